"""What is left when a command is killed? kill -9 and signals at random moments; then every folder
is looked at, and the command runs again.

    python -m benchmarks.kills                  25 kill -9 and 3 of each signal a command: an hour
    python -m benchmarks.kills generate --kills 5

One row a command in benchmarks/results/kills.jsonl. Counted are outputs that were complete before
and are not any more, outputs under their own name that are not whole, half-written folders that
open as a model, and work folders that a clean run after the kills leaves. All of them should be 0.
The moments are drawn from the second to the last quarter of the command's own duration. A training
goes on after each kill and makes no ONNX at its end, which `convert` does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open

from benchmarks.env import environment
from sdlite import hub
from sdlite.artifact import Artifact
from sdlite.errors import ArtifactError
from sdlite.io import WORK, append

RESULTS = Path(__file__).parent / "results" / "kills.jsonl"
ASKED = [s for s in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, s)]
SDLITE = [sys.executable, "-W", "ignore", "-m", "sdlite"]
RECIPE = """
name = "small"
[preview]
prompts = ["a fox"]
num_inference_steps = 1
[train]
batch_size = 4
log_every = 1
sample_every = 0
checkpoint_minutes = 0.01
[[stage]]
kind = "output"
images = 16
[[stage]]
kind = "progressive"
steps = [1]
images = 8
"""
CONVERT = "import sys; from sdlite.converter import convert; convert(sys.argv[1], sys.argv[2])"
SAVE = """
import sys, sdlite
pipe = sdlite.Pipeline.from_pretrained("emoji", threads=1)
for i in range(int(sys.argv[2])):
    pipe.save_pretrained(f"{sys.argv[1]}-{i}")
"""


@dataclass
class Place:
    """A folder with inputs, outputs, and everything else that a run may write: temporary files,
    cache, home.
    """

    root: Path

    def __post_init__(self) -> None:
        for name in ("tmp", "home", "out"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    @property
    def out(self) -> Path:
        return self.root / "out"

    def environment(self) -> dict[str, str]:
        tmp, home = str(self.root / "tmp"), str(self.root / "home")
        return {
            **os.environ,
            "TMPDIR": tmp,
            "HOME": home,
            "SDLITE_CACHE": f"{home}/cache",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def plain(self) -> Path:
        """The embedded model as a plain diffusers folder."""
        folder = self.root / "plain"
        if not folder.exists():
            graphs = shutil.ignore_patterns("*.onnx", "*.data", "sdlite.json", "vae_decoder")
            shutil.copytree(hub.EMBEDDED / "emoji", folder, ignore=graphs)
        return folder

    def recipe(self) -> list[str]:
        """Arguments of a training of seconds."""
        data = self.root / "data"
        if not data.exists():
            data.mkdir()
            drawn = np.random.default_rng(0)
            for i in range(8):
                Image.fromarray(drawn.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
                    data / f"{i}.png"
                )
                (data / f"{i}.txt").write_text(f"image {i}")
            (self.root / "recipe.toml").write_text(RECIPE)
        return [
            str(self.root / "recipe.toml"),
            "--teacher",
            str(hub.EMBEDDED / "emoji"),
            "--data",
            str(data),
        ]


Command = Callable[[Place, Path], list[str]]
QUICK = [
    "--samples",
    "2",
    "--gate-prompts",
    "2",
    "--steps",
    "2",
    "--psnr-mean",
    "5",
    "--psnr-worst",
    "5",
    "--ssim-mean",
    "0",
    "--quiet",
]


def _quantize(precision: str) -> Command:
    return lambda place, out: [
        *SDLITE,
        "quantize",
        "emoji",
        "--precision",
        precision,
        "--out",
        str(out),
        *QUICK,
    ]


def _distill(place: Place, out: Path) -> list[str]:
    begun = [*out.glob("*/done.json"), *out.glob("*/checkpoint-*")]
    return [
        *SDLITE,
        "distill",
        *place.recipe(),
        "--no-export",
        "--out",
        str(out),
        *(["--resume"] if begun else []),
    ]


COMMANDS: dict[str, Command] = {
    "quantize int8-dynamic": _quantize("int8-dynamic"),
    "quantize int8-static": _quantize("int8-static"),
    "export": lambda place, out: [
        *SDLITE,
        "export",
        "emoji",
        "--target",
        "onnx",
        "--steps",
        "2",
        "--out",
        str(out),
    ],
    "convert": lambda place, out: [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        CONVERT,
        str(place.plain()),
        str(out),
    ],
    "save_pretrained": lambda place, out: [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        SAVE,
        str(out),
        "10",
    ],
    "distill": _distill,
    "generate": lambda place, out: [
        *SDLITE,
        "generate",
        "a fox",
        "--num",
        "40",
        "--steps",
        "1",
        "--quiet",
        "--out",
        f"{out}.png",
    ],
}
CAUGHT = (
    "quantize int8-dynamic",
    "quantize int8-static",
    "export",
    "distill",
    "generate",
)  # the commands; two are functions


# --- what is there


def _opens(folder: Path) -> bool:
    """Whether it is taken for a model that is whole."""
    try:
        artifact = Artifact.open(folder)
        if artifact.listing:
            artifact.verify()
    except ArtifactError:
        return False
    return True


def _whole(folder: Path) -> bool:
    """Whether what opens as a model is one: a plain folder has no hashes, so each of its files is
    read.
    """
    if Artifact.open(folder).listing:
        return True  # verified when it was opened
    try:
        for path in folder.rglob("*"):
            if path.suffix == ".safetensors":
                with safe_open(path, "np") as f:
                    f.keys()
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
    except (SafetensorError, ValueError):
        return False
    return all(
        (folder / x).exists() for x in ("tokenizer", "scheduler", "unet", "vae", "text_encoder")
    )


def _readable(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError):
        return False
    return True


def folders(place: Place) -> Iterator[Path]:
    """Every folder that a run may have written into, work folders too."""
    for name in ("out", "tmp", "home"):
        for folder, inner, _ in os.walk(place.root / name):
            yield from (Path(folder, x) for x in inner)


def strays(place: Place) -> list[str]:
    return [f.relative_to(place.root).as_posix() for f in folders(place) if f.name.startswith(WORK)]


def wrong(place: Place) -> list[str]:
    """Outputs under their own names that are not whole, and half-written folders that open as a
    model.
    """
    out = []
    for folder in folders(place):
        work = any(p.name.startswith(WORK) for p in (folder, *folder.parents))
        if _opens(folder) and (work or not _whole(folder)):
            out.append(f"{folder.relative_to(place.root)} opens and is half written")
        elif (
            folder.parent == place.out
            and not work
            and (folder / "model_index.json").exists()
            and not _opens(folder)
        ):
            out.append(f"{folder.relative_to(place.root)} is damaged")
    images = (
        p for p in place.out.rglob("*.png") if not any(x.name.startswith(WORK) for x in p.parents)
    )
    return out + [f"{p.relative_to(place.root)} is damaged" for p in images if not _readable(p)]


def _complete(place: Place) -> dict[str, str]:
    """Hash of every output, by name."""
    found = (
        p
        for p in place.out.rglob("*")
        if p.is_file() and not any(x.name.startswith(WORK) for x in p.parents)
    )
    return {
        p.relative_to(place.out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in found
    }


# --- killing


@dataclass
class Row:
    command: str
    seconds: float = 0.0  # of a run that nobody stops
    kills: int = 0
    ended: int = 0  # before the signal came
    signals: dict[str, int] = field(default_factory=dict)
    strays: int = 0  # kills that left a work folder, which the next run removes
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left: list[str] = field(
        default_factory=list
    )  # work folders after a clean run, or after a signal that is caught
    refused: list[str] = field(default_factory=list)  # clean runs that failed
    lines: list[str] = field(
        default_factory=list
    )  # what a caught signal said, where it was not one line

    @property
    def faults(self) -> list[str]:
        return self.lost + self.wrong + self.left + self.refused + self.lines


def start(place: Place, command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=place.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def stop(place: Place, command: list[str], number: int, after: float) -> tuple[int, str]:
    """Start, signal after so many seconds, and wait. Returns the exit code and stderr."""
    process = start(place, command)
    try:
        _, said = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, number)
        _, said = process.communicate(timeout=600)
    return process.returncode, said


def cleanly(place: Place, command: list[str], row: Row) -> None:
    """The next run ends well, and leaves no work folder."""
    code, said = stop(place, command, signal.SIGKILL, 3600)
    if code:
        row.refused.append(said.strip()[-300:])
    row.left += strays(place)


def run(name: str, place: Place, kills: int, asked: int, drawn: random.Random) -> Row:
    """`kills` times SIGKILL and `asked` times each signal that is caught, with a clean run after
    every fifth and at the end.

    A run that ends before its signal comes is counted apart and made again.
    """
    row, make = Row(name), COMMANDS[name]
    begin = time.perf_counter()
    cleanly(place, make(place, place.out / "kept"), row)
    row.seconds = time.perf_counter() - begin
    numbers = [signal.SIGKILL] * kills + [getattr(signal, s) for s in ASKED for _ in range(asked)]
    out = place.out / "r0"
    for i, number in enumerate(numbers):
        for again in range(5):
            if _once(row, place, name, out, number, drawn.uniform(0.25, 1.0) * row.seconds):
                break
            if name == "distill":  # there is nothing to go on with
                out = place.out / f"r{i}-{again}"
        if i % 5 == 4 or i in (kills - 1, len(numbers) - 1):
            cleanly(place, make(place, out), row)
            row.wrong += wrong(place)
            for made in place.out.glob("r*"):  # judged; "kept" stays
                shutil.rmtree(made) if made.is_dir() else made.unlink()
            out = place.out / f"r{i + 1}"
    return row


def _once(row: Row, place: Place, name: str, out: Path, number: int, after: float) -> bool:
    """One run that is stopped, and what is there then. Returns whether the signal came in time."""
    before = _complete(place)
    begin = time.perf_counter()
    code, said = stop(place, COMMANDS[name](place, out), number, after)
    if code == 0:  # the machine is quicker now
        row.seconds = min(row.seconds, time.perf_counter() - begin)
    hit = _judge(row, place, name, number, code, said)
    again = name in ("distill", "generate")  # go on with, or write anew, what is there
    mine = f"{out.name}{'/' if name == 'distill' else '-'}"
    then = _complete(place)
    row.lost += [
        k for k, v in before.items() if then.get(k) != v and not (again and k.startswith(mine))
    ]
    if not again:  # an output that was finished is in the way of the next
        for folder in (out, *place.out.glob(f"{out.name}-*")):
            shutil.rmtree(folder, ignore_errors=True)
    return hit


def _judge(row: Row, place: Place, name: str, number: int, code: int, said: str) -> bool:
    found = strays(place)
    row.wrong += wrong(place)
    if code == 0 and not (name == "distill" and number != signal.SIGKILL):
        row.ended += 1
        return False
    if number == signal.SIGKILL:
        row.kills += 1
        row.strays += bool(found)
        return True
    sent = signal.Signals(number).name
    row.signals[sent] = row.signals.get(sent, 0) + 1
    if name not in CAUGHT or code == -number:  # before there is a handler
        return True
    row.left += found
    if name == "distill" and code == 0:  # it ended with a checkpoint
        return True
    ours = [line for line in said.splitlines() if line.startswith("sdlite: ")]  # libraries warn too
    if (
        code != 1
        or len(ours) != 1
        or not ours[0].startswith("sdlite: interrupted")
        or "Traceback" in said
    ):
        row.lines.append(f"{sent}: exit code {code}, {said.strip()[-300:]}")
    return True


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("commands", nargs="*", help=f"default: {', '.join(COMMANDS)}")
    ap.add_argument("--kills", type=int, default=25)
    ap.add_argument("--signals", type=int, default=3, help="of each of " + ", ".join(ASKED))
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--out", type=Path, default=RESULTS)
    args = ap.parse_args()
    for name in ASKED:  # a shell's background jobs and nohup ignore some, and commands keep that
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    for name in args.commands or COMMANDS:
        with tempfile.TemporaryDirectory(prefix="kills-") as folder:
            row = run(
                name,
                Place(Path(folder)),
                args.kills,
                args.signals,
                random.Random(f"{args.seed} {name}"),
            )
        append(args.out, json.dumps({**vars(row), "seed": args.seed, **environment()}) + "\n")
        print(
            f"{name}: {row.kills} kills, {row.signals}, {row.ended} ended before; {len(row.faults)}"
            f" faults {row.faults[:3]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
