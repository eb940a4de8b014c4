"""Static int8: ranges of activations measured in the student's own sampling loop, weights rounded
to them, and each layer's own error, by which the search puts layers back to float.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from onnx import NodeProto

from sdlite.instrument import NamedOutputs, Visit
from sdlite.metrics import sqnr
from sdlite.onnx_graph import Graph, Layer
from sdlite.quant import insert, rewrite, summaries
from sdlite.quant.calibrate import walk
from sdlite.quant.candidate import LayerRow, Part, Parts, Work
from sdlite.quant.observe import ChannelMax, Histogram, choose_range

Graphs = dict[str, Graph]
Layers = dict[str, list[Layer]]
Ranges = dict[str, dict[str, insert.Range]]  # part -> tensor -> (low, high)
TEXT = "encoder_hidden_states"
SAMPLES = 4  # images that rewrites and the layers' own errors look at, at most


def quantizable(graph: Graph, keep: Sequence[str]) -> list[Layer]:
    """Layers of a graph whose names match none of the regular expressions."""
    return [layer for layer in graph.layers() if not any(re.search(k, layer.name) for k in keep)]


class StaticBuilder:
    """Builds static candidates of one float model: calibrated once, inserted for each candidate."""

    def __init__(self, work: Work, scheme: insert.Scheme, keep: Mapping[str, Sequence[str]]):
        """Rewrites the graphs, measures ranges and each layer's error: three passes of the loop."""
        self.scheme = scheme
        self.graphs = {p: work.graph(p) for p in work.parts}
        self.float_bytes = {p: g.total_bytes() for p, g in self.graphs.items()}
        self.parameters = {p: float_parameters(g) for p, g in self.graphs.items()}
        self.rewrites = _rewrite(work, self.graphs, keep)
        self.layers = {p: quantizable(g, keep[p]) for p, g in self.graphs.items()}
        self.seen = _histograms(work, self.graphs, self.layers)
        work.let_go()
        self.ranges = _ranges(work, self.seen, scheme)
        self.ratios = _layer_sqnr(work, self.graphs, self.layers, self.ranges, scheme)
        work.let_go()
        self.embeddings = {p: rewrite.integer_embeddings(g) for p, g in self.graphs.items()}
        self.order = sorted(self.ratios, key=lambda k: self.ratios[k])
        self.sizes = {
            f"{p}/{layer.name}": layer.parameters for p in self.graphs for layer in self.layers[p]
        }

    def build(self, back: Collection[str]) -> Parts:
        """The networks with the layers of `back` ("part/name") in float."""
        floats = set(back)
        return {p: self._part(p, floats) for p in self.graphs}

    def _part(self, part: str, back: set[str]) -> Part:
        chosen = [layer for layer in self.layers[part] if f"{part}/{layer.name}" not in back]
        embeddings = self.embeddings[part]
        integer = sum(layer.parameters for layer in chosen) + sum(embeddings.values())
        return Part(
            graph=insert.insert(self.graphs[part], chosen, self.ranges[part], self.scheme),
            scheme=self.scheme.name,
            arithmetic=f"int8 ({self.scheme.name}), rest float32",
            float_bytes=self.float_bytes[part],
            float_share=1 - integer / self.parameters[part],
            rewrites={**self.rewrites[part], "embeddings": embeddings},
            layers=[self._row(part, layer, layer in chosen) for layer in self.layers[part]],
        )

    def _row(self, part: str, layer: Layer, integer: bool) -> LayerRow:
        h, ranges = self.seen[part][layer.input], self.ranges[part]
        ratio = self.ratios[f"{part}/{layer.name}"]
        row: LayerRow = {
            "name": layer.name,
            "op": layer.op,
            "parameters": layer.parameters,
            "scheme": self.scheme.name if integer else "float",
            "input_seen": [h.low, h.high],
            "input_range": list(ranges[layer.input]),
            "sqnr": None if np.isinf(ratio) else ratio,
            "input_seen_per_step": [list(h.steps[s]) for s in sorted(h.steps)],
        }
        if layer.output in ranges:
            row["output_range"] = list(ranges[layer.output])
        return row


def float_parameters(graph: Graph) -> int:
    """How many float32 numbers a graph's constants have."""
    return sum(w.size for w in graph.weights.values() if w.dtype == np.float32)


def _session(work: Work, graph: Graph, name: str) -> NamedOutputs:
    return NamedOutputs(graph, work.scratch / f"{name}.onnx", work.threads)


def _rewrite(
    work: Work, graphs: Graphs, keep: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, object]]:
    """Split and smooth the graphs in place, from one look at a few samples; what was done."""
    seen: dict[str, dict[str, ChannelMax]] = {}
    sessions: dict[str, NamedOutputs] = {}
    told: dict[tuple[str, str], Callable[[np.ndarray], None]] = {}
    for p, graph in graphs.items():
        widths, halves = _linear_inputs(graph), _halves(graph)
        seen[p] = {x: ChannelMax() for x in widths.keys() | halves}
        watched = summaries.shapes(summaries.channels(graph, widths), halves)
        told |= {(p, summaries.channels_name(x)): seen[p][x].add_channels for x in widths}
        told |= {(p, summaries.shape_name(x)): seen[p][x].add_shape for x in halves}
        if TEXT in widths:
            watched = summaries.tokens(watched, TEXT)
            told[p, summaries.tokens_name(TEXT)] = seen[p][TEXT].add_tokens
        sessions[p] = _session(work, watched, f"{p}-rewrite")

    def visit(part: str, _: int, name: str, x: np.ndarray) -> None:
        if tell := told.get((part, name)):
            tell(x)

    _walk(work, sessions, visit, SAMPLES, "outliers")
    sessions.clear()
    work.let_go()
    alpha = work.calibration.smooth_alpha
    return {p: _changed(g, seen[p], alpha, keep[p]) for p, g in graphs.items()}


def _linear_inputs(graph: Graph) -> dict[str, int]:
    """What Linear layers read -> its channels."""
    return {
        layer.input: graph.weights[layer.weight].shape[1 - layer.axis]
        for layer in graph.layers()
        if layer.op != "Conv"
    }


def _halves(graph: Graph) -> set[str]:
    """Tensors that are concatenated for a convolution."""
    producers = graph.producers()
    made: list[NodeProto] = [
        producers[layer.input]
        for layer in graph.layers()
        if layer.op == "Conv" and layer.input in producers
    ]
    return {x for n in made if n.op_type == "Concat" for x in n.input}


def _changed(
    graph: Graph, seen: Mapping[str, ChannelMax], alpha: float | None, keep: Sequence[str]
) -> dict[str, object]:
    """Split and smooth one graph in place; what was done."""
    shapes = {x: s.shape for x, s in seen.items() if s.shape}
    split = rewrite.split_concat(graph, shapes)
    text = seen.get(TEXT)
    outlier = text is not None and text.first_token > 2 * text.other_tokens
    first = rewrite.split_first_token(graph, TEXT) if outlier else []
    smooth = {} if alpha is None else rewrite.smooth(graph, seen, alpha, keep=keep)
    return {"split_concat": split, "split_first_token": first, "smooth": smooth}


def _walk(
    work: Work, sessions: dict[str, NamedOutputs], visit: Visit, most: int | None, text: str
) -> None:
    """Run the calibration's images through sessions, `most` of them."""
    samples = work.calibration.samples if most is None else min(most, work.calibration.samples)
    run = walk(work.pipe, work.calibration, sessions, visit, samples)
    for _ in work.bar(run, 2 * samples, text):
        pass


def _histograms(work: Work, graphs: Graphs, layers: Layers) -> dict[str, dict[str, Histogram]]:
    """What the layers' inputs and the convolutions' outputs look like: part -> tensor -> counts."""
    out: dict[str, dict[str, Histogram]] = {}
    sessions: dict[str, NamedOutputs] = {}
    for p in graphs:
        inputs = {layer.input for layer in layers[p]}
        wanted = inputs | {layer.output for layer in layers[p] if layer.op == "Conv"}
        out[p] = {t: Histogram() for t in sorted(wanted)}
        sessions[p] = _session(work, summaries.values(graphs[p], out[p]), f"{p}-observe")
    tensors = {(p, summaries.values_name(t)): t for p in out for t in out[p]}

    def visit(part: str, step: int, name: str, x: np.ndarray) -> None:
        if t := tensors.get((part, name)):
            out[part][t].add_some(float(x[0]), float(x[1]), x[2:], step, f"{part}/{t}")

    _walk(work, sessions, visit, None, "ranges")
    # the text encoder is cheap and its words are many: it sees every calibration prompt, not only
    # those that images were made of
    judged = set(work.gate.shown)
    for prompt in [p for p in work.calibration.shown if p not in judged][:512]:
        for part in work.pipe.tokenizers:
            ids = work.pipe.tokenize([prompt], part)
            for name, x in sessions[part](input_ids=ids).items():
                visit(part, 0, name, x)
    return out


def _ranges(work: Work, seen: dict[str, dict[str, Histogram]], scheme: insert.Scheme) -> Ranges:
    c, symmetric = work.calibration, scheme.activation == "int8"
    return {
        p: {t: choose_range(h, c.observer, c.percentile, symmetric) for t, h in seen[p].items()}
        for p in seen
    }


def _layer_sqnr(
    work: Work, graphs: Graphs, layers: Layers, ranges: Ranges, scheme: insert.Scheme
) -> dict[str, float]:
    """Each layer alone, on float inputs: dB by "part/module"."""
    sessions = {}
    for p in graphs:
        twin = insert.insert(graphs[p], layers[p], ranges[p], scheme, twin=True)
        sessions[p] = _session(work, twin, f"{p}-twin")
    sums: dict[tuple[str, str], float] = {}

    def visit(part: str, _: int, name: str, x: np.ndarray) -> None:
        if x.ndim == 0:
            sums[part, name] = sums.get((part, name), 0.0) + float(x)

    _walk(work, sessions, visit, SAMPLES, "layer by layer")
    return {
        f"{p}/{layer.name}": sqnr(
            sums[p, insert.signal_name(layer)], sums[p, insert.noise_name(layer)]
        )
        for p in graphs
        for layer in layers[p]
    }
