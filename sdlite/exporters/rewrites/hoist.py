"""Fixed-schedule graphs: what depends on the timestep alone, on the prompt alone, and the rest, as
three graphs.

Over a sampling loop the time embedding and its projections are the same for every image, and the
cross-attention keys and values of a prompt are the same in every step. `hoist` cuts a UNet where
such values meet the latents; `sdlite.backends.fused` runs them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import helper

from sdlite.errors import ExportError
from sdlite.onnx_graph import Graph

# graph -> the one input it depends on
PARTS = {"time": "timestep", "prompt": "encoder_hidden_states"}


def hoist(
    graph: Graph,
    inputs: dict[str, np.ndarray],
    run: Callable[[Graph, dict[str, np.ndarray]], dict[str, np.ndarray]],
) -> dict[str, Graph]:
    """{"time", "prompt", "step"}: together equal to `graph`.

    Args:
        graph: a UNet of fixed shapes (a free batch ties the time embedding to the latents).
        inputs: one set of its inputs, to learn the shapes of what passes from graph to graph.
        run: runs a graph and returns its outputs by name.

    Raises:
        ExportError: nothing depends on the timestep alone or on the prompt alone.
    """
    seen: dict[str, frozenset[str]] = {i.name: frozenset([i.name]) for i in graph.proto.graph.input}
    for node in graph.nodes:
        needs = frozenset().union(*(seen.get(x, frozenset()) for x in node.input))
        seen |= dict.fromkeys(node.output, needs)
    results = {o.name for o in graph.proto.graph.output}
    meet: dict[str, list[str]] = {}
    for part, name in PARTS.items():
        alone = frozenset([name])
        crossing = {
            x
            for n in graph.nodes
            for x in n.input
            if seen.get(x) == alone and x != name and seen[n.output[0]] != alone
        }
        meet[part] = [o for n in graph.nodes for o in n.output if o in crossing]
        if not meet[part] or crossing & results:
            raise ExportError(
                f"no value of this network depends on {name} alone; are its shapes fixed?"
            )
    names = [x for part in PARTS for x in meet[part]]
    values = run(graph.outputs(names), inputs)
    out = {}
    for part, name in PARTS.items():
        out[part] = _cut(graph, [name], meet[part], seen, values, frozenset([name]).issuperset)
    hoisted = {frozenset([n]) for n in PARTS.values()}
    kept = [i.name for i in graph.proto.graph.input if i.name not in PARTS.values()]
    direct = [
        i
        for i in PARTS.values()
        if any(i in n.input and seen[n.output[0]] not in hoisted for n in graph.nodes)
    ]
    out["step"] = _cut(
        graph,
        [*kept, *direct, *names],
        [o.name for o in graph.proto.graph.output],
        seen,
        values,
        lambda n: n not in hoisted,
    )
    return out


def _cut(
    graph: Graph,
    inputs: list[str],
    outputs: list[str],
    seen: dict[str, frozenset[str]],
    values: dict[str, np.ndarray],
    belongs: Callable[[frozenset[str]], bool],
) -> Graph:
    part = graph.copy()
    part.replace([n for n in graph.nodes if belongs(seen[n.output[0]])])
    proto = part.proto.graph
    known = {v.name: v for v in (*graph.proto.graph.input, *graph.proto.graph.output)}
    known |= {
        k: helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for k, v in values.items()
        if k not in known
    }
    del proto.input[:], proto.output[:], proto.value_info[:]
    proto.input.extend(known[x] for x in inputs)
    proto.output.extend(known[x] for x in outputs)
    part.prune()
    return part
