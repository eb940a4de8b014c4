"""Distilling a teacher that is told its guidance (LCM): one row, the student told the same."""

from __future__ import annotations

import json
import tomllib
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the distill extra")
pytest.importorskip("accelerate", reason="needs the distill extra")
pytest.importorskip("diffusers", reason="needs the distill extra")

from sdlite.distill import doctor, preview  # noqa: E402
from sdlite.distill.advise import advise  # noqa: E402
from sdlite.distill.recipe import Recipe  # noqa: E402
from sdlite.distill.run import plan, run  # noqa: E402
from sdlite.distill.students import StudentSpec, build  # noqa: E402
from sdlite.distill.tasks.base import TOLD_SCALES, Given, drawn_guidance  # noqa: E402
from sdlite.distill.tasks.student import teacher_gradients  # noqa: E402
from sdlite.distill.teacher import Teacher, refuse_unfed  # noqa: E402
from sdlite.distill.teacher_cache import cache_targets  # noqa: E402
from sdlite.distill.train import step_generator  # noqa: E402
from sdlite.errors import InputError  # noqa: E402
from sdlite.families.sd import StableDiffusion, guidance_embedding  # noqa: E402
from sdlite.sampling import Schedule  # noqa: E402
from sdlite.spec import Tensor  # noqa: E402
from tests import folders  # noqa: E402
from tests.unit.test_families import remade  # noqa: E402
from tests.unit.test_parts import prompts, small  # noqa: E402, F401
from tests.unit.test_recipe import parse  # noqa: E402

WIDTH = 8
STAGES = {
    "output": "task_weight = 0\nfeature_weight = 0",
    "guidance": "",
    "progressive": "steps = [2]",
    "consistency": "",
    "adversarial": "",
}


@pytest.fixture(scope="module")
def lcm(small, tmp_path_factory):  # noqa: F811
    """The small teacher as an LCM."""
    out = tmp_path_factory.mktemp("lcm") / "teacher"
    remade(small, out, "LatentConsistencyModelPipeline", time_cond_proj_dim=WIDTH)
    folders.configure(out / "scheduler" / "scheduler_config.json", _class_name="LCMScheduler")
    return out


@pytest.fixture(scope="module")
def opened(lcm, prompts, tmp_path_factory):  # noqa: F811
    teacher = Teacher(lcm)
    return teacher, teacher.source(prompts, tmp_path_factory.mktemp("latents") / "l", False)


def stage(kind):
    return f"[[stage]]\nkind = '{kind}'\nimages = 2\n{STAGES[kind]}\n"


def task_of(kind, teacher, source, width=1.0):
    given = Given(
        build(teacher.unet, StudentSpec(width=width)),
        teacher.unet,
        teacher.text_encoder,
        source,
        parts={"vae": teacher.vae, "tokenizer": teacher.tokenizer},
        scheduler=teacher.scheduler,
    )
    return parse(stage(kind)).stages[0].kind.task(given)


class Calls:
    """What a network was called with."""

    def __init__(self, network):
        self.rows, self.told = [], []
        network.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        self.rows.append(len(args[0] if args else kwargs["sample"]))
        self.told.append(kwargs.get("timestep_cond"))


@pytest.mark.parametrize("kind", STAGES)
def test_teacher_and_student_are_told_the_same_in_one_row(kind, opened):
    task = task_of(kind, *opened, width=0.5)
    student = task.modules["student"].unet if kind == "output" else task.modules["unet"]
    calls = Calls(student), Calls(task.teacher)
    batch = task.batch(2, step_generator(0, 0))
    assert batch["timestep_cond"].shape == (2, WIDTH)
    loss = task.loss(task.modules, batch, 0)["loss"]
    for one in calls:
        assert set(one.rows) == {2}
        assert all(torch.equal(c, batch["timestep_cond"]) for c in one.told)
    loss.backward()
    assert student.time_embedding.cond_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["output", "guidance"])
def test_a_student_that_is_the_teacher_has_nothing_to_learn_at_any_guidance(kind, opened):
    task = task_of(kind, *opened)
    batch = task.batch(2, step_generator(0, 0))
    assert task.loss(task.modules, batch, 0)["loss"] == 0
    batch["wanted"] = task.targets(batch)
    batch["timestep_cond"] = batch["timestep_cond"].flip(0)  # another guidance than the teacher's
    assert task.loss(task.modules, batch, 0)["loss"] > 0


def test_scales_are_drawn_from_the_range_and_embedded_as_the_pipeline_does():
    rows = drawn_guidance(4, 16, torch.Generator().manual_seed(5)).numpy()
    low, high = TOLD_SCALES
    u = torch.rand(4, generator=torch.Generator().manual_seed(5)).numpy()
    for row, x in zip(rows, u, strict=True):
        np.testing.assert_allclose(
            row, guidance_embedding(low + (high - low) * x, 16)[0], atol=2e-3
        )


def test_kept_answers_are_those_of_the_guidance_that_is_kept_with_them(opened, tmp_path):
    task = task_of("guidance", *opened)
    pool = cache_targets(task, 6, tmp_path / "targets.safetensors", batch=4)
    assert pool.tensors["timestep_cond"].shape == (6, WIDTH)
    assert task.loss(task.modules, task.batch(4, step_generator(0, 1)), 0)["loss"] < 1e-10


def test_gradients_of_a_teacher_that_is_told_reach_its_guidance_embedding(opened):
    teacher, source = opened
    found = teacher_gradients(
        teacher.unet, teacher.text_encoder, source, teacher.scheduler, batches=1, size=2
    )
    assert found["time_embedding.cond_proj.weight"].abs().sum() > 0
    student = build(teacher.unet, StudentSpec(width=0.5, score="taylor"), found)
    assert student.config.time_cond_proj_dim == WIDTH


def test_its_images_are_made_in_one_row_as_it_was_made_for(opened):
    teacher, _ = opened
    assert (teacher.painted.sampler, teacher.painted.num_inference_steps) == ("lcm", 4)
    assert teacher.painted.guidance_scale == 8.5
    calls = Calls(teacher.unet)
    parts = {"unet": teacher.unet, "text_encoder": teacher.text_encoder}
    parts |= {"tokenizer": teacher.tokenizer}
    samples = preview.Samples(("a", "b"), 3, 7.5, sampler="lcm")
    out = preview.paint(parts, Schedule.from_config(teacher.scheduler), samples)
    assert out.isfinite().all()
    assert calls.rows == [2, 2, 2]
    for cond in calls.told:
        np.testing.assert_array_equal(cond.numpy(), np.repeat(guidance_embedding(7.5, WIDTH), 2, 0))


RECIPE = "[student]\nwidth = 0.5\n[train]\nbatch_size = 2\nsample_every = 0\n"


def test_a_whole_run_keeps_the_input_and_the_teachers_way_of_sampling(lcm, prompts, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    recipe = parse(RECIPE + "".join(stage(k) for k in STAGES))
    done = run(recipe, teacher=lcm, data=prompts, out=out, export=False, progress=False)
    assert done["finished"]
    for folder in done["stages"]:
        config = json.loads((out / folder / "model" / "unet" / "config.json").read_text())
        assert config["time_cond_proj_dim"] == WIDTH
        assert config["block_out_channels"] == [8, 16]


@pytest.mark.parametrize(
    ("kinds", "name", "steps"),
    [
        (["output"], "lcm", 4),
        (["output", "guidance"], "lcm", 4),
        (["progressive"], "ddim", 2),
        (["guidance", "consistency"], "lcm", 4),
    ],
)
def test_how_its_students_are_sampled(kinds, name, steps, opened):
    recipe = parse("".join(stage(k) for k in kinds))
    teachers = dict(opened[0].artifact.samples_with)
    assert recipe.default_sampler("ddim", teachers, is_told=True) == {
        "name": name,
        "num_inference_steps": steps,
        "guidance_scale": 8.5,
    }


def test_a_guidance_that_would_have_no_effect_is_refused_before_any_work(
    lcm,
    opened,
    prompts,  # noqa: F811
    tmp_path,
):
    recipe = parse(stage("guidance") + "guidance_scale = 4.0")
    words = r"stage 0-guidance says guidance_scale=4.0, but this teacher is told .* 3 to 15; leave"
    with pytest.raises(InputError, match=words):
        run(recipe, teacher=lcm, data=prompts, out=tmp_path / "run", export=False, progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=words):
        plan(recipe, opened[0])
    assert doctor.conditions(recipe, WIDTH)[1].level == "fail"


def test_doctor_says_what_the_teacher_is_told(lcm, prompts, tmp_path):  # noqa: F811
    recipe = parse(RECIPE + "[[stage]]\nkind = 'output'\nimages = 2")
    found = doctor.examine(recipe, lcm, prompts, tmp_path / "l", batch_size=2, progress=False)
    of = [str(f) for f in found if f.check == "conditions"]
    assert "told text and guidance (time_cond_proj_dim=8)" in of[0]
    assert of[1].startswith("warn conditions: 0-output: task_weight=1 pulls to the data")
    plain = doctor.conditions(recipe, None)
    assert [f.text for f in plain] == ["the teacher is told the text, and nothing else"]


@pytest.mark.parametrize("wish", ["quality", "balanced", "speed"])
def test_advice_for_it_is_a_recipe_that_it_takes(wish, lcm, tmp_path):
    teacher = remade(lcm, tmp_path / "two", layers_per_block=2)
    made = advise(device="cpu", memory_gb=4, minutes=60, wish=wish, teacher=teacher)
    recipe = Recipe.parse(tomllib.loads(made.recipe))
    recipe.refuse_guidance()
    assert [f.level for f in doctor.conditions(recipe, WIDTH)] == ["ok"]
    assert any("the teacher is told it" in r for r in made.reasons)


def test_a_teacher_with_inputs_that_are_not_fed_is_refused():
    inputs = (Tensor("image_embeds", ("B", "1280"), "float32", ""),)

    class Kandinsky(StableDiffusion):
        def unet_inputs(self, unet):
            return inputs

    family = Kandinsky()
    artifact = SimpleNamespace(folder="kandinsky", family=family, config=lambda part: {})
    artifact.spec = lambda part: family.spec(part, artifact.config)
    with pytest.raises(InputError, match="kandinsky is also given image_embeds; distilling"):
        refuse_unfed(artifact)
