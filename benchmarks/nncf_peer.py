"""Our static int8 file against OpenVINO's own quantiser (NNCF), both on OpenVINO: closeness to
float, bytes and seconds of a UNet call.

    python -m benchmarks.nncf_peer emoji                     # extra: bench, and `pip install nncf`
    python -m benchmarks.nncf_peer shape:bk-tiny --size 512

Same float graphs, same calibration pictures (the student's own loop), same engine, one process.
NNCF is run as its documentation says for a UNet that is calibrated on its own inputs: mixed preset,
transformer model type, bias correction off for the UNet's size. Rows go to
benchmarks/results/nncf.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.env import environment
from benchmarks.quantise import PROMPTS
from benchmarks.run import model_folder

RESULTS = Path(__file__).parent / "results" / "nncf.jsonl"


def record(
    pipe: Any, prompts: list[str], arguments: dict[str, Any], limit: int
) -> dict[str, list[dict[str, np.ndarray]]]:
    """Inputs of each network while `pipe` makes pictures: at most `limit` of each, spread over
    steps and prompts.
    """
    from sdlite.instrument import with_networks

    seen: dict[str, list[dict[str, np.ndarray]]] = {p: [] for p in pipe.artifact.parts}

    def watch(part: str) -> Any:
        network = pipe.networks.parts[part]

        def call(**inputs: np.ndarray) -> dict[str, np.ndarray]:
            seen[part].append({k: v.copy() for k, v in inputs.items()})
            out: dict[str, np.ndarray] = network(**inputs)
            return out

        return call

    watched = with_networks(pipe, {p: watch(p) for p in seen})
    for i, prompt in enumerate(prompts):
        watched(prompt, seed=1000 + i, **arguments)
    rng = np.random.default_rng(0)
    return {p: [v[i] for i in rng.permutation(len(v))[:limit]] for p, v in seen.items()}


def by_nncf(
    artifact: Any, seen: dict[str, list[dict[str, np.ndarray]]], out: Path
) -> dict[str, Path]:
    """Each float graph quantised by NNCF and saved as OpenVINO IR."""
    import nncf
    import openvino as ov

    files = {}
    for part, inputs in seen.items():
        model = ov.Core().read_model(
            artifact.folder / artifact.manifest.variants["fp32"][part]["file"]
        )
        kind = None if part == "vae_decoder" else nncf.ModelType.TRANSFORMER
        made = nncf.quantize(
            model,
            nncf.Dataset(inputs),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=kind,
            subset_size=len(inputs),
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
        )
        files[part] = out / f"{part}.xml"
        ov.save_model(made, files[part], compress_to_fp16=False)
    return files


def unet_seconds(networks: Any, inputs: dict[str, np.ndarray], repeats: int = 15) -> list[float]:
    samples = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        networks.unet(**inputs)
        samples.append(time.perf_counter() - begin)
    return samples[2:]


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("model")
    ap.add_argument("--size", type=int, default=512, help="pixels, for shapes")
    ap.add_argument("--samples", type=int, help="calibration pictures; default 16, shapes 2")
    ap.add_argument(
        "--limit", type=int, default=200, help="inputs of each network that NNCF is shown"
    )
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sdlite-bench")
    ap.add_argument("--out", type=Path, default=RESULTS)
    args = ap.parse_args()

    import sdlite
    from sdlite.backends import Networks
    from sdlite.backends.openvino_network import CompiledNetwork, arithmetic_of
    from sdlite.quant import Calibration, Gate, quantize, read_prompts
    from sdlite.quant import gate as gates

    emoji = args.model == "emoji"
    folder = model_folder(Case(args.model, "sdlite-ort", 4, args.size), args.cache)
    prompts = read_prompts(PROMPTS / ("emoji.txt" if emoji else "sd.txt"))
    judged, shown = (prompts[-64:], prompts[:-64]) if emoji else (prompts[-1:], prompts)
    samples, size, steps = (
        args.samples or (16 if emoji else 2),
        None if emoji else (args.size, args.size),
        None if emoji else 4,
    )
    gate = Gate(
        psnr_mean=0,
        psnr_worst=0,
        ssim_mean=-1,
        prompts=judged,
        num_prompts=64,
        seeds=(0, 1) if emoji else (0,),
        num_inference_steps=steps,
        size=size,
        max_float=0,
        engines=["openvino"],
    )
    floats = sdlite.Pipeline.from_pretrained(
        folder, precision="fp32", backend="openvino", threads=args.threads
    )
    reference, calls = gates.images(floats, judged, gate), gates.calls(floats, judged, gate)
    arguments = {
        "num_inference_steps": steps,
        **({"height": args.size, "width": args.size} if size else {}),
    }
    seen = record(floats, shown[:samples], arguments, args.limit)
    about = {**environment(), "command": "python -m benchmarks.nncf_peer " + " ".join(sys.argv[1:])}
    with tempfile.TemporaryDirectory() as tmp:
        begin = time.perf_counter()
        calibration = Calibration(
            prompts=shown, samples=samples, size=size, num_inference_steps=steps
        )
        quantize(
            folder,
            "int8-static",
            out=Path(tmp) / "ours",
            calibration=calibration,
            gate=gate,
            threads=args.threads,
        )
        ours = sdlite.Pipeline.from_pretrained(
            Path(tmp) / "ours", precision="int8-static", backend="openvino", threads=args.threads
        )
        pipes = {"sdlite": (ours, time.perf_counter() - begin)}
        begin = time.perf_counter()
        arithmetic = arithmetic_of(
            "int8-static", "cpu"
        )  # of the layers that stay float: the same as ours
        files = by_nncf(floats.artifact, seen, Path(tmp))
        networks = {
            p: CompiledNetwork(str(files[p]), p, "cpu", args.threads, "int8-static", arithmetic)
            for p in floats.artifact.parts
        }
        theirs = Networks(networks, floats.report, floats.networks.size_multiple)
        pipes["nncf"] = (sdlite.Pipeline(floats.artifact, theirs), time.perf_counter() - begin)
        size_of = {
            "sdlite": sum(
                f.stat().st_size
                for p in floats.artifact.parts
                for f in (Path(tmp) / "ours" / p).glob("model.int8*")
            ),
            "nncf": sum(files[p].with_suffix(".bin").stat().st_size for p in floats.artifact.parts),
        }
        speed: dict[str, list[float]] = {"float": [], "sdlite": [], "nncf": []}
        for _ in range(2):  # interleaved
            for name, p in (("float", floats), *((k, v[0]) for k, v in pipes.items())):
                speed[name] += unet_seconds(p.networks, seen["unet"][0], 15 if emoji else 5)
        for name, (pipe, seconds) in pipes.items():
            result, _ = gates.compare(reference, calls, pipe, judged, gate)
            row = {
                "model": args.model,
                "quantiser": name,
                "size_px": args.size if size else None,
                "samples": samples,
                "quantise_seconds": seconds,
                "bytes": size_of[name],
                **result.to_dict(),
                "unet_seconds": speed[name],
                "float_unet_seconds": speed["float"],
            }
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with open(args.out, "a") as f:
                f.write(json.dumps({**row, **about}) + "\n")
            print(
                f"{name}: PSNR mean {result.psnr_mean:.1f} worst {result.psnr_worst:.1f} dB, SSIM"
                f" {result.ssim_mean:.4f}, {size_of[name] / 1e6:.1f} MB, UNet"
                f" {np.median(speed[name]) * 1e3:.1f} ms (float"
                f" {np.median(speed['float']) * 1e3:.1f})"
            )


if __name__ == "__main__":
    main()
