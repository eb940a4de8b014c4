"""What is done with a bad model folder, and whether the answer is right."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Never

import numpy as np
import sdlite
from sdlite import cli
from sdlite.errors import SdliteError

from benchmarks.hostile.folder import OTHER, SAME, Case
from benchmarks.hostile.isolate import Ended

VERDICTS = ("refused", "right", "traceback", "hang", "memory", "crash", "wrong")
FAULTS = VERDICTS[2:]
COMMANDS = {"verify": ["verify"], "info": ["info"], "info --json": ["info", "--json"]}
ENGINES = ("auto", "openvino", "torch")
PROMPT = "a red apple on a blue background"
_SLOW = {"torch": 60.0}  # seconds; the others have `isolate.SECONDS`


def preload() -> None:
    """Import what the attempts need, so that a fork has it."""
    os.environ.update(SDLITE_OPENVINO_CACHE="0", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    import sdlite.backends.openvino_network
    import sdlite.backends.ort
    import sdlite.backends.torch_module
    import sdlite.converter
    import sdlite.onnx_graph
    import sdlite.torch_networks  # noqa: F401
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel  # noqa: F401
    from PIL import PngImagePlugin  # noqa: F401
    from transformers import CLIPTextModel  # noqa: F401

    cli.parser()


def attempts(case: Case) -> list[str]:
    """What is tried with a case."""
    out = [*COMMANDS, "auto"]
    out += ["openvino", "quantize"] if case.onnx else []
    return out + (["torch"] if case.torch else [])


def seconds(attempt: str, usual: float) -> float:
    return max(usual, _SLOW.get(attempt, 0.0))


# --- in the child


def run(attempt: str, folder: Path, outside: Path | None = None) -> dict[str, Any]:
    """One attempt: {error, text} of what was raised, or what it gave; `opened` outside files."""
    opened: list[str] = []
    if outside is not None:
        sys.addaudithook(_watcher(str(outside), opened))
    warnings.simplefilter("ignore")
    try:
        out = _do(attempt, folder)
    except SdliteError as e:
        out = {"error": "refused", "text": f"{type(e).__name__}: {e}"}
    except Exception as e:
        out = {"error": "traceback", "text": f"{type(e).__name__}: {e}"[:2000]}
    return {**out, "opened": opened}


def _watcher(outside: str, opened: list[str]) -> Callable[[str, tuple[Any, ...]], None]:
    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], (str, bytes)):
            name = os.fsdecode(args[0])
            if os.path.realpath(name).startswith(outside):
                opened.append(name)

    return hook


def _do(attempt: str, folder: Path) -> dict[str, Any]:
    if attempt in COMMANDS:
        name, *options = COMMANDS[attempt]
        return {"code": cli.main([name, str(folder), *options])}
    if attempt == "quantize":
        return _read_graphs(folder)
    return picture(folder, attempt)


def picture(folder: Path, backend: str, precision: str | None = None) -> dict[str, Any]:
    """SHA-256 of one image's pixels, and what made it."""
    pipe = sdlite.Pipeline.from_pretrained(folder, backend=backend, precision=precision, threads=1)
    pixels = np.asarray(pipe(PROMPT, seed=1).images[0])
    by = f"{pipe.report.backend} {pipe.report.precision}"
    return {"image": hashlib.sha256(pixels.tobytes()).hexdigest(), "by": by}


def _read_graphs(folder: Path) -> dict[str, Any]:
    """As `quantize` reads a model's networks: every weight."""
    from sdlite.onnx_graph import Graph

    for part in ("text_encoder", "unet", "vae_decoder"):
        graph = Graph.load(folder / part / "model.onnx")
        graph.layers()
        for weight in graph.weights.values():
            weight.array()
    return {}


# --- in the parent


def judge(case: Case, attempt: str, ended: Ended, right: dict[str, str]) -> tuple[str, str]:
    """One of `VERDICTS`, and what was said. `right`: "backend precision" -> hash of the image."""
    if ended.why:
        return ended.why, ended.err.strip()[-300:]
    value = ended.value
    if value["opened"] and case.expect != OTHER:
        return "wrong", f"it opened {value['opened'][0]}, which is not the model's"
    if attempt in COMMANDS:
        return _judge_command(case, attempt, ended)
    if "error" in value:
        return _judge_refusal(case, value["error"], value["text"])
    if attempt == "quantize" or case.expect == OTHER or value["image"] == right.get(value["by"]):
        return "right", ""
    return "wrong", f"another image, by {value['by']}"


def _judge_refusal(case: Case, error: str, text: str) -> tuple[str, str]:
    if error == "traceback":
        return error, text
    if unsafe(text):
        return "wrong", f"not one line of plain characters: {text!r}"
    if case.expect == SAME:
        return "wrong", f"the model is whole, and refused: {text}"
    return "refused", text


def _judge_command(case: Case, attempt: str, ended: Ended) -> tuple[str, str]:
    value = ended.value
    lines = [x for x in ended.err.splitlines() if not x.startswith("sdlite: warning: ")]
    if value.get("error"):
        return "traceback", value["text"]
    if bad := unsafe(ended.out.replace("\n", " ") + ended.err.replace("\n", " ")):
        return "wrong", f"it prints {bad!r}"
    if value["code"]:
        if len(lines) != 1 or not lines[0].startswith("sdlite: "):
            return "wrong", f"not one line: {ended.err[:300]!r}"
        return _judge_refusal(case, "refused", lines[0])
    if attempt == "verify" and case.listed:
        return "wrong", "it says that a changed file is whole"
    if attempt == "info --json":
        try:
            json.loads(ended.out, parse_constant=_no_constant)
        except ValueError as e:
            return "wrong", f"no JSON: {e}"
    return "right", ""


def unsafe(text: str) -> str:
    """The first character that a terminal would obey."""
    bad = (c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp"))
    return next(bad, "")


def _no_constant(name: str) -> Never:
    raise ValueError(f"{name} is no number")
