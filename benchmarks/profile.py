"""Where the time of a picture goes: by stage, by kind of operator in each network, and what is left
for everything else.

    python -m benchmarks.profile shape:bk-tiny --engines sdlite-ort sdlite-openvino \
        --precisions fp32 int8-static [--size 512]
    # OpenVINO: one shape or any, fused subgraphs or not, and how exact each is:
    python -m benchmarks.profile shape:bk-tiny --variants

Engines count their own operators (onnxruntime's profile, OpenVINO's performance counters), in a run
after the one whose stages are timed, since counting costs time. Rows go to
benchmarks/results/profile.jsonl; the table on screen is markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.env import environment
from benchmarks.peers import PROMPT, model_folder, quantized
from sdlite.backends import RowByRow, rows

RESULTS = Path(__file__).parent / "results" / "profile.jsonl"
BACKENDS = {"sdlite-ort": "onnxruntime", "sdlite-openvino": "openvino"}


class Watched:
    """A network that remembers its seconds and its last inputs."""

    def __init__(self, network: Any):
        self.network, self.seconds, self.inputs = network, 0.0, {}

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        out: dict[str, np.ndarray] = self.network(**inputs)
        self.seconds += time.perf_counter() - start
        self.inputs = inputs
        return out


def open_pipe(case: Case, folder: Path) -> Any:
    import sdlite

    precision, arithmetic = (
        ("fp32", "bfloat16") if case.precision == "bf16" else (case.precision, None)
    )
    return sdlite.Pipeline.from_pretrained(
        folder,
        precision=precision,
        backend=BACKENDS[case.engine],
        threads=case.threads,
        arithmetic=arithmetic,
    )


def picture(pipe: Any, case: Case) -> dict[str, float]:
    size = {"height": case.size_px, "width": case.size_px}
    out = pipe(
        [PROMPT] * case.batch,
        seed=0,
        sampler="ddim",
        num_inference_steps=case.steps,
        guidance_scale=case.guidance,
        **size,
    )
    timings: dict[str, float] = out.timings
    return timings


def stage_seconds(pipe: Any, case: Case) -> tuple[dict[str, float], dict[str, Watched]]:
    """Seconds of one warm picture: each network, and `glue`, which is the rest of the call (tokens,
    noise, sampler, pixels, PIL).
    """
    picture(pipe, case)
    watched = {p: Watched(n) for p, n in pipe.networks.parts.items()}
    pipe.networks.parts.update(watched)
    total = picture(pipe, case)["total"]
    seconds = {p: w.seconds for p, w in watched.items()}
    return {**seconds, "glue": total - sum(seconds.values()), "total": total}, watched


def alone(network: Any, inputs: dict[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
    """The compiled network below, and what it is called with: where rows go one by one, the
    first.
    """
    return (
        (network.network, next(rows(inputs)))
        if isinstance(network, RowByRow)
        else (network, inputs)
    )


def openvino_kinds(network: Any, inputs: dict[str, np.ndarray]) -> Counter[str]:
    """Seconds by kind and kernel type of one call; the network is compiled again with counters
    on.
    """
    network.options["PERF_COUNT"] = True
    network.requests.clear()
    network(**inputs), network(**inputs)
    out: Counter[str] = Counter()
    for node in next(iter(network.requests.values())).profiling_info:
        if node.status.name == "EXECUTED":
            out[f"{node.node_type} {node.exec_type.rsplit('_', 1)[-1]}"] += (
                node.real_time.total_seconds()
            )
    return out


def ort_kinds(path: Path, inputs: dict[str, np.ndarray], threads: int) -> Counter[str]:
    """Seconds by operator of the second call of a session with its profile on."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as tmp:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.enable_profiling, options.profile_file_prefix = True, str(Path(tmp) / "profile")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        session.run(None, inputs)
        session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
    start = max(e["ts"] for e in events if e["name"] == "model_run")  # the second call
    out: Counter[str] = Counter()
    for e in events:
        if e.get("cat") == "Node" and e["name"].endswith("_kernel_time") and e["ts"] >= start:
            out[e["args"]["op_name"]] += e["dur"] / 1e6
    return out


def profile(case: Case, folder: Path) -> dict[str, Any]:
    pipe = open_pipe(case, folder)
    seconds, watched = stage_seconds(pipe, case)
    files = {n.part: folder / n.file for n in pipe.report.networks}
    kinds = {}
    for p, w in watched.items():
        found = (
            openvino_kinds(*alone(w.network, w.inputs))
            if case.engine == "sdlite-openvino"
            else ort_kinds(files[p], w.inputs, case.threads)
        )
        kinds[p] = dict(found.most_common())
    return {"seconds": seconds, "kinds": kinds}


def table(row: dict[str, Any]) -> list[str]:
    """Stages, and the kinds that take at least one part in fifty of their network."""
    total = row["seconds"]["total"]
    lines = ["| stage | seconds | share | operators (share of the network) |", "|---|---|---|---|"]
    for stage, s in row["seconds"].items():
        kinds = row["kinds"].get(stage, {})
        whole = sum(kinds.values()) or 1.0
        named = ", ".join(f"{k} {v / whole:.0%}" for k, v in kinds.items() if v / whole >= 0.02)
        lines.append(f"| {stage} | {s:.3f} | {s / total:.0%} | {named} |")
    return lines


WAYS = [  # (hint, shapes, options): the first is what the others are compared with
    (hint, shapes, options)
    for hint in ("f32", "bf16")
    for shapes in ("any", "fixed", "free batch")
    for options in ({}, {"SNIPPETS_MODE": "DISABLE"})
]


def variants(case: Case, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """The UNet and the VAE decoder on OpenVINO, compiled in each of WAYS; seconds, and SQNR in dB
    to float32 of any shape.
    """
    pipe = open_pipe(case, folder)
    _, watched = stage_seconds(pipe, replace(case, steps=1))
    rows = []
    for part in ("unet", "vae_decoder"):
        network, inputs = alone(watched[part].network, watched[part].inputs)
        network.requests.clear()  # memory
        want: np.ndarray | None = None
        for hint, shapes, extra in WAYS:
            out, samples = compiled_as(network, inputs, hint, shapes, extra, repeats)
            want = out if want is None else want
            noise = ((out - want) ** 2).mean()
            sqnr = None if noise == 0 else float(10 * np.log10((want**2).mean() / noise))
            rows.append(
                {
                    "kind": "variant",
                    "part": part,
                    "hint": hint,
                    "shapes": shapes,
                    "options": extra,
                    "samples_seconds": samples,
                    "sqnr_db": sqnr,
                }
            )
            print(
                f"{part} {hint} {shapes} {extra}: {np.median(samples):.4f} s, SQNR {sqnr}",
                flush=True,
            )
    return rows


def compiled_as(
    network: Any,
    inputs: dict[str, np.ndarray],
    hint: str,
    shapes: str,
    extra: dict[str, str],
    repeats: int,
) -> tuple[np.ndarray, list[float]]:
    """The network's output (float64) and seconds of `repeats` calls after one."""
    graph = network.core.read_model(network.path)
    if shapes != "any":
        free = shapes == "free batch"
        graph.reshape(
            {k: [-1, *v.shape[1:]] if free and v.ndim else list(v.shape) for k, v in inputs.items()}
        )
    request = network.core.compile_model(
        graph, "CPU", {**network.options, "INFERENCE_PRECISION_HINT": hint, **extra}
    ).create_infer_request()
    samples = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        request.infer(inputs)
        samples.append(time.perf_counter() - start)
    return request.get_tensor(network.outputs[0]).data.astype(np.float64), samples[1:]


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("model", help="embedded name or shape:NAME")
    ap.add_argument("--engines", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    ap.add_argument(
        "--precisions",
        nargs="+",
        default=["fp32", "int8-static"],
        help="fp32, bf16 (openvino), int8-static, int8-dynamic",
    )
    ap.add_argument("--size", type=int, default=512)
    ap.add_argument("--steps", type=int, default=4)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument(
        "--variants", action="store_true", help="compare ways to compile for OpenVINO instead"
    )
    ap.add_argument("--repeats", type=int, default=3, help="of --variants")
    ap.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sdlite-bench")
    ap.add_argument("--out", type=Path, default=RESULTS)
    args = ap.parse_args()
    about = {**environment(), "command": "python -m benchmarks.profile " + " ".join(sys.argv[1:])}
    for engine in ["sdlite-openvino"] if args.variants else args.engines:
        for precision in args.precisions:
            if precision == "bf16" and engine == "sdlite-ort":
                continue
            case = Case(
                args.model, engine, args.steps, args.size, precision=precision, threads=args.threads
            )
            folder = quantized(case, model_folder(case, args.cache), args.cache)
            head = {
                "model": args.model,
                "engine": engine,
                "precision": precision,
                "size_px": args.size,
                "steps": args.steps,
                "threads": args.threads,
            }
            rows = (
                variants(case, folder, args.repeats)
                if args.variants
                else [{"kind": "profile", **profile(case, folder)}]
            )
            with open(args.out, "a") as f:
                f.writelines(json.dumps({**head, **r, **about}) + "\n" for r in rows)
            if not args.variants:
                print(f"\n{case.key}\n", *table(rows[0]), sep="\n", flush=True)


if __name__ == "__main__":
    main()
