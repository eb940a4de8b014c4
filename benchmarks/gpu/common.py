"""What the steps share: models of true shape, timed calls, rows that are kept as they are made."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import large_models, shapes
from benchmarks.env import environment, gpu
from sdlite import hub

LARGE = tuple(large_models.WIDTHS)  # of `benchmarks.published_models`, in true widths
LEAST = 5  # timed calls a row
PART = 15 << 20  # bytes of a file that goes home
ROOT = Path(__file__).parents[2]


class Budget:
    """Time that a step has; what does not fit is named, not dropped."""

    def __init__(self, minutes: float):
        self.end, self.left_out = time.monotonic() + 60 * minutes, list[str]()

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self.end - time.monotonic())

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
    """Machine, versions, commit and command of a row."""
    command = " ".join(["python -m", *_module(), *sys.argv[1:]])
    return {**environment(), "command": command, **gpu(device)}


def _module() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [spec.name] if spec else []


def keep(path: Path, row: dict[str, Any]) -> None:
    """Append and print it at once: a step that is stopped keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
    told = {k: v for k, v in row.items() if k not in ("versions", "os", "command", "samples")}
    print(json.dumps(told), flush=True)


def folder(model: str, scratch: Path) -> Path:
    """A diffusers folder of random weights in the model's true shape; "emoji" is the embedded
    student's own. One that was begun and not finished is written again.
    """
    if model == "emoji":
        return hub.resolve("emoji", None)
    out = scratch / model
    if not out.exists():
        begun = out.with_name(f"{model}-begun")
        shutil.rmtree(begun, ignore_errors=True)
        begun.parent.mkdir(parents=True, exist_ok=True)
        if model in shapes.SHAPES:
            shapes.write_sd_folder(model, begun)
        else:
            large_models.write(model, begun, "float16")
        begun.rename(out)
    return out


@contextmanager
def freed() -> Iterator[None]:
    """What a row allocated is given back."""
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@torch.no_grad()
def timed(call: Callable[[], Any], warm: int = 2) -> dict[str, Any]:
    """{"first_seconds", "seconds" (the median), "spread" (half the range over it), "samples",
    "peak_mib" (by torch's allocator, of these calls)} of a call, the device synchronized around
    each.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
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


def begun(path: Path) -> None:
    """The rows that an earlier visit brought home are where this one adds to them."""
    home = Path(__file__).parent.parent / "results" / path.name
    if not path.exists() and home.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(home, path)


def pack(folder: Path, out: Path) -> list[Path]:
    """A folder as a tar file in parts of at most `PART` bytes, which `cat PARTS | tar x` opens."""
    out.parent.mkdir(parents=True, exist_ok=True)
    whole, parts = out.with_name(out.name + ".tmp"), list[Path]()
    with tarfile.open(whole, "w") as tar:
        tar.add(folder, folder.name)
    with open(whole, "rb") as f:
        while block := f.read(PART):
            parts.append(out.with_name(f"{out.name}.{len(parts):02}"))
            parts[-1].write_bytes(block)
    whole.unlink()
    return parts


def child() -> dict[str, str]:
    """The environment of a process that imports this tree, and asks no hub."""
    known = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(p for p in known if p)
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
