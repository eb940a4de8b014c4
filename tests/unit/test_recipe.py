"""Recipes and data: what is said is checked, runs stop and go on, the result is a model."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="needs the distill extra")
pytest.importorskip("accelerate", reason="needs the distill extra")
pytest.importorskip("diffusers", reason="needs the distill extra")

from sdlite import Pipeline  # noqa: E402
from sdlite.cli import main  # noqa: E402
from sdlite.distill import data  # noqa: E402
from sdlite.distill.latent_cache import to_square  # noqa: E402
from sdlite.distill.recipe import Recipe  # noqa: E402
from sdlite.distill.run import plan, run  # noqa: E402
from sdlite.distill.tasks.base import Given  # noqa: E402
from sdlite.distill.tasks.student import Output  # noqa: E402
from sdlite.distill.teacher import Teacher  # noqa: E402
from sdlite.errors import InputError, UnknownNameError  # noqa: E402

RECIPE = """
name = "small"
[preview]
prompts = ["a fox"]
num_inference_steps = 2
[train]
batch_size = 4
sample_every = 0
log_every = 1
lr = 1e-4
[[stage]]
kind = "output"
images = 8
feature_weight = 0.1
[[stage]]
kind = "guidance"
images = 8
guidance_scale = 3.0
cache_targets = 12
[[stage]]
kind = "progressive"
steps = [2, 1]
images = 4
"""


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def parse(text):
    import tomllib

    return Recipe.parse(tomllib.loads(text))


# --- data


def test_folder_with_caption_files(pictures):
    (pictures / "0.txt").unlink()
    (pictures / "1.txt").write_text(" ")
    found = data.read(pictures)
    assert [i.caption for i in found.items] == ["picture 2", "picture 3", "picture 4", "picture 5"]
    assert set(found.skipped) == {"0.png", "1.png"}
    assert found.items[0].open().size == (90, 70)


def test_folder_with_metadata(pictures):
    rows = [
        {"file_name": "0.png", "text": "a"},
        {"file_name": "none.png", "text": "b"},
        {"file_name": "1.png"},
    ]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = data.read(pictures)
    assert [(i.key, i.caption) for i in found.items] == [("0.png", "a")]
    assert "missing" in found.skipped["none.png"]
    assert "no caption" in found.skipped["1.png"]
    (pictures / "metadata.jsonl").unlink()
    (pictures / "metadata.csv").write_text("file_name,caption\n2.png,two\n")
    assert [i.caption for i in data.read(pictures).items] == ["two"]


def test_shards_and_prompts(pictures, tmp_path):
    with tarfile.open(tmp_path / "a-0.tar", "w") as tar:
        for i in (0, 1):
            tar.add(pictures / f"{i}.png", f"{i}.png")
            tar.add(pictures / f"{i}.txt", f"{i}.txt")
        tar.add(pictures / "2.png", "2.png")
    found = data.read(tmp_path / "a-*.tar")
    assert [i.caption for i in found.items] == ["picture 0", "picture 1"]
    assert list(found.skipped) == ["a-0.tar: 2"]
    (tmp_path / "prompts.txt").write_text("# a comment\na fox\n\na house\n")
    found = data.read(tmp_path / "prompts.txt")
    assert [i.caption for i in found.items] == ["a fox", "a house"]
    assert found.prompts_only
    for bad, words in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "b-*.tar", "matches no file"),
        (pictures / "0.png", "none of the accepted"),
    ):
        with pytest.raises(InputError, match=words):
            data.read(bad)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="no usable sample"):
        data.read(tmp_path / "empty.txt")


def test_to_square_crops_the_middle_and_puts_transparency_on_white():
    image = Image.new("RGB", (90, 30), "red")
    image.paste("blue", (30, 0, 60, 30))
    x = to_square(image, 16)
    assert x.shape == (3, 16, 16)
    np.testing.assert_allclose(x[:, 8, 8], [-1, -1, 1])
    np.testing.assert_allclose(to_square(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 8), 1)


# --- recipes


def test_recipe_is_read():
    r = parse(RECIPE)
    assert [s.name for s in r.stages] == [
        "0-output",
        "1-guidance",
        "2-progressive-2",
        "2-progressive-1",
    ]
    assert r.stages[0].config.max_images == 8
    assert r.stages[0].config.batch_size == 4
    assert r.default_sampler("ddim") == {
        "name": "ddim",
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
    }
    assert (
        parse("[[stage]]\nkind='output'\nimages=1").default_sampler("ddim")["guidance_scale"] == 4.0
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no .*stage"),
        (
            "[[stage]]\nkind='magic'\nimages=1",
            "'magic' is not known; choose one of output, guidance",
        ),
        ("[[stage]]\nkind='output'", "images is missing"),
        ("[[stage]]\nkind='output'\nimages=1\nguidance_scale=3", "guidance_scale is not known"),
        ("[[stage]]\nkind='progressive'\nimages=1\nsteps=[8,3]", "halve"),
        ("[[stage]]\nkind='output'\nimages=1\ncache_targets=9", "set feature_weight = 0"),
        (
            "[student]\npreset='tiny'\n[[stage]]\nkind='output'\nimages=1",
            "preset='tiny' is not known",
        ),
        (
            "[student]\nweights='old'\n[[stage]]\nkind='output'\nimages=1",
            "weights='old'; accepted: 'teacher' or 'random'",
        ),
        ("[student]\ndepth=2\n[[stage]]\nkind='output'\nimages=1", "depth is not known"),
        ("[preview]\nsize=1\n[[stage]]\nkind='output'\nimages=1", "size is not known"),
        (
            "[train]\nlearning_rate=1\n[[stage]]\nkind='output'\nimages=1",
            "learning_rate is not known",
        ),
    ],
)
def test_recipe_errors(text, words):
    with pytest.raises((InputError, UnknownNameError), match=words):
        parse(text)


def test_sampler_knows_which_stages_put_guidance_into_the_student():
    """A progressive stage without a guidance stage before it learns the guided teacher: sampling it
    with guidance again would be twice.
    """
    few = "[[stage]]\nkind='progressive'\nsteps=[4, 2]\nimages=1\n"
    assert parse(few).default_sampler("ddim")["guidance_scale"] == 1.0
    assert parse(few + "guidance_scale=1.0").default_sampler("ddim")["guidance_scale"] == 4.0
    assert (
        parse("[[stage]]\nkind='guidance'\nimages=1").default_sampler("ddim")["guidance_scale"]
        == 1.0
    )
    guided = "[[stage]]\nkind='guidance'\nimages=1\nguidance_scale=3.0\n"
    assert len(parse(guided + few + "guidance_scale=1.0").stages) == 3
    for kind in ("progressive", "adversarial"):
        with pytest.raises(
            InputError, match="0-guidance has put guidance into the student already"
        ):
            parse(guided + f"[[stage]]\nkind='{kind}'\nimages=1\nguidance_scale=3.0")


def test_halvings_after_the_first_do_not_guide_again(plain, pictures, tmp_path):
    teacher = Teacher(plain)
    source = teacher.source(pictures, tmp_path / "c.safetensors", False)
    first, second = parse(
        "[[stage]]\nkind='progressive'\nsteps=[4, 2]\nimages=1\nguidance_scale=3.0"
    ).stages

    def made_by(stage, guided):
        networks = (teacher.unet, teacher.unet, teacher.text_encoder)
        given = Given(*networks, source, {}, teacher.scheduler, guided=guided)
        return stage.kind.task(given)

    made = [made_by(first, False), made_by(second, True)]
    assert [m.guidance_scale for m in made] == [3.0, 1.0]
    assert made[0].teacher is teacher.unet
    assert made[1].teacher is not teacher.unet
    judged = parse("[[stage]]\nkind='adversarial'\nimages=1").stages[0]
    stage = made_by(judged, True)
    assert stage.teacher is teacher.unet  # features of the real teacher
    assert stage.start is not None  # and the student as it was
    assert stage.start is not teacher.unet


def test_recipe_file_errors(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Recipe.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("stage = [")
    with pytest.raises(InputError, match="not TOML"):
        Recipe.load(tmp_path / "bad.toml")


def test_run_stops_resumes_and_makes_a_model(plain, pictures, tmp_path):
    (pictures / "5.png").write_bytes(b"not a picture")
    r, out = parse(RECIPE), tmp_path / "run"
    arguments = {"teacher": plain, "data": pictures, "out": out, "export": False, "progress": False}
    assert "100.0% of the teacher" in plan(r, Teacher(plain))
    stopped = run(r, **arguments, max_minutes=0)
    assert not stopped["finished"]
    said = (out / "report.md").read_text()
    assert "Stopped" in said
    assert said.count("not begun") == 4
    assert json.loads((out / "skipped.json").read_text()).keys() == {"5.png"}
    with pytest.raises(InputError, match="already holds a run"):
        run(r, **arguments)
    with pytest.raises(InputError, match="another recipe"):
        run(parse(RECIPE.replace("images = 8", "images = 12")), **arguments, resume=True)
    done = run(r, **arguments, resume=True)
    assert done["finished"]
    assert list(done["stages"]) == ["0-output", "1-guidance", "2-progressive-2", "2-progressive-1"]
    said = (out / "report.md").read_text()
    assert "Finished." in said
    assert "| 0-output | 8 |" in said
    assert "(2-progressive-1/sample-last.png)" in said
    assert (out / "1-guidance" / "targets.safetensors").exists()
    assert Image.open(out / "curves.png").height > 1000
    again = run(r, **arguments, resume=True)  # finished stages are not trained again
    assert again["seconds"] < done["seconds"]
    pipe = Pipeline.from_pretrained(out / "2-progressive-1" / "model", backend="torch", threads=1)
    assert pipe("picture 1", num_inference_steps=1, guidance_scale=1, seed=0).images[0].size == (
        64,
        64,
    )
    assert pipe.scheduler_config["timestep_spacing"] == "trailing"


def test_statistics_of_a_resumed_run_say_each_step_once(tmp_path):
    from sdlite.distill.report import statistics

    rows = [{"step": k, "loss": x} for k, x in ((1, 5.0), (2, 4.0), (3, 3.0), (2, 4.5), (3, 3.5))]
    (tmp_path / "stats.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 4, "lo')
    assert [(r["step"], r["loss"]) for r in statistics(tmp_path)] == [(1, 5.0), (2, 4.5), (3, 3.5)]
    assert statistics(tmp_path / "nowhere") == []


def test_prompts_alone_are_enough(plain, tmp_path):
    (tmp_path / "prompts.txt").write_text("red apple\ndog face\n")
    r = parse("[train]\nbatch_size=2\nsample_every=0\n[[stage]]\nkind='output'\nimages=2\n")
    assert run(
        r,
        teacher=plain,
        data=tmp_path / "prompts.txt",
        out=tmp_path / "run",
        export=False,
        progress=False,
    )["finished"]


def test_command_line(plain, pictures, tmp_path, capsys):
    (tmp_path / "r.toml").write_text(
        "[train]\nbatch_size=2\nsample_every=0\n[[stage]]\nkind='output'\nimages=2\n"
    )
    command = [
        "distill",
        str(tmp_path / "r.toml"),
        "--teacher",
        str(plain),
        "--data",
        str(pictures),
        "--out",
        str(tmp_path / "run"),
        "--no-export",
    ]
    assert main([*command, "--dry-run"]) == 0
    assert "0-output: 2 images" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert main(command) == 0
    assert "finished" in capsys.readouterr().out
    assert main(command) == 1
    assert "already holds a run" in capsys.readouterr().err


# --- doctor


def levels(found, check):
    return [f.level for f in found if f.check == check]


def test_doctor_finds_nothing_wrong_with_the_embedded_student(plain, pictures, tmp_path, capsys):
    (tmp_path / "r.toml").write_text("[[stage]]\nkind='output'\nimages=2\n")
    assert (
        main(
            [
                "distill",
                "doctor",
                str(tmp_path / "r.toml"),
                "--teacher",
                str(plain),
                "--data",
                str(pictures),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "100.0% of the teacher" in out
    assert "gradient norm" in out
    assert "temperature" in out
    assert "fail" not in out


def test_doctor_names_what_is_wrong(plain):
    from sdlite.distill import doctor

    teacher = Teacher(plain)
    other = type(teacher.unet)(**{**teacher.unet.config, "cross_attention_dim": 32})
    found = doctor.architecture(other, teacher.unet, teacher.text_encoder, teacher.vae)
    assert any(f.level == "fail" and "cross_attention_dim 32" in f.text for f in found)
    assert (
        levels(doctor.target({**teacher.scheduler, "prediction_type": "epsilon"}, True), "target")[
            0
        ]
        == "fail"
    )
    assert "warn" in levels(
        doctor.target({**teacher.scheduler, "timestep_spacing": "leading"}, True), "target"
    )
    assert levels(doctor.preprocessing(torch.randn(8, 4, 8, 8), 8, 0, 0), "preprocessing") == ["ok"]
    assert levels(
        doctor.preprocessing(torch.randn(8, 4, 8, 8) * 5.5, 8, 0, 0), "preprocessing"
    ) == ["fail"]  # scaling_factor forgotten
    assert levels(
        doctor.preprocessing(torch.full((1, 4, 8, 8), torch.nan), 8, 0, 0), "preprocessing"
    ) == ["fail"]
    assert levels(doctor.preprocessing(torch.randn(8, 4, 8, 8), 8, 5, 4), "data") == [
        "warn",
        "warn",
    ]
    assert "warn" in levels(
        doctor.temperature(torch.zeros(1, 2, 8, 8)), "temperature"
    )  # flat: no gradient
    peak = torch.zeros(1, 1, 8, 8)
    peak[..., 3, 3] = 1000
    assert "warn" in levels(doctor.temperature(peak), "temperature")


def test_doctor_measures_the_pull_of_each_term(plain, pictures, tmp_path):
    from sdlite.distill import doctor

    teacher = Teacher(plain)
    source = teacher.source(pictures, tmp_path / "c.safetensors", False)
    student = type(teacher.unet).from_config(teacher.unet.config)
    given = Given(student, teacher.unet, teacher.text_encoder, source, {}, teacher.scheduler)
    task = Output(feature_weight=1e4).task(given)
    found, measured = doctor.gradients(task, 4)
    assert set(measured) == {"task", "output", "feature"}
    assert levels(found, "loss scales")[-1] == "warn"


def small_task(**options):
    from tests.unit.test_stages import real

    return real(Output, **options)


def test_doctor_finds_a_wrong_prediction_type():
    """A network that is exact for v, under a scheduler that says epsilon: everything runs, and the
    two halves of the loss contradict.
    """
    from sdlite.distill import doctor
    from sdlite.distill.tasks.base import V_ZERO_SNR
    from sdlite.sampling import Schedule
    from tests.unit.test_stages import Perfect, Solver

    levels_of = {}
    for kind in ("v_prediction", "epsilon"):
        task = small_task(
            scheduler={**V_ZERO_SNR, "prediction_type": kind, "rescale_betas_zero_snr": False}
        )
        exact = Perfect(Solver(Schedule.from_config(V_ZERO_SNR)), torch.zeros(1, 4, 4, 4))
        exact.solver.alpha_bar, draw = task.forward.alpha_bar, task.source.draw
        task.source.draw = lambda size, g, draw=draw: {
            **draw(size, g),
            "latents": torch.zeros(size, 4, 4, 4) + 1e-3,
        }
        levels_of[kind] = levels(doctor.prediction(task, exact, 8), "prediction")
    assert levels_of == {"v_prediction": ["ok"], "epsilon": ["fail"]}
    assert levels(doctor.prediction(small_task(), small_task().teacher, 8), "prediction") == [
        "warn"
    ]  # random weights


def test_doctor_weighs_every_term():
    from sdlite.distill import doctor

    task = small_task(feature_weight=0.1, multi_scale_weight=1e6, channel_weight=1e-9)
    for p in task.modules["student"].parameters():
        p.data += 0.1 * torch.randn_like(p)
    found, measured = doctor.gradients(task, 8)
    assert set(measured) == {"task", "output", "feature", "multi_scale", "channel"}
    warned = [f.text for f in found if f.level == "warn"]
    assert any("multi_scale term pulls" in t for t in warned)
    assert any("channel term pulls" in t for t in warned)
    found, measured = doctor.gradients(small_task(article=True, feature_weight=0.0), 8)
    assert set(measured) == {"task", "article"}


def test_doctor_sees_a_learning_rate_that_is_too_high_and_leaves_the_student_as_it_was():
    from sdlite.distill import doctor

    task = small_task(feature_weight=0.0)
    before = [p.clone() for p in task.modules["student"].parameters()]
    assert levels(doctor.first_step(task, 1e-4, 8), "learning rate") == ["ok"]
    assert levels(doctor.first_step(task, 10.0, 8), "learning rate") == ["warn"]
    for p, q in zip(task.modules["student"].parameters(), before, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


def test_doctor_reads_the_recipes_settings():
    from sdlite.distill import doctor

    stage = "[[stage]]\nkind='output'\nimages=1\nfeature_weight=0.0\n"
    assert levels(doctor.settings(parse(stage), 100), "settings") == ["ok"]
    for wrong, level in (
        ("cache_targets=9", "warn"),
        ("article=true", "warn"),
        ("caption_dropout=0.0", "warn"),
        ("batch_size=8\nmicro_batch_size=3", "fail"),
    ):
        assert levels(doctor.settings(parse(stage + wrong), 100), "settings") == [level], wrong


def test_distill_usage_errors(tmp_path):
    for command in (
        ["distill", "a.toml", "b.toml", "--teacher", "t", "--data", "d"],
        ["distill", "a.toml", "--teacher", "t", "--data", "d"],
    ):
        with pytest.raises(SystemExit) as e:
            main(command)
        assert e.value.code == 2
