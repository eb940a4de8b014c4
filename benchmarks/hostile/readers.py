"""The readers of the package, each with whole files to damage and a way to have one read.

A target writes the bytes where the reader looks for them and reads. It returns, or raises an error
of `sdlite.errors`; all else is a fault.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sdlite
from sdlite import tokenizer_files
from sdlite.artifact import Artifact
from sdlite.exported import REPORT

from benchmarks.hostile import mutate, samples, stub
from benchmarks.hostile.folder import MANIFEST, put, vouch
from benchmarks.hostile.values import (
    GRAPH,
    INDEX,
    MERGES,
    SCHEDULER,
    SPECIAL,
    TEXT,
    TOKENIZER,
    UNET,
    VAE,
    VOCAB,
)

Mutator = Callable[[mutate.Rng, bytes], bytes]
Target = Callable[[Path, bytes], Any]


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        prepare: make a folder for it; returns whole files to start from.
        target: have changed bytes read.
        mutators: how they are changed, one of them at a time.
        needs: modules without which it cannot run.
    """

    name: str
    prepare: Callable[[Path], list[bytes]]
    target: Target
    mutators: tuple[Mutator, ...]
    needs: tuple[str, ...] = ()


# --- model folders


def _slim(*files: str) -> Callable[[Path], list[bytes]]:
    """The small model; start from these files of it."""

    def prepare(folder: Path) -> list[bytes]:
        samples.slim(folder)
        return [(folder / f).read_bytes() for f in files]

    return prepare


def _picture(folder: Path) -> None:
    """From the folder to an image, with no engine; and what `sdlite info` shows."""
    from sdlite.cli.info import describe

    json.dumps(describe(Artifact.open(folder)), allow_nan=False)
    pipe = sdlite.Pipeline.from_pretrained(folder, backend="stub")
    pipe(["a red apple", "\U0001f9c0 K\xe4se"], seed=1)


def _vouched(file: str) -> Target:
    """The file is changed and the manifest vouches for it."""

    def target(folder: Path, raw: bytes) -> None:
        put(folder, file, raw)
        vouch(folder)
        _picture(folder)

    return target


def _manifest(folder: Path, raw: bytes) -> None:
    put(folder, MANIFEST, raw)
    Artifact.open(folder).verify()
    _picture(folder)


def _exported(folder: Path) -> list[bytes]:
    samples.slim(folder)
    report = samples.export_report(folder)
    (folder / MANIFEST).unlink()
    return [report]


def _report(folder: Path, raw: bytes) -> None:
    put(folder, REPORT, raw)
    Artifact.open(folder).verify()
    _picture(folder)


def _scheduler(folder: Path) -> list[bytes]:
    samples.slim(folder)
    return samples.schedulers()


def _special(folder: Path) -> list[bytes]:
    """A folder whose special tokens stand in their own file alone."""
    samples.slim(folder)
    config = json.loads((folder / TOKENIZER).read_text())
    for key in ("added_tokens_decoder", *tokenizer_files.NAMED):
        config.pop(key, None)
    put(folder, TOKENIZER, json.dumps(config))
    return [(folder / SPECIAL).read_bytes()]


def _slow_tokenizer(folder: Path) -> list[bytes]:
    samples.slim(folder)
    (folder / TOKENIZER).unlink()
    size = len(json.loads(samples.vocabulary()))
    return [json.dumps({"<cat-toy>": size, "<dog>": size + 1}).encode()]


def _fast_tokenizer(folder: Path) -> list[bytes]:
    samples.slim(folder)
    for file in (VOCAB, MERGES):
        (folder / file).unlink()
    return [samples.tokenizer_json()]


def _tokenizer(file: str) -> Target:
    from sdlite.tokenizer import ClipTokenizer

    def target(folder: Path, raw: bytes) -> None:
        put(folder, f"tokenizer/{file}", raw)
        tokenizer = ClipTokenizer.from_pretrained(
            folder / "tokenizer", {"vocab_size": 4000, "max_position_embeddings": 77}
        )
        ids = tokenizer(["a red apple", "\U0001f9c0 K\xe4se, <cat-toy>"])
        if ids.shape[1] > 77 or ids.min() < 0 or ids.max() >= 4000:
            raise IndexError(f"ids to {ids.max()} of shape {ids.shape}")
        tokenizer.to_json()

    return target


# --- weights and graphs

SHARDS = (
    "diffusion_pytorch_model-00001-of-00002.safetensors",
    "diffusion_pytorch_model-00002-of-00002.safetensors",
)


def _safetensors(folder: Path, raw: bytes) -> None:
    from sdlite.weights import dtypes, weight_index, widen

    put(folder, "weights.safetensors", raw)
    index = weight_index([folder / "weights.safetensors"])
    dtypes(index)
    for stored in index.values():
        if stored.dtype in ("F32", "F16", "BF16"):
            stored.read()
    widen([folder / "weights.safetensors"], folder / "wide.safetensors")


def _sharded(folder: Path) -> list[bytes]:
    for i, name in enumerate(SHARDS):
        put(folder / "unet", name, samples.weights((f"{i}.weight", f"{i}.bias")))
    names = {f"{i}.{k}": name for i, name in enumerate(SHARDS) for k in ("weight", "bias")}
    return [json.dumps({"metadata": {"total_size": 288}, "weight_map": names}).encode()]


def _index(folder: Path, raw: bytes) -> None:
    from sdlite.weights import weight_files, weight_index

    put(folder, "unet/diffusion_pytorch_model.safetensors.index.json", raw)
    weight_index(weight_files(folder / "unet"))


def _graph_folder(folder: Path) -> list[bytes]:
    samples.slim(folder)
    graph = samples.network(folder / "unet")
    manifest = json.loads((folder / MANIFEST).read_text())
    data = "unet/model.onnx.data"
    manifest["files"][data] = {"sha256": "0" * 64, "bytes": 0}
    for parts in manifest["variants"].values():
        parts["unet"]["weights"] = [data]
    put(folder, MANIFEST, json.dumps(manifest))
    return [graph]


def _engine(backend: str) -> Target:
    """A graph that the manifest vouches for, loaded and called as a pipeline does."""

    def target(folder: Path, raw: bytes) -> None:
        from sdlite.backends import get_backend
        from sdlite.backends.checked import Checked

        put(folder, GRAPH, raw)
        vouch(folder)
        artifact = Artifact.open(folder)
        loaded, _ = get_backend(backend).load_part(artifact, "unet", "fp16", "cpu", 1)
        network = Checked(loaded, "unet", 8, backend)
        sample, text = np.zeros((1, 8, 8, 8), np.float32), np.zeros((1, 28, 192), np.float32)
        network(sample=sample, timestep=np.array(3, np.float32), encoder_hidden_states=text)

    return target


def _quantize(folder: Path, raw: bytes) -> None:
    from sdlite.onnx_graph import Graph

    put(folder, GRAPH, raw)
    graph = Graph.load(folder / GRAPH)
    graph.layers()
    for weight in graph.weights.values():
        weight.array()


def _seal(folder: Path, raw: bytes) -> None:
    from sdlite.backends import compiled

    put(folder, compiled.SEAL, raw)
    compiled._whole(folder)


def _sealed(folder: Path) -> list[bytes]:
    from sdlite.backends import compiled

    put(folder, "1.blob", b"compiled")
    compiled._seal(folder)
    return [(folder / compiled.SEAL).read_bytes()]


# --- what users write


def _profile(folder: Path, raw: bytes) -> None:
    from sdlite.exporters import profile

    put(folder, "profile.toml", raw)
    profile.load(folder / "profile.toml")


def _recipe(folder: Path, raw: bytes) -> None:
    from sdlite.distill.recipe import Recipe

    put(folder, "recipe.toml", raw)
    Recipe.load(folder / "recipe.toml").default_sampler("ddim")


def _prompts(folder: Path, raw: bytes) -> None:
    from sdlite.quant import read_prompts

    put(folder, "prompts.txt", raw)
    read_prompts(folder / "prompts.txt")


# --- training data


def _data_folder(folder: Path) -> None:
    for name, data in (("a.png", samples.images()[0]), ("b.png", samples.images()[2])):
        put(folder, f"data/{name}", data)


def _data(files: Callable[[], list[bytes]]) -> Callable[[Path], list[bytes]]:
    def prepare(folder: Path) -> list[bytes]:
        _data_folder(folder)
        return files()

    return prepare


def _training(name: str, whole: str = "data") -> Target:
    """Data with one file changed, read as a training does: captions, pictures, latents."""

    def target(folder: Path, raw: bytes) -> None:
        put(folder, name, raw)
        _latents(folder, folder / whole)

    return target


def _captioned(folder: Path, raw: bytes) -> None:
    put(folder, "data/c.png", samples.images()[0])
    put(folder, "data/c.txt", raw)
    put(folder, "data/a.txt", b"a red apple")
    _latents(folder, folder / "data")


def _photo(folder: Path, raw: bytes) -> None:
    put(folder, "data/c.png", raw)
    put(folder, "data/c.txt", b"a house")
    put(folder, "data/a.txt", b"a red apple")
    _latents(folder, folder / "data")


def _checkpoints(folder: Path) -> None:
    """Two of them, with a network of one matrix."""
    import torch
    from sdlite.distill import checkpoints

    for step in (1, 2):
        meta = {"step": step, "images": 8 * step, "config": {"batch_size": 8, "seed": 0}}
        checkpoints.write(folder, {"w": torch.ones(2, 3) * step}, meta, 2)


def _checkpoint(file: str) -> tuple[Callable[[Path], list[bytes]], Target]:
    """The newest of two checkpoints is changed; the one before is whole."""

    def prepare(folder: Path) -> list[bytes]:
        _checkpoints(folder)
        return [(folder / "checkpoint-00000002" / file).read_bytes()]

    def target(folder: Path, raw: bytes) -> None:
        from sdlite.distill import checkpoints

        for path in folder.iterdir():
            shutil.rmtree(path)
        _checkpoints(folder)
        put(folder, f"checkpoint-00000002/{file}", raw)
        if checkpoints.newest(folder) is None:
            raise LookupError("the checkpoint before it is whole, and is not found")

    return prepare, target


class _Tokens:
    """A tokenizer that takes any text."""

    def digest(self) -> str:
        return "none"

    def __call__(self, texts: list[str]) -> np.ndarray:
        return np.zeros((len(texts), 4), np.int64)


def _latents(folder: Path, data: Path) -> None:
    import torch
    from sdlite.distill import latent_cache
    from sdlite.distill.data import read

    kept = folder / "latents"
    for path in folder.glob("latents*"):
        path.unlink()
    latent_cache.CachedLatents.build(
        read(data),
        _Tokens(),
        lambda some, *_: torch.zeros(len(some), 4, 2, 2),
        kept,
        key={},
        size=(16, 16),
        progress=False,
    )


def quiet() -> None:
    """Before any target: the stub is a backend, warnings are not shown."""
    os.environ.update(SDLITE_OPENVINO_CACHE="0", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    warnings.simplefilter("ignore")
    stub.register()


JSON, TEXTS, PROTOBUF = (mutate.as_json,), (mutate.as_text,), (mutate.as_protobuf,)
TOML, BYTES = (mutate.as_toml, mutate.as_toml, mutate.as_text), (mutate.as_bytes,)
TORCH = ("torch", "diffusers", "accelerate")
READERS = {
    r.name: r
    for r in (
        Reader("manifest", _slim(MANIFEST), _manifest, JSON),
        Reader("export report", _exported, _report, JSON),
        Reader("model_index.json", _slim(INDEX), _vouched(INDEX), JSON),
        Reader("scheduler_config.json", _scheduler, _vouched(SCHEDULER), JSON),
        Reader("unet/config.json", _slim(UNET), _vouched(UNET), JSON),
        Reader("vae/config.json", _slim(VAE), _vouched(VAE), JSON),
        Reader("text_encoder/config.json", _slim(TEXT), _vouched(TEXT), JSON),
        Reader("vocab.json", _slim(VOCAB), _tokenizer("vocab.json"), JSON),
        Reader("merges.txt", _slim(MERGES), _tokenizer("merges.txt"), TEXTS),
        Reader(
            "tokenizer_config.json", _slim(TOKENIZER), _tokenizer("tokenizer_config.json"), JSON
        ),
        Reader("special_tokens_map.json", _special, _tokenizer("special_tokens_map.json"), JSON),
        Reader("added_tokens.json", _slow_tokenizer, _tokenizer(tokenizer_files.ADDED), JSON),
        Reader("tokenizer.json", _fast_tokenizer, _tokenizer(tokenizer_files.FAST), JSON),
        Reader(
            "safetensors",
            lambda _: [samples.weights()],
            _safetensors,
            (mutate.as_safetensors, mutate.as_bytes),
        ),
        Reader("safetensors index", _sharded, _index, JSON),
        Reader(
            "graph, onnxruntime", _graph_folder, _engine("onnxruntime"), PROTOBUF, ("onnxruntime",)
        ),
        Reader("graph, openvino", _graph_folder, _engine("openvino"), PROTOBUF, ("openvino",)),
        Reader("graph, quantize", _graph_folder, _quantize, PROTOBUF, ("onnx",)),
        Reader("compiled network's seal", _sealed, _seal, JSON, ("openvino",)),
        Reader("profile.toml", lambda _: [samples.PROFILE], _profile, TOML),
        Reader("recipe.toml", lambda _: [samples.RECIPE], _recipe, TOML, TORCH),
        Reader("checkpoint's meta.json", *_checkpoint("meta.json"), JSON, TORCH),
        Reader(
            "checkpoint's tensors",
            *_checkpoint("state.safetensors"),
            (mutate.as_safetensors, mutate.as_bytes),
            TORCH,
        ),
        Reader("prompts.txt", lambda _: [samples.PROMPTS], _prompts, TEXTS),
        Reader("training images", _data(samples.images), _photo, BYTES, TORCH),
        Reader("training captions", _data(lambda: [samples.PROMPTS]), _captioned, TEXTS, TORCH),
        Reader(
            "training metadata.jsonl",
            _data(lambda: [samples.METADATA]),
            _training("data/metadata.jsonl"),
            TEXTS,
            TORCH,
        ),
        Reader(
            "training metadata.csv",
            _data(lambda: [samples.CSV]),
            _training("data/metadata.csv"),
            TEXTS,
            TORCH,
        ),
        Reader(
            "training shards",
            _data(lambda: [samples.shard(), samples.shard("w:gz")]),
            _training("shard.tar", "shard.tar"),
            BYTES,
            TORCH,
        ),
        Reader(
            "training prompts",
            _data(lambda: [samples.PROMPTS]),
            _training("prompts.txt", "prompts.txt"),
            TEXTS,
            TORCH,
        ),
    )
}
