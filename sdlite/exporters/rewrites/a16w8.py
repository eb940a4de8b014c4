"""a16w8: 16 bits of activation, 8 of weight, in the QDQ form that Qualcomm's HTP takes as one
integer operator.

A layer becomes integer when its inputs come from DequantizeLinear and its output goes to
QuantizeLinear alone: uint16 asymmetric activations, int8 symmetric weights, int32 bias at input
scale x weight scale. Convolutions have a weight scale for each output channel. MatMul and Gemm have
one: with a scale for each channel the HTP simulator gives 7 dB for a feed-forward that is 55 dB on
onnxruntime's CPU, with one scale both give over 44 dB (emoji, 2026-11-25). What is not a layer
stays float, which the HTP computes in float16. Ranges are seen over the model's own loop, as for
`sdlite.quantize`. They are the extremes: with 65,536 levels rounding is small and clipping is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from onnx import NodeProto, helper

from sdlite import image_input
from sdlite.backends import RowByRow
from sdlite.exporters import parity
from sdlite.instrument import NamedOutputs, Watched, asked, with_networks
from sdlite.onnx_graph import Graph, Layer, constant
from sdlite.pipeline import Pipeline
from sdlite.quant.observe import Histogram, choose_range

Range = tuple[float, float]
DOMAIN = "com.microsoft"  # its QuantizeLinear has 16 bits at any opset; ONNX's own from 21 on


def choose(
    graph: Graph, original: Graph, operators: Sequence[str], keep: Sequence[str]
) -> dict[str, Layer]:
    """{torch module: layer} of what becomes integer.

    Args:
        graph: fixed shapes; its weights may have lost their names in folding.
        original: the model's graph, which has them; onnxruntime's fusions keep the node's name
            in front of a slash.
        operators: of Conv, MatMul and Gemm.
        keep: regular expressions of module names that stay float.
    """
    names = {layer.node: layer.name for layer in original.layers()}
    layers = {
        names.get(layer.node.partition("/")[0], layer.name): layer for layer in graph.layers()
    }
    return {
        n: x
        for n, x in layers.items()
        if x.op in operators and not any(re.search(k, n) for k in keep)
    }


def observe(
    graphs: Mapping[str, Graph],
    layers: Mapping[str, Mapping[str, Layer]],
    pipe: Pipeline,
    prompts: Sequence[str],
    scratch: Path,
    threads: int | None,
    **arguments: Any,
) -> dict[str, dict[str, Range]]:
    """Ranges of the layers' inputs and outputs, zero included, while the pipeline makes images of
    `prompts` (seed 1000 + i for prompt i), and edits them: the decoder is given other latents then.
    The images of an inpainting model are edits already.

    Args:
        graphs: part -> graph of batch 1.
    """
    seen = {
        p: {t: Histogram() for x in layers[p].values() for t in (x.input, x.output)} for p in graphs
    }

    def visit(part: str, step: int, name: str, x: np.ndarray) -> None:
        if name in seen[part]:
            seen[part][name].add(x, step, f"{part}/{name}")

    watched = {}
    for p in graphs:
        inputs = {i.name for i in graphs[p].proto.graph.input}
        session = _Echo(
            graphs[p].outputs(sorted(seen[p].keys() - inputs)),
            scratch / f"{p}.observed.onnx",
            threads,
        )
        watched[p] = RowByRow(Watched(pipe.artifact.spec(p), session, visit))
    made = with_networks(pipe, watched)
    call = cast(parity.CallArguments, arguments)
    given = asked(pipe, arguments.get("height"), arguments.get("width"))
    edits = "vae_encoder" in watched and not given
    strength = parity.edit_strength(pipe, call) if edits else None
    for i, prompt in enumerate(prompts):
        done = made(prompt, seed=1000 + i, **arguments, **given)
        if strength is not None:
            made(prompt, seed=1000 + i, image=done.images[0], strength=strength, **arguments)
        elif edits:
            watched["vae_encoder"](sample=image_input.pixels(done.images))
    return {p: {t: choose_range(h, "min-max") for t, h in seen[p].items()} for p in graphs}


class _Echo(NamedOutputs):
    """Also returns its inputs."""

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        return {**super().__call__(**inputs), **inputs}


def insert(graph: Graph, layers: Sequence[Layer], ranges: Mapping[str, Range]) -> Graph:
    """The graph with these layers in a16w8.

    Args:
        ranges: (low, high) of every layer's input and output.
    """
    work = _Inserter(graph, ranges, {x.node: x for x in layers})
    return fuse_gelu(work.done())


def fuse_gelu(graph: Graph) -> Graph:
    """GELU written out, x * 0.5 * (1 + erf(x / sqrt 2)), as one operator, in place. The HTP has no
    Erf. onnxruntime fuses it where x is one tensor; of an integer x it gives Div and Mul one
    DequantizeLinear each, and finds it no more.
    """
    makers, nodes = graph.producers(), list(graph.nodes)
    for i, node in enumerate(nodes):
        if node.op_type == "Mul" and (x := _gelu_input(graph, makers, node)):
            nodes[i] = helper.make_node("Gelu", [x], node.output, name=node.name, domain=DOMAIN)
    graph.replace(nodes)
    graph.drop_unread()  # what only the written out form needed
    return graph


def _gelu_input(graph: Graph, makers: Mapping[str, NodeProto], last: NodeProto) -> str:
    """x, where `last` is the product that ends a GELU; "" where it is another."""

    def factor(made: str, op: str, value: float) -> str:
        """The other operand of a node with one constant operand of this value."""
        node = makers.get(made)
        if node is None or node.op_type != op:
            return ""
        for a, b in zip(node.input, reversed(node.input), strict=True):
            if b in graph.weights and graph.weights[b].size == 1:
                found = float(graph.weights[b].array().reshape(()))
                return str(a) if np.isclose(found, value, rtol=1e-3) else ""
        return ""

    for x, half in zip(last.input, reversed(last.input), strict=True):
        erf = makers.get(factor(factor(half, "Mul", 0.5), "Add", 1.0))
        if erf is None or erf.op_type != "Erf":
            continue
        inner = erf.input[0]
        if x in (factor(inner, "Div", 2**0.5), factor(inner, "Mul", 2**-0.5)):
            return str(x)
    return ""


def parameters(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """scale float32 () and zero point uint16 () of a range, zero included."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32(max(high - low, 1e-7) / 65535)
    return np.array(scale), np.array(np.clip(np.round(-low / scale), 0, 65535), np.uint16)


class _Inserter:
    def __init__(self, graph: Graph, ranges: Mapping[str, Range], chosen: Mapping[str, Layer]):
        self.graph, self.out, self.ranges, self.chosen = graph, graph.copy(), ranges, chosen
        # every reader sees the integer value: else no unit is made
        self.results = {x.output for x in chosen.values()}
        self.final = {o.name for o in graph.proto.graph.output}
        self.made: set[str] = set()

    def done(self) -> Graph:
        nodes: list[NodeProto] = []
        for node in self.graph.nodes:
            made = NodeProto()
            made.CopyFrom(node)
            for i, x in enumerate(node.input):
                if x in self.results and x not in self.final:
                    made.input[i] = f"{x}/dq"
            nodes += (
                self._layer(made, self.chosen[node.name]) if node.name in self.chosen else [made]
            )
        self.out.replace(nodes)
        self.out.prune()
        self.out.proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        return self.out

    def _layer(self, node: NodeProto, layer: Layer) -> list[NodeProto]:
        new = (
            self._pair(layer.input, layer.input, f"{layer.input}/dq")
            if layer.input not in self.results
            else []
        )
        scale = self._weight(layer, new)
        node.input[0], node.input[1] = f"{layer.input}/dq", f"{layer.weight}/dq"
        if len(node.input) > 2:
            node.input[2] = self._bias(layer, node.input[2], scale, new)
        y = layer.output
        if y in self.final:
            node.output[0] = f"{y}/float"
            return [*new, node, *self._pair(y, f"{y}/float", y)]
        return [*new, node, *self._pair(y, y, f"{y}/dq")]

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.out.weights[name] = constant(value)
        return name

    def _pair(self, x: str, source: str, target: str) -> list[NodeProto]:
        """Quantize `source` with the parameters of `x`, and back; once for each tensor."""
        if f"{x}/q" in self.made:
            return []
        self.made.add(f"{x}/q")
        scale, zero = parameters(*self.ranges[x])
        held = [self._constant(f"{x}/scale", scale), self._constant(f"{x}/zero", zero)]
        return [
            helper.make_node(
                "QuantizeLinear", [source, *held], [f"{x}/q"], name=f"{x}/quantize", domain=DOMAIN
            ),
            helper.make_node(
                "DequantizeLinear",
                [f"{x}/q", *held],
                [target],
                name=f"{x}/dequantize",
                domain=DOMAIN,
            ),
        ]

    def _weight(self, layer: Layer, new: list[NodeProto]) -> np.ndarray:
        """int8 weight with its DequantizeLinear; returns the scale, () or for a convolution (output
        channels,).
        """
        w, name = self.graph.weights[layer.weight].array(), layer.weight
        along = tuple(i for i in range(w.ndim) if i != layer.axis) if layer.op == "Conv" else None
        scale = np.asarray(np.maximum(np.abs(w).max(along), 1e-8) / np.float32(127), np.float32)
        if f"{name}/dq" not in self.made:
            self.made.add(f"{name}/dq")
            steps = (
                scale.reshape([-1 if i == layer.axis else 1 for i in range(w.ndim)])
                if scale.ndim
                else scale
            )
            new.append(
                self._dequantize(
                    name, np.clip(np.round(w / steps), -127, 127).astype(np.int8), scale, layer.axis
                )
            )
        return scale

    def _bias(self, layer: Layer, name: str, scale: np.ndarray, new: list[NodeProto]) -> str:
        """int32 bias with its DequantizeLinear; returns the dequantized tensor."""
        both = np.asarray(scale * parameters(*self.ranges[layer.input])[0], np.float32)
        limit = 2**31 - 1
        q = np.clip(
            np.round(self.graph.weights[name].array().astype(np.float64) / both), -limit, limit
        ).astype(np.int32)
        new.append(self._dequantize(f"{layer.node}/bias", q, both, 0))
        return f"{layer.node}/bias/dq"

    def _dequantize(self, stem: str, q: np.ndarray, scale: np.ndarray, axis: int) -> NodeProto:
        zero = np.zeros(scale.shape, q.dtype)
        held = [
            self._constant(f"{stem}/{k}", v)
            for k, v in (("q", q), ("scale", scale), ("zero", zero))
        ]
        extra = {"axis": axis} if scale.ndim else {}
        return helper.make_node(
            "DequantizeLinear",
            held,
            [f"{stem}/dq"],
            name=f"{stem}/dequantize",
            domain=DOMAIN,
            **extra,
        )
