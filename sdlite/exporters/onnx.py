"""A diffusers SD-1.x/2.x folder -> an sdlite artefact with ONNX graphs.

Weights are stored once: text encoder and UNet graphs point into the folder's safetensors (ONNX external data is a file name, an
offset and a length, and a safetensors tensor is exactly that), so graphs are small and there is no 2 GB limit. The VAE decoder's
graph stands in `vae_decoder/` for optimum's sake, and external data may not leave its folder, so its weights are written again.
float16 weights are cast to float32 inside the graph: storage is half, arithmetic is float32.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from sdlite._version import __version__
from sdlite.artifact import Artifact, Manifest, read_json, weight_files, write_manifest, writing
from sdlite.backends.torch import vae_class
from sdlite.errors import ArtifactError, InputError
from sdlite.spec import SPECS, IOSpec

log = logging.getLogger("sdlite")
OPSET = 18
_ONNX_TYPES = {"F32": onnx.TensorProto.FLOAT, "F16": onnx.TensorProto.FLOAT16}


class _TextEncoder(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.module(input_ids)[0]
        return out


class _Unet(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        out: Tensor = self.module(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return out


class _VaeDecoder(nn.Module):
    def __init__(self, module: Any):
        super().__init__()
        self.module = module

    def forward(self, latent_sample: Tensor) -> Tensor:
        out: Tensor = self.module.decode(latent_sample, return_dict=False)[0]
        return out


def networks(folder: Path) -> dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]]:
    """part -> (wrapped network in float32, example inputs, dynamic shapes)."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    text = CLIPTextModel.from_pretrained(folder / "text_encoder", use_safetensors=True, attn_implementation="eager").float()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True).float()
    vae = vae_class(read_json(folder / "vae" / "config.json")).from_pretrained(folder / "vae", use_safetensors=True).float()
    if unet.config.time_cond_proj_dim is not None:
        raise InputError("the UNet takes a guidance embedding (time_cond_proj_dim), which this exporter does not carry yet.")
    side = unet.config.sample_size if isinstance(unet.config.sample_size, int) else unet.config.sample_size[0]
    length = text.config.max_position_embeddings
    # 63: with 64 the tracer refuses, refines and starts again; the graph itself takes any batch
    b, h, w = (torch.export.Dim(n, min=lo, max=hi) for n, lo, hi in (("batch", 1, 63), ("h", 1, 256), ("w", 1, 256)))
    multiple = 2 ** (len(unet.config.block_out_channels) - 1)
    latent = {0: b, 2: multiple * h, 3: multiple * w}
    sample = torch.randn(2, unet.config.in_channels, side, side)
    embeds = torch.randn(2, length, unet.config.cross_attention_dim)
    return {
        "text_encoder": (_TextEncoder(text), (torch.zeros(2, length, dtype=torch.int64),), {"input_ids": {0: b}}),
        "unet": (_Unet(unet), (sample, torch.tensor(500.0), embeds), {"sample": latent, "timestep": None, "encoder_hidden_states": {0: b}}),
        "vae_decoder": (_VaeDecoder(vae), (sample,), {"latent_sample": {0: b, 2: h, 3: w}}),
    }


def trace(part: str, wrapped: nn.Module, inputs: tuple[Tensor, ...], shapes: dict[str, Any], opset: int = OPSET) -> ir.Model:
    """torch network -> ONNX model whose initializers keep their torch names."""
    spec = SPECS[part]
    program = torch.onnx.export(
        wrapped.eval(), inputs, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False, external_data=False,
        input_names=[t.name for t in spec.inputs], output_names=[spec.output.name],
    )  # fmt: skip
    assert program is not None
    return program.model


def _safetensors_index(path: Path) -> dict[str, dict[str, Any]]:
    """name -> {dtype, shape, offset, length} with absolute offsets. Format: 8-byte header length, JSON, data."""
    with open(path, "rb") as f:
        (n,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(n))
    return {
        k: {
            "dtype": v["dtype"],
            "shape": v["shape"],
            "offset": 8 + n + v["data_offsets"][0],
            "length": v["data_offsets"][1] - v["data_offsets"][0],
        }
        for k, v in header.items()
        if k != "__metadata__"
    }


def _link_weights(model: onnx.ModelProto, weights: list[Path], prefix: str) -> int:
    """Point every initializer that stands in `weights` at its bytes there. Returns how many bytes stay inside the graph.

    float16 gets a Cast; a matrix that the tracer has transposed gets a Transpose (both are folded when a session loads).
    """
    index = {k: (path, v) for path in weights for k, v in _safetensors_index(path).items()}
    transposed: dict[tuple[Any, ...], list[str]] = {}
    for name, (path, entry) in index.items():
        if len(entry["shape"]) == 2:
            transposed.setdefault(_fingerprint(_read(path, entry).T), []).append(name)
    kept, nodes, made, inside = [], [], set(), 0
    for init in model.graph.initializer:
        name, turn = init.name.removeprefix(prefix), False
        found = index.get(name)
        if found is None and len(init.dims) == 2 and init.data_type == onnx.TensorProto.FLOAT:
            array = onnx.numpy_helper.to_array(init)
            name = next((n for n in transposed.get(_fingerprint(array), ()) if np.array_equal(_read(*index[n]).T, array)), "")
            found, turn = index.get(name), True
        if found is None or init.data_type != onnx.TensorProto.FLOAT or (not turn and list(init.dims) != found[1]["shape"]):
            kept.append(init)
            inside += len(init.raw_data)
            continue
        path, entry = found
        stored, half = "weights." + name, entry["dtype"] == "F16"
        if stored not in made:
            made.add(stored)
            tensor = onnx.TensorProto(
                name=stored, dims=entry["shape"], data_type=_ONNX_TYPES[entry["dtype"]], data_location=onnx.TensorProto.EXTERNAL
            )
            for k, v in (("location", path.name), ("offset", entry["offset"]), ("length", entry["length"])):
                tensor.external_data.add(key=k, value=str(v))
            kept.append(tensor)
            if half:
                nodes.append(onnx.helper.make_node("Cast", [stored], [stored + ".f32"], name=stored + "/cast", to=onnx.TensorProto.FLOAT))
        value = stored + ".f32" if half else stored
        op, extra = ("Transpose", {"perm": [1, 0]}) if turn else ("Identity", {})
        nodes.append(onnx.helper.make_node(op, [value], [init.name], name=init.name + "/" + op.lower(), **extra))
    nodes += model.graph.node
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(kept)
    model.graph.node.extend(nodes)
    return inside


def _read(path: Path, entry: dict[str, Any]) -> np.ndarray:
    dtype = {"F32": np.float32, "F16": np.float16}[entry["dtype"]]
    shape = tuple(entry["shape"])
    return np.memmap(path, dtype=dtype, mode="r", offset=entry["offset"], shape=shape).astype(np.float32)


def _fingerprint(matrix: np.ndarray) -> tuple[Any, ...]:
    return (*matrix.shape, matrix[:4, :4].tobytes())


def _strip(model: onnx.ModelProto) -> None:
    """Drop the tracer's notes (stack traces, intermediate shapes): they are larger than the graph."""
    del model.graph.value_info[:], model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]


def _own_weights(folder: Path, model: onnx.ModelProto, dtype: str) -> None:
    """Write the decoder's weights beside its graph as model.onnx.data, in float16 or float32, and link them."""
    from safetensors.numpy import save_file

    arrays = {
        i.name: onnx.numpy_helper.to_array(i)
        for i in model.graph.initializer
        if i.data_type == onnx.TensorProto.FLOAT and np.prod(i.dims) >= 16
    }
    path = folder / "model.onnx.data"
    save_file({k: np.ascontiguousarray(v.astype(np.float16 if dtype == "F16" else np.float32)) for k, v in arrays.items()}, path)
    _link_weights(model, [path], "")


def convert(
    folder: str | Path,
    out: str | Path,
    *,
    name: str = "",
    student: dict[str, Any] | None = None,
    sampler: dict[str, Any] | None = None,
    calibration_prompts: Sequence[str] | None = None,
    keep_float: dict[str, Sequence[str]] | None = None,
) -> Path:
    """Make an artefact: the diffusers folder, ONNX graphs for its three networks, and the manifest.

    Args:
        folder: diffusers SD-1.x/2.x pipeline folder with safetensors in float32 or float16.
        out: new or empty folder; written beside and renamed when whole.
        name: what reports call the model; default: the folder's name.
        student: what the manifest says of its making (teacher, recipe, data, licence); `unet_parameters` is counted here.
        sampler: {name, num_inference_steps, guidance_scale} defaults for a call.
        calibration_prompts: what `sdlite.quantize` shows the student when its caller gives no prompts.
        keep_float: what `sdlite.quantize` leaves in float when its caller does not say.

    Returns:
        `out`.

    Raises:
        ArtifactError: not a diffusers folder, or no safetensors. InputError: a UNet that this exporter does not carry.
    """
    source, out = Artifact.open(folder), Path(out)
    with writing(out) as tmp:
        for part in ("tokenizer", "scheduler", "text_encoder", "unet", "vae"):
            shutil.copytree(
                source.folder / part,
                tmp / part,
                ignore=lambda d, names: [n for n in names if not n.endswith((".json", ".txt", ".safetensors"))],
            )
        (tmp / "model_index.json").write_text(json.dumps(source.index, indent=1))
        for path in tmp.rglob("*.json"):
            _drop_paths(path)
        entries: dict[str, dict[str, Any]] = {}
        parts = networks(source.folder)
        for part, (wrapped, inputs, shapes) in parts.items():
            entries[part] = _write_part(tmp, part, SPECS[part], wrapped, inputs, shapes)
        unet: Any = parts["unet"][0].module
        counts = {f"{p}_parameters": sum(q.numel() for q in w.parameters()) for p, (w, _, _) in parts.items()}
        counts["vae_parameters"] = counts.pop("vae_decoder_parameters")
        manifest = Manifest(name=name or source.folder.name, student={**counts, **(student or {})}, sampler=sampler or {})
        if calibration_prompts:
            manifest.calibration = {"prompts": list(calibration_prompts)}
        if keep_float:
            manifest.calibration = {**(manifest.calibration or {}), "keep_float": {k: list(v) for k, v in keep_float.items()}}
        # float16 storage is exact in float32: one set of files is both variants.
        manifest.variants = dict.fromkeys(("fp16", "fp32") if entries["unet"]["storage"] == "float16" else ("fp32",), entries)
        vae_stride = 2 ** (len(parts["vae_decoder"][0].module.config.block_out_channels) - 1)
        manifest.size_multiple = vae_stride * 2 ** (len(unet.config.block_out_channels) - 1)
        write_manifest(tmp, manifest)
    return out


def _drop_paths(path: Path) -> None:
    """Configs remember the folder that they were loaded from: the maker's business, not the user's."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if "_name_or_path" in data:
        del data["_name_or_path"]
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def convert_cached(source: Artifact) -> Artifact:
    """`convert` into the user's cache, once for each state of the folder. Says so in the log.

    The cache is `$SDLITE_CACHE` or `~/.cache/sdlite`; the key is the folder's path and its files' names, sizes and times.
    """
    files = sorted(p for p in source.folder.rglob("*") if p.suffix in (".json", ".txt", ".safetensors"))
    state = [
        str(source.folder.resolve()),
        __version__,
        *(f"{p.relative_to(source.folder)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files),
    ]
    root = Path(os.environ.get("SDLITE_CACHE", Path.home() / ".cache" / "sdlite"))
    out = root / "onnx" / f"{source.name}-{hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]}"
    if not out.exists():
        log.warning("%s has no ONNX graphs: converting it once into %s (a few minutes for a large UNet)", source.folder, out)
        convert(source.folder, out, name=source.name)
    return Artifact.open(out)


def _write_part(
    root: Path, part: str, spec: IOSpec, wrapped: nn.Module, inputs: tuple[Tensor, ...], shapes: dict[str, Any]
) -> dict[str, Any]:
    weights = weight_files(root / spec.source)
    dtypes = {v["dtype"] for w in weights for v in _safetensors_index(w).values()} - {"I64"}
    if not dtypes <= {"F32", "F16"} or len(dtypes) != 1:
        raise ArtifactError(f"{spec.source}/ holds weights of type {sorted(dtypes)}; accepted: all float32 or all float16.")
    dtype = dtypes.pop()
    model = ir.to_proto(trace(part, wrapped, inputs, shapes))
    _strip(model)
    (root / part).mkdir(exist_ok=True)
    if part == "vae_decoder":
        shutil.copy(root / "vae" / "config.json", root / part / "config.json")
        _own_weights(root / part, model, dtype)
        files = [f"{part}/model.onnx.data"]
    else:
        _link_weights(model, weights, "module.")
        files = [f"{spec.source}/{w.name}" for w in weights]
    onnx.save_model(model, root / part / "model.onnx")
    onnx.checker.check_model(root / part / "model.onnx")
    return {
        "file": f"{part}/model.onnx", "weights": files, "opset": OPSET,
        "storage": "float16" if dtype == "F16" else "float32", "arithmetic": "float32",
    }  # fmt: skip
