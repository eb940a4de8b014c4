"""The Python code in an export's README.md that is the same for every runtime.

It follows the target's own code (`targets.base.Runtime`), whose `load(part)` gives a function of
the names in the network's spec for one row; its outputs come by name. The family's code
(`Family.snippet`) makes `conditions`. All stands in the folder, runs there, and imports nothing of
sdlite.
"""

from __future__ import annotations

ONE = """
unet = load("unet")
noise = unet(@ZEROS@
)["out_sample"]
print(noise.shape, noise.dtype)
"""

IMAGE = """
import torch
from diffusers import @CLASS@
from PIL import Image
from transformers import CLIPTokenizer

prompt, negative_prompt, seed = @PROMPT@, None, 0
steps, guidance = @STEPS@, @GUIDANCE@
height, width = @SIZE@
@TEXT@
unet, vae_decoder = load("unet"), load("vae_decoder")
scheduler = @CLASS@.from_pretrained("scheduler"@SETTINGS@)
scheduler.set_timesteps(steps)
generator = torch.Generator("cpu").manual_seed(seed)
latents = torch.randn(@LATENTS@, generator=generator)
latents = latents * scheduler.init_noise_sigma
for t in scheduler.timesteps:
    sample = scheduler.scale_model_input(latents, t).numpy()
    timestep = np.array(t, np.float32)
    answers = [unet(sample=sample, timestep=timestep, **c)["out_sample"] for c in conditions]
    noise = answers[0]
    if len(answers) == 2:
        noise = answers[1] + guidance * (answers[0] - answers[1])
    latents = scheduler.step(torch.from_numpy(noise), t, latents@NOISY@).prev_sample
latents = latents.numpy() / np.float32(@SCALING@)@SHIFT@
pixels = vae_decoder(latent_sample=latents)["sample"]
image = np.clip(pixels[0].transpose(1, 2, 0) / 2 + 0.5, 0, 1)
Image.fromarray((image * 255).round().astype(np.uint8)).save("image.png")
"""
