"""The networks of a diffusers folder as ONNX graphs that point into its weights.

Weights are stored once: text encoders' and UNet's graphs point into the folder's safetensors (ONNX
external data is a file name, an offset and a length, and a safetensors tensor is exactly that), so
graphs are small and there is no 2 GB limit. The VAE decoder's graph stands in `vae_decoder/` for
optimum's sake, and external data may not leave its folder, so its weights are written again.
The tracer reads none of the large ones (`sdlite.unread`): SD-1.4 in float16, whose UNet has 1.7 GB,
is traced in 0.6 GB. float16 weights are cast to float32 inside the graph: storage is half,
arithmetic is float32.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from sdlite import families
from sdlite.families import latent_channels, vae_stride
from sdlite.files import Files
from sdlite.manifest import NetworkRow
from sdlite.spec import IOSpec, latent_size, side_of, spec_of
from sdlite.spec import Tensor as SpecTensor
from sdlite.torch_networks import control_residuals, latent_parameters, open_network, text_states
from sdlite.unread import Links, UnknownTensorError, Unread, links
from sdlite.weights import Stored, dtypes, weight_files, weight_index

# input -> its free axes by torch.export.Dim; None: none
FreeShapes = dict[str, dict[int, Any] | tuple[dict[int, Any], ...] | None]
log = logging.getLogger("sdlite")
OPSET = 18
_ONNX_TYPES = {"F32": onnx.TensorProto.FLOAT, "F16": onnx.TensorProto.FLOAT16}


class _TextEncoder(nn.Module):
    """`outputs`: names of what it gives."""

    def __init__(self, module: nn.Module, outputs: Sequence[str]):
        super().__init__()
        self.module, self.outputs = module, outputs

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        return text_states(self.module, input_ids, self.outputs)


class _Unet(nn.Module):
    """`conditions`: names of what it is given besides latents, timestep and hidden states."""

    def __init__(self, module: nn.Module, conditions: Sequence[str] = ()):
        super().__init__()
        self.module, self.conditions = module, conditions

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *more: Tensor
    ) -> Tensor:
        named = families.unet_arguments(dict(zip(self.conditions, more, strict=True)))
        first = (sample, timestep, encoder_hidden_states)
        out: Tensor = self.module(*first, return_dict=False, **named)[0]
        return out


class _ControlNet(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
    ) -> tuple[Tensor, ...]:
        given = (sample, timestep, encoder_hidden_states, controlnet_cond)
        out: tuple[Tensor, ...] = control_residuals(self.module, *given)
        return out


class _VaeDecoder(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, latent_sample: Tensor) -> Tensor:
        out: Tensor = self.module.decode(latent_sample, return_dict=False)[0]
        return out


class _Sizes(list[Tensor]):
    """A list that the tracer does not know for one: of those in a module it leaves copies behind,
    and a network may be traced twice.
    """


class _VaeEncoder(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, sample: Tensor) -> Tensor:
        out: Tensor = latent_parameters(self.module, sample)
        return out


class _Upsample(nn.Module):
    """diffusers' Upsample2D that is told its size: nearest neighbors, then its convolution."""

    def __init__(self, original: nn.Module, sizes: _Sizes):
        super().__init__()
        self.conv, self.sizes = original.conv, sizes

    def forward(self, hidden_states: Tensor, output_size: object = None) -> Tensor:
        out: Tensor = self.conv(
            nn.functional.interpolate(hidden_states, size=self.sizes.pop(), mode="nearest")
        )
        return out


def free_sizes(unet: nn.Module) -> bool:
    """Make a UNet upsample to the size that its way down had, for every size, in place.

    diffusers does so only where the size is no multiple of the UNet's own (8 latents in SD-1.x),
    which a traced graph cannot ask. Where it is one, nothing changes.

    Returns:
        Whether it could be done: not for upsamplers of another kind than Stable Diffusion's.
    """
    from diffusers.models.upsampling import Upsample2D

    ups = [b.upsamplers for b in unet.up_blocks if getattr(b, "upsamplers", None)]
    downs = [b.downsamplers for b in unet.down_blocks if getattr(b, "downsamplers", None)]
    plain = all(
        len(u) == 1
        and type(u[0]) is Upsample2D
        and isinstance(getattr(u[0], "conv", None), nn.Conv2d)
        for u in ups
    )
    if not plain or len(ups) != len(downs):
        return False
    sizes = _Sizes()
    for down in downs:
        down[0].register_forward_pre_hook(lambda module, given: sizes.append(given[0].shape[2:]))
    for up in ups:
        up[0] = _Upsample(up[0], sizes)
    unet.num_upsamplers = 0  # no size is anything but a multiple of 1: nothing to ask
    return True


def network(folder: Path | Files, spec: IOSpec, unread: bool = False) -> nn.Module:
    """One wrapped network in float32, called with the arrays of its `IOSpec`; gives its outputs.

    Args:
        folder: of an opened model its `files`.
        unread: leave its large weights unread, see `sdlite.unread`; not the decoder's.
    """
    source = Files.of(folder).part(spec.source)
    if spec.source == "vae":
        kind = _VaeEncoder if spec.part == "vae_encoder" else _VaeDecoder
        return kind(open_network(source))
    with Unread() if unread else nullcontext():
        if spec.part == "unet":
            return _Unet(open_network(source), [t.name for t in spec.inputs[3:]])
        if spec.part == "controlnet":
            return _ControlNet(open_network(source))
        text = open_network(source, attn_implementation="eager")
    return _TextEncoder(text, names_of(spec))


def names_of(spec: IOSpec) -> list[str]:
    """Names of a graph's outputs."""
    return [*(t.name for t in spec.outputs), *spec.also]


def examples(
    parts: Mapping[str, nn.Module], multiple: int, conditions: Sequence[SpecTensor]
) -> dict[str, tuple[tuple[Tensor, ...], FreeShapes]]:
    """part -> example inputs and the shapes that stay free.

    Args:
        parts: see `network`.
        multiple: of latents, that the UNet can be called with.
        conditions: the UNet's inputs after the first three.
    """
    unet = parts["unet"].module.config
    length = parts["text_encoder"].module.config.max_position_embeddings
    side = latent_size(unet)[0]
    # 63: with 64 the tracer refuses, refines and starts again; 9: below it the UNet's innermost
    # sides are 1, which the tracer takes for always so. The graph itself takes any batch and any
    # size.
    b, h, w = (
        torch.export.Dim("batch", min=1, max=63),
        *(torch.export.Dim(n, min=9 if multiple == 1 else 1, max=2048 // multiple) for n in "hw"),
    )
    tokens = torch.export.Dim("tokens", min=2, max=4096)  # prompts longer than one window
    vae = dict(parts["vae_decoder"].module.config)
    stride, channels = vae_stride(vae), latent_channels(vae)
    sample = torch.randn(2, unet.in_channels, *[max(16, side // multiple * multiple)] * 2)
    pixels = torch.randn(2, 3, *(stride * n for n in sample.shape[2:]))
    texts = [p for p in parts if p.startswith("text_encoder")]
    width = sum(parts[p].module.config.hidden_size for p in texts)
    embeds = torch.randn(2, length, width)
    free = {0: b, 2: multiple * h if multiple > 1 else h, 3: multiple * w if multiple > 1 else w}
    ids = torch.zeros(2, length, dtype=torch.int64)
    return {
        **dict.fromkeys(texts, ((ids,), {"input_ids": {0: b}})),
        "unet": (
            (sample, torch.tensor(500.0), embeds, *(_example(t, sample) for t in conditions)),
            {
                "sample": free,
                "timestep": None,
                "encoder_hidden_states": {0: b, 1: tokens},
                **({"more": tuple(_free(t, b) for t in conditions)} if conditions else {}),
            },
        ),
        "vae_decoder": ((sample[:, :channels],), {"latent_sample": {0: b, 2: h, 3: w}}),
        "vae_encoder": ((pixels,), {"sample": {0: b, 2: stride * h, 3: stride * w}}),
        "controlnet": (
            (sample[:, : _channels(parts)], torch.tensor(500.0), embeds, pixels),
            {
                "sample": free,
                "timestep": None,
                "encoder_hidden_states": {0: b, 1: tokens},
                "controlnet_cond": {0: b, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},
            },
        ),
    }


def _channels(parts: Mapping[str, nn.Module]) -> int | None:
    """Of the latents that a ControlNet takes; a UNet may take more."""
    return int(parts["controlnet"].module.config.in_channels) if "controlnet" in parts else None


def _free(tensor: SpecTensor, batch: Any) -> dict[int, Any]:
    """Free axes of a condition: rows, and sides that follow from the latents'."""
    sides = (i for i, s in enumerate(tensor.shape) if s[0] in "hw")
    return {0: batch, **dict.fromkeys(sides, torch.export.Dim.AUTO)}


def _example(tensor: SpecTensor, sample: Tensor) -> Tensor:
    """Noise of a condition's shape, for the images of `sample`; zeros where it is whole numbers."""
    sides = dict(zip("BChw", sample.shape, strict=True))
    shape = tuple(side_of(s, sides) for s in tensor.shape)
    kind = getattr(torch, tensor.dtype)
    return torch.randn(shape) if kind.is_floating_point else torch.zeros(shape, dtype=kind)


def trace(
    part: str | IOSpec,
    wrapped: nn.Module,
    inputs: tuple[Tensor, ...],
    shapes: FreeShapes,
    opset: int = OPSET,
) -> ir.Model:
    """torch network -> ONNX model whose initializers keep their torch names. `part`: a name, or the
    model's own spec.
    """
    spec = spec_of(part)
    program = torch.onnx.export(
        wrapped.eval(),
        inputs,
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=shapes,
        verbose=False,
        external_data=False,
        input_names=[t.name for t in spec.inputs],
        output_names=names_of(spec),
    )
    assert program is not None
    return program.model


def _link_weights(
    model: onnx.ModelProto, weights: list[Path], prefix: str, known: Links | None = None
) -> int:
    """Point every initializer that stands in `weights` at its bytes there. Returns how many bytes
    stay inside the graph.

    It is `known`, or found by its name without `prefix`, or by its values: libraries rename
    modules, and the tracer transposes matrices. float16 gets a Cast, a transposed matrix a
    Transpose (both are folded when a session loads).
    """
    index = {k: s for k, s in weight_index(weights).items() if s.dtype in _ONNX_TYPES}
    values = _by_value(index)
    kept, nodes, made, inside = [], [], set(), 0
    for init in model.graph.initializer:
        name, turn = (known or {}).get(init.name) or _find(init, prefix, index, values)
        if not name:
            kept.append(init)
            inside += len(init.raw_data)
            continue
        found = index[name]
        stored, half = "weights." + name, found.dtype == "F16"
        if stored not in made:
            made.add(stored)
            kept.append(_external(stored, found))
            if half:
                nodes.append(
                    onnx.helper.make_node(
                        "Cast",
                        [stored],
                        [stored + ".f32"],
                        name=stored + "/cast",
                        to=onnx.TensorProto.FLOAT,
                    )
                )
        value = stored + ".f32" if half else stored
        op, extra = ("Transpose", {"perm": [1, 0]}) if turn else ("Identity", {})
        nodes.append(
            onnx.helper.make_node(
                op, [value], [init.name], name=init.name + "/" + op.lower(), **extra
            )
        )
    nodes += model.graph.node
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(kept)
    model.graph.node.extend(nodes)
    return inside


_Values = dict[tuple[object, ...], list[tuple[str, bool]]]


def _by_value(index: dict[str, Stored]) -> _Values:
    """Fingerprint -> names of tensors with it, and whether of their transpose."""
    out: _Values = {}
    for name, s in index.items():
        corner = s.read(*(slice(4) for _ in s.shape))
        out.setdefault(_fingerprint(s.shape, corner), []).append((name, False))
        if len(s.shape) == 2:
            out.setdefault(_fingerprint(s.shape[::-1], corner.T), []).append((name, True))
    return out


def _find(
    init: onnx.TensorProto, prefix: str, index: dict[str, Stored], values: _Values
) -> tuple[str, bool]:
    """Name of the stored tensor that an initializer is, and whether transposed; "" where there is
    none.
    """
    if init.data_type != onnx.TensorProto.FLOAT:
        return "", False
    name = init.name.removeprefix(prefix)
    if name in index and index[name].shape == tuple(init.dims):
        return name, False
    if np.prod(init.dims) < 16:  # a constant, or as good as one
        return "", False
    array = onnx.numpy_helper.to_array(init)
    for name, turn in values.get(
        _fingerprint(array.shape, array[tuple(slice(4) for _ in array.shape)]), ()
    ):
        if np.array_equal(index[name].read().T if turn else index[name].read(), array):
            return name, turn
    return "", False


def _fingerprint(shape: tuple[int, ...], corner: np.ndarray) -> tuple[object, ...]:
    return (*shape, corner.tobytes())


def _external(name: str, stored: Stored) -> onnx.TensorProto:
    """An initializer whose values are the bytes of a stored tensor."""
    tensor = onnx.TensorProto(
        name=name,
        dims=stored.shape,
        data_type=_ONNX_TYPES[stored.dtype],
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for k, v in (
        ("location", stored.path.name),
        ("offset", stored.offset),
        ("length", stored.length),
    ):
        tensor.external_data.add(key=k, value=str(v))
    return tensor


def _strip(model: onnx.ModelProto) -> None:
    """Drop the tracer's notes (stack traces, intermediate shapes): they are larger than the
    graph.
    """
    del model.graph.value_info[:], model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]


def _own_weights(folder: Path, model: onnx.ModelProto, dtype: str) -> None:
    """Write the decoder's weights beside its graph as model.onnx.data, in float16 or float32, and
    link them.
    """
    from safetensors.numpy import save_file

    arrays = {
        i.name: onnx.numpy_helper.to_array(i)
        for i in model.graph.initializer
        if i.data_type == onnx.TensorProto.FLOAT and np.prod(i.dims) >= 16
    }
    path = folder / "model.onnx.data"
    save_file({k: np.ascontiguousarray(v.astype(dtype)) for k, v in arrays.items()}, path)
    _link_weights(model, [path], "")


def write_graph(
    root: Path,
    part: str,
    spec: IOSpec,
    wrapped: nn.Module,
    inputs: tuple[Tensor, ...],
    shapes: FreeShapes,
) -> NetworkRow:
    """Write the graph of one network of the folder `root`, and of the decoder its weights.

    Args:
        wrapped: see `network`.
        inputs, shapes: see `examples`.

    Returns:
        What the manifest says of it.
    """
    weights = weight_files(root / spec.source)
    [dtype] = dtypes(weight_index(weights))
    traced, known = trace(spec, wrapped, inputs, shapes), Links()
    if spec.source != "vae":
        try:
            known = links(traced, wrapped, weight_index(weights), "module.")
        except UnknownTensorError as e:  # a library has done what none does that we know
            log.info("the weights of %s are read whole: %s", root / spec.source, e)
            whole = open_network(Files.of(root).part(spec.source)).state_dict()
            wrapped.module.load_state_dict(whole, assign=True)
            traced = trace(spec, wrapped, inputs, shapes)
    model = ir.to_proto(traced)
    _strip(model)
    (root / part).mkdir(exist_ok=True)
    if spec.source == "vae":
        shutil.copy(root / "vae" / "config.json", root / part / "config.json")
        _own_weights(root / part, model, dtype)
        files = [f"{part}/model.onnx.data"]
    else:
        _link_weights(model, weights, "module.", known)
        files = [f"{spec.source}/{w.name}" for w in weights]
    onnx.save_model(model, root / part / "model.onnx")
    onnx.checker.check_model(root / part / "model.onnx")
    return {
        "file": f"{part}/model.onnx",
        "weights": files,
        "opset": OPSET,
        "storage": dtype,
        "arithmetic": "float32",
    }
