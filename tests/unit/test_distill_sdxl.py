"""SDXL teachers: two encoders, pooled text and sizes reach the UNets as the pipeline hands them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="needs the distill extra")
pytest.importorskip("accelerate", reason="needs the distill extra")
pytest.importorskip("diffusers", reason="needs the distill extra")

from benchmarks import published_models  # noqa: E402
from sdlite import Pipeline  # noqa: E402
from sdlite.distill import doctor  # noqa: E402
from sdlite.distill.advise import advise  # noqa: E402
from sdlite.distill.encoders import STATES, TextEncoders  # noqa: E402
from sdlite.distill.latent_cache import told_sizes  # noqa: E402
from sdlite.distill.run import plan, run  # noqa: E402
from sdlite.distill.students import StudentSpec, build  # noqa: E402
from sdlite.distill.tasks.base import Given  # noqa: E402
from sdlite.distill.teacher import Teacher  # noqa: E402
from sdlite.distill.teacher_cache import cache_targets  # noqa: E402
from sdlite.distill.train import step_generator  # noqa: E402
from sdlite.errors import InputError  # noqa: E402
from tests.helpers import psnr  # noqa: E402
from tests.unit.test_recipe import parse  # noqa: E402

KINDS = {
    "output": "feature_weight = 0.1\nmask = true",
    "guidance": "",
    "progressive": "steps = [2]",
    "consistency": "",
    "adversarial": "",
}
CAPTIONS = ["a fox", "a house by the sea", "two cats", "rain"]


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """Vega's folder: narrow, 32 px, two layers in the second text encoder."""
    vega = published_models.MODELS["vega"]
    unet = vega.unet | {"sample_size": 4, "_diffusers_version": "0.20.0"}
    made = dataclasses.replace(vega, unet=unet, text_2={**vega.text_2, "num_hidden_layers": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(published_models.MODELS, "tiny-xl", made)
        return published_models.write("tiny-xl", tmp_path_factory.mktemp("xl") / "teacher")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i, caption in enumerate(CAPTIONS):
        size = (64 + 32 * i, 64, 3)  # height, width
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def opened(xl, pictures, tmp_path_factory):
    teacher = Teacher(xl)
    return teacher, teacher.source(pictures, tmp_path_factory.mktemp("latents") / "l", False)


def stage(kind, images=2):
    return f"[[stage]]\nkind = '{kind}'\nimages = {images}\n{KINDS.get(kind, '')}\n"


def task_of(kind, teacher, source, **spec):
    parts = {"vae": teacher.vae, "tokenizer": teacher.tokenizer}
    student = build(teacher.unet, StudentSpec(**spec))
    networks = (student, teacher.unet, teacher.text_encoder)
    given = Given(*networks, source, parts, scheduler=teacher.scheduler)
    return parse(stage(kind)).stages[0].kind.task(given)


def right(xl, prompts, negative=None):
    """What diffusers' own pipeline hands to the UNet of each prompt."""
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(xl)
    out = pipe.encode_prompt(prompts, do_classifier_free_guidance=True, negative_prompt=negative)
    return [x.detach() for x in out]


def test_captions_are_encoded_as_diffusers_does_and_an_empty_one_is_zeros(xl, opened):
    teacher, source = opened
    states, without, pooled, none = right(xl, CAPTIONS)
    encode = task_of("output", *opened).encode
    asked = encode.settings()
    order = [CAPTIONS.index(c) for c in source.captions]
    made = encode.conditions(source.ids)
    torch.testing.assert_close(made[STATES], states[order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made["text_embeds"], pooled[order], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made["text_embeds"].flip(0), pooled[order], rtol=1e-4, atol=1e-4)
    empty = encode.conditions(source.empty_ids[None])
    assert all(float(x.abs().max()) == 0 for x in (*empty.values(), without, none))
    teacher.text_encoder.zeros = False  # as a pipeline that does not say so
    try:
        again = task_of("output", *opened).encode
        assert again.settings() == {"empty_is_zeros": False} != asked
        empty = again.conditions(source.empty_ids[None])
    finally:
        teacher.text_encoder.zeros = True
    _, without, _, none = right(xl, ["a fox"], negative="")
    torch.testing.assert_close(empty[STATES], without, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(empty["text_embeds"], none, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("original", "size", "told"),
    [
        ((512, 512), (512, 512), [512, 512, 0, 0, 512, 512]),
        ((2000, 1000), (1024, 1024), [1000, 2000, 0, 512, 1024, 1024]),
        ((300, 600), (1024, 1024), [600, 300, 512, 0, 1024, 1024]),
        ((1600, 900), (512, 1024), [900, 1600, 32, 0, 512, 1024]),
    ],
)
def test_sizes_are_the_originals_and_crops_are_counted_in_the_resized_image(original, size, told):
    assert told_sizes(original, size) == told


def test_the_data_carry_their_sizes_also_from_the_cache(opened, xl, pictures, tmp_path):
    _, source = opened
    rows = {tuple(r) for r in source.told["time_ids"].int().tolist()}
    tall = [(64 + 32 * i, 64, 8 * i, 0, 32, 32) for i in range(4)]
    assert rows == set(tall)
    teacher = Teacher(xl)
    first = teacher.source(pictures, tmp_path / "l", False)
    again = teacher.source(pictures, tmp_path / "l", False)
    torch.testing.assert_close(again.told["time_ids"], first.told["time_ids"])
    batch = again.draw(6, torch.Generator().manual_seed(0))
    assert torch.equal(batch["time_ids"], again.told["time_ids"][batch["ids"]])


@pytest.mark.parametrize("kind", KINDS)
def test_student_and_teacher_are_told_the_same_and_another_pooled_text_is_seen(kind, opened):
    task = task_of(kind, *opened, one_layer=True)
    student = task.modules["student"].unet if kind == "output" else task.modules["unet"]
    seen = []

    def keep(module, args, kwargs):
        seen.append({k: v.clone() for k, v in kwargs["added_cond_kwargs"].items()})

    hooks = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in (student, task.teacher)]
    batch = task.batch(2, step_generator(0, 0))
    told = task.conditions(batch)
    loss = task.loss(task.modules, batch, 0)["loss"]
    for hook in hooks:
        hook.remove()
    for added in seen:  # guided calls have the rows without a caption first
        torch.testing.assert_close(added["time_ids"][-2:], batch["time_ids"])
        torch.testing.assert_close(added["text_embeds"][-2:], told["text_embeds"])
        assert len(added["text_embeds"]) == 2 or not added["text_embeds"][:2].any()
    loss.backward()
    assert student.add_embedding.linear_1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("broken", ["", "text_embeds", "time_ids"])
def test_a_student_that_is_the_teacher_learns_nothing_unless_rows_are_mixed_up(broken, opened):
    task = task_of("output", *opened)
    batch = task.batch(4, step_generator(0, 1))
    batch["wanted"] = task.targets(batch)
    told = task.conditions

    def mixed(batch):
        out = told(batch)
        return {**out, **({broken: out[broken].roll(1, 0)} if broken else {})}

    task.conditions = mixed
    loss = float(task.loss(task.modules, batch, 0)["output"].detach())
    assert loss > 1e-6 if broken else loss < 1e-10, loss


def test_kept_answers_keep_the_sizes_they_were_given_for(opened, tmp_path):
    task = task_of("guidance", *opened)
    pool = cache_targets(task, 4, tmp_path / "targets.safetensors", batch=2)
    assert pool.tensors["time_ids"].shape == (4, 6)


RECIPE = (
    "[student]\none_layer = true\n[train]\nbatch_size = 2\nmicro_batch_size = 1\nsample_every = 0\n"
    "log_every = 1\nlr = 1e-3\nwarmup_images = 0\n[preview]\nprompts = ['a fox']\n"
    "num_inference_steps = 1\n"
)


GIVEN = {"export": False, "progress": False}


def same_images(folder, sampler, **call):
    """The folder's images by diffusers, with the scheduler that stands in it, and ours."""
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    theirs = pipe("a fox", latents=x, output_type="np", **call).images[0]
    with Pipeline.from_pretrained(folder, backend="torch", threads=1) as ours:
        mine = np.asarray(ours("a fox", latents=x.numpy(), sampler=sampler, **call).images[0])
    assert psnr(theirs * 255, mine) > 50
    return pipe


def test_a_run_resumes_exactly_and_its_folder_is_diffusers_and_ours(xl, pictures, tmp_path):
    from diffusers import DDIMScheduler
    from safetensors.torch import load_file

    recipe = parse(RECIPE + stage("output", 16) + stage("consistency", 4))
    given = {"teacher": xl, "data": pictures, **GIVEN}
    whole = run(recipe, out=tmp_path / "whole", **given)
    assert whole["finished"]
    rows = (tmp_path / "whole" / "0-output" / "stats.jsonl").read_text().splitlines()
    losses = [json.loads(r)["loss"] for r in rows]
    assert losses[-1] < losses[0]
    stopped = run(recipe, out=tmp_path / "cut", max_minutes=1e-9, **given)
    assert not stopped["finished"]
    assert run(recipe, out=tmp_path / "cut", resume=True, **given)["finished"]
    name = "1-consistency/model/unet/diffusion_pytorch_model.safetensors"
    a, b = (load_file(tmp_path / d / name) for d in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    folder = tmp_path / "whole" / "0-output" / "model"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["force_zeros_for_empty_prompt"] is True
    pipe = same_images(folder, "ddim", num_inference_steps=2, guidance_scale=5.0)
    assert isinstance(pipe.scheduler, DDIMScheduler)


@pytest.mark.slow
def test_whole_runs_of_the_stages_for_few_steps(xl, pictures, tmp_path):
    from safetensors.torch import load_file

    halved = stage("progressive", 8).replace("steps = [2]", "steps = [2, 1]")
    recipe = parse(RECIPE + stage("output", 2) + halved + stage("adversarial", 8))
    out = tmp_path / "out"
    assert run(recipe, teacher=xl, data=pictures, out=out, **GIVEN)["finished"]
    before = None
    for name, steps in (("1-progressive-2", 2), ("1-progressive-1", 1), ("2-adversarial", 4)):
        rows = [json.loads(r) for r in (out / name / "stats.jsonl").read_text().splitlines()]
        assert len(rows) == 4
        assert all(np.isfinite(v) for r in rows for k, v in r.items() if "loss" in k)
        folder = out / name / "model"
        unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        if before is not None:
            assert any((unet[k] != before[k]).any() for k in unet)
        before = unet
        pipe = same_images(folder, "ddim", num_inference_steps=steps, guidance_scale=1.0)
        assert pipe.scheduler.config.timestep_spacing == "trailing"


def test_what_is_not_for_several_text_encoders_is_refused_before_any_work(opened, tmp_path):
    teacher, _ = opened
    recipe = parse(stage("output") + stage("text-encoder") + "layers = 1\n")
    words = r"1-text-encoder makes one .* has 2 \(text_encoder, text_encoder_2\), .* leave the"
    with pytest.raises(InputError, match=words):
        plan(recipe, teacher)
    given = {"teacher": teacher.artifact.folder, "data": tmp_path, "export": False}
    with pytest.raises(InputError, match=words):
        run(recipe, out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()
    found = doctor.text_encoders(recipe, teacher.text_encoders)
    assert [f.level for f in found] == ["fail"]
    assert isinstance(teacher.text_encoder, TextEncoders)


def test_doctor_says_what_the_teacher_is_told(xl, pictures, tmp_path):
    recipe = parse(RECIPE + stage("output"))
    found = doctor.examine(recipe, xl, pictures, tmp_path / "l", batch_size=2, progress=False)
    of = [f.text for f in found if f.check == "conditions"]
    assert of[0] == "the teacher is told the text"
    assert "text_embeds (pooled text) by text_encoder, text_encoder_2" in of[1]
    assert "target width in pixels) by the data: each image as it was" in of[2]
    assert "zeros for an empty caption" in of[3]


def test_advice_counts_both_text_encoders(xl):
    made = advise(device="gpu", memory_gb=8, minutes=60, wish="quality", teacher=xl)
    assert "[[stage]]" in made.recipe
