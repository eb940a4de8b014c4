"""A diffusers folder -> an sdlite model with ONNX graphs.

The graphs point into the model's weights, which are stored once, see `sdlite.tracing`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from sdlite import arguments, preview
from sdlite._version import __version__
from sdlite.artifact import Artifact
from sdlite.checkpoints import is_file, sources
from sdlite.errors import CONVERT_NEEDS, ArtifactError, InputError, need
from sdlite.families import LatentScale, latent_channels, listed_index, vae_config, vae_stride
from sdlite.files import Files
from sdlite.io import alone, cache_root, check_out, read_json, scratch, writing
from sdlite.manifest import Manifest, SamplerRow, write_manifest
from sdlite.sampling import known_sampler
from sdlite.tokenizer import ClipTokenizer
from sdlite.tracing import examples, free_sizes, network, write_graph
from sdlite.tryout import try_out
from sdlite.weights import (
    dtypes,
    index_name,
    plain_name,
    stem,
    variant_of,
    weight_files,
    weight_index,
    widen,
)

log = logging.getLogger("sdlite")


def convert(
    source: str | Path,
    out: str | Path,
    *,
    name: str = "",
    student: Mapping[str, object] | None = None,
    sampler: Mapping[str, object] | None = None,
    calibration_prompts: Sequence[str] | None = None,
    keep_float: dict[str, Sequence[str]] | None = None,
    lora: Sequence[Any] = (),
    lora_skip_missing: bool = False,
    embedding: Sequence[str | Path] = (),
    vae: str | Path | None = None,
    precision: str | None = None,
    prediction_type: str | None = None,
    from_pickle: bool = False,
    clip_skip: int | None = None,
    variant: str | None = None,
    controlnet: str | Path | None = None,
) -> Path:
    """Make a model: the diffusers folder, ONNX graphs for its networks, and the manifest.

    Args:
        source: diffusers pipeline folder of a known family with safetensors in float32, float16 or
            bfloat16 (written as float32), or one .safetensors file in the original key layout.
        out: new or empty folder; written beside and renamed when whole.
        name: what reports call the model; default: the folder's name.
        student: what the manifest says of its making (teacher, recipe, data, license);
            `unet_parameters` is counted here.
        sampler: {name, num_inference_steps, guidance_scale} defaults for a call, any of them; the
            rest is as diffusers' pipeline has it.
        calibration_prompts: what `sdlite.quantize` shows the student when its caller gives no
            prompts.
        keep_float: what `sdlite.quantize` leaves in float when its caller does not say.
        lora: "FILE", "FILE:WEIGHT" or (file, weight), fused into the weights in this order. One
            that is made for few steps (LCM-LoRA, Hyper-SD) brings its sampler, unless `sampler`
            says otherwise.
        lora_skip_missing: leave out a LoRA's layers that the model does not have.
        embedding: textual inversions, "FILE" or "FILE:WORD".
        vae: an autoencoder's file or folder, in the place of the source's own.
        precision: "fp32" or "fp16", how weights are stored; None keeps the source's.
        prediction_type: "epsilon" or "v_prediction", of a single file; None is epsilon for 1.x and
            v_prediction for 2.x.
        from_pickle: whether pickled weights (.ckpt, .pt, .bin) may be read, by torch with
            weights_only=True, which runs no code.
        clip_skip: how many layers of the text encoders the model does without, as diffusers counts
            them: 1 reads the layer before the last (of SDXL, read before its last layer anyway, the
            second before the last). 0 to one less than the layers of the shorter encoder. Negative
            prompts are read so too (diffusers reads these with all layers). The manifest's student
            record says it.
        variant: of a folder's weights, such as "fp16" or "non_ema", where it has several. A network
            without it is taken from its default weights, as in diffusers. None is the default
            weights, or the only variant that is there.
        controlnet: a ControlNet's folder (config.json and safetensors), made for the source's UNet:
            a call then takes a `control_image`. Of Stable Diffusion 1.x and 2.x.

    Returns:
        `out`.

    Raises:
        ArtifactError: not a diffusers folder, a pipeline that sdlite does not run, or weights that
            are missing, damaged or not those of the config; also where what was written does not
            open again, and a LoRA or embedding of another base.
        InputError, UnknownNameError: an argument cannot be used.
        MissingExtraError: a package of the extra `export` is not installed.
    """
    need("making ONNX graphs", "export", *CONVERT_NEEDS)
    place, out = Path(arguments.path("source", source)), Path(arguments.path("out", out))
    if sampler and "name" in sampler:
        known_sampler(arguments.text("sampler name", sampler["name"]))
    extras = sources.Extras(
        lora,
        lora_skip_missing,
        embedding,
        vae,
        from_pickle,
        prediction_type,
        precision,
        clip_skip,
        variant,
        controlnet,
    )
    said = {"clip_skip": clip_skip} if clip_skip else {}
    manifest = Manifest(name=name or (place.stem if is_file(place) else place.name))
    if calibration_prompts:
        manifest.calibration = {"prompts": list(calibration_prompts)}
    if keep_float:
        kept = {k: list(v) for k, v in keep_float.items()}
        manifest.calibration = {**(manifest.calibration or {}), "keep_float": kept}
    check_out(out)
    with scratch("convert") as aside:
        ready = sources.prepared(place, extras, aside)
        for note in ready.notes:
            log.warning("%s", note)
        manifest.sampler = cast(SamplerRow, {**ready.sampler, **(sampler or {})})
        opened = Artifact.open(ready.folder, variant=ready.variant)
        _write(opened, out, manifest, {**said, **(student or {})})
    return out


def _write(source: Artifact, out: Path, manifest: Manifest, student: Mapping[str, object]) -> None:
    """The model at `out`, written beside, tried out, and renamed."""
    for part, folder in source.family.tokenizers.items():
        ClipTokenizer.from_pretrained(source.files.part(folder), source.config(part))
    with writing(out) as tmp, _named(tmp, source.folder):
        _copy(source, tmp)
        manifest.student = {**_write_graphs(tmp, manifest, source), **student}
        write_manifest(tmp, manifest)
        try_out(tmp)


@contextmanager
def _named(copy: Path, folder: Path) -> Iterator[None]:
    """Errors name the folder that was given, not its copy, which is gone when they are read."""
    try:
        yield
    except ArtifactError as e:
        raise ArtifactError(str(e).replace(str(copy), str(folder))) from e


def _copy(source: Artifact, out: Path) -> None:
    """The parts that the model runs with and nothing else; model_index.json names no other.

    Networks that are neither all float32 nor all float16 are cast to float32, which is exact.
    """
    for part in source.folders:
        files, weights = source.files.part(part), list[Path]()
        files.copy_configs(out / part)
        if part in source.family.networks:
            weights = weight_files(files)
            if dtypes(weight_index(weights)) not in (["float16"], ["float32"]):
                widen(weights, out / part / f"{stem(part)}.safetensors")
                weights = []
        _copy_weights(files, [w.name for w in weights], out / part)
    (out / "model_index.json").write_text(
        json.dumps(listed_index(source.index), indent=1), encoding="utf-8"
    )
    vae = vae_config(read_json(out / "vae" / "config.json"))
    (out / "vae" / "config.json").write_text(json.dumps(vae, indent=2) + "\n", encoding="utf-8")
    for path in out.rglob("*.json"):
        _drop_paths(path)


def _copy_weights(files: Files, names: Sequence[str], out: Path) -> None:
    """One file, or shards and their index; those of a variant under the default names."""
    base = stem(files.name)
    plain = {n: plain_name(n, base) for n in names}
    for name, to in plain.items():
        files.copy(name, out / to)
    if len(names) > 1:
        index = files.read_json(index_name(base, variant_of(names[0], base)))
        index["weight_map"] = {k: plain[n] for k, n in index["weight_map"].items()}
        text = json.dumps(index, indent=2) + "\n"
        (out / index_name(base, "")).write_text(text, encoding="utf-8")


def _preview(decoder: nn.Module, root: Path) -> list[list[float]] | None:
    """The map of previews, see `sdlite.preview`; None where the decoder gives no numbers."""
    scale = LatentScale.of(read_json(root / "vae" / "config.json"))

    @torch.no_grad()
    def decode(latents: np.ndarray) -> np.ndarray:
        pixels: np.ndarray = decoder(scale.to_decoder(torch.from_numpy(latents))).numpy()
        return pixels

    channels = latent_channels(read_json(root / "vae" / "config.json"))
    colors = preview.fitted(decode, channels)
    if not np.isfinite(colors).all():
        return None
    return [[round(float(x), 5) for x in row] for row in colors]


def _write_graphs(root: Path, manifest: Manifest, source: Artifact) -> dict[str, int]:
    """The graphs of the networks in `root`, and what the manifest says of them. Returns their
    parameters.
    """
    specs = {p: source.spec(p) for p in (*source.parts, *source.family.optional)}
    parts = {p: network(root, spec, unread=True) for p, spec in specs.items()}
    module = parts["unet"].module
    multiple = 1 if free_sizes(module) else 2 ** (len(module.config.block_out_channels) - 1)
    manifest.size_multiple = vae_stride(read_json(root / "vae" / "config.json")) * multiple
    given = examples(parts, multiple, specs["unet"].inputs[3:])
    entries = {p: write_graph(root, p, specs[p], parts[p], *given[p]) for p in parts}
    manifest.preview = _preview(parts["vae_decoder"], root)
    # float16 storage is exact in float32: one set of files is both variants.
    held = ("fp16", "fp32") if entries["unet"]["storage"] == "float16" else ("fp32",)
    manifest.variants = dict.fromkeys(held, entries)
    counts = {f"{p}_parameters": sum(q.numel() for q in w.parameters()) for p, w in parts.items()}
    counts["vae_parameters"] = counts.pop("vae_decoder_parameters")
    del counts["vae_encoder_parameters"]
    return counts


def _drop_paths(path: Path) -> None:
    """Configs remember the folder that they were loaded from: the maker's business, not the
    user's.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if "_name_or_path" in data:
        del data["_name_or_path"]
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def convert_cached(source: Artifact, clip_skip: int | None = None) -> Artifact:
    """`convert` into the user's cache, once for each state of the folder. Says so in the log.

    The cache is `$SDLITE_CACHE` or `~/.cache/sdlite`; the key is the folder's path, its files'
    names, sizes and times, and what is asked for besides.
    """
    files = sorted(
        p for p in source.folder.rglob("*") if p.suffix in (".json", ".txt", ".safetensors")
    )
    state = [f"{p.relative_to(source.folder)} {_state(p)}" for p in files]
    return _cached(source.folder, source.name, state, clip_skip, source.files.variant or None)


def convert_cached_file(path: Path, clip_skip: int | None = None) -> Artifact:
    """`convert` of one file of weights into the user's cache, as `convert_cached`.

    Raises:
        InputError, ArtifactError: see `convert`.
    """
    sources.check_file(path, from_pickle=False)
    sources.recognized(path)  # says what is wrong before it says that it converts
    return _cached(path, path.stem, [_state(path)], clip_skip)


def _state(path: Path) -> str:
    about = path.stat()
    return f"{about.st_size} {about.st_mtime_ns}"


def _cached(
    source: Path,
    name: str,
    state: list[str],
    clip_skip: int | None = None,
    variant: str | None = None,
) -> Artifact:
    asked = {"clip_skip": clip_skip, "variant": variant}
    told = [f"{k}={v}" for k, v in asked.items() if v is not None]
    key = json.dumps([str(source.resolve()), __version__, *state, *told]).encode()
    out = cache_root() / "onnx" / f"{name}-{hashlib.sha256(key).hexdigest()[:16]}"
    if not out.exists():
        _convert_once(
            source, out, partial(convert, name=name, clip_skip=clip_skip, variant=variant)
        )
    return Artifact.open(out)


def _convert_once(source: Path, out: Path, make: Callable[[Path, Path], Path]) -> None:
    """Convert, or find what another process or thread has made meanwhile: one at a time, which also
    bounds the memory.
    """
    with alone(out.parent):
        if out.exists():
            return
        log.warning(
            "%s has no ONNX graphs: converting it once into %s (a few minutes for a large UNet)",
            source,
            out,
        )
        try:
            make(source, out)
        except InputError:
            if not out.exists():  # on a file system without locks another one may have been faster
                raise
