"""Why int8 weights get 7 bits on x86 without VNNI: one quantised convolution, exact integers
against what the engines make of it.

    python -m benchmarks.saturation

`vpmaddubsw` adds two u8 x s8 products in 16 bits and saturates; engines shift s8 activations to u8
for it, so symmetric int8 is hit as well. The reference is the same graph in float arithmetic on the
same integers (onnxruntime, no optimisation). Rows go to benchmarks/results/saturation.jsonl; on a
CPU with VNNI every row is exact.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.env import environment
from sdlite.metrics import sqnr

RESULTS = Path(__file__).parent / "results" / "saturation.jsonl"
CHANNELS, SIZE = 32, 16


def convolution(activation: str, bits: int, per_channel: bool, requantised: bool) -> bytes:
    """A QDQ convolution (3x3, 32 to 32 channels) as a serialised ONNX model; `activation` is "s8"
    or "u8".
    """
    import onnx
    from onnx import helper as h
    from onnx import numpy_helper as nh

    rng = np.random.default_rng(0)
    w = rng.standard_normal((CHANNELS, CHANNELS, 3, 3)).astype(np.float32) / np.sqrt(CHANNELS * 9)
    top = 2 ** (bits - 1) - 1
    largest = np.abs(w).max((1, 2, 3)) if per_channel else np.full(CHANNELS, np.abs(w).max())
    scale = (largest / top).astype(np.float32)
    wq = np.clip(np.round(w / scale[:, None, None, None]), -top, top).astype(np.int8)
    zero = np.int8(0) if activation == "s8" else np.uint8(128)
    values = {
        "s": np.float32(4 / 127),
        "z": zero,
        "w": wq,
        "ws": scale,
        "wz": np.zeros(CHANNELS, np.int8),
        "b": np.zeros(CHANNELS, np.float32),
    }
    nodes = [
        h.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        h.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        h.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        h.make_node("Conv", ["xd", "wd", "b"], ["c" if requantised else "y"], pads=[1, 1, 1, 1]),
    ]
    if requantised:
        nodes += [
            h.make_node("QuantizeLinear", ["c", "s", "z"], ["cq"]),
            h.make_node("DequantizeLinear", ["cq", "s", "z"], ["y"]),
        ]
    io = [
        h.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, CHANNELS, SIZE, SIZE])
        for n in ("x", "y")
    ]
    graph = h.make_graph(
        nodes, "conv", io[:1], io[1:], [nh.from_array(np.asarray(v), k) for k, v in values.items()]
    )
    out: bytes = h.make_model(
        graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return out


def measure(model: bytes) -> dict[str, float]:
    """Engine -> SQNR in dB against exact arithmetic, at most 200."""
    import onnxruntime as ort

    x = np.random.default_rng(1).standard_normal((1, CHANNELS, SIZE, SIZE)).astype(np.float32)

    def run_ort(level: ort.GraphOptimizationLevel) -> np.ndarray:
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        out: np.ndarray = ort.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        ).run(None, {"x": x})[0]
        return out

    exact = run_ort(ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    made = {"onnxruntime": run_ort(ort.GraphOptimizationLevel.ORT_ENABLE_ALL)}
    try:
        import openvino

        with tempfile.TemporaryDirectory() as tmp:
            path = Path(tmp) / "model.onnx"
            path.write_bytes(model)
            made["openvino"] = openvino.Core().compile_model(
                path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
            )([x])[0]
    except ModuleNotFoundError:
        pass
    signal = float(np.square(exact, dtype=np.float64).sum())
    return {
        k: min(sqnr(signal, float(np.square(exact.astype(np.float64) - y).sum())), 200.0)
        for k, y in made.items()
    }


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", type=Path, default=RESULTS)
    args = ap.parse_args()
    about = {
        **environment(),
        "command": "python -m benchmarks.saturation " + " ".join(sys.argv[1:]),
    }
    with open(args.out, "a") as f:
        for activation in ("s8", "u8"):
            for bits in (8, 7):
                for per_channel in (True, False):
                    for requantised in (True, False):
                        case = {
                            "activation": activation,
                            "weight_bits": bits,
                            "per_channel": per_channel,
                            "requantised": requantised,
                        }
                        found = measure(convolution(activation, bits, per_channel, requantised))
                        f.write(json.dumps({**case, "sqnr": found, **about}) + "\n")
                        print(case, {k: f"{v:.1f} dB" for k, v in found.items()})


if __name__ == "__main__":
    main()
