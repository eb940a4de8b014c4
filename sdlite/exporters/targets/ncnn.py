"""ncnn (.param and .bin) by pnnx, for Vulkan phones and ARM CPUs: batch 1, fixed shapes, float32 or
float16 weights.

Inputs are in0, in1, ... in the order of the model's spec, without the batch axis; token ids are
int32; outputs are out0, out1, ...
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from sdlite.artifact import Artifact
from sdlite.backends import Network
from sdlite.errors import ExportError, InputError
from sdlite.exporters.targets.base import NotRunnable, Runtime, Target
from sdlite.io import scratch
from sdlite.settings import settings
from sdlite.spec import Arrays, IOSpec

CODE = """
import ncnn
import numpy as np

INPUTS = @INPUTS@
OUTPUTS = @OUTPUTS@


def load(part):
    net = ncnn.Net()
    # float32 arithmetic; a phone is faster without these three lines
    net.opt.use_fp16_packed = False
    net.opt.use_fp16_storage = False
    net.opt.use_fp16_arithmetic = False
    net.load_param(f"{part}/model.param")
    net.load_model(f"{part}/model.bin")

    def network(**inputs):
        with net.create_extractor() as run:
            for i, name in enumerate(INPUTS[part]):
                x = inputs[name]
                x = x.astype(np.int32 if name == "input_ids" else np.float32)
                x = np.ascontiguousarray(x[0] if x.ndim else x.reshape(1))
                run.input(f"in{i}", ncnn.Mat(x).clone())  # ncnn works in place
            names = enumerate(OUTPUTS[part])
            return {name: np.array(run.extract(f"out{i}")[1])[None] for i, name in names}

    return network
"""
_HALF = 0x01306B47  # ncnn's tag of float16 weights; 0 is plain float32
# `featmask` of a layer: no float16 arithmetic (1) or storage (2), no bfloat16 (4), no Vulkan (16)
_FLOAT32 = "31=23"
_LACKING = {"Gather", "Shape", "Where", "Expand"}  # what pnnx may leave and ncnn does not have


@settings
@dataclass(frozen=True)
class Options:
    """`vulkan`: check the export on a Vulkan device."""

    vulkan: bool = False


class Ncnn(Target[Options]):
    """Tencent's runtime for phones and boards."""

    name = "ncnn"
    extra = "ncnn"
    packages = ("ncnn", "pnnx")
    precisions = ("fp32", "fp16")
    sample = "ncnn.cpp"
    options_type = Options

    def runtime(self) -> Runtime:
        """ncnn's Python package."""
        return Runtime("ncnn", "ncnn", self.named(CODE), batch_axis=False, narrow_ids=True)

    def check(self, artifact: Artifact) -> None:
        """Refuse a text encoder that gives pooled text: the row of the end token, found by its id.

        Raises:
            InputError: it does; pnnx leaves ArgMax and GatherND, which ncnn does not have.
        """
        for part, spec in self.specs.items():
            if any(t.name == "text_embeds" for t in spec.outputs):
                raise InputError(
                    f"ncnn cannot run {part} of {artifact.name}: its pooled text (text_embeds) is"
                    " found by ArgMax and GatherND, which ncnn does not have. Choose another"
                    " target, such as mnn or onnx."
                )

    def convert(self, part: str, graph: Path, out: Path) -> list[Path]:
        """ONNX to .param and .bin.

        Raises:
            ExportError: pnnx refuses it, or leaves a layer that ncnn does not have.
        """
        import pnnx

        half = self.precision(part) == "fp16"
        with scratch("pnnx") as tmp:  # pnnx writes nine files beside its input
            model = tmp / "model.onnx"
            onnx.save_model(onnx.load(str(graph)), str(model), save_as_external_data=False)
            command = [pnnx.EXEC_PATH, model.name, f"fp16={int(half)}"]
            done = subprocess.run(command, cwd=tmp, capture_output=True, text=True)
            param, weights = model.with_suffix(".ncnn.param"), model.with_suffix(".ncnn.bin")
            if done.returncode or not param.exists() or not weights.exists():
                words = (done.stdout + done.stderr).strip()[-300:]
                raise ExportError(f"pnnx refused {part}: {words}")
            layers, data = _embed(param.read_text(), weights.read_bytes(), half=half)
            layers = _wide_angles(layers)
        if unknown := sorted({line.split()[0] for line in layers.splitlines()[2:]} & _LACKING):
            raise ExportError(
                f"pnnx left {', '.join(unknown)} in {part}, which ncnn does not have."
            )
        files = [out / "model.param", out / "model.bin"]
        files[0].write_text(layers)
        files[1].write_bytes(data)
        return files

    def run(self, part: str, files: Sequence[Path], threads: int | None) -> Network:
        """The network on this machine's CPU or Vulkan device, in float32 arithmetic."""
        import ncnn

        vulkan = self.options.vulkan
        if vulkan and not ncnn.get_gpu_count():
            raise NotRunnable(
                "ncnn finds no Vulkan device here; a software one is in Debian's"
                " mesa-vulkan-drivers"
            )
        return _Network(files, self.specs[part], threads, vulkan)


def _embed(param: str, data: bytes, *, half: bool) -> tuple[str, bytes]:
    """The token table: pnnx leaves ONNX's Gather from constant data, ncnn has Embed, whose weights
    carry a tag.

    Raises:
        ExportError: the table is not the first of the weights, so that its place in the file is not
            known.
    """
    magic, counts, *lines = param.splitlines()
    at = next((i for i, line in enumerate(lines) if line.split()[0] == "Gather"), None)
    if at is None:
        return param, data
    gather = lines[at].split()
    name, table, ids, result = gather[1], gather[4], gather[5], gather[6]
    if lines[at - 1].split()[0] == "MemoryData" and ids == lines[at - 1].split()[4]:
        table, ids = ids, table
    source = lines[at - 1].split()
    if (
        source[0] != "MemoryData"
        or source[4] != table
        or any(line.split()[0] != "Input" for line in lines[: at - 1])
    ):
        raise ExportError(
            "the token table is not the first of ncnn's weights; pnnx has changed, tell us."
        )
    width, words = (int(s.split("=")[1]) for s in source[5:7])
    lines[at - 1 : at + 1] = [
        f"Embed {name} 1 1 {ids} {result} 0={width} 1={words} 2=0 3={width * words}"
    ]
    layer_count, blob_count = (int(n) for n in counts.split())
    size = 4 * width * words
    weights = np.frombuffer(data[:size], np.float32)
    head = (
        struct.pack("<I", _HALF) + _padded(weights.astype(np.float16).tobytes())
        if half
        else struct.pack("<I", 0) + weights.tobytes()
    )
    return "\n".join([magic, f"{layer_count - 1} {blob_count - 1}", *lines, ""]), head + data[size:]


def _wide_angles(param: str) -> str:
    """What leads to a sine or a cosine in float32, on the CPU, whatever the program asks ncnn for
    (its own default is float16 arithmetic where there is any): see `float16.before_sines`.
    """
    magic, counts, *lines = param.splitlines()
    layers = [_Layer(line.split()) for line in lines]
    makers = {blob: layer for layer in layers for blob in layer.made}
    ahead = [layer for layer in layers if layer.is_sine]
    while ahead:
        for layer in ahead:
            layer.words.append(_FLOAT32)
        found = [makers[blob] for layer in ahead for blob in layer.read]
        ahead = [m for m in dict.fromkeys(found) if _FLOAT32 not in m.words and m.kind != "Input"]
    return "\n".join([magic, counts, *(" ".join(layer.words) for layer in layers), ""])


class _Layer:
    """A line of a .param: kind, name, counts of blobs, what is read, what is made, parameters."""

    def __init__(self, words: list[str]):
        self.words, self.kind = words, words[0]
        first = 4 + int(words[2])
        self.read, self.made = words[4:first], words[first : first + int(words[3])]
        self.is_sine = self.kind == "UnaryOp" and bool({"0=9", "0=10"} & {*words[first:]})


def _padded(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % 4)


class _Network:
    def __init__(self, files: Sequence[Path], spec: IOSpec, threads: int | None, vulkan: bool):
        import ncnn

        self.ncnn, self.spec = ncnn, spec
        self.net = ncnn.Net()
        self.net.opt.num_threads = threads or 2
        self.net.opt.use_vulkan_compute = vulkan
        for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic"):
            # the weights may be float16; the arithmetic that is checked is float32
            setattr(self.net.opt, option, False)
        if self.net.load_param(str(files[0])) or self.net.load_model(str(files[1])):
            raise ExportError(
                f"ncnn cannot load {files[0].parent.name}: {files[0].name} names a layer that it"
                " does not have."
            )

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        with self.net.create_extractor() as run:
            for i, t in enumerate(self.spec.inputs):
                x = np.asarray(inputs[t.name], np.int32 if t.dtype == "int64" else np.float32)
                x = np.ascontiguousarray(x[0] if x.ndim else x.reshape(1))
                # a copy of its own: a first layer that works in place crashes on numpy's memory
                run.input(f"in{i}", self.ncnn.Mat(x).clone())
            made: Arrays = {}
            for i, t in enumerate(self.spec.outputs):
                failed, out = run.extract(f"out{i}")
                if failed:
                    raise ExportError(f"ncnn could not run {self.spec.part} (code {failed}).")
                made[t.name] = np.array(out)[None]
            return made
