"""`advise`: which strategy? From device, memory, time and wish to a recipe, with the measured table
as evidence.

The table is `measured.json` beside this file: what `python -m benchmarks.distil summary` made of
`benchmarks/results/distil.jsonl`. Nothing measured stands in this code. Only rows in which students
draw something count as evidence (`sdlite.distill.evidence`); where there is none, the advice is the
published recipe with its source and cost. Where the time is too short for it, the advice says so.
What is computed here and now are parameters, bytes and multiply-accumulates, from the teacher's
configuration.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdlite.distill.evidence import DRAWS, Verdict, judge
from sdlite.distill.features import blank
from sdlite.distill.preview import guidance_width
from sdlite.distill.recipe import Recipe
from sdlite.distill.students import PRESETS, StudentSpec, parameters, shape
from sdlite.errors import InputError, UnknownNameError
from sdlite.families import unet_arguments
from sdlite.spec import latent_size

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

Row = dict[str, Any]  # of measured.json
Said = dict[str, Any]  # a [[stage]] of a recipe

TABLE = Path(__file__).parent / "measured.json"
# device -> precision, bytes of a weight in it, the next command
DEVICES = {
    "cpu": (
        "int8-static",
        1,
        "sdlite quantize DIR/artefact --precision int8-static --out DIR/int8",
    ),
    "gpu": (
        "fp16",
        2,
        "sdlite generate PROMPT --model DIR/artefact --precision fp16 --device cuda",
    ),
    "phone": (
        "fp16",
        2,
        (
            "sdlite export DIR/artefact --target mnn-fp16 --out DIR/phone   # also ncnn-fp16,"
            " coreml, executorch"
        ),
    ),
    "browser": ("fp16", 2, "sdlite export DIR/artefact --target web --out DIR/site"),
}
WISHES = ("quality", "balanced", "speed")
# How much worse than the student before its step distillation (KID) a few-step student may be, for
# each wish.
ALLOWED = {"quality": 1.0, "balanced": 1.15, "speed": 1.3}
# The fewest network calls for each wish. The measured students of few steps began as a four-step
# student, on images of 64 pixels: what a fresh one loses in one step they do not show.
LEAST_CALLS = {"quality": 8, "balanced": 4, "speed": 1}
PUBLISHED = (
    "BK-SDM, arXiv:2305.15798: 50,000 steps of 256 images of 0.22M LAION pairs, 13 days of an A100"
)
PUBLISHED_IMAGES = 50_000 * 256
USUAL_IMAGES = 50_000  # of a stage for fewer steps or another part; a convention, not measured
UNMEASURED = "not measured yet by us"
UNMEASURED_STEPS = {
    "quality": [16, 8],
    "balanced": [16, 8, 4],
    "speed": [16, 8, 4, 2],
}  # halvings; without a table only a convention
CROSS, UP_CROSS = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SD14 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": (CROSS, CROSS, CROSS, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", UP_CROSS, UP_CROSS, UP_CROSS),
}
SD14_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SD14_TEXT = 123_060_480  # parameters of SD-1.4's text encoder


@dataclass
class Advice:
    """`recipe` is TOML; `reasons` say why, one a line; `then` is the command after the training."""

    recipe: str
    reasons: list[str] = field(default_factory=list)
    then: str = ""

    def __str__(self) -> str:
        lines = [*(f"# {r}" for r in self.reasons), f"# then: {self.then}", "", self.recipe]
        return "\n".join(lines)


class Table:
    """The measured rows, and what they say beyond their spread."""

    def __init__(self, data: Mapping[str, Any]):
        self.rows: list[Row] = data.get("rows", [])

    @classmethod
    def load(cls, path: Path = TABLE) -> Table:
        return cls(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})

    def find(self, table: str, strategy: str) -> Row | None:
        """The row of a strategy with the largest budget."""
        found = [r for r in self.rows if (r["table"], r["strategy"]) == (table, strategy)]
        return max(found, key=lambda r: r["images"], default=None)

    def trained(self, table: str) -> list[Row]:
        names = dict.fromkeys(
            r["strategy"] for r in self.rows if r["table"] == table and r["images"]
        )
        return [r for n in names if (r := self.find(table, n)) is not None]

    def drawing(self, table: str) -> list[Row]:
        """`trained`, of students that draw something (`evidence.DRAWS`)."""
        return [r for r in self.trained(table) if r["mean"]["identity@1"] >= DRAWS]

    def verdict(self, table: str, one: str, against: str) -> Verdict | None:
        """`one` against another strategy; None when either is not measured, or in one seed only."""
        a, b = self.find(table, one), self.find(table, against)
        return None if a is None or b is None else judge(_kids(b), _kids(a))

    def aids(self) -> list[str]:
        """A line for each loss: does it help beyond the spread, against the plain task's loss or
        what it adds to?
        """
        plain, both = "task", "feature + output"
        against = {
            "from scratch": plain,
            "output": plain,
            "feature": plain,
            both: plain,
            f"{both} + multi-scale": both,
            f"{both} + mask": both,
            f"{both} + channel, temperature 4 to 1": both,
            "article's literal loss": plain,
        }
        return [f"{one} against {base}: {self._said(one, base)}" for one, base in against.items()]

    def _said(self, one: str, against: str) -> str:
        if self.find("size", one) is None or self.find("size", against) is None:
            return "not measured yet"
        return str(self.verdict("size", one, against) or "measured in one seed: no verdict")


def _kids(row: Row) -> dict[int, float]:
    return {int(seed): kid for seed, kid in row["kids"].items()}


def macs(network: UNet2DConditionModel, tokens: int = 77) -> int:
    """Multiply-accumulates of one call of a UNet, batch 1, at its own size with `tokens` of text.

    Counted on the meta device: torch's counter does not see the fused attention of CPUs (torch
    2.13), and would leave its products out.
    """
    from torch.utils.flop_counter import FlopCounterMode

    network, c = shape(network, StudentSpec()), network.config
    size = latent_size(c)
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        told = unet_arguments(blank(network, tokens))
        network(torch.zeros(1, c.in_channels, *size), torch.zeros(()), **told)
    return int(counter.get_total_flops() // 2)


def decoder_macs(vae: AutoencoderKL, size: tuple[int, int]) -> int:
    """Multiply-accumulates of decoding one image of latents of `size`, height and width."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode(
            torch.zeros(1, vae.config.latent_channels, *size, device=next(vae.parameters()).device)
        )
    return int(counter.get_total_flops() // 2)


def advise(
    *,
    device: str,
    memory_gb: float,
    minutes: float,
    wish: str,
    teacher: str | Path | None = None,
    images_per_second: float | None = None,
    table: Table | None = None,
) -> Advice:
    """A recipe for a student, and why.

    Args:
        device: where the student will run: cpu, gpu, phone or browser.
        memory_gb: memory of that device for the model.
        minutes: time for training, on the machine that trains.
        wish: quality, balanced or speed.
        teacher: diffusers folder; None: SD-1.4's shape.
        images_per_second: of training, measured on that machine (`stats.jsonl`, after a run with
            --max-minutes 2); None: from the table.

    Raises:
        UnknownNameError, InputError: an argument is not accepted, or no student fits the memory.
    """
    for name, value, known in (("device", device, DEVICES), ("wish", wish, WISHES)):
        if value not in known:
            raise UnknownNameError(
                f"{name}={value!r} is not known; choose one of {', '.join(known)}."
            )
    for name, number in (
        ("memory_gb", memory_gb),
        ("minutes", minutes),
        ("images_per_second", images_per_second),
    ):
        if number is not None and not (number > 0 and math.isfinite(number)):
            raise InputError(f"{name}={number}; accepted: above 0.")
    table = Table.load() if table is None else table
    unet, vae, rest = _teacher(teacher)
    preset, reasons = _size(unet, rest, device, memory_gb, wish)
    student = shape(unet, PRESETS[preset] if preset else StudentSpec())
    work = [macs(unet), macs(student)]
    stages, calls, said = _stages(table, wish, preset)
    if guidance_width(unet) is not None:
        said += _told(stages)
    reasons += said + _decoder(stages, vae, latent_size(unet.config), calls * work[1], calls, wish)
    reasons += _budget(table, stages, minutes, images_per_second, work)
    precision, _, then = DEVICES[device]
    reasons.append(
        f"precision {precision}: what the device's engines run best of those that sdlite makes; the"
        " gate of the next command checks it"
    )
    reasons += [
        "measured aids (emoji student, benchmarks/results/distil.jsonl):",
        *(f"  {a}" for a in table.aids()),
    ]
    lr = 5e-5 if parameters(student) > 1e8 else None
    if lr is not None:
        for s in stages:
            s.pop("lr", None)  # of networks of some million parameters
        reasons.append(
            "lr: 5e-5, BK-SDM's for SD's size (arXiv:2305.15798); not measured yet by us"
        )
    recipe = _toml(f"{wish}-{device}", preset, stages, lr)
    Recipe.parse(_parsed(recipe))
    return Advice(recipe, reasons, then)


def _told(stages: list[Said]) -> list[str]:
    """In place: the stages for a teacher that is told its guidance. Returns why."""
    for stage in stages:
        stage.pop("guidance_scale", None)
        if stage["kind"] == "output":
            stage["task_weight"] = 0.0
    return [
        "guidance: the teacher is told it, and so is its student; no stage puts it in, and no term"
        " pulls to the data, which have none"
    ]


def _parsed(text: str) -> Said:
    import tomllib

    return tomllib.loads(text)


def _teacher(folder: str | Path | None) -> tuple[UNet2DConditionModel, AutoencoderKL, int]:
    """Its UNet and VAE on the meta device, and the parameters of text encoders and VAE decoder."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        if folder is None:
            vae = AutoencoderKL(**SD14_VAE)
            return UNet2DConditionModel(**SD14), vae, SD14_TEXT + parameters(vae.decoder)
        import transformers

        from sdlite.artifact import Artifact
        from sdlite.distill.teacher import refuse_unfed
        from sdlite.torch_networks import vae_class

        artifact = Artifact.open(folder)
        refuse_unfed(artifact)
        kinds = {
            p: getattr(transformers, artifact.index[p][-1]) for p in artifact.family.tokenizers
        }
        texts = [
            kind(transformers.CLIPTextConfig(**artifact.config(part)))
            for part, kind in kinds.items()
        ]
        vae = vae_class(artifact.config("vae")).from_config(artifact.config("vae"))
        return (
            UNet2DConditionModel.from_config(artifact.config("unet")),
            vae,
            sum(parameters(text) for text in texts) + parameters(vae.decoder),
        )


def _size(
    unet: UNet2DConditionModel, rest: int, device: str, memory_gb: float, wish: str
) -> tuple[str | None, list[str]]:
    """The preset (None: the teacher's own size) and why."""
    sizes: dict[str | None, int] = {None: parameters(unet)}
    for name, spec in PRESETS.items():
        try:
            sizes[name] = parameters(shape(unet, spec))
        except InputError:  # not for this teacher
            continue
    each = DEVICES[device][1]
    room = memory_gb * 1e9 / 2
    fitting = [
        (n, k)
        for k, n in sizes.items()
        if (n + rest) * each <= room and (k is not None or wish == "quality")
    ]
    fitting.sort(key=lambda one: (one[0], one[1] or ""))  # a preset may be the teacher's own size
    if not fitting:
        least = min(sizes.values())
        raise InputError(
            f"no student fits {memory_gb:g} GB on {device}: the smallest preset has"
            f" {least / 1e6:.0f}M UNet parameters, with text encoder and decoder"
            f" {(least + rest) * each / 1e9:.2f} GB of weights, and half the memory is kept for"
            " activations; give more memory, or add text-encoder and tiny-decoder stages"
            " (sdlite.distill.recipe) to a recipe of your own."
        )
    count, preset = {
        "quality": fitting[-1],
        "speed": fitting[0],
        "balanced": fitting[(len(fitting) - 1) // 2],
    }[wish]
    name = f"preset {preset}" if preset else "the teacher's own size"
    return preset, [
        f"size: {name}, {count / 1e6:.1f}M UNet parameters ({count / sizes[None]:.0%} of the"
        f" teacher); weights {(count + rest) * each / 1e9:.2f} GB at {each} byte a weight, within"
        f" half of {memory_gb:g} GB; {len(fitting)} sizes fit, {wish} takes the "
        + {"quality": "largest", "speed": "smallest", "balanced": "middle one"}[wish]
    ]


def _decoder(
    stages: list[Said], vae: AutoencoderKL, size: tuple[int, int], work: int, calls: int, wish: str
) -> list[str]:
    """In place: a tiny-decoder stage where decoding is most of the work and the wish is speed.
    Returns why.
    """
    from sdlite.distill.tasks.other_networks import tiny_vae

    with torch.device("meta"):
        tiny = tiny_vae(vae)
    old, new = decoder_macs(vae, size), decoder_macs(tiny, size)
    text = (
        f"decoder: {old / 1e9:.3g} GMACs against {work / 1e9:.3g} of {calls} UNet calls; TAESD's"
        f" shape takes {new / 1e9:.3g}, its quality is not measured yet by us"
    )
    if new >= old or 2 * old < work:
        return [text.split("; ")[0] + ": it stays"]
    if wish != "speed":
        return [text + "; a [[stage]] with kind = 'tiny-decoder' would make one"]
    stages.append({"kind": "tiny-decoder"})
    return [text + "; the wish is speed, so it is trained"]


def _stages(table: Table, wish: str, preset: str | None) -> tuple[list[Said], int, list[str]]:
    """Stages without images, network calls of an image, and why."""
    stages, reasons = _losses(table) if preset is not None else ([], [])
    few, calls, said = _few_steps(table, wish)
    return stages + few, calls, [*reasons, said]


def _losses(table: Table) -> tuple[list[Said], list[str]]:
    """The stage that makes the student smaller, and why: of measured students that draw something
    the best, or the one that trains fastest of those that it does not beat; else as published.
    """
    rows = [r for r in table.drawing("size") if _distills(r)]
    if not rows:
        measured = "no measured student draws anything" if table.trained("size") else UNMEASURED
        return [{"kind": "output", "feature_weight": 0.1}], [
            f"losses: task + output + feature, as published ({PUBLISHED}); {measured}"
        ]
    best = min(rows, key=lambda r: float(r["mean"]["kid"]))

    def beaten(row: Row) -> bool:
        verdict = table.verdict("size", best["strategy"], row["strategy"])
        return verdict is None or verdict.word == "helps"

    equal = [r for r in rows if r is best or not beaten(r)]
    chosen = min(equal, key=lambda r: float(r["minutes"]))
    return [_plain(s) for s in chosen["stages"]], [
        f"losses: {chosen['strategy']}: KID {_figure(chosen, 'kid')}, best is"
        f" {best['strategy']} with {_figure(best, 'kid')}; of those that it does not beat beyond"
        f" the seeds' spread the one that trains fastest ({chosen['minutes']:.0f} min for"
        f" {chosen['images']:,} images)"
    ]


def _distills(row: Row) -> bool:
    """Whether a teacher's output or features were learned, and not the article's literal loss."""
    return row["strategy"] not in ("from scratch", "task") and not any(
        s.get("article") for s in row["stages"]
    )


def _few_steps(table: Table, wish: str) -> tuple[list[Said], int, str]:
    rows, start = table.drawing("steps"), table.find("steps", "start")
    rows = [r for r in rows if r["calls"] >= LEAST_CALLS[wish]]
    if not rows or start is None:
        halvings = UNMEASURED_STEPS[wish]
        return (
            [
                {"kind": "guidance", "guidance_scale": 4.0},
                {"kind": "progressive", "steps": halvings},
            ],
            halvings[-1],
            (
                f"steps: guidance, then halvings to {halvings[-1]} (arXiv:2210.03142, 2202.00512),"
                f" with {wish} as the only ground; not measured yet by us"
            ),
        )
    limit = ALLOWED[wish] * start["mean"]["kid"]
    good = [r for r in rows if r["mean"]["kid"] <= limit]
    chosen = (
        min(good, key=lambda r: (r["calls"], r["mean"]["kid"]))
        if good
        else min(rows, key=lambda r: r["mean"]["kid"])
    )
    why = (
        f"the fewest network calls of {LEAST_CALLS[wish]} or more with KID within"
        f" {ALLOWED[wish]:g}x of"
        if good
        else "no strategy is within the allowed KID; the best one against"
    )
    return (
        [_plain(s) for s in chosen["stages"]],
        chosen["calls"],
        (
            f"steps: {chosen['strategy']}: {chosen['calls']} network calls, KID"
            f" {_figure(chosen, 'kid')}, identity {chosen['mean']['identity@1']:.1%}; {why} the"
            f" student before ({start['calls']} calls, KID {_figure(start, 'kid')})"
        ),
    )


def _plain(stage: Said) -> Said:
    return {
        k: v
        for k, v in stage.items()
        if not (isinstance(v, float) and v == 0.0 and k not in ("output_weight", "feature_weight"))
    }


def _figure(row: Row, metric: str) -> str:
    return f"{row['mean'][metric]:.2f} ± {row['std'][metric]:.2f}"


def _budget(
    table: Table, stages: list[Said], minutes: float, rate: float | None, work: list[int]
) -> list[str]:
    """In place: `images` of each stage. Returns why."""
    said = "as given"
    if rate is None:
        rate, said = _rate(table, work)
    trainings = [len(s.get("steps", [0])) for s in stages]
    least = [_least(table, s) for s in stages]
    needed = sum(n * images for n, images in zip(trainings, least, strict=True))
    for s, images in zip(stages, least, strict=True):
        s["images"] = images
    if rate is None:
        return [
            "images: not measured yet, so the time of this recipe is not known; run it with"
            " --max-minutes 2, read images_per_second in stats.jsonl, and ask again with"
            f" --images-per-second for a recipe of {minutes:g} minutes"
        ]
    total = rate * minutes * 60
    if total < needed:
        return [
            f"not on this machine in {minutes:g} minutes: the recipe needs {needed:,} images, which"
            f" take {_time(needed / rate)} at {rate:.2f} images/s ({said}); the time is enough for"
            f" {total:,.0f}. Give it more time, a faster machine or a smaller teacher: with fewer"
            " images no student is known to draw anything"
        ]
    for s, images in zip(stages, least, strict=True):
        s["images"] = int(images * total / needed)
    return [
        f"images: {total:,.0f} in {minutes:g} minutes at {rate:.2f} images/s ({said}), shared in"
        f" proportion to what each stage needs ({needed:,} in all)"
    ]


def _rate(table: Table, work: list[int]) -> tuple[float | None, str]:
    """Images a second by the measured rows, and how that is known. A step costs about the teacher's
    forward and three of the student's.
    """
    cost = work[0] + 3 * work[1]
    measured = [r for r in table.trained("size") if r.get("teacher_macs") and r["minutes"]]
    rates = sorted(
        r["images"] / r["minutes"] / 60 * (r["teacher_macs"] + 3 * r["macs"]) / cost
        for r in measured
    )
    if not rates:
        return None, ""
    return rates[len(rates) // 2], (
        f"from {len(rates)} measured rows by multiply-accumulates ({measured[0]['cpu']}); another"
        " machine differs: check stats.jsonl"
    )


def _least(table: Table, stage: Said) -> int:
    """Images of one training of the stage below which no student is known to draw anything."""
    if stage["kind"] in ("text-encoder", "tiny-decoder"):
        return USUAL_IMAGES
    size = stage["kind"] == "output"
    measured = [int(r["images"]) for r in table.drawing("size" if size else "steps")]
    return min(measured, default=PUBLISHED_IMAGES if size else USUAL_IMAGES)


def _time(seconds: float) -> str:
    days = seconds / 86_400
    return f"{days:,.1f} days" if days >= 1 else f"{seconds / 3600:.1f} hours"


def _toml(name: str, preset: str | None, stages: list[Said], lr: float | None) -> str:
    lines = [
        f'name = "{name}"',
        "[student]",
        *([f'preset = "{preset}"'] if preset else []),
        *([] if lr is None else ["[train]", f"lr = {lr!r}"]),
    ]
    for s in stages:
        lines += ["[[stage]]", *(f"{k} = {_value(v)}" for k, v in s.items())]
    return "\n".join(lines) + "\n"


def _value(v: object) -> str:
    return json.dumps(v) if isinstance(v, (str, list, tuple, bool)) else repr(v)
