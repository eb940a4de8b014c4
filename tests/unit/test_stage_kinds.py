"""A kind of stage from outside the package: one class, known by one call, trained by a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest

torch = pytest.importorskip("torch", reason="needs the distill extra")
pytest.importorskip("accelerate", reason="needs the distill extra")
pytest.importorskip("diffusers", reason="needs the distill extra")

from sdlite.distill import tasks  # noqa: E402
from sdlite.distill.losses import huber_loss  # noqa: E402
from sdlite.distill.run import plan, run  # noqa: E402
from sdlite.distill.tasks.base import Scale, StageKind  # noqa: E402
from sdlite.distill.tasks.few_step import GuidanceTask  # noqa: E402
from sdlite.distill.teacher import Teacher  # noqa: E402
from sdlite.errors import InputError  # noqa: E402
from sdlite.settings import At, settings  # noqa: E402
from tests.unit.test_parts import prompts, small  # noqa: E402, F401
from tests.unit.test_recipe import parse  # noqa: E402


class HuberTask(GuidanceTask):
    def __init__(self, given, options):
        super().__init__(given, options.guidance)
        self.c, self.seen = options.c, []

    def loss(self, modules, batch, step):
        x, _ = self.forward(batch["latents"], batch["noise"], batch["t"])
        out = modules["unet"](x, batch["t"], self.embeds(batch["input_ids"])).sample
        return {"loss": huber_loss(out, self.targets(batch), self.c)}


@settings
@dataclass(frozen=True)
class Huber(StageKind):
    """Guidance, learned by another loss."""

    name = "huber"
    sampler = "euler"
    becomes_teacher = True

    c: Annotated[float, At(0, 1)] = 0.1
    guidance_scale: Scale = 2.0

    @property
    def guidance(self):
        return self.guidance_scale

    @property
    def sampling_steps(self):
        return 8

    def task(self, given):
        return HuberTask(given, self)


RECIPE = """
[train]
batch_size = 2
sample_every = 0
[preview]
prompts = ["a fox"]
num_inference_steps = 1
[[stage]]
kind = "huber"
images = 4
c = 0.5
[[stage]]
kind = "progressive"
steps = [2]
images = 2
"""


@pytest.fixture
def known():
    yield tasks.register(Huber)
    del tasks.KINDS["huber"]


def test_a_kind_from_outside_is_read_shown_and_trained(known, small, prompts, tmp_path):  # noqa: F811
    recipe = parse(RECIPE)
    assert recipe.stages[0].kind == Huber(c=0.5)
    assert "0-huber: 4 images, batch 2, lr 0.0003, c=0.5" in plan(recipe, Teacher(small))
    alone = parse(RECIPE[: RECIPE.index('[[stage]]\nkind = "progressive"')])
    assert alone.default_sampler("ddim") == {
        "name": "euler",
        "num_inference_steps": 8,
        "guidance_scale": 1.0,
    }
    out = tmp_path / "run"
    done = run(recipe, teacher=small, data=prompts, out=out, export=False, progress=False)
    assert done["finished"]
    assert [r["step"] for r in done["stages"].values()] == [2, 1]
    assert (out / "0-huber" / "model" / "unet" / "config.json").exists()
    assert "| 0-huber | " in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("c = 2", r"\[\[stage\]\] 0 \(huber\): c=2; accepted: at most 1"),
        ("c = 'much'", r"\[\[stage\]\] 0 \(huber\): c='much'; accepted: a finite number"),
        ("d = 1", r"\[\[stage\]\] 0 \(huber\): d is not known; known: .*, c, .*guidance_scale"),
    ],
)
def test_its_options_are_checked_by_their_types(known, said, words):
    with pytest.raises(InputError, match=words):
        parse(f"[[stage]]\nkind = 'huber'\nimages = 1\n{said}")


def test_guidance_of_a_kind_from_outside_counts(known):
    for kind in ("progressive", "adversarial"):
        text = f"[[stage]]\nkind = '{kind}'\nimages = 1\nguidance_scale = 3.0"
        with pytest.raises(InputError, match="0-huber has put guidance into the student already"):
            parse("[[stage]]\nkind = 'huber'\nimages = 1\n" + text)


def test_what_cannot_be_registered():
    class Another(StageKind):
        name = "output"

    before = tasks.KINDS["output"]
    with pytest.raises(InputError, match="stage kind 'output' is known already"):
        tasks.register(Another)
    assert tasks.KINDS["output"] is before
    with pytest.raises(InputError, match="'huber' is not known; choose one of output, guidance"):
        parse("[[stage]]\nkind = 'huber'\nimages = 1")
