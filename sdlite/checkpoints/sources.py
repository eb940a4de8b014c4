"""Any source -> a diffusers folder with safetensors, which `sdlite.convert` makes a model of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sdlite import arguments, families
from sdlite.artifact import Artifact
from sdlite.checkpoints import PICKLED, embeddings, is_file, layouts, lora, pickles, single_file
from sdlite.errors import ArtifactError, InputError
from sdlite.torch_networks import open_network
from sdlite.weights import dtypes, weight_files, weight_index

PRECISIONS = ("fp32", "fp16")
PARTS = ("text_encoder", "unet", "vae")


@dataclass(frozen=True)
class Extras:
    """What changes a source before it is converted.

    Attributes:
        lora: "FILE", "FILE:WEIGHT" or (file, weight), fused in this order.
        lora_skip_missing: leave out a LoRA's layers that the model does not have.
        embedding: "FILE" or "FILE:WORD", textual inversions.
        vae: an autoencoder's file or folder, for files without one, or instead of theirs.
        from_pickle: whether a .ckpt, .pt or .bin may be read, by torch with weights_only=True.
        prediction_type: of a single file of Stable Diffusion 2.x; see `layouts.recognized`.
        precision: "fp32" or "fp16", how weights are stored; None keeps the source's.
    """

    lora: Sequence[Any] = ()
    lora_skip_missing: bool = False
    embedding: Sequence[Any] = ()
    vae: str | Path | None = None
    from_pickle: bool = False
    prediction_type: str | None = None
    precision: str | None = None

    @property
    def any(self) -> bool:
        """Whether a folder needs more than to be converted as it is."""
        return bool(self.lora or self.embedding or self.vae or self.precision)


@dataclass(frozen=True)
class Prepared:
    """A diffusers folder, the sampler that a few-step LoRA is made for, and what is to be said."""

    folder: Path
    sampler: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def prepared(source: Path, extras: Extras, scratch: Path) -> Prepared:
    """Make the folder in `scratch`, an empty folder. A diffusers folder that nothing is to be
    changed in is its own answer.

    Raises:
        InputError: an argument cannot be used, or a pickle that was not asked for.
        ArtifactError: a file is damaged, of another kind, or of another base.
        MissingExtraError: a package that a LoRA needs is not installed.
    """
    loras = [lora.Lora.given(x) for x in extras.lora]
    words = [embeddings.Embedding.given(x) for x in extras.embedding]
    if extras.precision is not None:
        arguments.one_of("precision", extras.precision, PRECISIONS)
    if extras.prediction_type is not None and not is_file(source):
        raise InputError(
            f"prediction_type={extras.prediction_type!r} is for one file of weights; {source} is a"
            " folder, whose scheduler_config.json says it. Leave it out, or change it there."
        )
    if not is_file(source) and not extras.any and not _pickled(source, extras):
        return Prepared(source)
    folder = scratch / "model"
    networks, half = _opened(source, extras, folder, scratch)
    notes = _changed(networks, folder, loras, words, extras.lora_skip_missing)
    stored = half if extras.precision is None else extras.precision == "fp16"
    _save(networks, folder, half=stored)
    sampler = next((s for x in loras if (s := x.sampler)), {})
    return Prepared(folder, sampler, tuple(notes))


def _changed(
    networks: dict[str, nn.Module],
    folder: Path,
    loras: Sequence[lora.Lora],
    words: Sequence[embeddings.Embedding],
    skip_missing: bool,
) -> list[str]:
    notes = []
    if words:
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        notes = [f"{w.path.name} is {embeddings.add(networks, tokenizer, w)!r}" for w in words]
        tokenizer.save_pretrained(folder / "tokenizer")
    if loras:
        both = {p: networks[p] for p in ("unet", "text_encoder")}
        notes += lora.fuse(both, loras, skip_missing)
    return notes


def _opened(
    source: Path, extras: Extras, folder: Path, scratch: Path
) -> tuple[dict[str, nn.Module], bool]:
    """The networks in float32, whether they were stored in float16, and `folder` with all files but
    theirs.
    """
    vae = None if extras.vae is None else Path(arguments.path("vae", extras.vae))
    if is_file(source):
        return _from_file(source, extras, folder, scratch, vae)
    artifact = Artifact.open(
        _without_pickles(source, scratch) if _pickled(source, extras) else source
    )
    folder.mkdir()
    for part in (*PARTS, "tokenizer", "scheduler"):
        artifact.files.part(part).copy_configs(folder / part)
    index = json.dumps(families.own_index(artifact.index), indent=1)
    (folder / "model_index.json").write_text(index, encoding="utf-8")
    networks = {p: open_network(artifact.files.part(p)) for p in PARTS}
    if vae is not None:
        networks["vae"] = single_file.autoencoder(vae, scratch / "own" / "vae")
    stored = dtypes(weight_index(weight_files(artifact.files.part("unet"))))
    return networks, stored == ["float16"]


def _from_file(
    source: Path, extras: Extras, folder: Path, scratch: Path, vae: Path | None
) -> tuple[dict[str, nn.Module], bool]:
    check_file(source, extras.from_pickle)
    if source.suffix.lower() in PICKLED:
        source = pickles.to_safetensors(source, scratch / f"{source.stem}.safetensors")
    shapes, half = single_file.shapes(source)
    layout = layouts.recognized(source, shapes, extras.prediction_type)
    if why := families.refusal(str(source), layout.index, layout.config):
        raise ArtifactError(why)
    layout.write(folder)
    return single_file.networks(source, layout, folder, vae), half


def check_file(source: Path, from_pickle: bool) -> None:
    """Raises InputError where a file is not there, or is a pickle that nobody asked for."""
    if not source.exists():
        raise InputError(f"{source} does not exist; give a file of weights, a folder or a hub id.")
    if source.suffix.lower() in PICKLED and not from_pickle:
        raise InputError(
            f"{source} is a pickle, a format that can run code, and is not read unless it is asked"
            " for: `sdlite convert --from-pickle` reads its tensors and nothing else."
        )


def _pickled(source: Path, extras: Extras) -> bool:
    """Whether a folder has pickles that may be read, in the place of weights that it lacks."""
    return extras.from_pickle and any(_pickle_of(source, p) for p in PARTS)


def _pickle_of(source: Path, part: str) -> Path | None:
    folder, endings = source / part, PICKLED
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return None
    stem = "pytorch_model" if part == "text_encoder" else "diffusion_pytorch_model"
    return next((p for e in endings if (p := folder / f"{stem}{e}").exists()), None)


def _without_pickles(source: Path, scratch: Path) -> Path:
    """A folder as `source`, its pickled weights as safetensors."""
    out = scratch / "read"
    ignored = shutil.ignore_patterns("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl", "*.pickle")
    shutil.copytree(source, out, ignore=ignored)
    for part in PARTS:
        if (pickled := _pickle_of(source, part)) is not None:
            name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
            pickles.to_safetensors(pickled, out / part / f"{name}.safetensors")
    return out


def _save(networks: dict[str, Any], folder: Path, half: bool) -> None:
    """The networks' weights and configurations into their folders."""
    import torch

    for part, network in networks.items():
        for old in (folder / part).glob("*.safetensors*"):
            old.unlink()
        network.to(torch.float16 if half else torch.float32)
        network.save_pretrained(folder / part, safe_serialization=True)
