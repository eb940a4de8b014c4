"""One file of weights in the original layout -> torch networks, by diffusers' own loader."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdlite import headers
from sdlite.checkpoints import layouts
from sdlite.checkpoints.layouts import Layout, Shapes
from sdlite.errors import ArtifactError, InputError, printable
from sdlite.torch_networks import open_network

Networks = dict[str, nn.Module]  # "unet", "vae", "text_encoder"


def shapes(path: Path) -> tuple[Shapes, bool]:
    """Tensor name -> shape, and whether the float weights are stored in float16.

    Raises:
        ArtifactError: not a whole safetensors file.
    """
    entries = headers.read(path)
    floats = [kind for kind, *_ in entries.values() if kind in ("F16", "BF16", "F32", "F64")]
    half = bool(floats) and set(floats) == {"F16"}
    return {name: entry[1] for name, entry in entries.items()}, half


def networks(path: Path, layout: Layout, folder: Path, vae: Path | None) -> Networks:
    """The networks of a recognized file, in float32.

    Args:
        folder: `layout.write` was here.
        vae: an autoencoder's file or folder, which takes the place of the file's own; needed where
            it has none.

    Raises:
        InputError: it holds no autoencoder and none is given.
        ArtifactError: a tensor is missing or of another shape.
    """
    if vae is None and not layout.has_vae:
        raise InputError(
            f"{path} holds no autoencoder (it was pruned); give one as vae=: a diffusers vae/"
            " folder, or a file such as vae-ft-mse-840000-ema-pruned.safetensors."
        )
    from diffusers import StableDiffusionPipeline

    given = {"vae": autoencoder(vae, folder.parent / "own" / "vae")} if vae is not None else {}
    with _quiet(), _as_ours(path):
        pipe = StableDiffusionPipeline.from_single_file(
            str(path),
            config=str(folder),
            local_files_only=True,
            safety_checker=None,
            torch_dtype=torch.float32,
            **given,
        )
    out: Networks = {p: getattr(pipe, p) for p in ("unet", "vae", "text_encoder")}
    for part, network in out.items():
        _complete(path, part, network)
    return out


def autoencoder(source: Path, aside: Path) -> nn.Module:
    """A VAE from a diffusers folder (a pipeline's, its vae/, or a VAE's own), or from a file of its
    own in the original layout.

    Args:
        aside: a path that ends in vae, where a copy may stand.

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

    found, _ = shapes(source)
    config = layouts.vae_config(source, found)
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
    from safetensors.torch import load_file

    tensors = {k.removeprefix(layouts.VAE): v.float() for k, v in load_file(source).items()}
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
