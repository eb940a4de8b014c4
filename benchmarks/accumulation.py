"""Where the error of an int8 network comes from: layer by layer as it adds up, and at other numbers
of steps than it was calibrated for.

    python -m benchmarks.accumulation FLOAT INT8 --label shape:bk-tiny --size 256 --steps 4 1 25

FLOAT and INT8 are folders: a model and what `sdlite quantize` made of it. The first of `--steps` is
the one that INT8 was calibrated for. Rows go to benchmarks/results/accumulation.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.env import environment
from sdlite.artifact import Artifact
from sdlite.instrument import Call, NamedOutputs, Tape, let_go, on_demand, with_networks
from sdlite.metrics import sqnr
from sdlite.onnx_graph import Graph

RESULTS = Path(__file__).parent / "results" / "accumulation.jsonl"
PROMPT = "a child blowing soap bubbles in a park"


def ratio(wanted: np.ndarray, got: np.ndarray) -> float:
    """SQNR in dB."""
    signal, noise = (
        np.square(wanted, dtype=np.float64).sum(),
        np.square(got - wanted.astype(np.float64)).sum(),
    )
    return sqnr(float(signal), float(noise))


def calls(folder: Path, steps: int, size: int | None, threads: int) -> dict[str, list[Call]]:
    """Every call of the float networks while they make one image."""
    pipe = on_demand(Artifact.open(folder), threads)
    tapes = {p: Tape(n, []) for p, n in pipe.networks.parts.items()}
    with_networks(pipe, dict(tapes))(
        PROMPT, seed=0, num_inference_steps=steps, guidance_scale=1.0, height=size, width=size
    )
    let_go(pipe)
    return {p: t.calls for p, t in tapes.items()}


def graph_of(folder: Path, precision: str, part: str) -> Graph:
    manifest = Artifact.open(folder).manifest
    assert manifest is not None
    return Graph.load(folder / manifest.variants[precision][part]["file"])


def layers(
    args: argparse.Namespace, part: str, inputs: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Each integer layer of a network in order: its error alone, on float inputs, and with all
    before it integer.
    """
    report = json.loads((args.int8 / "quantize-report.json").read_text())
    alone = {
        r["name"]: r["sqnr"] for r in report["networks"][part]["layers"] if r["scheme"] != "float"
    }
    floats, made = graph_of(args.float, "fp32", part), graph_of(args.int8, "int8-static", part)
    chosen = [x for x in floats.layers() if x.name in alone]
    names = sorted({x.output for x in chosen} & set(made.producers()))
    with tempfile.TemporaryDirectory() as tmp:
        want = NamedOutputs(floats.outputs(names), Path(tmp) / "float.onnx", args.threads)(**inputs)
        got = NamedOutputs(made.outputs(names), Path(tmp) / "int8.onnx", args.threads)(**inputs)
    rows = [
        {"layer": x.name, "alone": alone[x.name], "together": ratio(want[x.output], got[x.output])}
        for x in chosen
        if x.output in names
    ]
    end = floats.proto.graph.output[0].name
    return [
        *rows,
        {"layer": "the network's answer", "alone": None, "together": ratio(want[end], got[end])},
    ]


def at_steps(args: argparse.Namespace, steps: int) -> tuple[dict[str, Any], dict[str, list[Call]]]:
    """The integer networks on what the float ones are given when they make an image in so many
    steps.
    """
    held = calls(args.float, steps, args.size, args.threads)
    made = on_demand(Artifact.open(args.int8), args.threads, "int8-static")
    close = {}
    for p, network in made.networks.parts.items():
        wanted = [v.ravel() for _, y in held[p] for v in y.values()]
        got = [v.ravel() for x, _ in held[p] for v in network(**x).values()]
        close[p] = ratio(np.concatenate(wanted), np.concatenate(got))
        let_go(made)
    latents = held["vae_decoder"][0][0]["latent_sample"]
    return {
        "kind": "steps",
        "steps": steps,
        "decoder_input_std": float(latents.std()),
        "sqnr": close,
    }, held


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("float", type=Path)
    ap.add_argument("int8", type=Path)
    ap.add_argument("--label", required=True, help="name in the rows")
    ap.add_argument("--part", default="vae_decoder")
    ap.add_argument("--size", type=int, help="pixels; default: the model's own")
    ap.add_argument("--steps", nargs="+", type=int, default=[4])
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--out", type=Path, default=RESULTS)
    args = ap.parse_args()
    about = {
        "model": args.label,
        "size": args.size,
        **environment(),
        "command": "python -m benchmarks.accumulation " + " ".join(sys.argv[1:]),
    }
    rows = []
    for i, steps in enumerate(args.steps):
        row, held = at_steps(args, steps)
        rows.append(row)
        print(
            f"{steps:2d} steps: decoder's input has deviation {row['decoder_input_std']:.1f};",
            {p: f"{v:.1f} dB" for p, v in row["sqnr"].items()},
        )
        if i == 0:
            found = layers(args, args.part, held[args.part][-1][0])
            rows.append({"kind": "layers", "steps": steps, "part": args.part, "layers": found})
            for x in found:
                print(
                    f"  {x['layer']:<60} alone {x['alone'] or 0:5.1f}, together"
                    f" {x['together']:5.1f} dB"
                )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a") as f:
        f.writelines(json.dumps({**r, **about}) + "\n" for r in rows)


if __name__ == "__main__":
    main()
