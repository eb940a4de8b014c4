"""OpenVINO: ONNX graphs on Intel's runtime.

GPU and NPU are the same calls with another device name and have not been run by us.
"""

from __future__ import annotations

from sdlite.artifact import Artifact
from sdlite.backends.base import Backend
from sdlite.backends.held import entry
from sdlite.backends.network import AUTOENCODER, Network, Overflowing, RowByRow
from sdlite.backends.report import NetworkReport

LARGE = 32 << 20  # bytes of a network whose rows are computed one by one on the CPU
KEPT = 1 << 30  # bytes of weights that a network's compiled graphs may have together
ROWS = (
    "an image of a batch is its seed's image alone, bit by bit: networks of 32 MiB and more compute"
    " their rows one by one; smaller ones compute them together, which gave equal bits in fp32,"
    " fp16 and int8-static (measured on AVX-512 with VNNI and BF16)"
)
STORAGE = "fp16 on this CPU is storage: weights are float16 on disk, arithmetic is float32"


class OpenVINO(Backend):
    """ONNX graphs on OpenVINO, compiled for each shape."""

    name = "openvino"
    package = "openvino"
    precisions = ("fp32", "fp16", "int8-static")
    extra = "openvino"
    devices = ("cpu", "gpu", "npu")
    arithmetic = ("float32", "bfloat16", "float16")
    order = 1

    def engine(self) -> str:
        import openvino

        return f"openvino {openvino.__version__}"

    def unasked(self, precision: str) -> tuple[str | None, str]:
        """float32 for fp16 files, as every other backend computes them: "auto" does not choose
        other images.
        """
        if precision != "fp16":
            return None, ""
        return "float32", (
            "; arithmetic='bfloat16' is faster where the CPU has it, with slightly other images"
        )

    def notes(self, precision: str, device: str, arithmetic: str | None = None) -> list[str]:
        from sdlite.backends.openvino_network import arithmetic_of

        chosen = arithmetic_of(precision, device, arithmetic)
        out = ["compiled at the first call of each size; the sizes used last are kept"]
        if device == "cpu":
            out.append(ROWS)
        if device != "cpu" or arithmetic is not None:
            return out
        if precision == "fp16" and chosen == "float32":
            out.append(STORAGE)
        elif chosen != "float32":
            out.append(
                f"float layers are computed in {chosen}, which this CPU has instructions for;"
                " arithmetic='float32' is exact and slower"
            )
        return out

    def load_part(
        self,
        artifact: Artifact,
        part: str,
        precision: str,
        device: str,
        threads: int | None,
        arithmetic: str | None = None,
    ) -> tuple[Network, NetworkReport]:
        from sdlite.backends.openvino_network import SHAPES, CompiledNetwork, arithmetic_of

        row, size = entry(artifact, part, precision)
        files = [row["file"], *row["weights"]]

        def compiling(arithmetic: str) -> CompiledNetwork:
            return CompiledNetwork(
                str(artifact.folder / row["file"]),
                artifact.spec(part),
                device,
                threads,
                precision,
                arithmetic,
                weights=[artifact.folder / w for w in row["weights"]],
                hashes=artifact.hashes(files),
                keep=min(SHAPES, max(1, KEPT // size)),
            )

        chosen = arithmetic_of(precision, device, arithmetic)
        network: Network = compiling(chosen)
        if part in AUTOENCODER and chosen == "float16":
            network = Overflowing(network, lambda: compiling("float32"), part)
        if row.get("batch") or (device == "cpu" and size >= LARGE):
            network = RowByRow(network)
        said = row["arithmetic"].replace("float32", chosen)
        return network, NetworkReport(part, row["file"], size, row["storage"], said)
