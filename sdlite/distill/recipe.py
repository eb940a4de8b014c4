"""A recipe is a TOML list of stages; running it makes an artefact.

    name = "my-student"
    [student]
    preset = "bk-tiny"            # sdlite.distill.students.PRESETS; or width = 0.5, one_layer =
                                  true, ...
    weights = "teacher"           # what stays of the teacher's; or "random"
    score = "l1"                  # which channels a width below 1 keeps; or "taylor"
    [train]                       # defaults of every stage: fields of TrainConfig
    batch_size = 64
    [[stage]]
    kind = "output"               # task, output and feature distillation (tasks.StudentTask)
    images = 200000
    lr = 1e-4
    feature_weight = 0.1          # also: multi_scale_weight, channel_weight and temperature, mask,
                                  tap_weights
    [[stage]]
    kind = "guidance"
    images = 50000
    guidance_scale = 4.0
    cache_targets = 50000         # teacher runs once over so many draws (targets.py); output
                                  without features, guidance, progressive, consistency
    [[stage]]
    kind = "progressive"
    steps = [16, 8, 4]            # one training of `images` for each halving
    images = 30000
    [[stage]]
    kind = "text-encoder"         # fewer layers; reads as the teacher's for this UNet
                                  (parts.TextEncoderTask)
    layers = 6
    images = 50000
    [[stage]]
    kind = "tiny-decoder"         # TAESD's shape instead of the VAE decoder
                                  (parts.TinyDecoderTask); width = 64, blocks = 3
    images = 50000
    [sampler]
    guidance_scale = 1.0
    [preview]                     # of the sample grids; default: 16 captions of the data, 25 steps
                                  or the stage's own
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

import dataclasses
import hashlib
import itertools
import json
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sdlite import families
from sdlite.arguments import integer, integers, lines, number, one_of, optional, text, truth
from sdlite.artifact import Artifact
from sdlite.distill import checkpoints, data, report
from sdlite.distill.latent_cache import CachedLatents, items_hash
from sdlite.distill.students import PRESETS, StudentSpec, build, parameters, shape
from sdlite.distill.tasks import few_step
from sdlite.distill.tasks import student as tasks
from sdlite.distill.tasks.other_networks import (
    TextEncoderTask,
    TinyDecoderTask,
    smaller_text_encoder,
    tiny_vae,
)
from sdlite.distill.teacher_cache import cache_targets
from sdlite.distill.train import TrainConfig, fit
from sdlite.errors import (
    CONVERT_NEEDS,
    ArtifactError,
    InputError,
    SdliteError,
    SdliteWarning,
    need,
    printable,
)
from sdlite.io import check_writable, read_json, read_toml, sha256, write_json
from sdlite.sampling import guided, known_sampler
from sdlite.spec import latent_size
from sdlite.tokenizer import ClipTokenizer
from sdlite.torch_networks import open_network
from sdlite.tryout import try_out
from sdlite.weights import weight_files

KINDS: dict[str, Any] = {
    "output": tasks.StudentTask,
    "guidance": few_step.GuidanceTask,
    "progressive": few_step.ProgressiveTask,
    "consistency": few_step.ConsistencyTask,
    "adversarial": few_step.AdversarialTask,
    "text-encoder": TextEncoderTask,
    "tiny-decoder": TinyDecoderTask,
}
MAKES = {
    "text-encoder": "text_encoder",
    "tiny-decoder": "vae",
}  # stage kind -> part of the pipeline that it makes; the others make the UNet
_TRAIN = {f.name for f in dataclasses.fields(TrainConfig)} - {"max_images"}
_Check = Callable[[str, Any], Any]


def _from(low: float, high: float) -> _Check:
    return lambda name, value: number(name, value, low, high)


def _whole(low: int, high: int) -> _Check:
    return lambda name, value: integer(name, value, low, high)


def _halving(name: str, value: Any) -> None:
    if not isinstance(value, list):
        raise InputError(
            f"{name}={value!r}; accepted: a list that halves each time, such as [16, 8, 4]."
        )
    if any(a != 2 * b for a, b in itertools.pairwise(integers(name, value, 1, 1000))):
        raise InputError(f"progressive {name}={value} must halve each time, such as [16, 8, 4].")


def _two(name: str, value: Any) -> None:
    if not isinstance(value, list) or len(value) != 2:
        raise InputError(f"{name}={value!r}; accepted: two numbers, such as [4.0, 1.0].")
    for i, v in enumerate(value):
        number(f"{name}[{i}]", v, 1e-3, 1e3)


def _weights(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise InputError(
            f"{name}={value!r}; accepted: a table of numbers, such as {{ mid = 1.0 }}."
        )
    for k, v in value.items():
        number(f"{name}.{printable(k, 80)}", v, 0, 1e6)


_WEIGHT, _SHARE, _SCALE, _STEPS, _COUNT = (
    _from(0, 1e6),
    _from(0, 1),
    _from(0, 1000),
    _whole(1, 1000),
    _whole(1, 10**12),
)
_GUIDED: dict[str, _Check] = {"guidance_scale": _SCALE, "cache_targets": _COUNT}
# What a stage of each kind may say besides `kind`, `images` and TrainConfig's fields, and what each
# accepts.
_OPTIONS: dict[str, dict[str, _Check]] = {
    "output": {
        **{f"{k}_weight": _WEIGHT for k in ("task", "output", "feature", "multi_scale", "channel")},
        "temperature": _two,
        "temperature_steps": _COUNT,
        "mask": truth,
        "article": truth,
        "tap_weights": _weights,
        "caption_dropout": _SHARE,
        "timestep_power": _from(0.01, 100),
        "cache_targets": _COUNT,
    },
    "guidance": _GUIDED,
    "progressive": {
        "steps": _halving,
        "loss_type": lambda n, v: one_of(n, v, ("v", "x0")),
        **_GUIDED,
    },
    "consistency": {
        "grid": _STEPS,
        "sigma_data": _from(1e-6, 1e6),
        "timestep_scaling": _from(0, 1e6),
        **_GUIDED,
    },
    "adversarial": {
        "num_inference_steps": _STEPS,
        "weight": _WEIGHT,
        "ramp": _whole(0, 10**12),
        "reconstruction": _WEIGHT,
        "guidance_scale": _SCALE,
    },
    "text-encoder": {
        "layers": _whole(1, 1000),
        "output_weight": _WEIGHT,
        "caption_dropout": _SHARE,
    },
    "tiny-decoder": {
        "width": _whole(1, 4096),
        "blocks": _whole(1, 64),
        "latent_noise": _from(0, 100),
        "multi_scale_weight": _WEIGHT,
    },
}
_SAMPLER: dict[str, _Check] = {
    "name": lambda n, v: known_sampler(text(n, v)),
    "num_inference_steps": _STEPS,
    "guidance_scale": _SCALE,
}
_PREVIEW: dict[str, _Check] = {"prompts": lines, "num_inference_steps": _STEPS}
# Fields of TrainConfig that change how a training runs, not what is learned: free to change when it
# goes on.
_FREE = {
    "micro_batch_size",
    "gradient_checkpointing",
    "compile",
    "plain_attention",
    "log_every",
    "sample_every",
    "checkpoint_minutes",
    "keep_checkpoints",
}
_NEEDED = {"text-encoder": "layers: how many of the teacher's text encoder stay"}


@dataclass(frozen=True)
class Stage:
    """One training: what `fit` is given."""

    name: str
    kind: str
    config: TrainConfig
    options: dict[str, Any]

    @property
    def makes(self) -> str:
        """Part of the pipeline that this stage trains: unet, text_encoder or vae."""
        return MAKES.get(self.kind, "unet")

    @property
    def guidance(self) -> float:
        """The guidance that this stage puts into the student when it learns from the teacher; 1 is
        none.
        """
        default = 4.0 if self.kind in ("guidance", "progressive", "consistency") else 1.0
        return float(self.options.get("guidance_scale", default))


@dataclass(frozen=True)
class Recipe:
    name: str
    student: StudentSpec
    stages: tuple[Stage, ...]
    sampler: dict[str, Any] = field(default_factory=dict)
    preview: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read and check a TOML file.

        Raises:
            InputError: the file is missing, is not TOML, or says something that is not known; the
                message names it and what is.
        """
        return cls.parse(read_toml(path, "recipe", "give a TOML file (see sdlite.distill.recipe)"))

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Recipe:
        """Check what a TOML file says.

        Raises:
            InputError: see `load`.
        """
        _known("recipe", raw, {"name", "student", "train", "stage", "sampler", "preview"})
        name = _asked("recipe", "name", text, raw.get("name", "student"))
        train, student, sampler, shown = (
            _table(raw, k) for k in ("train", "student", "sampler", "preview")
        )
        for where, given, checks in (
            ("[sampler]", sampler, _SAMPLER),
            ("[preview]", shown, _PREVIEW),
        ):
            _known(where, given, set(checks))
            for k, v in given.items():
                _asked(where, k, checks[k], v)
        _known("[train]", train, _TRAIN)
        _train("[train]", {"max_images": 1, **train})
        listed = raw.get("stage")
        if (
            not listed
            or not isinstance(listed, list)
            or not all(isinstance(s, dict) for s in listed)
        ):
            raise InputError(
                "the recipe has no [[stage]]; give at least one, such as kind = 'output'."
            )
        out = [stage for n, s in enumerate(listed) for stage in _stages(n, s, train)]
        _ordered(out)
        return cls(name, _spec(student), tuple(out), sampler, shown)

    def default_sampler(self, own: str, teachers: dict[str, Any] | None = None) -> dict[str, Any]:
        """{name, num_inference_steps, guidance_scale} for the artefact: the last UNet stage's own,
        unless [sampler] says otherwise.

        Args:
            own: sampler of many-step students. teachers: the teacher's defaults, for recipes that
                leave the UNet as it is.
        """
        unet = [s for s in self.stages if s.makes == "unet"]
        out: dict[str, Any] = {"name": own, "num_inference_steps": 25, "guidance_scale": 4.0}
        if unet:
            out["guidance_scale"] = 1.0 if any(guided(s.guidance) for s in unet) else 4.0
            if unet[-1].kind == "consistency":
                out |= {"name": "lcm", "num_inference_steps": 4}
            elif (steps := _steps(unet[-1])) is not None:
                out["num_inference_steps"] = steps
        else:
            out |= {k: v for k, v in (teachers or {}).items() if k in out}
        return out | self.sampler


def _table(raw: dict[str, Any], name: str) -> dict[str, Any]:
    given = raw.get(name, {})
    if not isinstance(given, dict):
        raise InputError(f"{name}={printable(repr(given), 80)}; accepted: a table, [{name}].")
    return dict(given)


def _asked(where: str, name: str, check: _Check, value: Any) -> Any:
    """What `check` says of a value; an error says where it stands."""
    try:
        return check(name, value)
    except SdliteError as e:
        raise type(e)(f"{where}: {e}") from None


def _train(where: str, settings: dict[str, Any]) -> TrainConfig:
    betas = settings.get("betas", TrainConfig(1).betas)
    settings = {**settings, "betas": tuple(betas) if isinstance(betas, list) else betas}
    return _asked(where, "", lambda *_: TrainConfig(**settings), None)


def _stages(n: int, given: dict[str, Any], common: dict[str, Any]) -> list[Stage]:
    """The trainings of the n-th [[stage]]; `common` is [train]."""
    kind = given.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(
            f"[[stage]] {n}: kind={kind!r} is not known; choose one of {', '.join(KINDS)}."
        )
    where, options = (
        f"[[stage]] {n} ({kind})",
        {k: v for k, v in given.items() if k in _OPTIONS[kind]},
    )
    _known(where, given, {"kind", "images", *_TRAIN, *_OPTIONS[kind]})
    if "images" not in given:
        raise InputError(f"{where} says no images: how many to train on.")
    if kind in _NEEDED and (name := _NEEDED[kind].split(":")[0]) not in given:
        raise InputError(f"{where} does not say {name}{_NEEDED[kind].removeprefix(name)}.")
    images = _asked(where, "images", _COUNT, given["images"])
    for k, v in options.items():
        _asked(where, k, _OPTIONS[kind][k], v)
    features = {"feature_weight": 0.1, "multi_scale_weight": 0, "channel_weight": 0}
    if (
        kind == "output"
        and "cache_targets" in given
        and (used := [k for k, v in features.items() if given.get(k, v)])
    ):
        raise InputError(
            f"{where}: cache_targets keeps the teacher's output, not its features; set"
            f" {', '.join(used)} = 0, or leave cache_targets out."
        )
    config = _train(
        where, {**common, **{k: v for k, v in given.items() if k in _TRAIN}, "max_images": images}
    )
    if kind == "progressive":
        steps = options.pop("steps", [4])
        return [
            Stage(f"{n}-progressive-{s}", kind, config, {**options, "num_inference_steps": s})
            for s in steps
        ]
    return [Stage(f"{n}-{kind}", kind, config, options)]


def _steps(stage: Stage) -> int | None:
    """Sampling steps that a progressive or adversarial stage makes its student for."""
    if stage.kind == "adversarial":
        return int(stage.options.get("num_inference_steps", 4))
    return stage.options.get("num_inference_steps")


def _ordered(made: list[Stage]) -> None:
    """Refuse UNet stages after the other parts' stages, and guidance on top of guidance."""
    into: Stage | None = None
    for before, stage in itertools.pairwise([None, *made]):
        assert stage is not None
        if (
            before is not None
            and before.makes != "unet"
            and (stage.makes == "unet" or stage.kind == before.kind)
        ):
            raise InputError(
                f"stage {stage.name} comes after {before.name}; put text-encoder and tiny-decoder"
                " last, each at most once: they are made for the UNet that is shipped."
            )
        asked = (
            stage.options.get("guidance_scale", 1.0)
            if stage.kind in ("progressive", "adversarial")
            else 1.0
        )
        if (
            into is not None
            and guided(asked)
            and into.name.split("-")[0] != stage.name.split("-")[0]
        ):
            raise InputError(
                f"stage {stage.name} asks for guidance_scale={asked:g}, but {into.name} has put"
                " guidance into the student already; say guidance_scale = 1.0, or leave it out."
            )
        into = stage if guided(stage.guidance) else into


def _known(where: str, given: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(given) - known):
        raise InputError(
            f"{where}: {printable(', '.join(unknown), 200)} {'is' if len(unknown) == 1 else 'are'}"
            f" not known; known: {', '.join(sorted(known))}."
        )


def _spec(given: dict[str, Any]) -> StudentSpec:
    preset = _asked(
        "[student]",
        "preset",
        lambda n, v: optional(one_of, n, v, tuple(PRESETS)),
        given.pop("preset", None),
    )
    _known("[student]", given, {f.name for f in dataclasses.fields(StudentSpec)})
    return _asked(
        "[student]",
        "",
        lambda *_: dataclasses.replace(PRESETS[preset] if preset else StudentSpec(), **given),
        None,
    )


class Teacher:
    """A diffusers SD-1.x/2.x folder, opened for training.

    Raises:
        InputError: it is no folder. ArtifactError: it is not a whole model.
    """

    def __init__(self, folder: str | Path):
        if not Path(folder).is_dir():
            raise InputError(
                f"teacher {folder} is no folder; give that of a diffusers Stable Diffusion"
                " pipeline: a hub model is made one by `hf download ORG/NAME --local-dir DIR`."
            )
        self.artifact, self._stamps = Artifact.open(folder), dict[str, str]()
        part = self.artifact.files.part
        self.scheduler = self.artifact.config("scheduler")
        self.unet, self.text_encoder = (
            open_network(part("unet")),
            open_network(part("text_encoder")),
        )
        self.vae = open_network(part("vae")).eval().requires_grad_(False)
        config = self.artifact.config("text_encoder")
        self.tokenizer = ClipTokenizer.from_pretrained(part("tokenizer"), config)
        height, width = latent_size(self.unet.config)
        self.unet.register_to_config(
            sample_size=height if height == width else [height, width]
        )  # students have it from here
        stride = families.vae_stride(self.vae.config)
        self.size = (height * stride, width * stride)  # pixels

    @torch.no_grad()
    def encode(self, pictures: list[Any]) -> torch.Tensor:
        """float32 arrays (3, H, W) -> scaled posterior means (B, C, h, w)."""
        z = self.vae.encode(torch.stack([torch.from_numpy(p) for p in pictures])).latent_dist.mean
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return (z - shift) * self.vae.config.scaling_factor

    @property
    def shown_size(self) -> str:
        """Of its pictures, as people say it."""
        height, width = self.size
        return f"{height} px" if height == width else f"{height}x{width} px"

    def make(
        self, prompts: list[str], *, num_inference_steps: int, guidance_scale: float, seed: int
    ) -> torch.Tensor:
        """Latents (B, C, h, w) that the teacher paints for the prompts: data when there is none."""
        parts = {
            "unet": self.unet.eval(),
            "text_encoder": self.text_encoder.eval(),
            "vae": self.vae,
            "tokenizer": self.tokenizer,
        }
        return tasks.paint(
            parts,
            tasks.Schedule.from_config(self.scheduler),
            prompts=prompts,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seed,
        )

    def stamp(self, part: str) -> str:
        """What tells one network's weights from another's: the hash of its file, or of all its
        shards.
        """
        if part not in self._stamps:
            self._stamps[part] = "".join(
                sha256(f) for f in weight_files(self.artifact.files.part(part))
            )
        return self._stamps[part]

    def source(self, path: str | Path, cache: Path, progress: bool) -> CachedLatents:
        """`latents` of what `data.read` finds at `path`."""
        return self.latents(data.read(path), cache, progress)

    def latents(self, found: data.Captions, cache: Path, progress: bool) -> CachedLatents:
        """Read `cache`, or make it: latents by the VAE, or painted where there are only prompts.

        Raises:
            InputError: no image can be read, or this teacher cannot encode.
        """
        key: dict[str, Any] = {"vae": self.stamp("vae"), "scale": self.vae.config.scaling_factor}
        if not found.prompts_only and not hasattr(self.vae, "quant_conv"):
            raise InputError(
                f"{self.artifact.folder} has a {type(self.vae).__name__}, whose encoder need not be"
                " trained; give a teacher with an AutoencoderKL to train on images, or prompts"
                " alone."
            )
        if found.prompts_only:
            key |= {
                "made_by": self.stamp("unet"),
                "steps": 25,
                "guidance_scale": 4.0,
                "scheduler": self.scheduler,
            }

        def encode(given: list[Any], before: int) -> torch.Tensor:
            if not found.prompts_only:
                return self.encode(given)
            return self.make(
                given, num_inference_steps=25, guidance_scale=4.0, seed=before + len(given)
            )

        few = max(
            1, min(16, 2**20 // (self.size[0] * self.size[1]))
        )  # images at once: 16 to 256 px, 4 at 512 px
        return CachedLatents.build(
            found,
            self.tokenizer,
            encode,
            cache,
            key=key,
            size=self.size,
            batch=few,
            progress=progress,
        )


def plan(recipe: Recipe, teacher: Teacher) -> str:
    """What `run` would do, in a few lines (`--dry-run`)."""
    student = shape(teacher.unet, recipe.student)
    a, b = parameters(student), parameters(teacher.unet)
    lines = [
        f"{recipe.name}: UNet {a:,} parameters, {a / b:.1%} of the teacher's {b:,};"
        f" {teacher.shown_size}"
    ]
    for s in recipe.stages:
        said = "".join(f", {k}={v}" for k, v in s.options.items())
        lines.append(
            f"  {s.name}: {s.config.max_images:,} images, batch {s.config.batch_size}, lr"
            f" {s.config.lr:g}{said}"
        )
        if s.makes == "text_encoder":
            text = smaller_text_encoder(teacher.text_encoder, s.options["layers"])
            lines.append(
                f"    text encoder {parameters(text):,} parameters of the teacher's"
                f" {parameters(teacher.text_encoder):,}"
            )
        if s.makes == "vae":
            tiny = tiny_vae(teacher.vae, s.options.get("width", 64), s.options.get("blocks", 3))
            lines.append(
                f"    decoder {parameters(tiny.decoder):,} parameters of the teacher's"
                f" {parameters(teacher.vae.decoder):,}"
            )
    state = a * 4 * 4 + b * 4  # student, its EMA and AdamW's two moments; the frozen teacher
    lines.append(
        f"  weights and optimizer: about {state / 1e9:.2f} GB; activations come on top (gradient"
        " accumulation: micro_batch_size; gradient_checkpointing)"
    )
    return "\n".join(lines)


def packages(export: bool) -> None:
    """Look for all that a run comes to, its last step too, before it trains.

    Raises:
        MissingExtraError: something is not installed.
    """
    purpose = "distilling with its export (--no-export does without)" if export else "distilling"
    need(purpose, "distill", "accelerate", "matplotlib", *(CONVERT_NEEDS if export else ()))


def run(
    recipe: Recipe,
    *,
    teacher: str | Path,
    data: str | Path,
    out: str | Path,
    resume: bool = False,
    max_minutes: float | None = None,
    preview_prompts: list[str] | None = None,
    export: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Train every stage and write `out/artefact` (with `export`) or leave `out/<last stage>/model`;
    and `out/report.md`.

    Args:
        teacher: diffusers folder. data: what `sdlite.distill.data.read` takes.
        out: folder of the run; `resume` goes on from its checkpoints, and finished stages are
            skipped.
        max_minutes: of the whole call; the run stops with a checkpoint and can be resumed.

    Returns:
        {"finished", "stages": {name: result}, "artefact": path or None, "seconds"}.

    Raises:
        InputError, TrainingError, ArtifactError: see `Recipe`, `fit`, `Artifact`.
            MissingExtraError: see `packages`.
    """
    out = Path(out)
    new = not out.exists()
    try:
        return _run(
            recipe, teacher, Path(data), out, resume, max_minutes, preview_prompts, export, progress
        )
    except KeyboardInterrupt:
        if not out.exists():
            raise
        raise KeyboardInterrupt(
            f"what was made is kept in {out}: go on with --resume (resume=True)"
        ) from None
    finally:
        with suppress(OSError):
            if new:
                out.rmdir()  # empty: the start failed before it made anything


def _run(
    recipe: Recipe,
    teacher: str | Path,
    where: Path,
    out: Path,
    resume: bool,
    max_minutes: float | None,
    preview_prompts: list[str] | None,
    export: bool,
    progress: bool,
) -> dict[str, Any]:
    begin = time.monotonic()
    packages(export)
    state = _processes()
    if state.is_main_process:
        _look(out, resume)
    taught = Teacher(teacher)
    found = data.read(where)
    now = _fingerprint(recipe, taught, found)
    if state.is_main_process:
        _same_run(out, now, recipe) if _begun(out) else _room(out, recipe, taught, found)
    with state.main_process_first():
        source = taught.latents(
            found, out / "latents.safetensors", progress and state.is_main_process
        )
    if source.skipped and state.is_main_process:
        _say_left_out(out, source)
    parts = {
        "vae": taught.vae,
        "tokenizer": taught.tokenizer,
        "tokenizer_folder": taught.artifact.files.part("tokenizer"),
    }
    prompts = preview_prompts or recipe.preview.get("prompts") or source.captions
    torch.manual_seed(
        recipe.stages[0].config.seed
    )  # of new weights: the same on every process and in every run
    gradients = None
    if recipe.student.score == "taylor" and recipe.student.width != 1:
        gradients = tasks.teacher_gradients(
            taught.unet, taught.text_encoder, source, taught.scheduler
        )
    made: dict[str, Any] = {
        "unet": build(taught.unet, recipe.student, gradients),
        "text_encoder": taught.text_encoder,
        "vae": taught.vae,
    }
    last, sampler = None, recipe.default_sampler("ddim", dict(taught.artifact.sampler))
    about, folders = (
        report.about_run(recipe, taught, made["unet"], source, where),
        [out / s.name for s in recipe.stages],
    )
    if state.is_main_process:
        write_json(out / _RUN, now)
    results: dict[str, Any] = {}
    for stage in recipe.stages:
        folder = out / stage.name
        done = _done(folder)
        if done is None:
            left = (
                None
                if max_minutes is None
                else max(0.0, max_minutes - (time.monotonic() - begin) / 60)
            )
            torch.manual_seed(stage.config.seed)
            if stage.makes == "unet":
                task = _task(
                    stage,
                    made["unet"],
                    taught,
                    source,
                    parts,
                    prompts,
                    last is not None and _guided(recipe, stage),
                )
                if (
                    (steps := recipe.preview.get("num_inference_steps"))
                    and _steps(stage) is None
                    and stage.kind != "consistency"
                ):
                    task.preview["num_inference_steps"] = steps
            else:
                task = _part_task(
                    recipe,
                    stage,
                    made,
                    taught,
                    source,
                    parts,
                    {"prompts": prompts[:16], **_painted(sampler)},
                    last,
                )
            if draws := stage.options.get("cache_targets"):
                _teach_once(task, draws, folder / "targets.safetensors", progress)
            results[stage.name] = fit(task, stage.config, folder, resume=True, max_minutes=left)
            if not results[stage.name]["finished"]:
                if state.is_main_process:
                    report.write(
                        out, recipe.name, about, folders, finished=False, left_out=source.skipped
                    )
                return {
                    "finished": False,
                    "stages": results,
                    "artefact": None,
                    "seconds": time.monotonic() - begin,
                }
            if state.is_main_process:
                write_json(folder / "done.json", results[stage.name])
            state.wait_for_everyone()  # the next stage reads what the main process wrote
        else:
            results[stage.name] = done
        made[stage.makes], last = open_network(folder / "model" / stage.makes), folder
    assert last is not None
    artefact = out / "artefact" if export else None
    if state.is_main_process:
        if artefact is not None:
            _convert(recipe, taught, where, len(source), last, artefact, sampler, prompts)
        else:
            try_out(last / "model")
        left_out = source.skipped
        page = report.write(out, recipe.name, about, folders, finished=True, left_out=left_out)
        print(f"wrote {page}")
    state.wait_for_everyone()
    return {
        "finished": True,
        "stages": results,
        "artefact": artefact,
        "seconds": time.monotonic() - begin,
    }


def _convert(
    recipe: Recipe,
    taught: Teacher,
    data: Path,
    pictures: int,
    last: Path,
    artefact: Path,
    sampler: dict[str, Any],
    prompts: list[str],
) -> None:
    from sdlite.converter import convert

    if not artefact.exists():
        made_of = {
            "teacher": taught.artifact.name,
            "teacher_unet_parameters": parameters(taught.unet),
            "recipe": [dataclasses.asdict(s) for s in recipe.stages],
            "data": data.name,
            "pictures": pictures,
        }
        convert(
            last / "model",
            artefact,
            name=recipe.name,
            student=made_of,
            sampler=sampler,
            calibration_prompts=prompts,
        )
    print(f"wrote {artefact}")


def _processes() -> Any:
    """Accelerate's view of this process and the others, as its launcher started them."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


_RUN, _OLD = "run.json", "recipe.sha256"


def _begun(out: Path) -> bool:
    """Whether anything was trained there. What a failed start leaves (latents) is no run."""
    inside = [p for p in out.iterdir() if p.is_dir()] if out.is_dir() else []
    return any((p / "done.json").exists() or checkpoints.folders(p) for p in inside)


def _look(out: Path, resume: bool) -> None:
    """Whether a run can be made there, before any work. Leaves nothing."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose a folder for the run.")
    if not resume and _begun(out):
        raise InputError(
            f"{out} already holds a run; pass resume to go on with it, or choose another folder."
        )
    check_writable(out)


def _fingerprint(recipe: Recipe, taught: Teacher, found: data.Captions) -> dict[str, Any]:
    """What a run is made of, as JSON: it goes on with the same only."""
    said = {f"student.{k}": v for k, v in dataclasses.asdict(recipe.student).items()}
    for s in recipe.stages:
        config = {k: v for k, v in dataclasses.asdict(s.config).items() if k not in _FREE}
        said |= {f"{s.name}.{k}": v for k, v in {"kind": s.kind, **config, **s.options}.items()}
    teacher = {part: taught.stamp(part) for part in ("unet", "text_encoder", "vae")}
    out = {
        "recipe": said,
        "teacher": {
            **teacher,
            "scheduler": taught.scheduler,
            "tokenizer": taught.tokenizer.digest(),
        },
        "data": {"samples": len(found.items), "items": items_hash(found)},
        "size": list(taught.size),
    }
    return dict(json.loads(json.dumps(out)))


def _same_run(out: Path, now: dict[str, Any], recipe: Recipe) -> None:
    """Refuse to go on with another recipe, teacher, data or size than the run was begun with.

    Raises:
        InputError: the message says what differs.
    """
    old = out / _OLD
    if (
        old.exists()
        and hashlib.sha256(repr((recipe.student, recipe.stages)).encode()).hexdigest()
        != old.read_text(errors="replace").strip()
    ):
        raise InputError(
            f"{out} was begun with another recipe; use that one, or choose another folder."
        )
    try:
        before = read_json(out / _RUN)
    except ArtifactError:
        why = "was begun by an earlier version" if old.exists() else f"has no readable {_RUN}"
        warnings.warn(
            f"{out} {why}: whether teacher and data are those it was begun with is not known.",
            SdliteWarning,
            stacklevel=4,
        )
        return
    for what, say in (
        ("recipe", _recipes),
        ("teacher", _teachers),
        ("size", _sizes),
        ("data", _data),
    ):
        if before.get(what) != now[what]:
            raise InputError(
                f"{out} was begun with another {what} ({say(before.get(what), now[what])}); use"
                " that one, or choose another folder."
            )


def _recipes(before: Any, now: dict[str, Any]) -> str:
    before = before if isinstance(before, dict) else {}
    differ = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    said = [
        f"{k} was {json.dumps(before.get(k))}, now {json.dumps(now.get(k))}" for k in differ[:3]
    ]
    return "; ".join(said) + (f"; and {len(differ) - 3} more" if len(differ) > 3 else "")


def _teachers(before: Any, now: dict[str, Any]) -> str:
    before = before if isinstance(before, dict) else {}
    return "other " + ", ".join(k for k in now if before.get(k) != now[k])


def _sizes(before: Any, now: list[int]) -> str:
    return f"was {before}, now {now} pixels"


def _data(before: Any, now: dict[str, Any]) -> str:
    count = before.get("samples") if isinstance(before, dict) else None
    return (
        f"{count} samples then, {now['samples']} now"
        if count != now["samples"]
        else "as many samples, with other names, captions or bytes"
    )


def _room(out: Path, recipe: Recipe, taught: Teacher, found: data.Captions) -> None:
    """Whether the disk holds the least that the run leaves: its latents, and a checkpoint of each
    stage.
    """
    height, width = latent_size(taught.unet.config)
    latents = len(found.items) * 2 * int(taught.unet.config.in_channels) * height * width
    unet = sum(s.makes == "unet" for s in recipe.stages)
    needed = latents + unet * 16 * parameters(
        shape(taught.unet, recipe.student)
    )  # weights, their mean and AdamW's two moments
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        raise InputError(
            f"too little disk for this run: at least {needed / 2**20:,.0f} MiB are needed in {out},"
            f" {free / 2**20:,.0f} MiB are free. Make room, or choose another folder."
        )


def _say_left_out(out: Path, source: CachedLatents) -> None:
    write_json(out / "skipped.json", source.skipped)
    count, first = len(source.skipped), next(iter(source.skipped.items()))
    print(
        f"{count} samples left out, listed in {out / 'skipped.json'} (first: {first[0]}"
        f" {first[1]}); {len(source)} are used"
    )
    if count > data.MANY * (count + len(source)):
        warnings.warn(
            f"{count} of {count + len(source)} samples were left out, more than {data.MANY:.0%};"
            f" look at {out / 'skipped.json'}.",
            SdliteWarning,
            stacklevel=4,
        )


def _done(folder: Path) -> dict[str, Any] | None:
    """What a finished stage said; None where it is not finished."""
    try:
        said = read_json(folder / "done.json")
    except ArtifactError:
        return None
    return said if (folder / "model" / "unet").is_dir() else None


def _teach_once(task: Any, draws: int, path: Path, progress: bool) -> None:
    """`cache_targets`, on the device of the training, by one process while the others wait."""
    state = _processes()
    task.to(state.device)
    with state.main_process_first():
        cache_targets(task, draws, path, progress=progress and state.is_main_process)


def _guided(recipe: Recipe, stage: Stage) -> bool:
    """Whether an earlier stage has put guidance into the student, so that it is its own teacher
    from here on.
    """
    before = recipe.stages[: recipe.stages.index(stage)]
    return any(s.kind in ("guidance", "progressive", "consistency") for s in before)


def _copy(student: Any) -> Any:
    out = type(student).from_config(student.config)
    out.load_state_dict(student.state_dict())
    return out


def _painted(sampler: dict[str, Any]) -> dict[str, Any]:
    """An artefact's sampler as `tasks.paint` takes it."""
    return {"sampler": sampler["name"], **{k: v for k, v in sampler.items() if k != "name"}}


def _task(
    stage: Stage,
    student: Any,
    teacher: Teacher,
    source: CachedLatents,
    parts: dict[str, Any],
    prompts: list[str],
    guided: bool,
) -> Any:
    """The UNet stage's `Task`. Progressive and adversarial stages keep to the student as it was
    before them, once guidance is in it.
    """
    options = {k: v for k, v in stage.options.items() if k != "cache_targets"}
    shown: dict[str, Any] = {
        "prompts": prompts[:16],
        "num_inference_steps": options.get("num_inference_steps", 25),
    }
    if stage.kind == "output":
        return tasks.StudentTask(
            student,
            teacher.unet,
            teacher.text_encoder,
            source,
            parts=parts,
            preview=shown,
            scheduler=teacher.scheduler,
            **options,
        )
    scheduler = {
        **teacher.scheduler,
        "timestep_spacing": "trailing",
    }  # few steps must begin at the last timestep (arXiv:2305.08891)
    own = stage.kind in ("progressive", "adversarial") and guided
    options["guidance_scale"] = 1.0 if own else stage.guidance
    shown["guidance_scale"] = 1.0
    if stage.kind == "consistency":
        shown |= {"sampler": "lcm", "num_inference_steps": 4}
    if stage.kind == "adversarial" and own:
        options["start"] = _copy(student)
    master = _copy(student) if stage.kind == "progressive" and own else teacher.unet
    return KINDS[stage.kind](
        student,
        master,
        teacher.text_encoder,
        source,
        parts=parts,
        preview=shown,
        scheduler=scheduler,
        **options,
    )


def _part_task(
    recipe: Recipe,
    stage: Stage,
    made: dict[str, Any],
    teacher: Teacher,
    source: CachedLatents,
    parts: dict[str, Any],
    shown: dict[str, Any],
    last: Path | None,
) -> Any:
    """The `Task` of a text-encoder or tiny-decoder stage, on the schedule that the UNet before it
    was saved with.
    """
    scheduler = (
        read_json(last / "model" / "scheduler" / "scheduler_config.json")
        if last
        else teacher.scheduler
    )
    given: dict[str, Any] = {
        "parts": parts,
        "preview": shown,
        "scheduler": scheduler,
        **stage.options,
    }
    if stage.kind == "tiny-decoder":
        return TinyDecoderTask(made["unet"], made["text_encoder"], source, **given)
    unet = [s for s in recipe.stages if s.makes == "unet"]
    if unet and (steps := _steps(unet[-1])) is not None:
        given["timesteps"] = few_step.trailing_timesteps(
            steps, scheduler.get("num_train_timesteps", 1000)
        )[:-1]
    given["parts"] = {**parts, "vae": made["vae"]}
    return TextEncoderTask(made["unet"], teacher.text_encoder, source, **given)
