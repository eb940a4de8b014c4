"""Sines and cosines of a timestep's angles on hardware that has float16 alone.

diffusers computes them in float32 in every precision: angles are up to 1000 radians, of which
float16 does not tell those apart that are half a radian away. Here the timestep is taken apart into
digits, t = 1024 k + 128 l + 16 m + n. The angle of a digit is 25 radians at most, for whole turns
of its frequency are left out, and the waves of their sum are made of the digits' own:
sin(a + b) = sin a cos b + cos a sin b, cos(a + b) = cos a cos b - sin a sin b.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

UNITS = (1024, 128, 16, 1)
_MOST = 4096  # numbers of a constant that may be frequencies


def in_digits(graph: Path) -> Path:
    """The graph with its angles in digits, beside it and on the same weights; itself where it has
    no angles.
    """
    model = onnx.load(str(graph), load_external_data=False)
    if not split(model):
        return graph
    out = graph.with_name(f"{graph.stem}.digits.onnx")
    onnx.save_model(model, str(out))
    return out


def split(model: ModelProto) -> bool:
    """In place: products of constants and a number or two whose sine and cosine alone are read.

    Returns:
        Whether there were any.
    """
    constants = {i.name: numpy_helper.to_array(i) for i in _small(model)}
    nodes: list[NodeProto] = []
    gone: set[str] = set()  # names of what the digits make
    for node in model.graph.node:
        waves = [n for n in model.graph.node if set(n.input) & set(node.output)]
        known = [x for x in node.input if x in constants]
        if node.op_type == "Mul" and len(known) == 1 and _both(waves):
            time = next(x for x in node.input if x not in known)
            work = _Work(node.name)
            work.write(time, constants[known[0]], waves)
            nodes += work.nodes
            model.graph.initializer.extend(work.constants)
            gone |= {x for w in waves for x in w.output}
        elif not gone & set(node.output):
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return bool(gone)


def _small(model: ModelProto) -> Iterator[onnx.TensorProto]:
    for i in model.graph.initializer:
        inside = i.data_location != onnx.TensorProto.EXTERNAL
        if inside and i.data_type == onnx.TensorProto.FLOAT and np.prod(i.dims) < _MOST:
            yield i


def _both(waves: Sequence[NodeProto]) -> bool:
    return {w.op_type for w in waves} == {"Sin", "Cos"}


class _Work:
    """Nodes and constants in the place of one product."""

    def __init__(self, name: str):
        self.name = name
        self.nodes: list[NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def write(self, time: str, frequencies: np.ndarray, waves: Sequence[NodeProto]) -> None:
        """Nodes from `time` to the outputs of `waves`."""
        left, known = time, None
        for unit in UNITS:
            count = left
            if unit > 1:
                count = self.node("Floor", self.node("Mul", left, self.constant(1 / unit)))
                left = self.node("Sub", left, self.node("Mul", count, self.constant(unit)))
            turns = frequencies.astype(np.float64) * unit / (2 * np.pi)
            turns = (turns - np.round(turns)) * 2 * np.pi
            angle = self.node("Mul", count, self.constant(turns))
            new = self.node("Sin", angle), self.node("Cos", angle)
            known = new if known is None else self.sum(known, new)
        assert known is not None
        for wave in waves:
            made = known[0] if wave.op_type == "Sin" else known[1]
            self.nodes.append(helper.make_node("Identity", [made], wave.output, name=wave.name))

    def sum(self, a: tuple[str, str], b: tuple[str, str]) -> tuple[str, str]:
        """Sine and cosine of the sum of two angles, from theirs."""
        sine = self.node("Add", self.node("Mul", a[0], b[1]), self.node("Mul", a[1], b[0]))
        cosine = self.node("Sub", self.node("Mul", a[1], b[1]), self.node("Mul", a[0], b[0]))
        return sine, cosine

    def node(self, op: str, *inputs: str) -> str:
        """A node's output."""
        name = f"{self.name}/digits{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=name))
        return name

    def constant(self, value: float | np.ndarray) -> str:
        """A constant's name."""
        name = f"{self.name}/constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name
