"""`advise`: which strategy? From device, memory, time and wish to a recipe, with the measured table
    as evidence.

The table is `measured.json` beside this file: what `python -m benchmarks.distil summary` made of
`benchmarks/results/distil.jsonl`. Nothing measured stands in this code; where the table has no row,
the advice says "not measured yet" and what it rests on instead. What is computed here and now are
parameters, bytes and multiply-accumulates, from the teacher's configuration.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sdlite.distill.recipe import Recipe
from sdlite.distill.students import PRESETS, StudentSpec, parameters, shape
from sdlite.errors import InputError, UnknownNameError
from sdlite.spec import latent_size

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

    def __init__(self, data: dict[str, Any]):
        self.rows: list[dict[str, Any]] = data.get("rows", [])

    @classmethod
    def load(cls, path: Path = TABLE) -> Table:
        return cls(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})

    def find(self, table: str, strategy: str) -> dict[str, Any] | None:
        """The row of a strategy with the largest budget."""
        found = [r for r in self.rows if (r["table"], r["strategy"]) == (table, strategy)]
        return max(found, key=lambda r: r["images"], default=None)

    def trained(self, table: str) -> list[dict[str, Any]]:
        names = dict.fromkeys(
            r["strategy"] for r in self.rows if r["table"] == table and r["images"]
        )
        return [r for n in names if (r := self.find(table, n)) is not None]

    def difference(
        self, table: str, one: str, other: str, metric: str = "kid"
    ) -> tuple[float, float] | None:
        """(mean of `one` minus mean of `other`, standard error of it over seeds); None when either
        is not measured.
        """
        a, b = self.find(table, one), self.find(table, other)
        if a is None or b is None:
            return None
        error = math.sqrt(sum(r["std"][metric] ** 2 / max(r["seeds"], 1) for r in (a, b)))
        return a["mean"][metric] - b["mean"][metric], error

    def aids(self) -> list[str]:
        """A line for each strategy of size: does it help beyond the spread, against the plain
        task's loss or what it adds to?
        """
        pairs = [
            ("from scratch", "task"),
            ("output", "task"),
            ("feature", "task"),
            ("feature + output", "task"),
            ("feature + output + multi-scale", "feature + output"),
            ("feature + output + mask", "feature + output"),
            ("feature + output + channel, temperature 4 to 1", "feature + output"),
            ("article's literal loss", "task"),
        ]
        return [f"{one}, against {other}: {self._verdict(one, other)}" for one, other in pairs]

    def _verdict(self, one: str, other: str) -> str:
        found = self.difference("size", one, other)
        if found is None:
            return "not measured yet"
        d, error = found
        if min(r["seeds"] for n in (one, other) if (r := self.find("size", n))) < 2:
            return f"KID {d:+.2f}, of one seed: no verdict"
        said = f"KID {d:+.2f} ± {error:.2f}"
        return said + (
            ", no difference beyond the seeds' spread"
            if abs(d) <= 2 * error
            else ", helps"
            if d < 0
            else ", harms"
        )


def macs(network: Any, tokens: int = 77) -> int:
    """Multiply-accumulates of one call of a UNet, batch 1, at its own size with `tokens` of text.

    Counted on the meta device: torch's counter does not see the fused attention of CPUs (torch
    2.13), and would leave its products out.
    """
    from torch.utils.flop_counter import FlopCounterMode

    network, c = shape(network, StudentSpec()), network.config
    size = latent_size(c)
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        network(
            torch.zeros(1, c.in_channels, *size),
            torch.zeros(()),
            torch.zeros(1, tokens, c.cross_attention_dim),
        )
    return int(counter.get_total_flops() // 2)


def decoder_macs(vae: Any, size: tuple[int, int]) -> int:
    """Multiply-accumulates of decoding one picture of latents of `size`, height and width."""
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


def _parsed(text: str) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(text)


def _teacher(folder: str | Path | None) -> tuple[Any, Any, int]:
    """Its UNet and VAE on the meta device, and the parameters of text encoder and VAE decoder."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        if folder is None:
            vae = AutoencoderKL(**SD14_VAE)
            return UNet2DConditionModel(**SD14), vae, SD14_TEXT + parameters(vae.decoder)
        from transformers import CLIPTextConfig, CLIPTextModel

        from sdlite.artifact import Artifact
        from sdlite.torch_networks import vae_class

        artifact = Artifact.open(folder)
        text = CLIPTextModel(CLIPTextConfig(**artifact.config("text_encoder")))
        vae = vae_class(artifact.config("vae")).from_config(artifact.config("vae"))
        return (
            UNet2DConditionModel.from_config(artifact.config("unet")),
            vae,
            parameters(text) + parameters(vae.decoder),
        )


def _size(
    unet: Any, rest: int, device: str, memory_gb: float, wish: str
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
    fitting = sorted(
        (n, k)
        for k, n in sizes.items()
        if (n + rest) * each <= room and (k is not None or wish == "quality")
    )
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
    stages: list[dict[str, Any]], vae: Any, size: tuple[int, int], work: int, calls: int, wish: str
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


def _stages(
    table: Table, wish: str, preset: str | None
) -> tuple[list[dict[str, Any]], int, list[str]]:
    """Stages without images, network calls of a picture, and why."""
    stages: list[dict[str, Any]] = []
    reasons: list[str] = []
    if preset is not None:
        rows = [
            r
            for r in table.trained("size")
            if all(s.get("kind") == "output" and not s.get("article") for s in r["stages"])
        ]
        rows = [r for r in rows if r["strategy"] != "from scratch"]
        if rows:
            best = min(rows, key=lambda r: r["mean"]["kid"])
            equal = [
                r
                for r in rows
                if (d := table.difference("size", r["strategy"], best["strategy"]))
                and d[0] <= 2 * d[1]
            ]
            chosen = min(equal or [best], key=lambda r: r["minutes"])
            reasons.append(
                f"losses: {chosen['strategy']}: KID {_figure(chosen, 'kid')}, best is"
                f" {best['strategy']} with {_figure(best, 'kid')}; of those within the spread the"
                f" one that trains fastest ({chosen['minutes']:.0f} min for {chosen['images']:,}"
                " images)"
            )
            stages += [_plain(s) for s in chosen["stages"]]
        else:
            reasons.append(
                "losses: task + output + feature, as BK-SDM (arXiv:2305.15798); not measured yet"
                " by us"
            )
            stages.append({"kind": "output", "feature_weight": 0.1})
    few, calls, said = _few_steps(table, wish)
    return stages + few, calls, [*reasons, said]


def _few_steps(table: Table, wish: str) -> tuple[list[dict[str, Any]], int, str]:
    rows, start = table.trained("steps"), table.find("steps", "start")
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
        f"the fewest network calls with KID within {ALLOWED[wish]:g}x of"
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


def _plain(stage: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v
        for k, v in stage.items()
        if not (isinstance(v, float) and v == 0.0 and k not in ("output_weight", "feature_weight"))
    }


def _figure(row: dict[str, Any], metric: str) -> str:
    return f"{row['mean'][metric]:.2f} ± {row['std'][metric]:.2f}"


def _budget(
    table: Table, stages: list[dict[str, Any]], minutes: float, rate: float | None, work: list[int]
) -> list[str]:
    """In place: `images` of each stage. Returns why. A step costs about the teacher's forward and
    three of the student's.
    """
    cost = work[0] + 3 * work[1]
    said = "as given"
    measured = [r for r in table.trained("size") if r.get("teacher_macs") and r["minutes"]]
    if rate is None and measured:
        rates = [
            r["images"] / r["minutes"] / 60 * (r["teacher_macs"] + 3 * r["macs"]) / cost
            for r in measured
        ]
        rate = sorted(rates)[len(rates) // 2]
        said = (
            f"from {len(rates)} measured rows by multiply-accumulates ({measured[0]['cpu']});"
            " another machine differs: check stats.jsonl"
        )
    trainings = sum(len(s.get("steps", [0])) for s in stages)
    if rate is None:
        for s in stages:
            s["images"] = 200_000 if s["kind"] == "output" else 50_000
        return [
            "images: not measured yet, so the time of this recipe is not known; run it with"
            " --max-minutes 2, read images_per_second in stats.jsonl, and ask again with"
            f" --images-per-second for a recipe of {minutes:g} minutes"
        ]
    total = rate * minutes * 60
    first = 0.5 if len(stages) > 1 and stages[0]["kind"] == "output" else 1.0
    for n, s in enumerate(stages):
        output = n == 0 and s["kind"] == "output"
        share = (
            first
            if output
            else (1 - first * (stages[0]["kind"] == "output"))
            / max(trainings - (stages[0]["kind"] == "output"), 1)
        )
        s["images"] = max(1, round(total * share))
    lines = [
        f"images: {total:,.0f} in {minutes:g} minutes at {rate:.2f} images/s ({said}); half for the"
        f" size, the rest for {trainings} trainings alike"
    ]
    least = min((r["images"] for r in table.trained("size")), default=0)
    if least and min(s["images"] for s in stages) < least:
        lines.append(
            f"short: some stages get fewer images than the {least:,} of the measured rows; expect"
            " less than they show"
        )
    return lines


def _toml(name: str, preset: str | None, stages: list[dict[str, Any]], lr: float | None) -> str:
    lines = [
        f'name = "{name}"',
        "[student]",
        *([f'preset = "{preset}"'] if preset else []),
        *([] if lr is None else ["[train]", f"lr = {lr!r}"]),
    ]
    for s in stages:
        lines += ["[[stage]]", *(f"{k} = {_value(v)}" for k, v in s.items())]
    return "\n".join(lines) + "\n"


def _value(v: Any) -> str:
    return json.dumps(v) if isinstance(v, (str, list, tuple, bool)) else repr(v)
