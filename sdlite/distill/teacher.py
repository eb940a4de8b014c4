"""A teacher: a diffusers folder opened for training, and the data as its networks see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sdlite import families
from sdlite.artifact import Artifact
from sdlite.distill import data
from sdlite.distill.encoders import TextEncoders, Tokenizers
from sdlite.distill.latent_cache import CachedLatents
from sdlite.distill.preview import Samples, guidance_width, image_size, paint
from sdlite.errors import InputError
from sdlite.io import sha256
from sdlite.sampling import Schedule
from sdlite.spec import latent_size
from sdlite.tokenizer import ClipTokenizer
from sdlite.torch_networks import open_network
from sdlite.weights import weight_files

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    from sdlite.distill.recipe import Recipe

ONE_SIZE = np.zeros((1, 6), np.int64)
PAINTED = Samples()  # how the teacher makes images where the data are prompts alone


class Teacher:
    """A diffusers folder of Stable Diffusion 1.x, 2.x or XL, opened for training.

    Attributes:
        text_encoder, tokenizer: several of them are one (`TextEncoders`, `Tokenizers`).
        size: of its images, height and width in pixels.
        guidance_width: of the guidance embedding that its UNet is told (LCM); None: it is not.
        painted: how it makes images where the data are prompts alone.

    Raises:
        InputError: it is no folder, or its UNet has inputs that distilling does not feed.
            ArtifactError: it is not a whole model.
    """

    def __init__(self, folder: str | Path):
        if not Path(folder).is_dir():
            raise InputError(
                f"teacher {folder} is no folder; give that of a diffusers Stable Diffusion"
                " pipeline: a hub model is made one by `hf download ORG/NAME --local-dir DIR`."
            )
        self.artifact, self._stamps = Artifact.open(folder), dict[str, str]()
        refuse_unfed(self.artifact)
        if families.inpaints(*(self.artifact.config(p) for p in ("unet", "vae"))):
            raise InputError(
                f"teacher {folder} is an inpainting model, whose UNet reads an image and a mask:"
                " distilling feeds it neither. Give the text-to-image model that it came from, or"
                " compress it with sdlite quantize."
            )
        part = self.artifact.files.part
        self.scheduler = self.artifact.config("scheduler")
        self.unet: UNet2DConditionModel = open_network(part("unet"))
        self.text_encoder = self._text_encoder()
        self.vae: AutoencoderKL = open_network(part("vae")).eval().requires_grad_(False)
        self.tokenizer = self._tokenizer()
        self.tokenizer_folder = part("tokenizer")
        height, width = latent_size(self.unet.config)
        self.unet.register_to_config(
            sample_size=height if height == width else [height, width]
        )  # students have it from here
        self.size = image_size(self.unet, self.vae)
        self.guidance_width, self.painted = guidance_width(self.unet), PAINTED
        if self.guidance_width is not None:  # it is sampled as it was made for
            own = self.artifact.samples_with
            self.painted = Samples(
                num_inference_steps=own["num_inference_steps"],
                guidance_scale=own["guidance_scale"],
                sampler=own["name"],
            )

    def _text_encoder(self) -> CLIPTextModel | TextEncoders:
        """The text encoder, or several as one."""
        if len(self.artifact.family.tokenizers) > 1:
            return TextEncoders(self.artifact)
        one: CLIPTextModel = open_network(self.artifact.files.part("text_encoder"))
        return one

    def _tokenizer(self) -> ClipTokenizer | Tokenizers:
        if isinstance(self.text_encoder, TextEncoders):
            return self.text_encoder.tokenizer
        config = self.artifact.config("text_encoder")
        return ClipTokenizer.from_pretrained(self.artifact.files.part("tokenizer"), config)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Folders of its text encoders."""
        return tuple(self.artifact.family.tokenizers)

    def refuse(self, recipe: Recipe) -> None:
        """
        Raises:
            InputError: a stage of the recipe is not for this teacher.
        """
        if self.guidance_width is not None:
            recipe.refuse_guidance()
        if len(self.text_encoders) > 1:
            recipe.refuse_text_encoders(self.text_encoders)

    @torch.no_grad()
    def encode(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """float32 arrays (3, H, W) in [-1, 1] -> scaled posterior means (B, C, h, w)."""
        pixels = torch.stack([torch.from_numpy(p) for p in images])
        z: torch.Tensor = self.vae.encode(pixels).latent_dist.mean
        return families.LatentScale.of(self.vae.config).from_encoder(z)

    @property
    def shown_size(self) -> str:
        """The size of its images, as people say it."""
        height, width = self.size
        return f"{height} px" if height == width else f"{height}x{width} px"

    def make(self, samples: Samples) -> torch.Tensor:
        """Latents (B, C, h, w) that the teacher makes for prompts: data when there is none."""
        parts = {
            "unet": self.unet.eval(),
            "text_encoder": self.text_encoder.eval(),
            "vae": self.vae,
            "tokenizer": self.tokenizer,
        }
        return paint(parts, Schedule.from_config(self.scheduler), samples)

    def stamp(self, part: str) -> str:
        """What tells one network's weights from another's: the hash of its file, or of all its
        shards.
        """
        if part not in self._stamps:
            files = weight_files(self.artifact.files.part(part))
            self._stamps[part] = "".join(sha256(f) for f in files)
        return self._stamps[part]

    def source(self, path: str | Path, cache: Path, progress: bool) -> CachedLatents:
        """`latents` of what `data.read` finds at `path`."""
        return self.latents(data.read(path), cache, progress)

    def latents(self, found: data.Captions, cache: Path, progress: bool) -> CachedLatents:
        """Read `cache`, or make it: latents by the VAE, or made by the teacher where there are only
        prompts.

        Raises:
            InputError: no image can be read, or this teacher cannot encode.
        """
        if not found.prompts_only and not hasattr(self.vae, "quant_conv"):
            raise InputError(
                f"{self.artifact.folder} has a {type(self.vae).__name__}, whose encoder need not be"
                " trained; give a teacher with an AutoencoderKL to train on images, or prompts"
                " alone."
            )
        # images at once: 16 to 256 px, 4 at 512 px
        few = max(1, min(16, 2**20 // (self.size[0] * self.size[1])))
        return CachedLatents.build(
            found,
            self.tokenizer,
            self._painted if found.prompts_only else self._encoded,
            cache,
            key=self._key(found.prompts_only),
            size=self.size,
            batch=few,
            progress=progress,
            told=self.artifact.family.size_conditions if told_of_sizes(self.artifact) else None,
        )

    def _key(self, prompts_only: bool) -> dict[str, object]:
        """What determines the latents besides the data."""
        key = {"vae": self.stamp("vae"), "scale": self.vae.config.scaling_factor}
        if not prompts_only:
            return key
        if len(self.text_encoders) > 1:
            key["text_encoders"] = [self.stamp(part) for part in self.text_encoders]
        key |= {
            "made_by": self.stamp("unet"),
            "steps": self.painted.num_inference_steps,
            "guidance_scale": self.painted.guidance_scale,
            "scheduler": self.scheduler,
        }
        return key | ({} if self.guidance_width is None else {"sampler": self.painted.sampler})

    def _encoded(self, images: Sequence[np.ndarray], before: int) -> torch.Tensor:
        return self.encode(images)

    def _painted(self, prompts: Sequence[str], before: int) -> torch.Tensor:
        return self.make(replace(self.painted, prompts=tuple(prompts), seed=before + len(prompts)))


def refuse_unfed(artifact: Artifact) -> None:
    """
    Raises:
        InputError: the model's UNet has an input that distilling does not feed.
    """
    family = artifact.family
    if family.controls:
        raise InputError(
            f"teacher {artifact.folder} has a ControlNet, which was made for its whole UNet and"
            " fits no student that is cut from it. Give the pipeline without it; one that was made"
            " for the student is added in the end: sdlite convert STUDENT --controlnet FOLDER."
        )
    inputs = family.unet_inputs(artifact.config("unet"))
    of_text = {o.name for part in family.tokenizers for o in artifact.spec(part).outputs}
    fed = {"timestep_cond", *of_text, *family.size_conditions(ONE_SIZE)}
    if more := [t.name for t in inputs if t.name not in fed]:
        raise InputError(
            f"the UNet of {artifact.folder} is also given {', '.join(more)}; distilling feeds"
            " latents, timestep, text, guidance and sizes. Give a teacher of Stable Diffusion 1.x,"
            " 2.x or XL, or make the student alone by sdlite.distill.students.build."
        )


def told_of_sizes(artifact: Artifact) -> bool:
    """Whether the model's UNet is told the sizes of images."""
    return bool(artifact.family.size_conditions(ONE_SIZE))
