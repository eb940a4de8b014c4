"""diffusers' habits work with diffusers' meaning, or are answered with our word."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest

import sdlite
from sdlite import habits
from sdlite.errors import AttributeNameError, InputError, UnknownNameError

FAST = {"num_inference_steps": 2}


def pixels(out):
    return np.stack([np.asarray(i) for i in out.images])


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="needs the torch extra")


# --- generator=


@pytest.mark.parametrize("sampler", ["ddim", "euler-ancestral"])
def test_new_cpu_generator_is_its_seed(emoji, torch, sampler):
    want = emoji("pizza", seed=9, sampler=sampler, **FAST)
    made = emoji("pizza", generator=torch.Generator().manual_seed(9), sampler=sampler, **FAST)
    assert made.seeds == want.seeds == [9]
    assert np.abs(pixels(made).astype(int) - pixels(want)).max() <= 1


def test_list_of_generators_is_one_for_each_image(emoji, torch):
    made = emoji(
        ["pizza", "ghost"], generator=[torch.Generator().manual_seed(s) for s in (4, 2)], **FAST
    )
    want = emoji(["pizza", "ghost"], seed=[4, 2], **FAST)
    assert np.abs(pixels(made).astype(int) - pixels(want)).max() <= 1


def test_generator_that_would_give_another_image_is_refused(emoji, torch):
    used = torch.Generator().manual_seed(1)
    emoji("pizza", generator=used, **FAST)  # moves on, as in diffusers
    one = torch.Generator()
    for given, text in (
        (used, "drawn from before"),
        ([one], "1 generators for 2 images"),
        ([one, one], "stands twice"),
        (7, "accepted: torch.Generator"),
        (np.random.default_rng(1), "accepted: torch.Generator"),
    ):
        with pytest.raises(InputError, match=text):
            emoji(["pizza"] * (2 if isinstance(given, list) else 1), generator=given, **FAST)
    with pytest.raises(InputError, match="pass it as generator="):
        emoji("pizza", seed=one, **FAST)
    with pytest.raises(InputError, match="both given"):
        emoji("pizza", generator=one, seed=1, **FAST)


def test_generator_of_a_card_is_refused():
    class Generator:  # torch's, on a machine that has a card
        device = "cuda:0"

        def initial_seed(self):
            return 1

    Generator.__module__ = "torch._C"
    with pytest.raises(InputError, match=r"cuda:0.*use torch.Generator\('cpu'\), or seed="):
        habits.generators(Generator(), 1)


# --- output_type=, callback_on_step_end=, to()


def test_output_types_are_those_of_diffusers(emoji):
    want = pixels(emoji("pizza", seed=1, **FAST))
    array = emoji("pizza", seed=1, output_type="np", **FAST).images
    assert (array.dtype, array.shape) == (np.float32, (1, 64, 64, 3))
    assert (np.round(array * 255).astype(np.uint8) == want).all()
    latents = emoji("pizza", seed=1, output_type="latent", **FAST).images
    assert latents.shape == (1, 8, 8, 8)
    assert (emoji.decode(latents) == want).all()
    with pytest.raises(
        UnknownNameError, match="output_type='pt' is not known; choose one of pil, np, latent"
    ):
        emoji("pizza", output_type="pt")


def test_step_end_callback_sees_what_diffusers_shows_and_may_change_the_latents(emoji):
    seen = []

    def look(pipe, step, timestep, kept):
        seen.append((pipe is emoji, step, int(timestep), kept["latents"].shape))
        return {"latents": kept["latents"] * (0 if step == 1 else 1)}

    zero = emoji("pizza", seed=1, callback_on_step_end=look, output_type="latent", **FAST).images
    assert [s[:2] for s in seen] == [(True, 0), (True, 1)]
    assert seen[0][2] > seen[1][2]
    assert (zero == 0).all()
    want = emoji("pizza", seed=1, output_type="latent", **FAST).images
    assert (
        emoji(
            "pizza", seed=1, callback_on_step_end=lambda *_: {}, output_type="latent", **FAST
        ).images
        == want
    ).all()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (None, "returned NoneType"),
        ({"prompt_embeds": 1}, "returned prompt_embeds"),
        ({"latents": np.zeros(3)}, r"\(3,\)"),
    ],
)
def test_step_end_callback_that_asks_for_more_is_refused(emoji, answer, text):
    with pytest.raises(InputError, match=text):
        emoji("pizza", seed=1, callback_on_step_end=lambda *_: answer, **FAST)


def test_to_is_nothing_where_the_pipeline_is_and_an_error_elsewhere(emoji, torch):
    assert (
        emoji.to("cpu")
        is emoji.to(torch.device("cpu"), torch.float16)
        is emoji.to(device="cpu")
        is emoji
    )
    for wanted, word in (
        ("cuda", "device="),
        (torch.device("cuda", 1), "device="),
        (torch.float32, "precision="),
    ):
        with pytest.raises(InputError, match=f"pass {word} to Pipeline.from_pretrained"):
            emoji.to(wanted)


# --- what is answered


@pytest.mark.parametrize("name", sorted(habits.CALL))
def test_keyword_of_the_call_is_answered_or_harmless(emoji, name):
    harmless, way = habits.CALL[name]
    with pytest.raises(InputError, match=f"^{name}= is diffusers' and not taken here: ") as e:
        emoji("pizza", **{name: object()})
    assert way in str(e.value)
    for value in harmless:
        emoji("pizza", seed=0, num_inference_steps=1, **{name: value})


@pytest.mark.parametrize("name", sorted(habits.LOAD))
def test_keyword_of_loading_is_answered_or_harmless(name):
    pytest.importorskip("onnxruntime", reason="needs the cpu extra")
    harmless, way = habits.LOAD[name]
    with pytest.raises(InputError, match=f"^{name}= is diffusers' and not taken here: ") as e:
        sdlite.Pipeline.from_pretrained("emoji", **{name: object()})
    assert way in str(e.value)
    if harmless:
        with pytest.raises(UnknownNameError, match="precision='none'"):  # accepted so far
            sdlite.Pipeline.from_pretrained(
                "emoji", precision="none", **dict.fromkeys([name], harmless[0])
            )


@pytest.mark.parametrize("name", sorted(habits.ATTRIBUTES))
def test_attribute_is_answered(emoji, name):
    with pytest.raises(AttributeNameError, match=f"^pipe.{name} is diffusers' and not here: "):
        getattr(emoji, name)
    with pytest.raises(AttributeNameError, match=f"^pipe.{name} is diffusers'"):
        setattr(emoji, name, 1)
    assert not hasattr(emoji, name)


def test_nobodys_names_are_told_the_nearest(emoji):
    for name, near in (
        ("steps", "num_inference_steps"),
        ("guidence_scale", "guidance_scale"),
        ("sede", "seed"),
        ("negative_promt", "negative_prompt"),
    ):
        with pytest.raises(
            UnknownNameError, match=f"^{name}= is not an argument; did you mean '{near}'"
        ):
            emoji("pizza", **{name: 1})
    with pytest.raises(UnknownNameError, match="did you mean 'precision'"):
        sdlite.Pipeline.from_pretrained("emoji", precison="fp16")
    with pytest.raises(AttributeNameError, match="did you mean 'tokenize'"):
        emoji.tokenise("x")
    with pytest.raises(AttributeNameError, match="from_single_file"):
        sdlite.Pipeline.from_single_file("x.safetensors")


def test_only_the_first_argument_has_a_place(emoji):
    with pytest.raises(InputError, match=r"3 arguments without a name.*height="):
        emoji("pizza", 64, 64)
    with pytest.raises(InputError, match=r"2 arguments without a name.*precision="):
        sdlite.Pipeline.from_pretrained("emoji", "fp16")


def test_prompt_that_is_left_out_is_asked_for(emoji):
    with pytest.raises(InputError, match="prompt is an empty list; accepted: a string"):
        emoji()


def test_pipeline_without_a_safety_checker_may_be_told_so_and_copied(emoji):
    pipe = copy.copy(emoji)
    pipe.safety_checker = None
    pipe.note = "an app's own"
    assert pipe.note
    assert pixels(pipe("pizza", seed=0, **FAST)).shape == (1, 64, 64, 3)


@pytest.mark.parity
def test_every_keyword_of_diffusers_is_ours_or_answered():
    diffusers = pytest.importorskip("diffusers", reason="needs the torch extra")
    theirs = diffusers.StableDiffusionPipeline
    ours = {*inspect.signature(sdlite.Pipeline.__call__).parameters, *habits.CALL}
    assert set(inspect.signature(theirs.__call__).parameters) - ours - {"kwargs"} == set()
