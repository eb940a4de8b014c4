"""Networks whose large weights are not read: a tracer needs a network's code, shapes and small
tensors, and no more of its gigabytes than to know each tensor again.

The libraries open the network as ever, so names, shapes and what they say of both are theirs. What
they would write into a large tensor is left out: its memory is reserved and never touched, but for
the first numbers, which tell tensors apart whose names a library has changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sdlite.weights import FLOATS, Stored

# Numbers in a tensor. What onnxscript computes from weights before it writes a graph, it computes
# from constants of at most this many (DEFAULT_CONSTANT_FOLD_INPUT_SIZE_LIMIT); of larger ones it
# takes the transpose, which is a view.
LARGE = 8192
CORNER = 16
# Operations of aten that write a whole tensor: how libraries fill networks.
_FILLS = (
    "add_",
    "bernoulli_",
    "clamp_",
    "div_",
    "erfinv_",
    "fill_",
    "mul_",
    "normal_",
    "sub_",
    "uniform_",
    "zero_",
)
Links = dict[str, tuple[str, bool]]  # initializer -> the stored tensor, and whether its transpose


class UnknownTensorError(Exception):
    """A large constant of a graph is none of the stored tensors: open the network whole."""


class Unread(TorchDispatchMode):
    """While it is entered, CPU tensors of more than `LARGE` numbers are neither filled nor cast.

    It holds for this thread alone: what a library loads in others is whole, which is as good.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not args or not _large(args[0]):
            return func(*args, **kwargs)
        name = func.__name__.partition(".")[0]
        if name == "_to_copy" and _on_cpu(kwargs.get("device")):
            out = torch.empty_like(args[0], dtype=kwargs.get("dtype"))
            return _with_corner(out, args[0])
        if name == "copy_" and args[1].shape == args[0].shape and _on_cpu(args[1].device):
            return _with_corner(args[0], args[1])
        return args[0] if name in _FILLS else func(*args, **kwargs)


def _on_cpu(device: object) -> bool:
    return device is None or torch.device(str(device)).type == "cpu"


def _large(value: object) -> bool:
    """Whether a value is a tensor that need not be filled: contiguous, on the CPU."""
    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu"
        and value.numel() > LARGE
        and value.is_contiguous()
    )


def _with_corner(out: Tensor, source: Tensor) -> Tensor:
    """`out` with the first numbers of `source`, of the same shape."""
    if not source.is_contiguous():
        return out.copy_(source)
    out.view(-1)[:CORNER].copy_(source.view(-1)[:CORNER])
    return out


def links(model: ir.Model, network: nn.Module, index: Mapping[str, Stored], prefix: str) -> Links:
    """Large initializer of a traced network -> the stored tensor that it is, and whether its
    transpose. Their values in `model` become names of bytes in files, so that it can be written.

    They are known by their place in memory, not by their values, which were not read.

    Args:
        index: of the network's files, see `weights.weight_index`.
        prefix: of names in `network` that names in files do not have.

    Raises:
        UnknownTensorError: one is none of them.
    """
    places = {
        t.data_ptr(): (n.removeprefix(prefix), t)
        for n, t in (*network.named_parameters(), *network.named_buffers())
        if t.numel() > LARGE
    }
    out, firsts = Links(), dict[tuple[object, ...], list[str]]()
    for init in model.graph.initializers.values():
        value = init.const_value
        if value is None or value.size <= LARGE:
            continue
        array = value.numpy()
        name, tensor = places.get(array.__array_interface__["data"][0], ("", None))
        if tensor is None:
            raise UnknownTensorError(f"{init.name}, {array.shape}")
        turn = _turned(array, tensor)
        stored = _stored(name, tensor, index, firsts)
        found, shape = index[stored], tuple(array.shape)
        init.const_value = ir.ExternalTensor(
            found.path.name,
            found.offset,
            found.length,
            value.dtype,
            shape=ir.Shape(shape),
            name=str(init.name),
        )
        out[str(init.name)] = stored, turn
    return out


def _turned(array: np.ndarray, tensor: Tensor) -> bool:
    """Whether an array is a tensor's transpose; else it is the tensor."""
    size = array.itemsize
    steps, shape = tuple(s // size for s in array.strides), tuple(tensor.shape)
    if array.shape == shape and steps == tensor.stride():
        return False
    if array.shape == shape[::-1] and steps == tensor.stride()[::-1] and len(shape) == 2:
        return True
    raise UnknownTensorError(f"{array.shape} of {shape}")


def _stored(
    name: str,
    tensor: Tensor,
    index: Mapping[str, Stored],
    firsts: dict[tuple[object, ...], list[str]],
) -> str:
    """The stored tensor that a network's is: by its name, or by shape and first numbers. `firsts`
    is filled when it is needed.
    """
    shape = tuple(tensor.shape)
    if name in index and index[name].shape == shape:
        return name
    if not firsts:
        for k, s in index.items():
            if s.dtype in FLOATS:
                firsts.setdefault((*s.shape, s.first(CORNER).tobytes()), []).append(k)
    first = tensor.detach().reshape(-1)[:CORNER].numpy()
    found = firsts.get((*shape, first.tobytes()), [])
    if len(found) != 1:
        raise UnknownTensorError(f"{name}, {shape}: {len(found)} stored tensors begin like it")
    return found[0]
