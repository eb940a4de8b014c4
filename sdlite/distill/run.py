"""Running a recipe: every stage in turn, what a run may go on with (`run.json`), and the model at
the end.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import torch

from sdlite.distill import checkpoints, data, report
from sdlite.distill.latent_cache import CachedLatents, items_hash
from sdlite.distill.preview import SHOWN, Parts, Samples
from sdlite.distill.recipe import STEPS, HowSampled, Recipe, Stage
from sdlite.distill.students import build, parameters, shape
from sdlite.distill.tasks.base import Denoising, Given
from sdlite.distill.tasks.student import teacher_gradients
from sdlite.distill.teacher import Teacher
from sdlite.distill.teacher_cache import cache_targets
from sdlite.distill.train import Trained, fit
from sdlite.errors import CONVERT_NEEDS, ArtifactError, InputError, SdliteWarning, need
from sdlite.io import check_writable, read_json, write_json
from sdlite.spec import latent_size
from sdlite.torch_networks import open_network
from sdlite.tryout import try_out

if TYPE_CHECKING:
    from accelerate import PartialState

RUN, OLD = "run.json", "recipe.sha256"  # what a run was begun with; OLD is of earlier versions
# Fields of TrainConfig that change how a training runs, not what is learned: free to change when it
# goes on.
FREE = {
    "micro_batch_size",
    "gradient_checkpointing",
    "compile",
    "plain_attention",
    "log_every",
    "sample_every",
    "checkpoint_minutes",
    "keep_checkpoints",
}


class Result(TypedDict):
    """What a run came to; `artefact` is the model's folder, None without an export."""

    finished: bool
    stages: dict[str, Trained]
    artefact: Path | None
    seconds: float


def plan(recipe: Recipe, teacher: Teacher) -> str:
    """What `run` would do, in a few lines (`--dry-run`).

    Raises:
        InputError: the recipe is not for this teacher.
    """
    teacher.refuse(recipe)
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
        if (made := s.kind.made_size(teacher.text_encoder, teacher.vae)) is not None:
            lines.append(f"    {made}")
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


@dataclass(frozen=True)
class _Asked:
    """The arguments of `run`."""

    teacher: str | Path
    data: Path
    out: Path
    resume: bool
    max_minutes: float | None
    preview_prompts: list[str] | None
    export: bool
    progress: bool


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
) -> Result:
    """Train every stage and write `out/artefact` (with `export`) or leave `out/<last stage>/model`;
    and `out/report.md`.

    Args:
        teacher: diffusers folder. data: what `sdlite.distill.data.read` takes.
        out: folder of the run; `resume` goes on from its checkpoints, and finished stages are
            skipped.
        max_minutes: of the whole call; the run stops with a checkpoint and can be resumed.
        preview_prompts: of the sample grids, instead of the recipe's.

    Raises:
        InputError, TrainingError, ArtifactError: see `Recipe`, `fit`, `Artifact`.
            MissingExtraError: see `packages`.
    """
    out = Path(out)
    new = not out.exists()
    asked = _Asked(teacher, Path(data), out, resume, max_minutes, preview_prompts, export, progress)
    try:
        return _Run(recipe, asked).result()
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


class _Run:
    """One call of `run`: what is open, and what the stages have made so far."""

    def __init__(self, recipe: Recipe, asked: _Asked):
        self.begin = time.monotonic()
        packages(asked.export)
        self.recipe, self.asked, self.out = recipe, asked, asked.out
        self.processes = _processes()
        self.main = self.processes.is_main_process
        if self.main:
            _look(self.out, asked.resume)
        self.teacher = Teacher(asked.teacher)
        self.teacher.refuse(recipe)
        found = data.read(asked.data)
        begun_with = _fingerprint(recipe, self.teacher, found)
        if self.main:
            if _begun(self.out):
                _same_run(self.out, begun_with, recipe)
            else:
                _room(self.out, recipe, self.teacher, found)
        self.source = self._latents(found)
        self.prompts = (
            asked.preview_prompts or list(recipe.preview.prompts or ()) or self.source.captions
        )
        self.made = self._start()
        self.sampler = _sampler(recipe, self.teacher)
        self.last: Path | None = None  # folder of the stage before
        self.stages: dict[str, Trained] = {}
        where = asked.data
        self.about = report.about_run(recipe, self.teacher, self.made["unet"], self.source, where)
        if self.main:
            write_json(self.out / RUN, begun_with)

    def _latents(self, found: data.Captions) -> CachedLatents:
        progress = self.asked.progress and self.main
        with self.processes.main_process_first():
            source = self.teacher.latents(found, self.out / "latents.safetensors", progress)
        if source.skipped and self.main:
            _say_left_out(self.out, source)
        return source

    def _start(self) -> Parts:
        """The pipeline before its first stage."""
        taught, spec = self.teacher, self.recipe.student
        # of new weights: the same on every process and in every run
        torch.manual_seed(self.recipe.stages[0].config.seed)
        gradients = None
        if spec.score == "taylor" and spec.width != 1:
            gradients = teacher_gradients(
                taught.unet, taught.text_encoder, self.source, taught.scheduler
            )
        return {
            "unet": build(taught.unet, spec, gradients),
            "text_encoder": taught.text_encoder,
            "vae": taught.vae,
            "tokenizer": taught.tokenizer,
            "tokenizer_folder": taught.tokenizer_folder,
        }

    def result(self) -> Result:
        """Train what is not trained, and make the model."""
        for stage in self.recipe.stages:
            folder = self.out / stage.name
            done = _done(folder)
            self.stages[stage.name] = trained = done or self._train(stage, folder)
            if not trained["finished"]:
                return self._ended(finished=False, artefact=None)
            if done is None:
                if self.main:
                    write_json(folder / "done.json", trained)
                # the next stage reads what the main process wrote
                self.processes.wait_for_everyone()
            self.made[stage.makes] = open_network(folder / "model" / stage.makes)
            self.last = folder
        return self._ended(finished=True, artefact=self._model())

    def _train(self, stage: Stage, folder: Path) -> Trained:
        torch.manual_seed(stage.config.seed)
        task = stage.kind.task(self._given(stage))
        if stage.kind.draws is not None and isinstance(task, Denoising):
            self._teach_once(task, stage.kind.draws, folder / "targets.safetensors")
        return fit(task, stage.config, folder, resume=True, max_minutes=self._minutes_left())

    def _minutes_left(self) -> float | None:
        if self.asked.max_minutes is None:
            return None
        return max(0.0, self.asked.max_minutes - (time.monotonic() - self.begin) / 60)

    def _given(self, stage: Stage) -> Given:
        given = Given(
            student=self.made["unet"],
            teacher=self.teacher.unet,
            text_encoder=self.teacher.text_encoder,
            source=self.source,
            parts=self.made,
            scheduler=self.teacher.scheduler,
            samples=self._shown(),
            guided=self.last is not None and _guided(self.recipe, stage),
        )
        return given if stage.makes == "unet" else self._of_finished_unet(given)

    def _shown(self) -> Samples:
        """The sample grid of a stage, before the stage says its own steps."""
        told = self.teacher.guidance_width is not None
        usual = self.teacher.painted if told else Samples(num_inference_steps=STEPS)
        steps = self.recipe.preview.num_inference_steps or usual.num_inference_steps
        return replace(usual, prompts=tuple(self.prompts[:SHOWN]), num_inference_steps=steps)

    def _of_finished_unet(self, given: Given) -> Given:
        """For the other parts: on the schedule that the UNet was saved with, at its timesteps, and
        shown as the model will be sampled.
        """
        scheduler = given.scheduler
        if self.last is not None:
            scheduler = read_json(self.last / "model" / "scheduler" / "scheduler_config.json")
        unet = self.recipe.unet_stages
        total = cast(int, scheduler.get("num_train_timesteps", 1000))
        samples = Samples(
            given.samples.prompts,
            self.sampler["num_inference_steps"],
            self.sampler["guidance_scale"],
            sampler=self.sampler["name"],
        )
        return replace(
            given,
            scheduler=scheduler,
            samples=samples,
            timesteps=unet[-1].kind.timesteps(total) if unet else None,
        )

    def _teach_once(self, task: Denoising, draws: int, path: Path) -> None:
        """`cache_targets`, on the device of the training, by one process while the others wait."""
        task.to(self.processes.device)
        with self.processes.main_process_first():
            cache_targets(task, draws, path, progress=self.asked.progress and self.main)

    def _ended(self, *, finished: bool, artefact: Path | None) -> Result:
        """Write the report, and say what was done."""
        folders = [self.out / s.name for s in self.recipe.stages]
        if self.main:
            page = report.write(
                self.out,
                self.recipe.name,
                self.about,
                folders,
                finished=finished,
                left_out=self.source.skipped,
            )
            if finished:
                print(f"wrote {page}")
        if finished:
            self.processes.wait_for_everyone()
        return {
            "finished": finished,
            "stages": self.stages,
            "artefact": artefact,
            "seconds": time.monotonic() - self.begin,
        }

    def _model(self) -> Path | None:
        """Convert the last stage's folder; without an export, only try it."""
        assert self.last is not None
        folder, out = self.last / "model", self.out / "artefact"
        if self.main and self.asked.export:
            self._convert(folder, out)
        elif self.main:
            try_out(folder)
        return out if self.asked.export else None

    def _convert(self, folder: Path, out: Path) -> None:
        from sdlite.converter import convert

        if not out.exists():
            made_of = {
                "teacher": self.teacher.artifact.name,
                "teacher_unet_parameters": parameters(self.teacher.unet),
                "recipe": [s.described() for s in self.recipe.stages],
                "data": self.asked.data.name,
                "pictures": len(self.source),
            }
            convert(
                folder,
                out,
                name=self.recipe.name,
                student=made_of,
                sampler=dict(self.sampler),
                calibration_prompts=self.prompts,
            )
        print(f"wrote {out}")


def _sampler(recipe: Recipe, teacher: Teacher) -> HowSampled:
    """How the model is sampled by default."""
    told, own = teacher.guidance_width is not None, teacher.artifact
    teachers = dict(own.samples_with) if told else dict(own.sampler)
    return recipe.default_sampler("ddim", teachers, is_told=told)


def _guided(recipe: Recipe, stage: Stage) -> bool:
    """Whether an earlier stage has made the student its own teacher."""
    before = recipe.stages[: recipe.stages.index(stage)]
    return any(s.kind.becomes_teacher for s in before)


def _processes() -> PartialState:
    """Accelerate's view of this process and the others, as its launcher started them."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


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


Said = Mapping[str, object]  # what a run is made of, as JSON


def _fingerprint(recipe: Recipe, taught: Teacher, found: data.Captions) -> Said:
    """What a run is made of: it goes on with the same only."""
    student = asdict(recipe.student)
    for later in (f for f in fields(recipe.student) if not f.repr):  # earlier runs do not say it
        if student[later.name] == later.default:
            del student[later.name]
    said = {f"student.{k}": v for k, v in student.items()}
    for s in recipe.stages:
        config = {k: v for k, v in asdict(s.config).items() if k not in FREE}
        own = {"kind": s.kind.name, **config, **s.options}
        said |= {f"{s.name}.{k}": v for k, v in own.items()}
    more = taught.text_encoders[1:]
    teacher = {part: taught.stamp(part) for part in ("unet", "text_encoder", "vae", *more)}
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


def _old_hash(recipe: Recipe) -> str:
    """What earlier versions kept of a recipe: the hash of how Python printed it."""
    stages = [
        f"Stage(name={s.name!r}, kind={s.kind.name!r}, config={s.config!r},"
        f" options={dict(s.options)!r})"
        for s in recipe.stages
    ]
    several = ", ".join(stages) + ("," if len(stages) == 1 else "")
    return hashlib.sha256(f"({recipe.student!r}, ({several}))".encode()).hexdigest()


def _same_run(out: Path, now: Said, recipe: Recipe) -> None:
    """Refuse to go on with another recipe, teacher, data or size than the run was begun with.

    Raises:
        InputError: the message says what differs.
    """
    try:
        before = read_json(out / RUN)
    except ArtifactError:
        _same_as_old(out, recipe)
        return
    for what, differs in _DIFFERS.items():
        if before.get(what) != now[what]:
            raise InputError(
                f"{out} was begun with another {what} ({differs(before.get(what), now[what])}); use"
                " that one, or choose another folder."
            )


def _same_as_old(out: Path, recipe: Recipe) -> None:
    """`_same_run` of a run without run.json: no more than the recipe is known."""
    old = out / OLD
    if old.exists() and _old_hash(recipe) != old.read_text(errors="replace").strip():
        raise InputError(
            f"{out} was begun with another recipe; use that one, or choose another folder."
        )
    why = "was begun by an earlier version" if old.exists() else f"has no readable {RUN}"
    warnings.warn(
        f"{out} {why}: whether teacher and data are those it was begun with is not known.",
        SdliteWarning,
        stacklevel=5,
    )


def _table(value: object) -> Said:
    return value if isinstance(value, dict) else {}


def _other_recipe(before: object, now: object) -> str:
    old, new = _table(before), _table(now)
    differ = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    said = [f"{k} was {json.dumps(old.get(k))}, now {json.dumps(new.get(k))}" for k in differ[:3]]
    return "; ".join(said) + (f"; and {len(differ) - 3} more" if len(differ) > 3 else "")


def _other_teacher(before: object, now: object) -> str:
    old, new = _table(before), _table(now)
    return "other " + ", ".join(k for k in new if old.get(k) != new[k])


def _other_size(before: object, now: object) -> str:
    return f"was {before}, now {now} pixels"


def _other_data(before: object, now: object) -> str:
    then, count = _table(before).get("samples"), _table(now)["samples"]
    if then != count:
        return f"{then} samples then, {count} now"
    return "as many samples, with other names, captions or bytes"


_DIFFERS: dict[str, Callable[[object, object], str]] = {
    "recipe": _other_recipe,
    "teacher": _other_teacher,
    "size": _other_size,
    "data": _other_data,
}


def _room(out: Path, recipe: Recipe, taught: Teacher, found: data.Captions) -> None:
    """Whether the disk holds the least that the run leaves: its latents, and a checkpoint of each
    stage.
    """
    height, width = latent_size(taught.unet.config)
    latents = len(found.items) * 2 * int(taught.unet.config.in_channels) * height * width
    # of each UNet: weights, their mean and AdamW's two moments
    state = 16 * parameters(shape(taught.unet, recipe.student))
    needed = latents + len(recipe.unet_stages) * state
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


def _done(folder: Path) -> Trained | None:
    """What a finished stage said; None where it is not finished."""
    try:
        said = read_json(folder / "done.json")
    except ArtifactError:
        return None
    return cast(Trained, said) if (folder / "model" / "unet").is_dir() else None
