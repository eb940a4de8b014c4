"""Which safetensors files a network has, and what stands in them: read from names and headers
alone, without torch.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sdlite import headers
from sdlite.errors import ArtifactError, UnknownNameError, printable
from sdlite.files import TOKENIZER_FILES, Files
from sdlite.manifest import INDEX, PICKLES
from sdlite.schema import Json

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # what a network may be stored in
_TERMS = r"(?i)(licen[cs]e|notice|readme)(\.\w+)?"
# Traits of names that a network does not have, what they come from and what to do.
_CAUSES = (
    ("_orig_mod.", "it was saved compiled: save module._orig_mod, the network inside"),
    (
        "module.",
        "it was saved inside DistributedDataParallel: save its .module, the network inside",
    ),
    (
        ".base_layer.",
        (
            "a LoRA was fused but not unloaded: after fuse_lora() call unload_lora_weights(), then"
            " save_pretrained()"
        ),
    ),
    (
        "lora_",
        (
            "it is or holds a LoRA: load it with diffusers, fuse_lora(), unload_lora_weights(),"
            " save_pretrained()"
        ),
    ),
    (
        "model.diffusion_model.",
        (
            "it is a checkpoint in one file: give it to `sdlite convert` itself, outside of a"
            " pipeline's folder"
        ),
    ),
)


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: `dtype` in safetensors' spelling, `offset` and `length` in bytes of the
    whole file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int

    def read(self, *at: slice) -> np.ndarray:
        """The values, or those at `at`, as float32, which holds each accepted dtype exactly."""
        kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[self.dtype]
        raw = np.memmap(self.path, dtype=kind, mode="r", offset=self.offset, shape=self.shape)[at]
        if self.dtype == "BF16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32)

    def first(self, count: int) -> np.ndarray:
        """The first `count` numbers as they stand in the file, as float32; (count,), or fewer."""
        return replace(self, shape=(int(np.prod(self.shape)),)).read(slice(count))


def stem(part: str) -> str:
    """File name, without its ending, of the weights in a pipeline's folder: transformers' or
    diffusers'.
    """
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


def select(
    names: Collection[str], part: str, where: str, listed: Callable[[str], Json], variant: str = ""
) -> list[str]:
    """The weight files among `names` that diffusers and transformers load by default: one file, or
    its shards. Where there are none, those of the only variant that is there (`fp16`, `non_ema`),
    see `variant_of`.

    Args:
        names: file names of the folder of a pipeline.
        part: name of that folder.
        where: what errors call it.
        listed: name of an index file -> its content.
        variant: goes first where it is there, as diffusers takes it for each network by itself.

    Raises:
        ArtifactError: there are none (pickles and variants that are there are named), or shards
            without an index.
    """
    base, variants = stem(part), variants_of(names, part)
    found = _of_variant(names, base, variant, where, listed) if variant in variants else []
    found = found or _of_variant(names, base, "", where, listed)
    if not found and len(variants) == 1:
        found = _of_variant(names, base, variants[0], where, listed)
    if found:
        return found
    single, index = f"{base}.safetensors", index_name(base, "")
    others = sorted(n for n in names if n.endswith((".safetensors", *PICKLES)))
    seen = f"only {', '.join(others)}" if others else "no weights"
    raise ArtifactError(
        f"{where} holds {seen}; accepted: {single}, or shards that {index} lists."
        f"{_way_out(others, variants)}"
    )


def _of_variant(
    names: Collection[str], base: str, variant: str, where: str, listed: Callable[[str], Json]
) -> list[str]:
    """The files of a variant, "" for the default; [] where there are none."""
    dot = f".{variant}" if variant else ""
    single, index = f"{base}{dot}.safetensors", index_name(base, variant)
    if index in names and not (
        base == "model" and single in names
    ):  # transformers prefers the single file
        return _listed(listed(index), names, f"{where}/{index}")
    shards = sorted(n for n in names if _is_shard(n, base, variant))
    if shards and index not in names:
        raise ArtifactError(
            f"{where} holds {len(shards)} shards (first: {shards[0]}) and no {index} that lists"
            " them; fetch the index too, or remove left-over shards."
        )
    return [single] if single in names else []


def index_name(base: str, variant: str) -> str:
    """The file that lists the shards of a variant, "" for the default."""
    return (
        f"{base}.safetensors.index.{variant}.json" if variant else f"{base}.safetensors.index.json"
    )


_NUMBERED = r"-\d+-of-\d+"


def _is_shard(name: str, base: str, variant: str) -> bool:
    """diffusers writes model.fp16-00001-of-00002.safetensors, and before 0.28
    model-00001-of-00002.fp16.safetensors.
    """
    dot = re.escape(f".{variant}") if variant else ""
    return bool(re.fullmatch(rf"{base}({dot}{_NUMBERED}|{_NUMBERED}{dot})\.safetensors", name))


def variant_of(name: str, base: str) -> str:
    """The variant that a file of weights, or an index of them, is of: "fp16" for
    model.fp16.safetensors; "" for one of the default, and for any other file.

    Args:
        base: see `stem`.
    """
    ends = rf"(?P<a>[\w-]+?)(?:{_NUMBERED})?\.safetensors"
    index = r"safetensors\.index\.(?P<b>[\w-]+)\.json"
    found = re.fullmatch(rf"{base}(?:{_NUMBERED})?\.(?:{ends}|{index})", name)
    return (found["a"] or found["b"] or "") if found else ""


def variants_of(names: Iterable[str], part: str) -> list[str]:
    """The variants that a network has weights of, without the default, sorted. `names`: file names
    of the folder `part`.
    """
    return sorted({v for n in names if (v := variant_of(n, stem(part)))})


def check_variant(
    variant: str, names: Mapping[str, Collection[str]], where: str
) -> tuple[list[str], list[str]]:
    """The networks that have weights of a variant, and those whose default weights stand in, as in
    diffusers.

    Args:
        names: part -> file names of its folder.
        where: what errors call the model.

    Raises:
        UnknownNameError: no network has it; those that are there are said.
    """
    held = {part: variants_of(n, part) for part, n in names.items()}
    own = [part for part, v in held.items() if variant in v]
    if not own:
        there = sorted({v for found in held.values() for v in found})
        said = f"it has {', '.join(there)}" if there else "it has the default alone"
        raise UnknownNameError(
            f"{where} has no weights of variant {printable(repr(variant), 100)}; {said}. Take one"
            " of these, or leave it out."
        )
    return own, [part for part in held if part not in own]


def plain_name(name: str, base: str) -> str:
    """The default name of a file of a variant; any other name as it is."""
    if not variant_of(name, base):
        return name
    numbered = re.search(_NUMBERED, name)
    return f"{base}{numbered[0] if numbered else ''}.safetensors"


def _way_out(others: Collection[str], variants: Sequence[str]) -> str:
    if variants:
        return (
            f" It has several variants ({', '.join(variants)}): choose one with"
            f" variant={variants[0]!r} (`sdlite convert --variant {variants[0]}`)."
        )
    if any(n.endswith(PICKLES) for n in others):
        return (
            " Pickles can run code and are never loaded: load with diffusers what you trust, and"
            " save_pretrained()."
        )
    return " Save or fetch the model again."


def _listed(index: Json, names: Collection[str], where: str) -> list[str]:
    weights = index.get("weight_map")
    given = list(weights.values()) if isinstance(weights, dict) else []
    if not given or not all(
        isinstance(n, str) and re.fullmatch(r"[\w.-]+\.safetensors", n) for n in given
    ):
        raise ArtifactError(
            f"{where} has no weight_map of safetensors files beside it; fetch or save the model"
            " again."
        )
    found = sorted(set(given))
    if missing := [n for n in found if n not in names]:
        raise ArtifactError(
            f"{where} lists {missing[0]}, which is missing; fetch or save the model again."
        )
    return found


def weight_files(folder: Path | Files) -> list[Path]:
    """`select` on a folder. Of an opened model (`artifact.files.part("unet")`) each file is
    verified.

    Raises:
        ArtifactError: see `select` and `Files.file`.
    """
    files = Files.of(folder)
    chosen = select(files.names(), files.name, str(files.folder), files.read_json, files.variant)
    return [files.file(n) for n in chosen]


def model_files(files: Files, networks: Iterable[str], tokenizers: Iterable[str]) -> list[str]:
    """Files of a plain diffusers folder that a model runs with, and its licenses: paths, sorted.

    Raises:
        ArtifactError: weights or a configuration are missing, see `select`.
    """
    out = [INDEX, "scheduler/scheduler_config.json"]
    for folder_name in tokenizers:
        out += [f"{folder_name}/{n}" for n in TOKENIZER_FILES if files.part(folder_name).has(n)]
    for part in networks:
        folder = files.part(part)
        where = str(folder.folder)
        chosen = select(folder.names(), part, where, folder.read_json, folder.variant)
        index = index_name(stem(part), variant_of(chosen[0], stem(part)))
        out += [
            f"{part}/{n}" for n in ("config.json", *chosen, *([index] if len(chosen) > 1 else []))
        ]
    if missing := [n for n in out if not files.has(n)]:
        raise ArtifactError(f"{files.path(missing[0])} is missing; fetch or save the model again.")
    return sorted(
        {
            *out,
            *(
                n
                for n in files.names()
                if re.fullmatch(_TERMS, n) and not files.path(n).is_symlink()
            ),
        }
    )


def weight_index(paths: Iterable[Path]) -> dict[str, Stored]:
    """Tensor name -> where it stands, of all `paths`. Format: 8-byte header length, JSON, data.

    Raises:
        ArtifactError: a file is not safetensors or is cut off, or two files hold one name.
    """
    out: dict[str, Stored] = {}
    for path in paths:
        found = _header(path)
        if twice := sorted(out.keys() & found.keys()):
            raise ArtifactError(
                f"{path} and {out[twice[0]].path.name} both hold {twice[0]}; remove left-over"
                " shards or save the model again."
            )
        out |= found
    return out


def _header(path: Path) -> dict[str, Stored]:
    return {name: Stored(path, *entry) for name, entry in headers.read(path).items()}


def dtypes(index: dict[str, Stored]) -> list[str]:
    """What the weights of a network are stored in: "float32", "float16", "bfloat16".

    Raises:
        ArtifactError: another kind, such as integers or float8.
    """
    kinds: dict[str, str] = {}
    for name, stored in index.items():
        if name.split(".")[-1] != "position_ids":  # the one buffer of integers that is saved
            kinds.setdefault(stored.dtype, name)
    if unknown := sorted(set(kinds) - set(FLOATS)):
        first = kinds[unknown[0]]
        raise ArtifactError(
            f"{index[first].path} holds {first} as {unknown[0]}; accepted:"
            f" {', '.join(FLOATS.values())}. Save it in one of these."
        )
    return sorted(FLOATS[k] for k in kinds)


def cause(names: Collection[str]) -> str:
    """Why the names of a file may differ from the network's, and what to do; "" where that is not
    known.
    """
    for trait, text in _CAUSES:
        if any(n.startswith(trait) if trait == "module." else trait in n for n in names):
            return text
    return ""


def widen(paths: list[Path], out: Path) -> None:
    """Write the tensors of `paths` to one file in float32, each cast exactly, integers as they are;
    one tensor at a time.
    """
    index, header, end = weight_index(paths), Json(), 0
    for name, s in index.items():
        kind, length = (
            ("F32", int(np.prod(s.shape)) * 4) if s.dtype in FLOATS else (s.dtype, s.length)
        )
        header[name] = {"dtype": kind, "shape": list(s.shape), "data_offsets": [end, end + length]}
        end += length
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with open(out, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for s in index.values():
            if s.dtype in FLOATS:
                f.write(s.read().tobytes())
            else:
                f.write(
                    np.memmap(
                        s.path, dtype=np.uint8, mode="r", offset=s.offset, shape=(s.length,)
                    ).tobytes()
                )
