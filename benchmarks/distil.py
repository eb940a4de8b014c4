"""Every distillation strategy under one protocol: one teacher, one student shape, one budget,
several seeds.

    python -m benchmarks.distil size --teacher runs/teacher/model \
        --latents runs/teacher/latents.safetensors --out runs/distil
    python -m benchmarks.distil steps --student runs/student/model ...
    python -m benchmarks.distil summary        # what `sdlite distill advise` reads:
                                               sdlite/distill/measured.json

`size`: students of 5.4M parameters (`half`: BK-Base's blocks at half width) from the teacher, by
    different losses, sampled in 25 guided steps. `steps`: the student given by `--student` made to
    need fewer steps and no guidance pass; without it only the teacher's table row. A row has
    parameters, MACs of one UNet call (batch 1), network calls of a picture, quality by
    `benchmarks.quality`'s definitions, PSNR to the teacher's 50-step guided picture from the same
    noise, seconds of one picture (torch, batch 1) and training minutes. Rows that are already in
    the results file (same strategy, seed and budget) are not measured again, so an interrupted run
    goes on where it was. On a GPU (`--device cuda`) `benchmarks.gpu.strategies` starts it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

USUAL_BATCH = 32  # images of a step where a row does not say another number
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "emoji"))
RESULTS = HERE / "results" / "distil.jsonl"
SUMMARY = HERE.parent / "sdlite" / "distill" / "measured.json"
METRICS = (
    "identity@1",
    "exact@1",
    "colour",
    "heldout@1",
    "kid",
    "fid",
    "paired_psnr",
    "seconds_per_image",
    "loss",
)


@dataclass(frozen=True)
class Strategy:
    kind: str  # a stage of sdlite.distill.recipe
    options: dict[str, Any] = field(default_factory=dict)
    weights: str = "teacher"  # of the student at the start
    lr: float = 1e-3
    sampler: str = "ddim"
    steps: int = 25
    guidance: float = 2.0
    after: str | None = None  # the strategy whose result it starts from


NONE = {"output_weight": 0.0, "feature_weight": 0.0}
BOTH = {"output_weight": 1.0, "feature_weight": 0.1}
SIZE = {
    "from scratch": Strategy("output", NONE, weights="random"),
    "task": Strategy("output", NONE),
    "output": Strategy("output", {**NONE, "output_weight": 1.0}),
    "feature": Strategy("output", {**NONE, "feature_weight": 0.1}),
    "feature + output": Strategy("output", BOTH),
    "feature + output + multi-scale": Strategy("output", {**BOTH, "multi_scale_weight": 0.1}),
    "feature + output + mask": Strategy("output", {**BOTH, "mask": True}),
    "feature + output + channel, temperature 4 to 1": Strategy(
        "output", {**BOTH, "channel_weight": 0.01}
    ),
    "article's literal loss": Strategy("output", {**NONE, "article": True}),
}
FEW: dict[str, Any] = {"lr": 2e-4, "guidance": 1.0}
STEPS = {
    "guidance": Strategy("guidance", {"guidance_scale": 2.0}, **FEW),
    "progressive 8": Strategy(
        "progressive", {"steps": (8,), "guidance_scale": 1.0}, steps=8, after="guidance", **FEW
    ),
    "progressive 4": Strategy(
        "progressive", {"steps": (4,), "guidance_scale": 1.0}, steps=4, after="progressive 8", **FEW
    ),
    "progressive 2": Strategy(
        "progressive", {"steps": (2,), "guidance_scale": 1.0}, steps=2, after="progressive 4", **FEW
    ),
    "progressive 1": Strategy(
        "progressive", {"steps": (1,), "guidance_scale": 1.0}, steps=1, after="progressive 2", **FEW
    ),
    # its target is the student itself: at 2e-4 it drifts to a grey mean within 200 steps, as LCM's
    # reports of its touchy rate say
    "consistency 4": Strategy(
        "consistency", {"guidance_scale": 2.0}, sampler="lcm", steps=4, **{**FEW, "lr": 2e-5}
    ),
    "adversarial 4": Strategy(
        "adversarial", {"num_inference_steps": 4}, steps=4, after="progressive 4", **FEW
    ),
    "adversarial 2": Strategy(
        "adversarial", {"num_inference_steps": 2}, steps=2, after="progressive 2", **FEW
    ),
    "adversarial 1": Strategy(
        "adversarial", {"num_inference_steps": 1}, steps=1, after="progressive 1", **FEW
    ),
}


def macs(unet: Any) -> int:
    """Multiply-accumulates of one UNet call, batch 1, 32 tokens."""
    from sdlite.distill import advise

    return advise.macs(unet, tokens=32)


class Bench:
    """The teacher, its pictures and the data: made once."""

    def __init__(self, args: argparse.Namespace):
        import emoji
        import torch
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from latents import EmojiLatents
        from train_teacher import PREVIEW
        from transformers import CLIPTextModel

        from benchmarks.quality import Protocol
        from sdlite.distill.preview import Samples
        from sdlite.tokenizer import ClipTokenizer

        torch.set_num_threads(args.threads)
        self.args, self.torch = args, torch
        self.vae = AutoencoderKL.from_pretrained(args.teacher / "vae").eval().requires_grad_(False)
        self.text_encoder = (
            CLIPTextModel.from_pretrained(args.teacher / "text_encoder").float().eval()
        )
        self.load = UNet2DConditionModel.from_pretrained
        self.teacher = self.load(args.teacher / "unet").eval()
        tokenizer = ClipTokenizer.from_pretrained(emoji.TOKENIZER)
        self.source = EmojiLatents(self.vae, tokenizer, emoji.load(), args.latents)
        self.parts = {"vae": self.vae, "tokenizer": tokenizer, "tokenizer_folder": emoji.TOKENIZER}
        self.samples = Samples(tuple(PREVIEW))
        self.protocol = Protocol(args.prompts, args.heldout)
        self.paired: dict[int, np.ndarray] = {}

    def pipeline(self, folder: Path) -> Any:
        import sdlite

        how = {"precision": "fp32", "backend": "torch", "device": self.args.device}
        return sdlite.Pipeline.from_pretrained(folder, threads=self.args.threads, **how)

    def taught(self, seed: int) -> np.ndarray:
        """The teacher's guided 50-step pictures of the protocol's prompts."""
        from benchmarks.quality import generate

        if seed not in self.paired:
            kept = Path(self.args.out) / f"taught-{seed}-{len(self.protocol.prompts)}.npy"
            if not kept.exists():
                made = generate(
                    self.pipeline(self.args.teacher),
                    self.protocol,
                    self.protocol.prompts,
                    seed,
                    50,
                    2.0,
                )
                kept.parent.mkdir(parents=True, exist_ok=True)
                np.save(kept.with_suffix(".tmp.npy"), made)
                kept.with_suffix(".tmp.npy").replace(kept)
            self.paired[seed] = np.load(kept)
        return self.paired[seed]

    def train(self, name: str, s: Strategy, seed: int, folder: Path) -> dict[str, Any]:
        from sdlite.distill.students import PRESETS, build
        from sdlite.distill.tasks import KINDS
        from sdlite.distill.tasks.base import V_ZERO_SNR, Given
        from sdlite.distill.train import TrainConfig, fit

        self.torch.manual_seed(seed)
        options = dict(s.options)
        if s.kind == "output":
            from dataclasses import replace

            student, master = (
                build(self.teacher, replace(PRESETS["half"], weights=s.weights)),
                self.teacher,
            )
            if options.get("channel_weight"):
                options["temperature_steps"] = self.args.images // (2 * self.args.batch_size)
            options["timestep_power"] = 0.6
        else:
            start = self.run_folder(s.after, seed) / "model" if s.after else self.args.student
            student, master = self.load(start / "unet"), self.load(start / "unet")
        networks = (student, master, self.text_encoder)
        given = Given(*networks, self.source, self.parts, V_ZERO_SNR, self.samples)
        task = KINDS[s.kind](**options).task(given)
        config = TrainConfig(
            max_images=self.args.images,
            batch_size=self.args.batch_size,
            lr=s.lr,
            warmup_images=1_000 * self.args.batch_size // USUAL_BATCH,
            decay_from=0.3,
            seed=seed,
            sample_every=0,
            checkpoint_minutes=30,
            mixed_precision=self.args.mixed_precision,
            plain_attention=self.args.mixed_precision != "no" and self.args.device == "cpu",
        )
        late = self.args.max_minutes
        return fit(task, config, folder, resume=folder.exists(), max_minutes=late)

    def run_folder(self, name: str, seed: int) -> Path:
        return Path(self.args.out) / run_name(name, seed, self.args.images, self.args.batch_size)

    def measure(self, folder: Path, s: Strategy, seed: int) -> dict[str, Any]:
        from benchmarks.quality import fid, generate, kid
        from sdlite.distill.students import parameters
        from sdlite.metrics import psnr

        pipe, p = self.pipeline(folder), self.protocol
        made = {
            "heldout": generate(_With(pipe, s.sampler), p, p.heldout, seed, s.steps, s.guidance)
        }
        taught = (folder, s.steps, s.guidance, s.sampler) == (self.args.teacher, 50, 2.0, "ddim")
        made["prompts"] = (
            self.taught(seed)
            if taught
            else generate(_With(pipe, s.sampler), p, p.prompts, seed, s.steps, s.guidance)
        )
        scored = p.score(p.prompts, made["prompts"])
        held = p.score(p.heldout, made["heldout"])
        paired = [
            min(psnr(a, b), 100.0) for a, b in zip(self.taught(seed), made["prompts"], strict=True)
        ]
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            pipe(
                "red apple",
                seed=0,
                num_inference_steps=s.steps,
                guidance_scale=s.guidance,
                sampler=s.sampler,
            )
            times.append(time.perf_counter() - begin)
        unet = self.load(folder / "unet")
        return {
            "parameters": parameters(unet),
            "macs": macs(unet),
            "calls": s.steps * (1 if s.guidance <= 1 else 2),
            "steps": s.steps,
            "guidance": s.guidance,
            "sampler": s.sampler,
            "identity@1": float(scored["identity@1"]),
            "exact@1": float(scored["exact@1"]),
            "colour": float(scored["colour"]),
            "heldout@1": float(held["exact@1"]),
            "kid": kid(scored["features"], p.real(p.prompts)),
            "fid": fid(scored["features"], p.real(p.prompts)),
            "paired_psnr": float(np.mean(paired)),
            "seconds_per_image": float(np.median(times)),
        }


def run_name(name: str, seed: int, images: int, batch_size: int) -> str:
    """Of the folder of a strategy's training."""
    plain = name.replace(" ", "-").replace("'", "")
    batch = "" if batch_size == USUAL_BATCH else f"-b{batch_size}"
    return f"{plain}-{seed}-{images}{batch}"


class _With:
    """A pipeline with its sampler chosen."""

    def __init__(self, pipe: Any, sampler: str):
        self.pipe, self.sampler = pipe, sampler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.pipe(*args, sampler=self.sampler, **kwargs)


def chain(table: str, name: str) -> list[dict[str, Any]]:
    """The strategy as stages of a recipe, without images: what came before it, and it; halvings in
    one row.
    """
    if name not in (SIZE if table == "size" else STEPS):
        return []
    if table == "size":
        return [
            {"kind": "output", **SIZE[name].options, "timestep_power": 0.6, "lr": SIZE[name].lr}
        ]
    done: list[Strategy] = []
    at: str | None = name
    while at is not None:
        done.insert(0, STEPS[at])
        at = STEPS[at].after
    out: list[dict[str, Any]] = []
    for s in done:
        if s.kind == "progressive" and out and out[-1]["kind"] == "progressive":
            out[-1]["steps"] += s.options["steps"]
        elif s.kind == "progressive":
            out.append({"kind": "progressive", "steps": [*s.options["steps"]], "lr": s.lr})
        else:
            out.append({"kind": s.kind, **s.options, "lr": s.lr})
    return out


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of each (table, strategy, budget); a seed that was
    measured twice counts once, the last time.
    """
    groups: dict[tuple[str, str, int, int], dict[int, dict[str, Any]]] = {}
    for r in rows:
        batch = r.get("batch_size", USUAL_BATCH)
        groups.setdefault((r["table"], r["strategy"], r["images"], batch), {})[r["seed"]] = r
    teachers = {r["table"]: r["macs"] for r in rows if r["strategy"] == "teacher"}
    out = []
    for (table, strategy, images, _), seeds in groups.items():
        found, last = list(seeds.values()), list(seeds.values())[-1]
        values = {m: [r[m] for r in found if r.get(m) is not None] for m in METRICS}
        out.append(
            {
                "table": table,
                "strategy": strategy,
                "images": images,
                "seeds": len(found),
                "stages": chain(table, strategy),
                **{
                    k: last[k]
                    for k in ("parameters", "macs", "calls", "steps", "guidance", "sampler")
                },
                "kids": {str(r["seed"]): r["kid"] for r in found},
                "teacher_macs": teachers.get(table),
                "minutes": float(
                    np.median([r["minutes"] for r in found])
                ),  # other work on the machine can only lengthen one
                "mean": {m: float(np.mean(v)) for m, v in values.items() if v},
                "std": {
                    m: float(np.std(v, ddof=1)) if len(v) > 1 else 0.0
                    for m, v in values.items()
                    if v
                },
                **{k: last[k] for k in ("date", "commit", "cpu", "cores")},
            }
        )
    return {
        "about": (
            "made by `python -m benchmarks.distil summary` from benchmarks/results/distil.jsonl; do"
            " not edit"
        ),
        "rows": out,
    }


def write_summary(results: Path, out: Path) -> None:
    tmp = out.with_name(out.name + ".tmp")
    tmp.write_text(summary_text(results), encoding="utf-8")
    tmp.replace(out)


def summary_text(results: Path) -> str:
    return json.dumps(summary(rows_of(results)), indent=1) + "\n"


def arguments() -> argparse.Namespace:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("table", choices=("size", "steps", "summary"))
    ap.add_argument("--teacher", type=Path, help="diffusers folder")
    ap.add_argument("--latents", type=Path, help="latent cache of the teacher's training")
    ap.add_argument("--student", type=Path, help="diffusers folder that `steps` starts from")
    ap.add_argument("--out", type=Path, help="folder of the runs")
    ap.add_argument("--only", nargs="+", help="strategies; default: all of the table")
    ap.add_argument(
        "--images",
        type=int,
        default=12_800,
        help="training images of each strategy (of each halving)",
    )
    ap.add_argument("--seeds", type=int, default=3)
    ap.add_argument("--only-seeds", nargs="+", type=int, help="of them; default: all")
    ap.add_argument("--references", action="store_true", help="measure what is not trained, alone")
    ap.add_argument("--batch-size", type=int, default=USUAL_BATCH)
    ap.add_argument("--max-minutes", type=float, help="of a training; asked again, it goes on")
    ap.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the images")
    ap.add_argument("--prompts", type=int, default=128)
    ap.add_argument("--heldout", type=int, default=64)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument(
        "--mixed-precision",
        default="no",
        choices=["no", "bf16"],
        help="bf16 pays where the CPU has AMX or AVX512-BF16",
    )
    ap.add_argument("--results", type=Path, default=RESULTS)
    args = ap.parse_args()
    if args.table == "summary":
        return args
    if missing := [f"--{k}" for k in ("teacher", "latents", "out") if getattr(args, k) is None]:
        ap.error(f"{args.table} needs {', '.join(missing)}")
    strategies = SIZE if args.table == "size" else STEPS
    if unknown := set(args.only or []) - set(strategies):
        ap.error(f"{sorted(unknown)} are not in {args.table}; choose of {', '.join(strategies)}")
    if args.table == "steps" and args.student is None:
        ap.error("steps needs --student")
    return args


def key(row: dict[str, Any]) -> tuple[str, str, int, int, int]:
    """What a row is of: table, strategy, seed, images, images of a step."""
    batch = row.get("batch_size", USUAL_BATCH)
    return row["table"], row["strategy"], row["seed"], row["images"], batch


class Rows:
    """The results file: what is measured already, and what is added."""

    def __init__(self, args: argparse.Namespace):
        from benchmarks.env import environment, gpu

        command = "python -m benchmarks.distil " + " ".join(sys.argv[1:])
        self.args, self.about = args, {**environment(), "command": command}
        if args.device != "cpu":
            self.about |= gpu(args.device)
        self.before = rows_of(args.results)
        self.done = {key(r) for r in self.before}

    def has(self, name: str, seed: int, images: int) -> bool:
        batch = self.args.batch_size if images else USUAL_BATCH
        return (self.args.table, name, seed, images, batch) in self.done

    def of_other_table(self, name: str, seed: int) -> dict[str, Any] | None:
        """The teacher's row with the same protocol; the teacher is the same in both tables."""
        wanted = (name, seed, self.args.prompts, self.args.heldout)
        known = [
            r
            for r in self.before
            if (r["strategy"], r["seed"], r["prompts"], r["heldout"]) == wanted
        ]
        return known[-1] if known and name.startswith("teacher") else None

    def append(self, row: dict[str, Any]) -> None:
        self.args.results.parent.mkdir(parents=True, exist_ok=True)
        with open(self.args.results, "a") as f:
            f.write(json.dumps(row) + "\n")

    def write(self, name: str, seed: int, images: int, row: dict[str, Any]) -> None:
        protocol = {
            "table": self.args.table,
            "strategy": name,
            "seed": seed,
            "images": images,
            "prompts": self.args.prompts,
            "heldout": self.args.heldout,
        }
        if images and self.args.batch_size != USUAL_BATCH:
            protocol["batch_size"] = self.args.batch_size
        self.append({**protocol, **row, **self.about})
        print(
            f"{name} (seed {seed}): identity {row['identity@1']:.1%}, KID {row['kid']:.1f}, PSNR to"
            f" teacher {row['paired_psnr']:.2f} dB",
            flush=True,
        )


def _measure_references(bench: Bench, rows: Rows, seed: int) -> None:
    """Rows of what is not trained here: the teacher, and the student that `steps` starts from."""
    args = rows.args
    reference = {"teacher": (args.teacher, 50), "teacher, 4 steps": (args.teacher, 4)}
    if args.student is not None:
        reference |= {"start": (args.student, 25), "start, 4 steps": (args.student, 4)}
    for name, (folder, steps) in reference.items():
        if rows.has(name, seed, 0):
            continue
        if (known := rows.of_other_table(name, seed)) is not None:
            rows.append({**known, "table": args.table})
        else:
            measured = bench.measure(folder, Strategy("", steps=steps), seed)
            rows.write(name, seed, 0, {"minutes": 0.0, "loss": None, **measured})


def _measure_strategy(bench: Bench, rows: Rows, name: str, s: Strategy, seed: int) -> None:
    """Train one strategy and write its row."""
    folder = bench.run_folder(name, seed)
    trained = bench.train(name, s, seed, folder)
    if not trained["finished"]:  # interrupted: a row would claim the whole budget
        raise SystemExit(
            f"{name} (seed {seed}) was stopped after {trained['images']} images; start again to go"
            " on from there."
        )
    row = {
        "minutes": trained["seconds"] / 60,
        "loss": trained["loss"],
        "mixed_precision": rows.args.mixed_precision,
        **bench.measure(folder / "model", s, seed),
    }
    rows.write(name, seed, rows.args.images, row)


def main() -> None:
    args = arguments()
    if args.table == "summary":
        write_summary(args.results, SUMMARY)
        print(f"{SUMMARY}: {len(json.loads(SUMMARY.read_text())['rows'])} rows")
        return
    bench, rows = Bench(args), Rows(args)
    strategies = SIZE if args.table == "size" else STEPS
    if args.references:
        strategies = {}
    for seed in args.only_seeds or range(args.seeds):
        _measure_references(bench, rows, seed)
        for name, s in strategies.items():
            asked = not args.only or name in args.only
            if asked and not rows.has(name, seed, args.images):
                _measure_strategy(bench, rows, name, s, seed)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Of a results file, which need not be there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
