"""A recipe is a TOML list of stages; running it (`sdlite.distill.run`) makes a model.

    name = "my-student"
    [student]
    preset = "bk-tiny"            # sdlite.distill.students.PRESETS; or width = 0.5, ...
    weights = "teacher"           # what stays of the teacher's; or "random"
    score = "l1"                  # which channels a width below 1 keeps; or "taylor"
    [train]                       # defaults of every stage: fields of TrainConfig
    batch_size = 64
    [[stage]]                     # options of each kind: the classes in sdlite.distill.tasks
    kind = "output"               # task, output and feature distillation (tasks.student.Output)
    images = 200000
    lr = 1e-4
    feature_weight = 0.1
    [[stage]]
    kind = "guidance"
    images = 50000
    guidance_scale = 4.0
    cache_targets = 50000         # the teacher runs once over so many draws (teacher_cache)
    [[stage]]
    kind = "progressive"
    steps = [16, 8, 4]            # one training of `images` for each halving
    images = 30000
    [[stage]]
    kind = "text-encoder"         # fewer layers (tasks.other_networks.TextEncoder)
    layers = 6
    images = 50000
    [[stage]]
    kind = "tiny-decoder"         # TAESD's shape instead of the VAE decoder
    images = 50000
    [sampler]
    guidance_scale = 1.0
    [preview]                     # sample grids; default: 16 captions of the data, 25 steps
    prompts = ["a fox", "a house"]
    num_inference_steps = 10

`text-encoder` and `tiny-decoder` come last, each at most once; alone they make parts for a UNet
that stays. Each stage has its own folder, checkpoints and statistics, starts from the stage before
it, and is skipped when it is already done.

A run goes on (`resume`) with the recipe, the teacher's weights, the data and the size that it was
begun with, as `run.json` says; only how it runs may change: micro_batch_size,
gradient_checkpointing, compile, plain_attention, log_every, sample_every, checkpoint_minutes and
keep_checkpoints. What is in `out` before the first checkpoint (latents) never stands in the way of
another start.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TypedDict, cast

from sdlite.arguments import one_of
from sdlite.distill.students import PRESETS, StudentSpec
from sdlite.distill.tasks import KINDS
from sdlite.distill.tasks.base import TOLD_SCALES, Count, Scale, StageKind, Steps
from sdlite.distill.train import TrainConfig
from sdlite.errors import InputError, SdliteError, printable
from sdlite.io import read_toml
from sdlite.sampling import guided, known_sampler
from sdlite.settings import read, settings

Table = Mapping[str, object]  # of a TOML file
GUIDANCE = 4.0  # the default scale of students without guidance in them
STEPS = 25  # the default sampling steps of such students
_TRAIN = {f.name for f in fields(TrainConfig)} - {"max_images"}


@settings
@dataclass(frozen=True)
class Sampler:
    """[sampler]: how the model is sampled by default; None is what its stages made it for."""

    name: str | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: Scale | None = None


class HowSampled(TypedDict):
    """A model's default sampling."""

    name: str
    num_inference_steps: int
    guidance_scale: float


@settings
@dataclass(frozen=True)
class Preview:
    """[preview]: the sample grids; None is captions of the data, and the stage's own steps."""

    prompts: tuple[str, ...] | None = None
    num_inference_steps: Steps | None = None


@settings
@dataclass(frozen=True)
class _Tables:
    """The whole file, before its tables are looked at."""

    name: str = "student"
    student: dict[str, object] = field(default_factory=dict)
    train: dict[str, object] = field(default_factory=dict)
    sampler: dict[str, object] = field(default_factory=dict)
    preview: dict[str, object] = field(default_factory=dict)
    stage: object = None


@settings
@dataclass(frozen=True)
class _Length:
    images: Count


@dataclass(frozen=True)
class Stage:
    """One training: what `fit` is given.

    Attributes:
        name: of its folder.
        options: what the recipe says of it besides `config`, as reports and run.json keep it.
    """

    name: str
    kind: StageKind
    config: TrainConfig
    options: Mapping[str, object]

    @property
    def makes(self) -> str:
        """Part of the pipeline that this stage trains: unet, text_encoder or vae."""
        return self.kind.makes

    def described(self) -> dict[str, object]:
        """As manifests keep it."""
        config, options = asdict(self.config), dict(self.options)
        return {"name": self.name, "kind": self.kind.name, "config": config, "options": options}


@dataclass(frozen=True)
class Recipe:
    """What a recipe says, checked."""

    name: str
    student: StudentSpec
    stages: tuple[Stage, ...]
    sampler: Sampler = Sampler()
    preview: Preview = Preview()

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read and check a TOML file.

        Raises:
            InputError: the file is missing, is not TOML, or says something that is not known; the
                message names it and what is.
        """
        return cls.parse(read_toml(path, "recipe", "give a TOML file (see sdlite.distill.recipe)"))

    @classmethod
    def parse(cls, raw: Table) -> Recipe:
        """Check what a TOML file says.

        Raises:
            InputError: see `load`.
        """
        tables = read(_Tables, raw, "recipe")
        sampler, preview = _sampler(tables.sampler), _preview(tables.preview)
        read(TrainConfig, {"max_images": 1, **_known("[train]", tables.train, _TRAIN)}, "[train]")
        listed = tables.stage
        if not isinstance(listed, list) or not listed or not all(_is_table(s) for s in listed):
            raise InputError(
                "the recipe has no [[stage]]; give at least one, such as kind = 'output'."
            )
        made = [stage for n, s in enumerate(listed) for stage in _stages(n, s, tables.train)]
        _ordered(made)
        return cls(tables.name, _student(tables.student), tuple(made), sampler, preview)

    @property
    def unet_stages(self) -> list[Stage]:
        """The stages that train the UNet, in order."""
        return [s for s in self.stages if s.makes == "unet"]

    def default_sampler(
        self, own: str, teachers: Table | None = None, *, is_told: bool = False
    ) -> HowSampled:
        """How the model is sampled: as the last UNet stage made it for, unless [sampler] says
        otherwise.

        Args:
            own: sampler of many-step students.
            teachers: the teacher's defaults, for recipes that leave the UNet as it is.
            is_told: the UNet is told its guidance: the teacher's defaults are those of every
                student that no stage makes for other steps.
        """
        out: dict[str, object] = {
            "name": own,
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
        }
        unet = self.unet_stages
        if is_told or not unet:
            out |= {k: v for k, v in (teachers or {}).items() if k in out}
        elif any(guided(s.kind.guidance) for s in unet):
            out["guidance_scale"] = 1.0
        last = unet[-1].kind if unet else None
        if last and last.sampling_steps is not None:
            out |= {"name": own, "num_inference_steps": last.sampling_steps}
        if last and last.sampler is not None:
            out["name"] = last.sampler
        out |= {k: v for k, v in asdict(self.sampler).items() if v is not None}
        return cast(HowSampled, out)

    def refuse_guidance(self) -> None:
        """For a teacher that is told its guidance.

        Raises:
            InputError: a stage says a guidance, which would have no effect.
        """
        low, high = TOLD_SCALES
        for stage in self.stages:
            if "guidance_scale" in stage.options:
                raise InputError(
                    f"stage {stage.name} says guidance_scale={stage.options['guidance_scale']}, but"
                    " this teacher is told its guidance, and so is its student, at scales from"
                    f" {low:g} to {high:g}; leave guidance_scale out."
                )

    def refuse_text_encoders(self, names: Collection[str]) -> None:
        """For a teacher of several text encoders; `names`: their folders.

        Raises:
            InputError: a stage trains one.
        """
        for stage in self.stages:
            if (why := stage.kind.of_several(names)) is not None:
                raise InputError(f"stage {stage.name} {why}.")


def _is_table(value: object) -> bool:
    return isinstance(value, dict)


def _sampler(given: Table) -> Sampler:
    out = read(Sampler, given, "[sampler]")
    if out.name is not None:
        try:
            known_sampler(out.name)
        except SdliteError as e:
            raise type(e)(f"[sampler]: {e}") from None
    return out


def _preview(given: Table) -> Preview:
    out = read(Preview, given, "[preview]")
    if out.prompts == ():
        raise InputError("[preview]: prompts=[]; accepted: a list of strings, at least one.")
    return out


def _student(given: Table) -> StudentSpec:
    preset = given.get("preset")
    base = StudentSpec()
    if preset is not None:
        try:
            base = PRESETS[one_of("preset", preset, tuple(PRESETS))]
        except SdliteError as e:
            raise type(e)(f"[student]: {e}") from None
    rest = {k: v for k, v in given.items() if k != "preset"}
    return read(StudentSpec, {**asdict(base), **rest}, "[student]")


def _stages(n: int, given: Table, common: Table) -> list[Stage]:
    """The trainings of the n-th [[stage]]; `common` is [train]."""
    name = given.get("kind")
    if not isinstance(name, str) or name not in KINDS:
        raise InputError(
            f"[[stage]] {n}: kind={printable(repr(name), 80)} is not known; choose one of"
            f" {', '.join(KINDS)}."
        )
    where, own = f"[[stage]] {n} ({name})", {f.name for f in fields(KINDS[name])}
    _known(where, given, {"kind", "images", *_TRAIN, *own})
    length = read(_Length, {k: v for k, v in given.items() if k == "images"}, where)
    train = {**common, **{k: v for k, v in given.items() if k in _TRAIN}}
    config = read(TrainConfig, {**train, "max_images": length.images}, where)
    said = {k: v for k, v in given.items() if k in own}
    kind = read(KINDS[name], said, where)
    if (why := kind.conflict()) is not None:
        raise InputError(f"{where}: {why}.")
    return [Stage(f"{n}-{title}", k, config, o) for title, k, o in kind.trainings(said)]


def _ordered(made: list[Stage]) -> None:
    """Refuse UNet stages after the other parts' stages, and guidance on top of guidance."""
    for before, stage in itertools.pairwise(made):
        if before.makes != "unet" and (stage.makes == "unet" or stage.makes == before.makes):
            raise InputError(
                f"stage {stage.name} comes after {before.name}; put text-encoder and tiny-decoder"
                " last, each at most once: they are made for the UNet that is shipped."
            )
    into: Stage | None = None
    for stage in made:
        asked = stage.kind.more_guidance
        if into is not None and guided(asked) and _entry(into) != _entry(stage):
            raise InputError(
                f"stage {stage.name} asks for guidance_scale={asked:g}, but {into.name} has put"
                " guidance into the student already; say guidance_scale = 1.0, or leave it out."
            )
        into = stage if guided(stage.kind.guidance) else into


def _entry(stage: Stage) -> str:
    """The number of the [[stage]] that a training belongs to."""
    return stage.name.split("-")[0]


def _known(where: str, given: Table, known: set[str]) -> Table:
    if unknown := sorted(set(given) - known):
        raise InputError(
            f"{where}: {printable(', '.join(unknown), 200)} {'is' if len(unknown) == 1 else 'are'}"
            f" not known; known: {', '.join(sorted(known))}."
        )
    return given
