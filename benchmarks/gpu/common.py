"""What the steps share: models of true shape, timed calls, rows that are kept as they are made."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import large_models, shapes
from benchmarks.env import environment
from sdlite import hub

LARGE = tuple(large_models.WIDTHS)  # of `benchmarks.published_models`, in true widths
LEAST = 5  # timed calls a row


class Budget:
    """Time that a step has; what does not fit is named, not dropped."""

    def __init__(self, minutes: float):
        self.end, self.left_out = time.monotonic() + 60 * minutes, list[str]()

    def allows(self, what: str, seconds: float = 0.0) -> bool:
        """Whether work of about so many seconds still fits; remembers what does not."""
        if time.monotonic() + seconds <= self.end:
            return True
        self.left_out.append(what)
        return False


def arguments(about: str, name: str) -> argparse.ArgumentParser:
    """The options that all steps have."""
    ap = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    ap.add_argument("--device", default="cuda", help="cuda; cpu tries the script itself")
    ap.add_argument("--minutes", type=float, default=7.5, help="no row is begun after that")
    out = Path(os.environ.get("OUT", Path(__file__).parent.parent / "results"))
    ap.add_argument("--out", type=Path, default=out / f"gpu_{name}.jsonl", metavar="FILE")
    ap.add_argument("--scratch", type=Path, default=Path("/tmp/sdlite-gpu"), metavar="DIR")
    return ap


def about(device: str) -> dict[str, Any]:
    """Machine, versions and commit of a row. `SDLITE_COMMIT` is the commit where the tree has no
    .git.
    """
    row = environment()
    row["commit"] = row["commit"] or os.environ.get("SDLITE_COMMIT", "")
    row["command"] = " ".join(["python -m", *_module(), *sys.argv[1:]])
    row["gpu"] = None
    if device == "cuda":
        row["gpu"] = torch.cuda.get_device_name()
        row["driver"] = _driver()
        row["cuda"], row["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return row


def _module() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [spec.name] if spec else []


def _driver() -> str:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return platform.release()


def keep(path: Path, row: dict[str, Any]) -> None:
    """Append and print it at once: a step that is stopped keeps what it has."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
    told = {k: v for k, v in row.items() if k not in ("versions", "os", "command", "samples")}
    print(json.dumps(told), flush=True)


def folder(model: str, scratch: Path) -> Path:
    """A diffusers folder of random float16 weights in the model's true shape; "emoji" is the
    embedded student's own.
    """
    if model == "emoji":
        return hub.resolve("emoji", None)
    out = scratch / model
    if not (out / "model_index.json").exists():
        if model in shapes.SHAPES:
            shapes.write_sd_folder(model, out)
        else:
            large_models.write(model, out, "float16")
    return out


@contextmanager
def freed() -> Iterator[None]:
    """What a row allocated is given back, and the peak counted anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@torch.no_grad()
def timed(call: Callable[[], Any], warm: int = 2) -> dict[str, Any]:
    """{"first_seconds", "seconds" (the median), "spread" (half the range over it), "samples",
    "peak_mib"} of a call, the device synchronized around each.
    """
    first = _seconds(call)
    for _ in range(warm - 1):
        call()
    samples = [_seconds(call) for _ in range(LEAST)]
    middle = float(np.median(samples))
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    return {
        "first_seconds": first,
        "seconds": middle,
        "spread": (max(samples) - min(samples)) / 2 / middle,
        "samples": samples,
        "peak_mib": peak,
    }


def _seconds(call: Callable[[], Any]) -> float:
    _wait()
    begin = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - begin


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB between two float images of 0 to 1; 150 where they are equal."""
    error = float(np.square(a.astype(np.float64) - b).mean())
    return 150.0 if error == 0 else -10 * float(np.log10(error))
