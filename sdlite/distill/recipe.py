"""A recipe is a TOML list of stages; running it makes an artefact.

    name = "my-student"
    [student]
    preset = "bk-tiny"            # sdlite.distill.students.PRESETS; or width = 0.5, one_layer = true, ...
    weights = "teacher"           # what stays of the teacher's; or "random"
    score = "l1"                  # which channels a width below 1 keeps; or "taylor"
    [train]                       # defaults of every stage: fields of TrainConfig
    batch_size = 64
    [[stage]]
    kind = "output"               # task, output and feature distillation (tasks.StudentTask)
    images = 200000
    lr = 1e-4
    feature_weight = 0.1          # also: multi_scale_weight, channel_weight and temperature, mask, tap_weights
    [[stage]]
    kind = "guidance"
    images = 50000
    guidance_scale = 4.0
    cache_targets = 50000         # teacher runs once over so many draws (targets.py); output without features, guidance, progressive, consistency
    [[stage]]
    kind = "progressive"
    steps = [16, 8, 4]            # one training of `images` for each halving
    images = 30000
    [[stage]]
    kind = "text-encoder"         # fewer layers; reads as the teacher's for this UNet (parts.TextEncoderTask)
    layers = 6
    images = 50000
    [[stage]]
    kind = "tiny-decoder"         # TAESD's shape instead of the VAE decoder (parts.TinyDecoderTask); width = 64, blocks = 3
    images = 50000
    [sampler]
    guidance_scale = 1.0
    [preview]                     # of the sample grids; default: 16 captions of the data, 25 steps or the stage's own
    prompts = ["a fox", "a house"]
    num_inference_steps = 10

`text-encoder` and `tiny-decoder` come last, each at most once; alone they make parts for a UNet that stays. Each stage has its own folder, checkpoints and statistics, starts from the stage before it, and is skipped when it is already done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sdlite import families
from sdlite.artifact import Artifact
from sdlite.distill import data, report, stages, tasks
from sdlite.distill.cache import CachedLatents
from sdlite.distill.parts import TextEncoderTask, TinyDecoderTask, smaller_text_encoder, tiny_vae
from sdlite.distill.students import PRESETS, StudentSpec, build, parameters, shape
from sdlite.distill.targets import cache_targets
from sdlite.distill.train import TrainConfig, fit
from sdlite.errors import InputError, need
from sdlite.exporters import CONVERT_NEEDS
from sdlite.io import read_json, sha256
from sdlite.sampling import guided, known_sampler
from sdlite.spec import latent_size
from sdlite.tokenizer import ClipTokenizer
from sdlite.torch_networks import open_network
from sdlite.tryout import try_out
from sdlite.weights import weight_files

KINDS: dict[str, Any] = {
    "output": tasks.StudentTask,
    "guidance": stages.GuidanceTask,
    "progressive": stages.ProgressiveTask,
    "consistency": stages.ConsistencyTask,
    "adversarial": stages.AdversarialTask,
    "text-encoder": TextEncoderTask,
    "tiny-decoder": TinyDecoderTask,
}
MAKES = {
    "text-encoder": "text_encoder",
    "tiny-decoder": "vae",
}  # stage kind -> part of the pipeline that it makes; the others make the UNet
_TRAIN = {f.name for f in dataclasses.fields(TrainConfig)} - {"max_images"}
_OPTIONS: dict[str, set[str]] = {  # what a stage of each kind may say besides `kind`, `images` and TrainConfig's fields
    "output": {
        "task_weight",
        "output_weight",
        "feature_weight",
        "multi_scale_weight",
        "channel_weight",
        "temperature",
        "temperature_steps",
        "mask",
        "article",
        "tap_weights",
        "caption_dropout",
        "timestep_power",
        "cache_targets",
    },
    "guidance": {"guidance_scale", "cache_targets"},
    "progressive": {"steps", "loss_type", "guidance_scale", "cache_targets"},
    "consistency": {"grid", "sigma_data", "timestep_scaling", "guidance_scale", "cache_targets"},
    "adversarial": {"num_inference_steps", "weight", "ramp", "reconstruction", "guidance_scale"},
    "text-encoder": {"layers", "output_weight", "caption_dropout"},
    "tiny-decoder": {"width", "blocks", "latent_noise", "multi_scale_weight"},
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
        """The guidance that this stage puts into the student when it learns from the teacher; 1 is none."""
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
            InputError: the file is missing, is not TOML, or says something that is not known; the message names it and what is.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            return cls.parse(tomllib.loads(text))
        except FileNotFoundError:
            raise InputError(f"recipe {path} does not exist; give a TOML file (see sdlite.distill.recipe).") from None
        except tomllib.TOMLDecodeError as e:
            raise InputError(f"recipe {path} is not TOML: {e}.") from e

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Recipe:
        _known("recipe", raw, {"name", "student", "train", "stage", "sampler", "preview"})
        shown = dict(raw.get("preview", {}))
        _known("[preview]", shown, {"prompts", "num_inference_steps"})
        if not raw.get("stage"):
            raise InputError("the recipe has no [[stage]]; give at least one, such as kind = 'output'.")
        common = dict(raw.get("train", {}))
        _known("[train]", common, _TRAIN)
        out: list[Stage] = []
        for n, given in enumerate(raw["stage"]):
            kind = given.get("kind")
            if kind not in KINDS:
                raise InputError(f"[[stage]] {n}: kind={kind!r} is not known; choose one of {', '.join(KINDS)}.")
            _known(f"[[stage]] {n} ({kind})", given, {"kind", "images"} | _TRAIN | _OPTIONS[kind])
            if "images" not in given:
                raise InputError(f"[[stage]] {n} ({kind}) says no images: how many to train on.")
            if kind in _NEEDED and (name := _NEEDED[kind].split(":")[0]) not in given:
                raise InputError(f"[[stage]] {n} ({kind}) does not say {name}{_NEEDED[kind].removeprefix(name)}.")
            features = {
                "feature_weight": given.get("feature_weight", 0.1),
                **{k: given.get(k, 0) for k in ("multi_scale_weight", "channel_weight")},
            }
            if kind == "output" and given.get("cache_targets") and (used := [k for k, v in features.items() if v]):
                raise InputError(f"[[stage]] {n} (output): cache_targets keeps the teacher's output, not its features; set {', '.join(used)} = 0, or "
                                 "leave cache_targets out.")  # fmt: skip
            settings = {**common, **{k: v for k, v in given.items() if k in _TRAIN}}
            settings["betas"] = tuple(settings.get("betas", TrainConfig(1).betas))
            config = TrainConfig(max_images=int(given["images"]), **settings)
            options = {k: v for k, v in given.items() if k in _OPTIONS[kind]}
            if kind == "progressive":
                steps = options.pop("steps", [4])
                if any(a != 2 * b for a, b in itertools.pairwise(steps)):
                    raise InputError(f"[[stage]] {n}: progressive steps={steps} must halve each time, such as [16, 8, 4].")
                out += [Stage(f"{n}-progressive-{s}", kind, config, {**options, "num_inference_steps": s}) for s in steps]
            else:
                out.append(Stage(f"{n}-{kind}", kind, config, options))
        _ordered(out)
        return cls(str(raw.get("name", "student")), _spec(dict(raw.get("student", {}))), tuple(out), dict(raw.get("sampler", {})), shown)

    def default_sampler(self, own: str, teachers: dict[str, Any] | None = None) -> dict[str, Any]:
        """{name, num_inference_steps, guidance_scale} for the artefact: the last UNet stage's own, unless [sampler] says otherwise.

        Args:
            own: sampler of many-step students. teachers: the teacher's defaults, for recipes that leave the UNet as it is.
        """
        unet = [s for s in self.stages if s.makes == "unet"]
        out: dict[str, Any] = {"name": own, "num_inference_steps": 25, "guidance_scale": 4.0}
        _known("[sampler]", self.sampler, set(out))
        if unet:
            out["guidance_scale"] = 1.0 if any(guided(s.guidance) for s in unet) else 4.0
            if unet[-1].kind == "consistency":
                out |= {"name": "lcm", "num_inference_steps": 4}
            elif (steps := _steps(unet[-1])) is not None:
                out["num_inference_steps"] = steps
        else:
            out |= {k: v for k, v in (teachers or {}).items() if k in out}
        out |= self.sampler
        known_sampler(out["name"])
        guided(out["guidance_scale"])  # says what is out of range
        return out


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
        if before is not None and before.makes != "unet" and (stage.makes == "unet" or stage.kind == before.kind):
            raise InputError(
                f"stage {stage.name} comes after {before.name}; put text-encoder and tiny-decoder last, each at most once: "
                "they are made for the UNet that is shipped."
            )
        asked = stage.options.get("guidance_scale", 1.0) if stage.kind in ("progressive", "adversarial") else 1.0
        if into is not None and guided(asked) and into.name.split("-")[0] != stage.name.split("-")[0]:
            raise InputError(
                f"stage {stage.name} asks for guidance_scale={asked:g}, but {into.name} has put guidance into the student "
                "already; say guidance_scale = 1.0, or leave it out."
            )
        into = stage if guided(stage.guidance) else into


def _known(where: str, given: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(given) - known):
        raise InputError(
            f"{where}: {', '.join(unknown)} {'is' if len(unknown) == 1 else 'are'} not known; known: {', '.join(sorted(known))}."
        )


def _spec(given: dict[str, Any]) -> StudentSpec:
    preset = given.pop("preset", None)
    fields = {f.name for f in dataclasses.fields(StudentSpec)}
    _known("[student]", given, fields)
    if preset is not None and preset not in PRESETS:
        raise InputError(f"[student] preset={preset!r} is not known; choose one of {', '.join(PRESETS)}.")
    return dataclasses.replace(PRESETS[preset] if preset else StudentSpec(), **given)


class Teacher:
    """A diffusers SD-1.x/2.x folder, opened for training."""

    def __init__(self, folder: str | Path):
        self.artifact = Artifact.open(folder)
        part = self.artifact.files.part
        self.scheduler = self.artifact.config("scheduler")
        self.unet, self.text_encoder = open_network(part("unet")), open_network(part("text_encoder"))
        self.vae = open_network(part("vae")).eval().requires_grad_(False)
        config = self.artifact.config("text_encoder")
        self.tokenizer = ClipTokenizer.from_pretrained(part("tokenizer"), config)
        height, width = latent_size(self.unet.config)
        self.unet.register_to_config(sample_size=height if height == width else [height, width])  # students have it from here
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

    def make(self, prompts: list[str], *, num_inference_steps: int, guidance_scale: float, seed: int) -> torch.Tensor:
        """Latents (B, C, h, w) that the teacher paints for the prompts: data when there is none."""
        parts = {"unet": self.unet.eval(), "text_encoder": self.text_encoder.eval(), "vae": self.vae, "tokenizer": self.tokenizer}
        return tasks.paint(
            parts, tasks.Schedule.from_config(self.scheduler), prompts=prompts, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, seed=seed,
        )  # fmt: skip

    def _stamp(self, part: str) -> str:
        """What tells one network's weights from another's: the hash of its file, or of all its shards."""
        return "".join(sha256(f) for f in weight_files(self.artifact.files.part(part)))

    def source(self, path: str | Path, cache: Path, progress: bool) -> CachedLatents:
        found = data.read(path)
        key: dict[str, Any] = {"vae": self._stamp("vae"), "scale": self.vae.config.scaling_factor}
        if not found.prompts_only and not hasattr(self.vae, "quant_conv"):
            raise InputError(f"{self.artifact.folder} has a {type(self.vae).__name__}, whose encoder need not be trained; give a teacher with an "
                             "AutoencoderKL to train on pictures, or prompts alone.")  # fmt: skip
        if found.prompts_only:
            key |= {"made_by": self._stamp("unet"), "steps": 25, "guidance_scale": 4.0}
            key["scheduler"] = self.scheduler
            count = [0]

            def encode(prompts: list[Any]) -> torch.Tensor:
                count[0] += len(prompts)
                return self.make(prompts, num_inference_steps=25, guidance_scale=4.0, seed=count[0])
        else:
            encode = self.encode
        few = max(1, min(16, 2**20 // (self.size[0] * self.size[1])))  # pictures at once: 16 to 256 px, 4 at 512 px
        return CachedLatents.build(found, self.tokenizer, encode, cache, key=key, size=self.size, batch=few, progress=progress)


def plan(recipe: Recipe, teacher: Teacher) -> str:
    """What `run` would do, in a few lines (`--dry-run`)."""
    student = shape(teacher.unet, recipe.student)
    a, b = parameters(student), parameters(teacher.unet)
    lines = [f"{recipe.name}: UNet {a:,} parameters, {a / b:.1%} of the teacher's {b:,}; {teacher.shown_size}"]
    for s in recipe.stages:
        said = "".join(f", {k}={v}" for k, v in s.options.items())
        lines.append(f"  {s.name}: {s.config.max_images:,} images, batch {s.config.batch_size}, lr {s.config.lr:g}{said}")
        if s.makes == "text_encoder":
            text = smaller_text_encoder(teacher.text_encoder, s.options["layers"])
            lines.append(f"    text encoder {parameters(text):,} parameters of the teacher's {parameters(teacher.text_encoder):,}")
        if s.makes == "vae":
            tiny = tiny_vae(teacher.vae, s.options.get("width", 64), s.options.get("blocks", 3))
            lines.append(f"    decoder {parameters(tiny.decoder):,} parameters of the teacher's {parameters(teacher.vae.decoder):,}")
    state = a * 4 * 4 + b * 4  # student, its EMA and AdamW's two moments; the frozen teacher
    lines.append(f"  weights and optimizer: about {state / 1e9:.2f} GB; activations come on top (gradient accumulation: micro_batch_size; "
                 "gradient_checkpointing)")  # fmt: skip
    return "\n".join(lines)


def packages(export: bool) -> None:
    """Look for all that a run comes to, its last step too, before it trains.

    Raises:
        MissingExtraError: something is not installed.
    """
    purpose = "distilling with its export (--no-export does without)" if export else "distilling"
    need(purpose, "distill", "accelerate", "matplotlib", *(CONVERT_NEEDS if export else ()))


def run(recipe: Recipe, *, teacher: str | Path, data: str | Path, out: str | Path, resume: bool = False, max_minutes: float | None = None,
        preview_prompts: list[str] | None = None, export: bool = True, progress: bool = True) -> dict[str, Any]:  # fmt: skip
    """Train every stage and write `out/artefact` (with `export`) or leave `out/<last stage>/model`; and `out/report.md`.

    Args:
        teacher: diffusers folder. data: what `sdlite.distill.data.read` takes.
        out: folder of the run; `resume` goes on from its checkpoints, and finished stages are skipped.
        max_minutes: of the whole call; the run stops with a checkpoint and can be resumed.

    Returns:
        {"finished", "stages": {name: result}, "artefact": path or None, "seconds"}.

    Raises:
        InputError, TrainingError, ArtifactError: see `Recipe`, `fit`, `Artifact`. MissingExtraError: see `packages`.
    """
    begin, out = time.monotonic(), Path(out)
    packages(export)
    stamp = hashlib.sha256(repr((recipe.student, recipe.stages)).encode()).hexdigest()
    taught = Teacher(teacher)  # before anything is written: what is wrong with it must not leave a run behind
    state = _processes()
    if state.is_main_process:
        _same_recipe(out, stamp, resume)
    with state.main_process_first():
        source = taught.source(data, out / "latents.safetensors", progress and state.is_main_process)
    if source.skipped and state.is_main_process:
        (out / "skipped.json").write_text(json.dumps(source.skipped, indent=1))
        print(f"{len(source.skipped)} samples left out, listed in {out / 'skipped.json'}; {len(source)} are used")
    parts = {"vae": taught.vae, "tokenizer": taught.tokenizer, "tokenizer_folder": taught.artifact.files.part("tokenizer")}
    prompts = preview_prompts or recipe.preview.get("prompts") or source.captions
    torch.manual_seed(recipe.stages[0].config.seed)  # of new weights: the same on every process and in every run
    gradients = None
    if recipe.student.score == "taylor" and recipe.student.width != 1:
        gradients = tasks.teacher_gradients(taught.unet, taught.text_encoder, source, taught.scheduler)
    made: dict[str, Any] = {"unet": build(taught.unet, recipe.student, gradients), "text_encoder": taught.text_encoder, "vae": taught.vae}
    last, sampler = None, recipe.default_sampler("ddim", taught.artifact.sampler)
    about, folders = report.about_run(recipe, taught, made["unet"], source, Path(data)), [out / s.name for s in recipe.stages]
    results: dict[str, Any] = {}
    for stage in recipe.stages:
        folder = out / stage.name
        if not _done(folder):
            left = None if max_minutes is None else max(0.0, max_minutes - (time.monotonic() - begin) / 60)
            torch.manual_seed(stage.config.seed)
            if stage.makes == "unet":
                task = _task(stage, made["unet"], taught, source, parts, prompts, last is not None and _guided(recipe, stage))
                if (steps := recipe.preview.get("num_inference_steps")) and _steps(stage) is None and stage.kind != "consistency":
                    task.preview["num_inference_steps"] = steps
            else:
                task = _part_task(recipe, stage, made, taught, source, parts, {"prompts": prompts[:16], **_painted(sampler)}, last)
            if draws := stage.options.get("cache_targets"):
                _teach_once(task, draws, folder / "targets.safetensors", progress)
            results[stage.name] = fit(task, stage.config, folder, resume=bool(list(folder.glob("checkpoint-*"))), max_minutes=left)
            if not results[stage.name]["finished"]:
                if state.is_main_process:
                    report.write(out, recipe.name, about, folders, finished=False)
                return {"finished": False, "stages": results, "artefact": None, "seconds": time.monotonic() - begin}
            if state.is_main_process:
                (folder / "done.json").write_text(json.dumps(results[stage.name]))
            state.wait_for_everyone()  # the next stage reads what the main process wrote
        else:
            results[stage.name] = json.loads((folder / "done.json").read_text())
        made[stage.makes], last = open_network(folder / "model" / stage.makes), folder
    assert last is not None
    artefact = out / "artefact" if export else None
    if state.is_main_process:
        if artefact is not None:
            _convert(recipe, taught, Path(data), len(source), last, artefact, sampler, prompts)
        else:
            try_out(last / "model")
        print(f"wrote {report.write(out, recipe.name, about, folders, finished=True)}")
    state.wait_for_everyone()
    return {"finished": True, "stages": results, "artefact": artefact, "seconds": time.monotonic() - begin}


def _convert(recipe: Recipe, taught: Teacher, data: Path, pictures: int, last: Path, artefact: Path, sampler: dict[str, Any],
             prompts: list[str]) -> None:  # fmt: skip
    from sdlite.exporters.onnx import convert

    if not artefact.exists():
        made_of = {
            "teacher": taught.artifact.name, "teacher_unet_parameters": parameters(taught.unet), "recipe": [dataclasses.asdict(s) for s in recipe.stages],
            "data": data.name, "pictures": pictures,
        }  # fmt: skip
        convert(last / "model", artefact, name=recipe.name, student=made_of, sampler=sampler, calibration_prompts=prompts)
    print(f"wrote {artefact}")


def _processes() -> Any:
    """Accelerate's view of this process and the others, as its launcher started them."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def _same_recipe(out: Path, stamp: str, resume: bool) -> None:
    path = out / "recipe.sha256"
    if path.exists():
        if not resume:
            raise InputError(f"{out} already holds a run; pass resume to go on with it, or choose another folder.")
        if path.read_text() != stamp:
            raise InputError(f"{out} was begun with another recipe; use that one, or choose another folder.")
    out.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(stamp)
    os.replace(tmp, path)


def _done(folder: Path) -> bool:
    return (folder / "done.json").exists() and (folder / "model" / "unet").is_dir()


def _teach_once(task: Any, draws: int, path: Path, progress: bool) -> None:
    """`cache_targets`, on the device of the training, by one process while the others wait."""
    state = _processes()
    task.to(state.device)
    with state.main_process_first():
        cache_targets(task, draws, path, progress=progress and state.is_main_process)


def _guided(recipe: Recipe, stage: Stage) -> bool:
    """Whether an earlier stage has put guidance into the student, so that it is its own teacher from here on."""
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
    stage: Stage, student: Any, teacher: Teacher, source: CachedLatents, parts: dict[str, Any], prompts: list[str], guided: bool
) -> Any:
    """The UNet stage's `Task`. Progressive and adversarial stages keep to the student as it was before them, once guidance is in it."""
    options = {k: v for k, v in stage.options.items() if k != "cache_targets"}
    shown: dict[str, Any] = {"prompts": prompts[:16], "num_inference_steps": options.get("num_inference_steps", 25)}
    if stage.kind == "output":
        return tasks.StudentTask(
            student, teacher.unet, teacher.text_encoder, source, parts=parts, preview=shown, scheduler=teacher.scheduler, **options
        )
    scheduler = {**teacher.scheduler, "timestep_spacing": "trailing"}  # few steps must begin at the last timestep (arXiv:2305.08891)
    own = stage.kind in ("progressive", "adversarial") and guided
    options["guidance_scale"] = 1.0 if own else stage.guidance
    shown["guidance_scale"] = 1.0
    if stage.kind == "consistency":
        shown |= {"sampler": "lcm", "num_inference_steps": 4}
    if stage.kind == "adversarial" and own:
        options["start"] = _copy(student)
    master = _copy(student) if stage.kind == "progressive" and own else teacher.unet
    return KINDS[stage.kind](student, master, teacher.text_encoder, source, parts=parts, preview=shown, scheduler=scheduler, **options)


def _part_task(recipe: Recipe, stage: Stage, made: dict[str, Any], teacher: Teacher, source: CachedLatents, parts: dict[str, Any],
               shown: dict[str, Any], last: Path | None) -> Any:  # fmt: skip
    """The `Task` of a text-encoder or tiny-decoder stage, on the schedule that the UNet before it was saved with."""
    scheduler = read_json(last / "model" / "scheduler" / "scheduler_config.json") if last else teacher.scheduler
    given: dict[str, Any] = {"parts": parts, "preview": shown, "scheduler": scheduler, **stage.options}
    if stage.kind == "tiny-decoder":
        return TinyDecoderTask(made["unet"], made["text_encoder"], source, **given)
    unet = [s for s in recipe.stages if s.makes == "unet"]
    if unet and (steps := _steps(unet[-1])) is not None:
        given["timesteps"] = stages.trailing_timesteps(steps, scheduler.get("num_train_timesteps", 1000))[:-1]
    given["parts"] = {**parts, "vae": made["vae"]}
    return TextEncoderTask(made["unet"], teacher.text_encoder, source, **given)
