"""One file of weights in the original layout -> torch networks, by diffusers' own loader, one at a
time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdlite import headers
from sdlite.checkpoints import layouts
from sdlite.checkpoints.layouts import Layout
from sdlite.checkpoints.unet_shape import PREFIX, Shapes
from sdlite.errors import ArtifactError, InputError, printable
from sdlite.torch_networks import open_network

_PLACES = {  # network -> where its tensors are
    "unet": (PREFIX,),
    "vae": (layouts.VAE,),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": (layouts.OPEN_CLIP_XL,),
}


@dataclass(frozen=True)
class Header:
    """What stands in a file: tensor name -> shape, and the networks that are stored in float16."""

    shapes: Shapes
    half: frozenset[str]

    @classmethod
    def read(cls, path: Path) -> Header:
        """Raises ArtifactError where it is not a whole safetensors file."""
        entries = headers.read(path)
        kinds: dict[str, set[str]] = {p: set() for p in _PLACES}
        for name, (kind, *_) in entries.items():
            for part, places in _PLACES.items():
                if name.startswith(places) and kind in ("F16", "BF16", "F32", "F64"):
                    kinds[part].add(kind)
        half = frozenset(p for p, found in kinds.items() if found == {"F16"})
        return cls({name: entry[1] for name, entry in entries.items()}, half)


@dataclass(frozen=True)
class SingleFile:
    """A recognized file.

    Attributes:
        folder: `layout.write` was here.
        vae: an autoencoder's file or folder, which takes the place of the file's own; needed where
            it has none.
    """

    path: Path
    layout: Layout
    folder: Path
    vae: Path | None = None

    def check(self) -> None:
        """Raises InputError where it holds no autoencoder and none is given."""
        if self.vae is None and not self.layout.has_vae:
            raise InputError(
                f"{self.path} holds no autoencoder (it was pruned); give one as vae=: a diffusers"
                f" vae/ folder, or a file such as {_VAE_FILES[self.layout.version == 'xl']}."
            )

    def network(self, part: str, half: bool = False) -> nn.Module:
        """One of `layout.configs`, in float32, or in float16 where `half`: a third of the memory.

        Raises:
            InputError: see `check`.
            ArtifactError: a tensor is missing or of another shape.
        """
        self.check()
        if part == "vae" and self.vae is not None:
            return autoencoder(self.vae, self.folder.parent / "own" / "vae", self.layout.version)
        with _quiet(), _as_ours(self.path):
            tensors = _tensors(self.path)
            opened = _text_encoder if part.startswith("text_encoder") else _of_diffusers
            network = opened(tensors, part, self.folder, torch.float16 if half else torch.float32)
        _complete(self.path, part, network)
        if part == "unet":
            _nothing_left(self.path, tensors, network)
        return network


_VAE_FILES = ("vae-ft-mse-840000-ema-pruned.safetensors", "sdxl_vae.safetensors")


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """All of a file, mapped: what is not used is not read."""
    from safetensors.torch import load_file

    out: dict[str, torch.Tensor] = load_file(path)
    return out


def _of_diffusers(
    tensors: dict[str, torch.Tensor], part: str, folder: Path, dtype: torch.dtype
) -> nn.Module:
    import diffusers

    kind = diffusers.UNet2DConditionModel if part == "unet" else diffusers.AutoencoderKL
    network: nn.Module = kind.from_single_file(
        tensors, config=str(folder), subfolder=part, local_files_only=True, torch_dtype=dtype
    )
    return network


def _text_encoder(
    tensors: dict[str, torch.Tensor], part: str, folder: Path, dtype: torch.dtype
) -> nn.Module:
    import transformers
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    second = part == "text_encoder_2"
    network: nn.Module = create_diffusers_clip_model_from_ldm(
        transformers.CLIPTextModelWithProjection if second else transformers.CLIPTextModel,
        checkpoint=tensors,
        subfolder=part,
        config=str(folder),
        torch_dtype=dtype,
        local_files_only=True,
    )
    return network


def autoencoder(source: Path, aside: Path, version: str = "1") -> nn.Module:
    """A VAE from a diffusers folder (a pipeline's, its vae/, or a VAE's own), or from a file of its
    own in the original layout.

    Args:
        aside: a path that ends in vae, where a copy may stand.
        version: of the model that a file's is for, see `layouts.vae_config`.

    Raises:
        ArtifactError: it is none.
    """
    if source.is_dir():
        folder = source / "vae" if (source / "vae").is_dir() else source
        if folder.name != "vae":  # a network is known by its folder's name
            folder = Path(shutil.copytree(folder, aside))
        network: nn.Module = open_network(folder)
        return network
    from diffusers import AutoencoderKL

    config = layouts.vae_config(source, Header.read(source).shapes, version)
    network = AutoencoderKL.from_config(config)
    with _quiet(), _as_ours(source):
        tensors = _converted_vae(source, dict(network.config))
        missing, extra = network.load_state_dict(tensors, strict=False)
    if missing or extra:
        raise ArtifactError(
            f"{source} is no whole autoencoder: it lacks {len(missing)} tensors"
            f" ({', '.join(missing[:3])}) and has {len(extra)} that none knows; fetch it again."
        )
    return network


def _converted_vae(source: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    tensors = {k.removeprefix(layouts.VAE): v.float() for k, v in _tensors(source).items()}
    out: dict[str, torch.Tensor] = convert_ldm_vae_checkpoint(tensors, config)
    return out


def _complete(path: Path, part: str, network: nn.Module) -> None:
    """diffusers leaves what a file lacks on the meta device, without a word."""
    lost = [n for n, p in network.named_parameters() if p.is_meta]
    if lost:
        raise ArtifactError(
            f"{path} lacks {len(lost)} tensors of its {part.replace('_', ' ')}"
            f" ({', '.join(lost[:3])}); fetch the file again, from a source that has all of it."
        )


def _nothing_left(path: Path, tensors: Mapping[str, torch.Tensor], network: nn.Module) -> None:
    """diffusers leaves out what it has no place for, without a word. Its UNet has a name for each
    of the original's.
    """
    names = [k for k in tensors if k.startswith(PREFIX)]
    if (more := len(names) - len(network.state_dict())) > 0:
        odd = [k for k in names if not k.removeprefix(PREFIX).startswith(_KNOWN)] or names[-1:]
        raise ArtifactError(
            f"{path} holds {more} tensors of its UNet that diffusers has no place for (such as"
            f" {odd[0]}); give a diffusers folder of this model."
        )


_KNOWN = (
    "input_blocks.",
    "middle_block.",
    "output_blocks.",
    "out.",
    "label_emb.0.",
    "time_embed.0.",
    "time_embed.2.",
)


@contextmanager
def _as_ours(path: Path) -> Iterator[None]:
    """What the loaders raise about a file, as one line that names it."""
    try:
        yield
    except NotImplementedError as e:  # diffusers leaves what a file lacks on the meta device
        raise ArtifactError(
            f"{path} lacks tensors that a Stable Diffusion checkpoint has; fetch the file again,"
            " from a source that has all of it."
        ) from e
    except (ValueError, KeyError, RuntimeError, TypeError, OSError) as e:
        raise ArtifactError(
            f"{path} cannot be read as a Stable Diffusion checkpoint ({printable(e, 300)}); fetch"
            " it again, or give a diffusers folder."
        ) from e


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' progress bar and its word on the safety checker."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
