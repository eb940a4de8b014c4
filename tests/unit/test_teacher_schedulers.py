"""Teachers of every scheduler class: what they paint is not clipped, what was clipped is seen, and
none need be square.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="needs the distill extra")
pytest.importorskip("accelerate", reason="needs the distill extra")
pytest.importorskip("diffusers", reason="needs the distill extra")

from sdlite.distill import doctor  # noqa: E402
from sdlite.distill.latent_cache import to_size  # noqa: E402
from sdlite.distill.preview import Samples, save_pipeline  # noqa: E402
from sdlite.distill.run import plan, run  # noqa: E402
from sdlite.distill.teacher import Teacher  # noqa: E402
from sdlite.sampling import Schedule  # noqa: E402
from sdlite.sampling.schedule import DEFAULTS  # noqa: E402
from tests.unit.test_recipe import parse  # noqa: E402

PROMPTS = ("red apple", "pizza on a blue background")


@pytest.fixture
def teacher(plain, tmp_path):
    """scheduler settings, UNet settings -> a folder of the embedded student with them."""

    def make(scheduler, **unet):
        out = tmp_path / "teacher"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(plain, out)
        (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
        path = out / "unet" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | unet))
        return out

    return make


def test_what_a_teacher_paints_does_not_depend_on_its_schedulers_class(teacher):
    """No file says clip_sample: DDIM's and DDPM's default is true, and most classes do not know the
    key.
    """
    shared = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
    }
    made = {}
    taught = Teacher(teacher({"_class_name": "DDIMScheduler", **shared}))
    for name in DEFAULTS:
        taught.scheduler = {"_class_name": name, **shared}
        made[name] = taught.make(Samples(PROMPTS, 3, 3.0))
    first = made["DDIMScheduler"]
    assert first.abs().max() > 1.2
    assert all(torch.equal(x, first) for x in made.values())
    same = Teacher(teacher({"_class_name": "DDIMScheduler", **shared, "clip_sample": True}))
    assert torch.equal(same.make(Samples(PROMPTS, 3, 3.0)), first)


def test_painted_data_of_another_scheduler_is_made_anew(teacher, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    config = {
        "_class_name": "DDIMScheduler",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    sources = [
        Teacher(teacher(c)).source(tmp_path / "prompts.txt", tmp_path / "cache.safetensors", False)
        for c in (config, config, {**config, "timestep_spacing": "leading"})
    ]
    assert torch.equal(sources[0].latents, sources[1].latents)
    assert not torch.equal(sources[1].latents, sources[2].latents)


def test_doctor_fails_clipped_latents():
    clean = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    (found,) = (
        f
        for f in doctor.preprocessing(clean.clamp(-1, 1).half(), 64, 0, 0)
        if f.check == "preprocessing"
    )
    assert found.level == "fail"
    assert "no latent is beyond 1.00" in found.text
    assert [f.level for f in doctor.preprocessing(clean.half(), 64, 0, 0)] == ["ok", "ok"]


def test_a_picture_is_cropped_to_the_teachers_shape():
    image = Image.new("RGB", (90, 30), "red")
    image.paste("blue", (22, 0, 68, 30))
    x = to_size(image, (16, 24))
    assert x.shape == (3, 16, 24)
    assert x[2].min() > 0.9  # the middle 45 x 30 alone
    assert to_size(Image.new("RGB", (30, 90), "white"), (16, 24)).shape == (3, 16, 24)


@pytest.mark.parametrize("data", ["prompts", "pictures"])
def test_a_teacher_that_is_not_square_teaches(teacher, data, tmp_path):
    folder = teacher(
        {
            "_class_name": "EulerDiscreteScheduler",
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
        },
        sample_size=[8, 16],
    )
    given = tmp_path / "prompts.txt"
    given.write_text("\n".join(PROMPTS))
    if data == "pictures":
        given = tmp_path / "pictures"
        given.mkdir()
        for i, prompt in enumerate(PROMPTS):
            Image.fromarray(np.full((40, 50, 3), 40 * i, np.uint8)).save(given / f"{i}.png")
            (given / f"{i}.txt").write_text(prompt)
    recipe = parse(
        "[preview]\nprompts = ['a fox']\nnum_inference_steps = 1\n[train]\nbatch_size ="
        " 2\nsample_every = 1\n[[stage]]\nkind = 'output'\nimages = 2\n"
    )
    assert "64x128 px" in plan(recipe, Teacher(folder))
    done = run(
        recipe, teacher=folder, data=given, out=tmp_path / "run", export=False, progress=False
    )
    assert done["finished"]
    assert Teacher(folder).source(
        given, tmp_path / "run" / "latents.safetensors", False
    ).latents.shape[2:] == (8, 16)
    student = json.loads(
        (tmp_path / "run" / "0-output" / "model" / "unet" / "config.json").read_text()
    )
    assert student["sample_size"] == [8, 16]


def test_an_old_teachers_student_has_diffusers_size(teacher):
    taught = Teacher(teacher({"_class_name": "DDIMScheduler"}, _diffusers_version="0.6.0"))
    assert taught.size == (512, 512)
    assert taught.unet.config.sample_size == 64


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (
            {"_class_name": "HeunDiscreteScheduler"},
            {"beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": False},
        ),
        (
            {"_class_name": "PNDMScheduler", "rescale_betas_zero_snr": True},
            {"beta_start": 0.0001, "rescale_betas_zero_snr": False},
        ),
        (
            {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True},
            {"beta_start": 0.0001, "rescale_betas_zero_snr": True},
        ),
    ],
)
def test_a_student_is_saved_with_the_schedule_that_it_was_trained_on(
    teacher, config, want, tmp_path
):
    """Its scheduler is DDIM, whose defaults and keys are not those of the teacher's class."""
    taught = Teacher(teacher(config))
    parts = {
        "unet": taught.unet,
        "vae": taught.vae,
        "text_encoder": taught.text_encoder,
        "tokenizer_folder": taught.artifact.folder / "tokenizer",
    }
    save_pipeline(tmp_path / "saved", parts, taught.scheduler)
    saved = json.loads((tmp_path / "saved" / "scheduler" / "scheduler_config.json").read_text())
    assert {k: saved[k] for k in want} == want
    assert (saved["clip_sample"], saved["steps_offset"]) == (False, 1)
    trained, served = (Schedule.from_config(c).alphas_cumprod() for c in (config, saved))
    assert (trained == served).all()
