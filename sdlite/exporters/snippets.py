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
@BESIDE@

def finished(latents, timesteps):
    for t in timesteps:
        sample = scheduler.scale_model_input(latents, t).numpy()@SAMPLE@
        timestep = np.array(t, np.float32)
        answers = [unet(sample=sample, timestep=timestep, **c)["out_sample"] for c in conditions]
        noise = answers[0]
        if len(answers) == 2:
            noise = answers[1] + guidance * (answers[0] - answers[1])
        latents = scheduler.step(torch.from_numpy(noise), t, latents@NOISY@).prev_sample
    latents = latents.numpy() / np.float32(@SCALING@)@SHIFT@
    pixels = vae_decoder(latent_sample=latents)["sample"]
    image = np.clip(pixels[0].transpose(1, 2, 0) / 2 + 0.5, 0, 1)
    return Image.fromarray((image * 255).round().astype(np.uint8))


image = finished(latents * scheduler.init_noise_sigma, scheduler.timesteps)
@KEPT@image.save("image.png")
"""
# of an inpainting model: the mask, and the image without what is painted anew
BESIDE = """
size = (width, height)
photo = Image.open("photo.png").convert("RGB").resize(size, Image.Resampling.LANCZOS)
mask = Image.open("mask.png").convert("L").resize(size, Image.Resampling.LANCZOS)
painted = np.asarray(mask) >= 128  # white
pixels = np.asarray(photo, np.float32).transpose(2, 0, 1)[None] / 255 * 2 - 1
pixels = np.where(painted, np.float32(0), pixels)
encoded = load("vae_encoder")(sample=np.ascontiguousarray(pixels))
@ENCODED@
small = painted[None, None, ::@STRIDE@, ::@STRIDE@].astype(np.float32)
beside = np.concatenate([small, encoded.numpy()], axis=1)
"""
SAMPLE = """
        sample = np.concatenate([sample, beside], axis=1)
"""
KEPT = """
image = Image.composite(image, photo, Image.fromarray(painted))  # what is not painted stays
"""

EDIT = """
strength = @STRENGTH@  # the share of the steps that is made: more of it changes more
image = Image.open("image.png").convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255 * 2 - 1
generator = torch.Generator("cpu").manual_seed(seed)
encoded = load("vae_encoder")(sample=np.ascontiguousarray(pixels))
@ENCODED@
@FIRST@
if hasattr(scheduler, "set_begin_index"):
    scheduler.set_begin_index(first)
timesteps = scheduler.timesteps[first:]
noise = torch.randn(encoded.shape, generator=generator)
finished(scheduler.add_noise(encoded, noise, timesteps[:1]), timesteps).save("edited.png")
"""
# latents of the encoder's mean and log variance
DRAWN = """
mean, spread = np.split(encoded["latent_parameters"], 2, axis=1)
spread = torch.from_numpy(np.exp(np.clip(spread, -30, 20) / 2))
encoded = torch.from_numpy(mean) + spread * torch.randn(mean.shape, generator=generator)
encoded = @FROM_ENCODER@
"""
PLAIN = """
encoded = torch.from_numpy(encoded["latent_sample"])
encoded = @FROM_ENCODER@
"""
# the steps that are made: the last of them, or all on the less noisy part of the schedule
LAST = """
scheduler.set_timesteps(steps)
first = (steps - int(steps * strength)) * scheduler.order
"""
SPREAD = """
scheduler.set_timesteps(steps, strength=strength)
first = 0
"""
