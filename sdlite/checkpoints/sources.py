"""Any source -> a diffusers folder with safetensors, which `sdlite.convert` makes a model of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from sdlite import arguments, families
from sdlite.artifact import Artifact
from sdlite.checkpoints import (
    PICKLED,
    controlnet,
    embeddings,
    few_step,
    is_file,
    layouts,
    lora,
    pickles,
    single_file,
)
from sdlite.errors import ArtifactError, InputError
from sdlite.files import Files
from sdlite.io import read_json
from sdlite.torch_networks import open_network
from sdlite.weights import dtypes, stem, weight_files, weight_index

PRECISIONS = ("fp32", "fp16")
FOLDERS = ("text_encoder", "text_encoder_2", "unet", "controlnet", "vae")  # of networks
_OTHERS = ("tokenizer", "tokenizer_2", "scheduler")


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
        clip_skip: how many layers of the text encoders to pass over, from their end, as diffusers
            counts: 1 is the layer before the last, then the final norm; of SDXL, whose encoders
            are read before their last layer anyway, the second before the last.
        variant: of a folder's weights, such as "fp16", where it has several.
        controlnet: a ControlNet's folder, as diffusers saves one.
    """

    lora: Sequence[Any] = ()
    lora_skip_missing: bool = False
    embedding: Sequence[Any] = ()
    vae: str | Path | None = None
    from_pickle: bool = False
    prediction_type: str | None = None
    precision: str | None = None
    clip_skip: int | None = None
    variant: str | None = None
    controlnet: str | Path | None = None

    @property
    def any(self) -> bool:
        """Whether a folder needs more than to be converted as it is."""
        return bool(
            self.lora or self.embedding or self.vae or self.precision or self.clip_skip is not None
        )


@dataclass(frozen=True)
class Prepared:
    """A diffusers folder, the sampler that a few-step LoRA is made for, what is to be said, and
    which variant of the folder's weights is meant.
    """

    folder: Path
    sampler: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    variant: str | None = None


def prepared(source: Path, extras: Extras, scratch: Path) -> Prepared:
    """A source as a diffusers folder, with all that `extras` says; made in `scratch`, an empty
    folder, or the source itself where nothing is to be changed.

    Raises:
        InputError, ArtifactError, MissingExtraError: see `sdlite.convert`.
    """
    made = _prepared(source, extras, scratch)
    if extras.controlnet is None:
        return made
    added = Path(arguments.path("controlnet", extras.controlnet))
    half = None if extras.precision is None else extras.precision == "fp16"
    folder = controlnet.added(made.folder, added, scratch / "controlled", half)
    return replace(made, folder=folder)


def _prepared(source: Path, extras: Extras, scratch: Path) -> Prepared:
    """Make the folder in `scratch`, an empty folder. A diffusers folder that nothing is to be
    changed in is its own answer.

    Raises:
        InputError: an argument cannot be used, or a pickle that was not asked for.
        ArtifactError: a file is damaged, of another kind, or of another base.
        MissingExtraError: a package that a LoRA needs is not installed.
    """
    loras = [lora.Lora.given(x) for x in extras.lora]
    words = [embeddings.Embedding.given(x) for x in extras.embedding]
    _check_there("lora", [x.path for x in loras])
    _check_there("embedding", [x.path for x in words])
    _check_there("vae", [] if extras.vae is None else [Path(arguments.path("vae", extras.vae))])
    if extras.precision is not None:
        arguments.one_of("precision", extras.precision, PRECISIONS)
    if extras.prediction_type is not None and not is_file(source):
        raise InputError(
            f"prediction_type={extras.prediction_type!r} is for one file of weights; {source} is a"
            " folder, whose scheduler_config.json says it. Leave it out, or change it there."
        )
    if extras.variant is not None and is_file(source):
        raise InputError(
            f"variant={extras.variant!r} is for diffusers folders and hub repositories; {source} is"
            " one file of weights: leave it out."
        )
    if not is_file(source) and not extras.any and not _pickled(source, extras):
        return Prepared(source, variant=extras.variant)
    opened = _opened(source, extras, scratch)
    unet = read_json(opened.folder / "unet" / "config.json") if loras else {}
    reads = [lora.read(x, unet, opened.parts) for x in loras]
    _check_clip_skip(opened, extras.clip_skip)
    added = [embeddings.read(x, opened.parts) for x in words]
    notes = [w.note for w in added]
    if opened.few_step:
        notes.append(f"{source.name} is by its name made for {opened.few_step.words}")
    # one at a time, the largest first: what it takes is what all take
    for part in sorted(opened.parts, key=lambda p: p != "unet"):
        half = part in opened.half if extras.precision is None else extras.precision == "fp16"
        # in float32 where something is added to it; else rounding at once is the same
        network = opened.network(part, half and not (reads or added))
        notes += _changed(part, network, opened.folder, reads, added, extras)
        _save(network, opened.folder / part, half=half)
    made = next((f for x in loras if (f := x.few_step)), opened.few_step)
    if made is not None:
        _edit(opened.folder / "scheduler", "scheduler_config.json", made.scheduler)
    return Prepared(opened.folder, made.sampler if made else {}, tuple(notes))


def _check_there(name: str, paths: Sequence[Path]) -> None:
    """Raises InputError where a file that is to be added does not exist."""
    if missing := [p for p in paths if not p.exists()]:
        raise InputError(f"{name}={str(missing[0])!r} does not exist; give a file that does.")


@dataclass(frozen=True)
class _Opened:
    """A source.

    Attributes:
        folder: with all its files but weights.
        parts: folders of its networks.
        half: those that are stored in float16.
        network: (part, whether float16 will do) -> its network; else in float32.
        few_step: what the name of a file says that it is made for.
    """

    folder: Path
    parts: tuple[str, ...]
    half: frozenset[str]
    network: Callable[[str, bool], nn.Module]
    few_step: few_step.FewStep | None = None


def _changed(
    part: str,
    network: nn.Module,
    folder: Path,
    reads: Sequence[lora.Read],
    words: Sequence[embeddings.Word],
    extras: Extras,
) -> list[str]:
    """What a source's extras make of one network, in place. Returns what is to be said."""
    if words and part.startswith("text_encoder"):
        from transformers import CLIPTokenizer

        place = folder / part.replace("text_encoder", "tokenizer")
        tokenizer = CLIPTokenizer.from_pretrained(place, local_files_only=True)
        for word in words:
            embeddings.add(part, network, tokenizer, word)
        tokenizer.save_pretrained(place)
    notes = lora.fuse(part, network, reads, extras.lora_skip_missing) if part != "vae" else []
    if part.startswith("text_encoder"):
        _pass_over(network, extras.clip_skip, folder / part)
    return notes


def _check_clip_skip(opened: _Opened, layers: int | None) -> None:
    """Raises InputError where a text encoder cannot lose so many layers."""
    if layers is None:
        return
    texts = [p for p in opened.parts if p.startswith("text_encoder")]
    configs = [read_json(opened.folder / p / "config.json") for p in texts]
    shortest = min(c.get("num_hidden_layers", 12) for c in configs)
    arguments.integer("clip_skip", layers, 0, shortest - 1)


def _pass_over(network: Any, last: int | None, folder: Path) -> None:
    """Have a CLIP text encoder do without its last layers; None: as `folder` says.

    Of one encoder they are taken out and its final norm stays. Of two all stay, and the
    configurations say which layer is read (`families.CLIP_SKIP`).

    Source: diffusers 0.39 `encode_prompt` of `StableDiffusionPipeline` and
    `StableDiffusionXLPipeline`, `clip_skip`.
    """
    if (folder.parent / "text_encoder_2").exists():
        own = read_json(folder / "config.json").get(families.CLIP_SKIP)
        if (said := own if last is None else last) is not None:
            setattr(network.config, families.CLIP_SKIP, said)
        return
    if not last:
        return
    inner = getattr(network, "text_model", network)
    inner.encoder.layers = inner.encoder.layers[:-last]
    network.config.num_hidden_layers = len(inner.encoder.layers)


def _opened(source: Path, extras: Extras, scratch: Path) -> _Opened:
    folder = scratch / "model"
    vae = None if extras.vae is None else Path(arguments.path("vae", extras.vae))
    if is_file(source):
        return _from_file(source, extras, folder, vae)
    artifact = Artifact.open(
        _without_pickles(source, scratch) if _pickled(source, extras) else source,
        variant=extras.variant,
    )
    parts = tuple(artifact.family.networks)
    folder.mkdir()
    for name in (*parts, *(o for o in _OTHERS if artifact.index.get(o))):
        artifact.files.part(name).copy_configs(folder / name)
    index = json.dumps(families.own_index(artifact.index), indent=1)
    (folder / "model_index.json").write_text(index, encoding="utf-8")

    def network(part: str, half: bool) -> Any:
        if part == "vae" and vae is not None:
            return single_file.autoencoder(vae, scratch / "own" / "vae")
        return open_network(artifact.files.part(part))

    stored = {p: dtypes(weight_index(weight_files(artifact.files.part(p)))) for p in parts}
    half = frozenset(p for p, kinds in stored.items() if kinds == ["float16"])
    return _Opened(folder, parts, half, network)


def _from_file(source: Path, extras: Extras, folder: Path, vae: Path | None) -> _Opened:
    check_file(source, extras.from_pickle)
    if source.suffix.lower() in PICKLED:
        source = pickles.to_safetensors(source, folder.parent / f"{source.stem}.safetensors")
    layout, half, made = recognized(source, extras.prediction_type)
    file = single_file.SingleFile(source, layout, folder, vae)
    file.check()
    layout.write(folder)
    return _Opened(folder, tuple(layout.configs), half, file.network, made)


def recognized(
    source: Path, prediction_type: str | None = None
) -> tuple[layouts.Layout, frozenset[str], few_step.FewStep | None]:
    """What a safetensors file is by its header and its name: its layout, the networks that it has
    in float16, and what it is made for.

    Raises:
        ArtifactError: it is damaged, or no model that sdlite runs.
    """
    header = single_file.Header.read(source)
    layout = layouts.recognized(source, header.shapes, prediction_type)
    made = few_step.by_name(source, few_step.FILES[layout.version])
    if made is not None:
        layout = layout.changed(made.unet, made.scheduler, prediction_type)
    if why := families.refusal(str(source), layout.index, layout.config):
        raise ArtifactError(why)
    return layout, header.half, made


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
    return extras.from_pickle and any(_pickle_of(source, p) for p in FOLDERS)


def _pickle_of(source: Path, part: str) -> Path | None:
    folder, endings = source / part, PICKLED
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return None
    name = "pytorch_model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    return next((p for e in endings if (p := folder / f"{name}{e}").exists()), None)


def _without_pickles(source: Path, scratch: Path) -> Path:
    """A folder as `source`, its pickled weights as safetensors."""
    out = scratch / "read"
    ignored = shutil.ignore_patterns("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl", "*.pickle")
    shutil.copytree(source, out, ignore=ignored)
    for part in FOLDERS:
        if (pickled := _pickle_of(source, part)) is not None:
            pickles.to_safetensors(pickled, out / part / f"{stem(part)}.safetensors")
    return out


def _edit(folder: Path, name: str, changes: Mapping[str, Any]) -> None:
    """Set keys of a JSON file."""
    if changes:
        content = {**Files.of(folder).read_json(name, infinity=True), **changes}
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _save(network: Any, folder: Path, half: bool) -> None:
    """A network's weights and configuration into its folder."""
    import torch

    for old in folder.glob("*.safetensors*"):
        old.unlink()
    network.to(torch.float16 if half else torch.float32)
    network.save_pretrained(folder, safe_serialization=True)
