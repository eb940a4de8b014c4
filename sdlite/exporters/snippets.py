"""The Python code in an export's README.md that is the same for every runtime.

It follows the target's own code (`targets.base.Runtime`), whose `load(part)` gives a function of
the names in `sdlite.spec` for one row. The code stands in the folder, runs there, and imports
nothing of sdlite.
"""

from __future__ import annotations

ONE = """
unet = load("unet")
noise = unet(
    sample=np.zeros(@LATENTS@, np.float32),
    timestep=np.array(500, np.float32),
    encoder_hidden_states=np.zeros(@EMBEDS@, np.float32),@FURTHER@
)
print(noise.shape, noise.dtype)
"""

IMAGE = """
import torch
from diffusers import @CLASS@
from PIL import Image
from transformers import CLIPTokenizer

prompt, negative_prompt, seed = @PROMPT@, "", 0
steps, guidance = @STEPS@, @GUIDANCE@

tokenizer = CLIPTokenizer.from_pretrained("tokenizer")
scheduler = @CLASS@.from_pretrained("scheduler"@SETTINGS@)
text_encoder, unet, vae_decoder = load("text_encoder"), load("unet"), load("vae_decoder")


def encode(text):
    padded = {"padding": "max_length", "max_length": @WINDOW@, "truncation": True}
    ids = tokenizer(text, return_tensors="np", **padded).input_ids
    return text_encoder(input_ids=ids.astype(np.int64))


guided = @GUIDED@
conditions = [encode(prompt), encode(negative_prompt)] if guided else [encode(prompt)]
scheduler.set_timesteps(steps)
generator = torch.Generator("cpu").manual_seed(seed)
latents = torch.randn(@LATENTS@, generator=generator) * scheduler.init_noise_sigma
@PREPARED@for t in scheduler.timesteps:
    sample = scheduler.scale_model_input(latents, t).numpy()
    timestep = np.array(t, np.float32)
    given = dict(sample=sample, timestep=timestep@MORE@)
    answers = [unet(encoder_hidden_states=c, **given) for c in conditions]
    noise = answers[1] + guidance * (answers[0] - answers[1]) if guided else answers[0]
    latents = scheduler.step(torch.from_numpy(noise), t, latents@NOISY@).prev_sample
pixels = vae_decoder(latent_sample=latents.numpy() / np.float32(@SCALING@)@SHIFT@)
image = np.clip(pixels[0].transpose(1, 2, 0) / 2 + 0.5, 0, 1)
Image.fromarray((image * 255).round().astype(np.uint8)).save("image.png")
"""
