"""Where an int8 network's error comes from: the same layers rounded in torch, without our graphs.

    python -m benchmarks.rounding FOLDER PART --label NAME [--int8 INT8] [--size 256] [--steps 2]
        [--other openvino]

FOLDER is a converted model. Its torch modules are given what the float pipeline gives them (a text
encoder: tokens of two prompts), once as they are and once with the weights and inputs of the
quantized layers rounded as the scheme says: weights to 7 bits a channel, inputs to 8 bits, of
int8-dynamic in the range that each row has, of int8-static in the range of least squared error over
these very calls, where convolutions' outputs are rounded too. That is the best that the scheme can
do without smoothing. `graph` is the network of INT8, what `sdlite quantize` made of FOLDER (without
it: the int8-dynamic graph of that part), on the same inputs: where it is as close to float as
`all`, the rounding is the cause, and the kinds of layers, rounded one kind at a time, say where.

`again` is that graph to itself, its float inputs changed by 1e-5 of their size: as close as two
engines can be expected to be, since a value that falls to another of the 256 levels changes what
comes after it. `other` is the graph on another backend, in float32, to it. `calls` has these, and
of int8-static `own_ranges`, call by call: the last is `all` with ranges of that call alone,
so where it is higher the calls differ in size. SQNR in dB; rows go to
benchmarks/results/rounding.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.env import environment
from sdlite import Pipeline, image_input, tracing
from sdlite.artifact import Artifact
from sdlite.instrument import NamedOutputs, Tape, controlled, let_go, on_demand, with_networks
from sdlite.metrics import sqnr
from sdlite.onnx_graph import Graph
from sdlite.quant import dynamic
from sdlite.quant.observe import Histogram, choose_range

RESULTS = Path(__file__).parent / "results" / "rounding.jsonl"
PROMPTS = ["two cats on a red sofa", ""]
KINDS = {
    "attention q, k": r"\.to_[qk]$|[qk]_proj$",
    "attention v": r"\.to_v$|v_proj$",
    "attention out": r"\.to_out\.0$|out_proj$",
    "feed-forward in": r"\.net\.0\.proj$|fc1$",
    "feed-forward out": r"\.net\.2$|fc2$",
    "projections": r"\.proj_(in|out)$",
    "convolutions": r"conv|upsamplers|downsamplers",
}
Inputs = dict[str, np.ndarray]
Answers = list[dict[str, np.ndarray]]


@dataclass
class Job:
    """One network: its torch module, its calls, and which of its layers the graph has in int8.

    Attributes:
        graph: the int8 network's answers.
        again: its answers to float inputs that are changed by 1e-5 of their size.
        other: those of another backend, where one was asked for.
        tables: embeddings that are int8 rows.
    """

    net: nn.Module
    names: list[str]
    calls: list[Inputs]
    static: bool
    layers: dict[str, nn.Module]
    tables: list[nn.Module]
    graph: Answers = field(default_factory=list)
    again: Answers = field(default_factory=list)
    other: Answers = field(default_factory=list)

    def answers(self) -> Answers:
        """What the module answers now."""
        out = []
        for given in self.calls:
            made = self.net(*(torch.from_numpy(np.array(x)) for x in given.values()))
            made = made if isinstance(made, tuple) else (made,)
            out.append({k: v.numpy().copy() for k, v in zip(self.names, made, strict=True)})
        return out


def closeness(wanted: Answers, got: Answers) -> float:
    """SQNR in dB over all calls; of several outputs the lowest."""
    signal, noise = defaultdict[str, float](float), defaultdict[str, float](float)
    for right, made in zip(wanted, got, strict=True):
        for name in made.keys() & right.keys():
            signal[name] += float(np.square(right[name], dtype=np.float64).sum())
            error = made[name].astype(np.float64) - right[name]
            noise[name] += float(np.square(error).sum())
    return min(sqnr(signal[name], noise[name]) for name in signal)


def rounded(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`x` on 256 levels of ranges, zero included."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-12)
    zero = torch.round(-low / scale)
    return (torch.clamp(torch.round(x / scale) + zero, 0, 255) - zero) * scale


def shaken(given: Inputs, amount: float = 1e-5) -> Inputs:
    """Float arrays times one plus normal noise of this deviation."""
    rng = np.random.default_rng(0)
    return {
        k: (v * (1 + amount * rng.standard_normal(v.shape))).astype(v.dtype)
        if v.dtype.kind == "f" and v.ndim
        else v
        for k, v in given.items()
    }


def by_row(x: Tensor) -> Tensor:
    """Rounded in each row's own range."""
    flat, shape = x.reshape(len(x), -1), [-1] + [1] * (x.ndim - 1)
    return rounded(x, flat.min(1).values.reshape(shape), flat.max(1).values.reshape(shape))


def weights_of(w: Tensor, levels: int) -> nn.Parameter:
    """Rounded by output channel, symmetric."""
    scale = w.reshape(len(w), -1).abs().max(1).values.clamp(min=1e-8) / levels
    scale = scale.reshape([-1] + [1] * (w.ndim - 1))
    return nn.Parameter(torch.clamp(torch.round(w / scale), -levels, levels) * scale, False)


def ranges(job: Job) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """(layer, "in" or "out") -> the range of least squared error over the calls."""
    seen = defaultdict[tuple[str, str], Histogram](Histogram)

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            seen[name, "in"].add(given[0].numpy())
            seen[name, "out"].add(made.numpy())

        return hook

    hooks = [m.register_forward_hook(look(n)) for n, m in job.layers.items()]
    job.answers()
    for hook in hooks:
        hook.remove()
    found = {k: choose_range(h, "mse") for k, h in seen.items()}
    return {k: (torch.tensor(low), torch.tensor(high)) for k, (low, high) in found.items()}


class Rounding:
    """Rounds layers of a job's module for a while."""

    def __init__(self, job: Job):
        self.job, self.ranges = job, ranges(job) if job.static else {}

    @contextmanager
    def __call__(
        self,
        kind: str | None,
        weights: bool = True,
        inputs: bool = True,
        levels: int = 63,
        tables: bool = False,
    ) -> Iterator[None]:
        """`kind`: of the layers' names, a regular expression; None: no layer."""
        held: list[tuple[nn.Module, Tensor]] = []
        hooks: list[Any] = []
        for name, m in self.job.layers.items():
            if kind is None or not re.search(kind, name):
                continue
            if weights:
                held.append((m, m.weight))
                m._parameters["weight"] = weights_of(m.weight, levels)
            if inputs:
                hooks += self._hooks(name, m)
        for m in self.job.tables if tables else ():
            held.append((m, m.weight))
            m._parameters["weight"] = weights_of(m.weight, 127)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for m, weight in held:
                m._parameters["weight"] = weight

    def _hooks(self, name: str, m: nn.Module) -> list[Any]:
        if not self.job.static:
            return [m.register_forward_pre_hook(lambda _, x: (by_row(x[0]), *x[1:]))]
        low, high = self.ranges[name, "in"]
        out = [m.register_forward_pre_hook(lambda _, x: (rounded(x[0], low, high), *x[1:]))]
        if isinstance(m, nn.Conv2d):
            a, b = self.ranges[name, "out"]
            out.append(m.register_forward_hook(lambda _m, _x, y: rounded(y, a, b)))
        return out


def calls(artifact: Artifact, part: str, args: argparse.Namespace) -> list[Inputs]:
    """What a network is given: tokens of the prompts, or what the float pipeline gives it."""
    pipe = on_demand(artifact, args.threads)
    if part in pipe.tokenizers:
        return [{"input_ids": pipe.tokenize(PROMPTS, part)}]
    tapes = {p: Tape(n, []) for p, n in pipe.networks.parts.items()}
    size = {"height": args.size, "width": args.size}
    more = controlled(pipe, args.size, args.size)
    made = with_networks(pipe, dict(tapes))(
        PROMPTS[0], seed=0, num_inference_steps=args.steps, **size, **more
    )
    if "vae_encoder" in tapes:
        tapes["vae_encoder"](sample=image_input.pixels(made.images))
    let_go(pipe)
    return [given for given, _ in tapes[part].calls]


def shaky(given: list[Inputs]) -> list[Inputs]:
    """All calls, shaken; none where they are tokens, which cannot be."""
    return [shaken(x) for x in given if any(v.dtype.kind == "f" for v in x.values())]


def run(args: argparse.Namespace, backend: str, given: list[Inputs]) -> Answers:
    """What the quantized network answers on a backend; its float layers compute in float32."""
    arithmetic = "float32" if backend == "openvino" else None
    pipe = Pipeline.from_pretrained(
        args.int8, backend=backend, threads=args.threads, arithmetic=arithmetic
    )
    network = pipe.network(args.part)
    return [dict(network(**x)) for x in given]


def job(args: argparse.Namespace) -> Job:
    """The network of the command line, and what its int8 graph answers."""
    artifact = Artifact.open(args.folder)
    spec = artifact.spec(args.part)
    given, outputs = calls(artifact, args.part, args), [t.name for t in spec.outputs]
    if args.int8:
        report = json.loads((args.int8 / "quantize-report.json").read_text())
        static, made = report["precision"] == "int8-static", report["networks"][args.part]
        rows, tables = made["layers"], made["rewrites"]["embeddings"]
        graph, again = run(args, "onnxruntime", given), run(args, "onnxruntime", shaky(given))
        other = run(args, args.other, given) if args.other else []
    else:
        loaded = Graph.load(artifact.graph("fp32", args.part)).answers(outputs)
        built, static = dynamic.build_part(loaded), False
        rows, tables = built.layers, built.rewrites["embeddings"]
        with tempfile.TemporaryDirectory() as tmp:
            session = NamedOutputs(built.graph, Path(tmp) / "int8.onnx", args.threads)
            alone = [{k: x[i : i + 1] for k, x in g.items()} for g in given for i in range(2)]
            graph, given, other = [session(**x) for x in alone], alone, []
            again = [session(**x) for x in shaky(alone)]
    net = tracing.network(args.folder, spec).eval()
    modules = {n.removeprefix("module."): m for n, m in net.named_modules()}
    names = {re.sub(r"[@#].*", "", r["name"]) for r in rows if r["scheme"] != "float"}
    layers = {n: modules[n] for n in modules if n in names}
    # a VAE's attention of a folder from before diffusers 0.16 has other names in the graph
    if lost := sorted(n for n in names - set(layers) if not n.startswith("val_")):
        raise RuntimeError(f"the module has no {lost[:3]}")
    held = [modules[n] for n in tables if n in modules]
    names_out = tracing.names_of(spec)
    return Job(net, names_out, given, static, layers, held, graph, again, other)


def measured(found: Job) -> dict[str, Any]:
    """SQNR of the graph, of all layers rounded in torch, and of some of them."""
    floats = found.answers()
    floats = [{k: x[k] for k in g} for x, g in zip(floats, found.graph, strict=True)]
    rounding = Rounding(found)

    def ratio(kind: str | None, **how: Any) -> float:
        with rounding(kind, **how):
            return closeness(floats, found.answers())

    row: dict[str, Any] = {
        "graph": closeness(floats, found.graph),
        "all": ratio("", tables=True),
        "weights": ratio("", inputs=False),
        "inputs": ratio("", weights=False),
        "weights_8_bits": ratio("", levels=127, tables=True),
    }
    if found.tables:
        row["embeddings"] = ratio(None, tables=True)
    beside = {"again": found.again, "other": found.other}
    row |= {k: closeness(found.graph, made) for k, made in beside.items() if made}
    row["calls"] = by_call(found, floats)
    row["kinds"] = {
        label: {"both": ratio(kind), "inputs": ratio(kind, weights=False)}
        for label, kind in KINDS.items()
        if any(re.search(kind, n) for n in found.layers)
    }
    return row


def by_call(found: Job, floats: Answers) -> dict[str, list[float]]:
    """SQNR of each call: of the graph, of those beside it, and rounded in ranges of that call."""
    pairs = {
        "graph": (floats, found.graph),
        "again": (found.graph, found.again),
        "other": (found.graph, found.other),
    }
    rows = {
        k: [closeness([x], [y]) for x, y in zip(*both, strict=True)]
        for k, both in pairs.items()
        if both[1]
    }
    if found.static:
        rows["own_ranges"] = []
        for given, right in zip(found.calls, floats, strict=True):
            alone = dataclasses.replace(found, calls=[given])
            with Rounding(alone)("", tables=True):
                rows["own_ranges"].append(closeness([right], alone.answers()))
    return rows


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("folder", type=Path)
    ap.add_argument("part")
    ap.add_argument("--label", required=True, help="name in the rows")
    ap.add_argument("--int8", type=Path, help="what sdlite quantize made of it")
    ap.add_argument("--other", choices=["openvino"], help="another backend, beside onnxruntime")
    ap.add_argument("--size", type=int, default=256, help="pixels")
    ap.add_argument("--steps", type=int, default=2)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--out", type=Path, default=RESULTS)
    args = ap.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    found = job(args)
    row = {
        "model": args.label,
        "part": args.part,
        "precision": "int8-static" if found.static else "int8-dynamic",
        "layers": len(found.layers),
        **measured(found),
    }
    command = "python -m benchmarks.rounding " + " ".join(sys.argv[1:])
    with args.out.open("a") as f:
        f.write(json.dumps({**row, **environment(), "command": command}) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
