"""Whole files for the fuzzers to start from: small, and each as sdlite or diffusers writes it."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper
from PIL import Image

from benchmarks.hostile.folder import MANIFEST, MODEL, put, vouch
from benchmarks.hostile.values import INDEX, MERGES, SCHEDULER, SPECIAL, TEXT, TOKENIZER, UNET, VAE

JSONS = (INDEX, SCHEDULER, TEXT, UNET, VAE, TOKENIZER, SPECIAL, "vae_decoder/config.json")
WORDS = 60  # merges that are kept
SPECIALS = ("<|startoftext|>", "<|endoftext|>")


def _json(file: str) -> dict[str, Any]:
    out: dict[str, Any] = json.loads((MODEL / file).read_text())
    return out


def slim(folder: Path) -> None:
    """The embedded model with a small vocabulary and a few bytes for each network."""
    manifest = _json(MANIFEST)
    manifest["calibration"] = {"prompts": ["robot", "an apple"]}
    for file in manifest["files"]:
        put(folder, file, _graph() if file.endswith(".onnx") else b"stands for " + file.encode())
    for file in JSONS:
        put(folder, file, (MODEL / file).read_bytes())
    put(folder, MERGES, merges())
    put(folder, "tokenizer/vocab.json", vocabulary())
    put(folder, TOKENIZER, tokenizer_config())
    put(folder, MANIFEST, json.dumps(manifest))
    vouch(folder)


@cache
def _graph() -> bytes:
    """A graph of nothing."""
    return bytes(helper.make_model(helper.make_graph([], "nothing", [], [])).SerializeToString())


@cache
def merges() -> bytes:
    return b"\n".join((MODEL / MERGES).read_bytes().split(b"\n")[: WORDS + 1]) + b"\n"


@cache
def vocabulary() -> bytes:
    """All bytes, what the kept merges make, and the special tokens."""
    whole: dict[str, int] = _json("tokenizer/vocab.json")
    made = {line.replace(" ", "") for line in merges().decode().splitlines()}
    kept = [t for t in whole if len(t.removesuffix("</w>")) == 1 or t in made]
    return json.dumps({t: i for i, t in enumerate([*kept, *SPECIALS])}).encode()


def tokenizer_config() -> bytes:
    """The embedded model's, with the ids of the small vocabulary."""
    vocab, config = json.loads(vocabulary()), _json(TOKENIZER)
    flags = next(iter(config["added_tokens_decoder"].values()))
    config["added_tokens_decoder"] = {str(vocab[t]): {**flags, "content": t} for t in SPECIALS}
    return json.dumps(config).encode()


def tokenizer_json() -> bytes:
    """What transformers 5 saves."""
    from sdlite import tokenizer_files

    vocab = json.loads(vocabulary())
    pairs = [line.split(" ") for line in merges().decode().splitlines()[1:]]
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    split = {
        "type": "Split",
        "pattern": {"Regex": tokenizer_files.WORDS},
        "behavior": "Removed",
        "invert": True,
    }
    letters = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    data = {
        "version": "1.0",
        "added_tokens": [
            {"id": vocab[t], "content": t, "special": True, **flags} for t in SPECIALS
        ],
        "normalizer": tokenizer_files.NORMALIZER,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, letters]},
        "model": {
            **tokenizer_files.MODEL,
            "unk_token": SPECIALS[1],
            "vocab": vocab,
            "merges": pairs,
        },
    }
    return json.dumps(data).encode()


def export_report(folder: Path) -> bytes:
    """The report of an export with fixed shapes, for the files of a folder."""
    manifest = json.loads((folder / MANIFEST).read_text())
    shape = {"name": "x", "dtype": "float32", "shape": [1, 8, 8, 8]}
    networks = {
        part: {**row, "inputs": [shape], "output": shape}
        for part, row in manifest["variants"]["fp16"].items()
    }
    profile = {
        "name": "onnx-fixed",
        "target": "onnx",
        "precision": "fp16",
        "batch": 1,
        "height": 0,
        "width": 0,
        "dynamic": False,
        "memory_mib": 0,
        "gate": {"psnr": 40},
        "options": {},
        "about": "",
    }
    report = {
        "sdlite": "0.1.0",
        "model": "emoji",
        "profile": profile,
        "tools": {"onnx": "1.23.2"},
        "source": "fp16",
        "opset": 18,
        "networks": networks,
        "size": [64, 64],
        "size_multiple": 32,
        "files": manifest["files"],
        "companions": {},
        "not_run": {},
        "checked_by": "onnxruntime",
        "parity": {"psnr": [50.0], "networks": {}},
    }
    return json.dumps(report).encode()


def schedulers() -> list[bytes]:
    """A config of each class that is read, and the embedded model's."""
    from sdlite.sampling.schedule import DEFAULTS

    own = _json(SCHEDULER)
    out = [own, *({"_class_name": name, **keys} for name, keys in DEFAULTS.items())]
    for config in out:
        config.pop("lambda_min_clipped", None)  # minus infinity, which JSON does not have
    return [json.dumps(config).encode() for config in out]


def weights(names: tuple[str, ...] = ("a.weight", "b.bias")) -> bytes:
    """A safetensors file."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for i, name in enumerate(names):
        array = np.arange(24, dtype=(np.float32, np.float16)[i % 2]).reshape(2, 3, 4)
        kind, end = ("F32", "F16")[i % 2], len(data) + array.nbytes
        header[name] = {"dtype": kind, "shape": [2, 3, 4], "data_offsets": [len(data), end]}
        data += array.tobytes()
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + data


def network(folder: Path) -> bytes:
    """A small UNet as a graph, and its weights beside it in `model.onnx.data`."""
    node, channels = helper.make_node, 8
    shapes = {"kernel": (channels, channels, 3, 3), "text": (192, channels), "time": (channels,)}
    rng, data, tensors = np.random.default_rng(0), b"", []
    for name, shape in shapes.items():
        array = (rng.standard_normal(shape) * 0.1).astype(np.float16)
        tensor = TensorProto(
            name=f"{name}.f16",
            dims=shape,
            data_type=TensorProto.FLOAT16,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (
            ("location", "model.onnx.data"),
            ("offset", len(data)),
            ("length", array.nbytes),
        ):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
        data += array.tobytes()
    tensors.append(helper.make_tensor("one", TensorProto.INT64, [1], [1]))
    tensors.append(helper.make_tensor("last", TensorProto.INT64, [2], [-1, -2]))
    nodes = [
        node("Cast", [f"{n}.f16"], [n], to=TensorProto.FLOAT, name=f"cast_{n}") for n in shapes
    ]
    nodes += [
        node("Conv", ["sample", "kernel"], ["conv"], pads=[1, 1, 1, 1], name="conv"),
        node("MatMul", ["encoder_hidden_states", "text"], ["words"], name="words"),
        node("ReduceMean", ["words", "one"], ["mean"], keepdims=0, name="mean"),
        node("Mul", ["time", "timestep"], ["wave"], name="wave"),
        node("Sin", ["wave"], ["embed"], name="embed"),
        node("Add", ["mean", "embed"], ["both"], name="both"),
        node("Unsqueeze", ["both", "last"], ["wide"], name="wide"),
        node("Add", ["conv", "wide"], ["sum"], name="sum"),
        node("Sigmoid", ["sum"], ["gate"], name="gate"),
        node("Mul", ["sum", "gate"], ["out_sample"], name="silu"),
    ]
    value = helper.make_tensor_value_info
    free = ["batch", channels, "height", "width"]
    inputs = [
        value("sample", TensorProto.FLOAT, free),
        value("timestep", TensorProto.FLOAT, []),
        value("encoder_hidden_states", TensorProto.FLOAT, ["batch", 28, 192]),
    ]
    graph = helper.make_graph(
        nodes, "unet", inputs, [value("out_sample", TensorProto.FLOAT, free)], tensors
    )
    put(folder, "model.onnx.data", data)
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    return bytes(model.SerializeToString())


PROMPTS = "# calibration\na red apple\n\nein Käse \U0001f9c0\n  a house  \n".encode()
RECIPE = b"""
name = "my-student"
[student]
preset = "bk-tiny"
weights = "teacher"
score = "l1"
[train]
batch_size = 64
lr = 1e-4
[[stage]]
kind = "output"
images = 200000
feature_weight = 0.1
[[stage]]
kind = "guidance"
images = 50000
guidance_scale = 4.0
cache_targets = 50000
[[stage]]
kind = "progressive"
steps = [16, 8, 4]
images = 30000
[[stage]]
kind = "text-encoder"
layers = 6
images = 50000
[[stage]]
kind = "tiny-decoder"
images = 50000
width = 64
[sampler]
guidance_scale = 1.0
[preview]
prompts = ["a fox", "a house"]
num_inference_steps = 10
"""
PROFILE = b"""
about = "Any browser"
target = "web"
precision = "fp16"
batch = 1
height = 512
width = 512
dynamic = false
memory_mib = 2000
[gate]
psnr = 40
unet = 40.0
[options]
external = true
"""


@cache
def images() -> list[bytes]:
    """A small picture in each format and depth that folders hold."""
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    made: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (Image.fromarray(rgb), "PNG", {}),
        (Image.fromarray(rgb), "JPEG", {"exif": _turned()}),
        (Image.fromarray(rgb), "WEBP", {}),
        (Image.fromarray(rgb[..., 0].astype(np.uint16) * 257), "PNG", {}),
        (Image.fromarray(rgb).quantize(16), "PNG", {}),
        (Image.fromarray(rgb).convert("RGBA"), "PNG", {}),
    ]
    out = []
    for image, kind, options in made:
        file = io.BytesIO()
        image.save(file, kind, **options)
        out.append(file.getvalue())
    return out


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[274] = 6
    return exif


def shard(kind: str = "w:") -> bytes:
    """WebDataset: a picture with a caption in JSON, and one in a text."""
    file = io.BytesIO()
    parts = {
        "a.png": images()[0],
        "a.json": b'{"caption": "a red apple"}',
        "b.jpg": images()[1],
        "b.txt": b"a house",
    }
    with tarfile.open(fileobj=file, mode=kind) as tar:  # type: ignore[call-overload]
        for name, data in parts.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return file.getvalue()


METADATA = (
    b'{"file_name": "a.png", "text": "a red apple"}\n{"file_name": "b.png", "caption": "a house"}\n'
)
CSV = b'file_name,text\na.png,"a red, red apple"\nb.png,a house\n'
