"""A better embedded student on a GPU: the trainings of benchmarks/emoji, with more images.

    python -m benchmarks.gpu.student --state DIR [--times 4] [--teacher TEACHER]
    python -m benchmarks.gpu.student --state DIR --until teacher     # the teacher alone

A call goes through the stages below as far as its minutes allow, and stops with a checkpoint; the
next one with the same `--state` goes on with exactly that. `--times` multiplies the student's
images in the recipe of benchmarks/emoji/README.md. Without TEACHER (a diffusers folder, see
benchmarks/emoji/assemble_teacher.py) it is the embedded student grown to 31M parameters and
trained: DIR/teacher/model. The last stage measures today's student and the new one by one protocol
(`benchmarks.quality`) and says whether the new one is clearly better, see `verdict`; then the model
is in `OUT/student.NN`, parts of a tar file. Rows go to gpu_student.jsonl.

128 px is not among the stages: the data are images of 64 px.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import common
from sdlite import hub
from sdlite.distill import checkpoints

EMOJI = common.ROOT / "benchmarks" / "emoji"
SHORTEST = 60  # seconds that are worth a start
SPREADS = 2.0  # standard deviations over seeds that are no accident
LARGER = 1.02  # of today's bytes: the wheel has no room for more
BETTER = {"identity@1": 1, "kid": -1}  # figure -> its better direction; both must be clearly better
NO_WORSE = {"exact@1": 1, "colour": 1, "heldout@1": 1}


@dataclass(frozen=True)
class Stage:
    """One step on the way.

    Attributes:
        make: seconds that are left -> the command.
        done: whether it is whole.
        least: seconds that it wants; a training takes what there is.
    """

    name: str
    make: Callable[[float], list[str]]
    done: Callable[[], bool]
    least: float = SHORTEST


def seen(folder: Path) -> int:
    """Images of a training's newest checkpoint."""
    found = checkpoints.newest(folder) if folder.exists() else None
    return found.images if found else 0


class Recipe:
    """The stages of one state folder."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.state = args, args.state
        self.old = hub.resolve("emoji", None)
        own = args.teacher is None
        self.teacher: Path = self.state / "teacher" / "model" if own else args.teacher
        self.latents = self.state / "latents.safetensors"
        self.stages = [
            *(self._teacher() if own else []),
            self._student(),
            self._few("guidance", "guided", "student", 80_000, guidance=2.0),
            self._few("progressive", "p8", "guided", 30_000, steps=8),
            self._few("progressive", "p4", "p8", 60_000, steps=4),
            self._decoder(),
            self._shipped(),
            self._compared(),
        ]

    def _script(self, name: str, *words: object) -> list[str]:
        return [sys.executable, "-W", "ignore", str(EMOJI / f"{name}.py"), *map(str, words)]

    def _training(self, name: str, script: str, images: int, *words: object) -> Stage:
        """A training of `images` times `--times` into the folder `name`; a teacher's, which is not
        what is asked for, of no more than `images`.
        """
        times = min(1.0, self.args.times) if name == "teacher" else self.args.times
        folder, count = self.state / name, max(1, round(images * times))
        more = ("--images", count, "--out", folder, "--resume", "--mixed-precision", "bf16")
        threads = ("--threads", os.cpu_count() or 1)

        def make(seconds: float) -> list[str]:
            late = ("--max-minutes", f"{seconds / 60:.2f}")
            return self._script(script, *words, *more, *threads, *late)

        return Stage(name, make, lambda: seen(folder) >= count)

    def _teacher(self) -> list[Stage]:
        """The student grown, and trained: its latents are those of all stages."""
        grown, folder = self.state / "grown", self.state / "teacher"
        self.latents = folder / "latents.safetensors"
        start = ("--student", self.old, "--out", grown)
        given = ("--vae", self.old / "vae", "--unet", grown / "unet", "--freeze-text-encoder")
        given += ("--text-encoder", self.old / "text_encoder", "--timestep-power", 0.6)
        batch = ("--decay-from", 0.3, "--batch-size", self.args.batch_size)
        whole = (grown / "unet" / "config.json").exists
        return [
            Stage("grown", lambda _: self._script("grow_teacher", *start), whole),
            self._training("teacher", "train_teacher", 220_000, *given, *batch),
        ]

    def _student(self) -> Stage:
        given = ("--teacher", self.teacher, "--init", self.old / "unet", "--latents", self.latents)
        how = ("--timestep-power", 0.6, "--lr", 5e-4, "--batch-size", self.args.batch_size)
        return self._training("student", "train_student", 60_000, *given, *how)

    def _few(
        self, kind: str, name: str, after: str, images: int, *, guidance: float = 0, steps: int = 0
    ) -> Stage:
        """A stage of train_few_step.py: guidance from the teacher, halvings from the student."""
        given = (kind, "--student", self.state / after / "model", "--latents", self.latents)
        if guidance:
            given += ("--teacher", self.teacher, "--guidance", guidance)
            given += ("--timestep-power", 0.7, "--lr", 5e-4)
        else:
            given += ("--steps", steps)
        batch = ("--batch-size", self.args.batch_size)
        return self._training(name, "train_few_step", images, *given, *batch)

    def _decoder(self) -> Stage:
        given = ("--model", self.state / "p4" / "model", "--vae", self.teacher / "vae")
        how = ("--guidance", 1, "--steps", 4, "--latents", self.latents)
        return self._training("decoder", "train_decoder", 12_000, *given, *how)

    def _shipped(self) -> Stage:
        out, n = self.state / "shipped", self.args.times
        recipe = (
            "from the embedded student before: task + output + feature distillation from the"
            f" teacher ({60_000 * n:,.0f} images), guidance 2 ({80_000 * n:,.0f}), progressive 8"
            f" and 4 steps ({30_000 * n:,.0f} and {60_000 * n:,.0f}); decoder ({12_000 * n:,.0f})"
        )
        given = ("--model", self.state / "p4" / "model")
        given += ("--vae", self.state / "decoder" / "model" / "vae")
        how = ("--steps", 4, "--guidance", 1, "--images", round(230_000 * n), "--out", out)
        how += ("--recipe", recipe)
        whole = (out / "sdlite.json").exists
        return Stage("shipped", lambda _: self._script("ship", *given, *how), whole, 90)

    def _compared(self) -> Stage:
        """Both by one protocol; on the CPU, as the rows of today's student are."""
        out = self.state / "quality.jsonl"
        models = ("emoji", str(self.state / "shipped"))
        labels = ("--label", "today", "--label", "new", "--backend", "onnxruntime")
        how = ("--threads", str(os.cpu_count() or 1), "--out", str(out))
        how += ("--prompts", str(self.args.prompts), "--seeds", str(self.args.seeds))
        how += ("--heldout", str(self.args.heldout))
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.quality"]
        return Stage("compared", lambda _: [*command, *models, *labels, *how], out.exists, 150)


def verdict(today: dict[str, Any], new: dict[str, Any], size: float) -> dict[str, Any]:
    """Whether a student is to replace today's: rows of `benchmarks.quality` of both, and the new
    one's bytes as a multiple of today's.

    identity@1 and KID must both be better by more than `SPREADS` standard deviations (of the seeds
    of both), no other figure worse by as much, and the size at most `LARGER`.
    """
    gains = {}
    for name, sign in (BETTER | NO_WORSE).items():
        spread = (today["std"][name] ** 2 + new["std"][name] ** 2) ** 0.5
        gain = sign * (new["mean"][name] - today["mean"][name])
        gains[name] = {"gain": gain, "spread": spread}
    against = [f"{n} is not clearly better" for n in BETTER if not _more(gains[n], 1)]
    against += [f"{n} is clearly worse" for n in NO_WORSE if _more(gains[n], -1)]
    if size > LARGER:
        against.append(f"{size:.2f} times as large, at most {LARGER:g}")
    return {"replace": not against, "against": against, "gains": gains, "size": size}


def _more(found: dict[str, float], sign: int) -> bool:
    return sign * found["gain"] > SPREADS * found["spread"]


def go(args: argparse.Namespace, recipe: Recipe, budget: common.Budget) -> str:
    """Run what is not done; the stage that is next, "" where all are.

    Raises:
        SystemExit: a stage failed.
    """
    environ = {**common.child(), "SDLITE_CACHE": str(args.state / "cache")}
    for stage in recipe.stages:
        if not stage.done():
            if budget.left < stage.least:
                return stage.name
            print(f"{stage.name}: {budget.left:.0f} s are left", flush=True)
            code = subprocess.run(stage.make(budget.left - 15), env=environ).returncode
            if code:
                raise SystemExit(f"{stage.name} failed, exit {code}; what it said is above")
            if not stage.done():
                return stage.name
        if stage.name == args.until:
            return ""
    return ""


def same(args: argparse.Namespace) -> None:
    """What the state was begun with.

    Raises:
        SystemExit: now it is something else.
    """
    path = args.state / "asked.json"
    teacher = args.teacher and str(args.teacher.resolve())
    now = {"times": args.times, "batch_size": args.batch_size, "teacher": teacher}
    if not path.exists():
        path.write_text(json.dumps(now))
    if (begun := json.loads(path.read_text())) != now:
        raise SystemExit(f"{args.state} was begun with {begun}, not {now}; choose another --state.")


def listed_bytes(model: Path) -> int:
    """Of all files that its manifest names."""
    files = json.loads((model / "sdlite.json").read_text())["files"].values()
    return sum(f["bytes"] for f in files)


def judged(args: argparse.Namespace, about: dict[str, Any]) -> dict[str, Any]:
    """The row of the comparison."""
    size = listed_bytes(args.state / "shipped") / listed_bytes(hub.resolve("emoji", None))
    lines = (args.state / "quality.jsonl").read_text().splitlines()
    rows = {r["model"]: r for r in map(json.loads, lines)}
    found = verdict(rows["today"], rows["new"], size)
    keys = ("mean", "std", "seeds", "steps", "guidance", "prompts", "heldout")
    both = {name: {k: rows[name][k] for k in keys} for name in ("today", "new")}
    told = {"times": args.times, "batch_size": args.batch_size}
    return {**told, "own_teacher": args.teacher is None, **found, **both, **about}


def main() -> int:
    ap = common.arguments(__doc__ or "", "student")
    ap.add_argument("--state", type=Path, required=True, help="folder of trainings")
    ap.add_argument("--teacher", type=Path, help="diffusers folder of the 31M teacher")
    ap.add_argument(
        "--times", type=float, default=4.0, help="images, as a multiple of the recipe's"
    )
    ap.add_argument("--batch-size", type=int, default=64)
    ap.add_argument("--until", metavar="STAGE", help="stop after this stage")
    ap.add_argument("--prompts", type=int, default=256)
    ap.add_argument("--heldout", type=int, default=64)
    ap.add_argument("--seeds", type=int, default=3)
    args = ap.parse_args()
    budget, about = common.Budget(args.minutes), common.about(args.device)
    args.state.mkdir(parents=True, exist_ok=True)
    same(args)
    recipe = Recipe(args)
    names = [s.name for s in recipe.stages]
    if args.until not in (None, *names):
        ap.error(f"--until {args.until}; choose one of {', '.join(names)}")
    if left := go(args, recipe, budget):
        print(f"{left} is not done: the same command goes on")
    elif args.until in (None, names[-1]):
        common.keep(args.out, judged(args, about))
        for part in common.pack(args.state / "shipped", args.out.with_name("student")):
            print(part)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
