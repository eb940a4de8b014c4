"""Weighted and long prompts, embeddings in place of prompts and steps of the call's own, against
diffusers' pipelines of published folders (their configs and layouts, narrow random networks).
"""

from __future__ import annotations

import numpy as np
import pytest

import sdlite
from sdlite.errors import InputError
from sdlite.sampling import Schedule

pytest.importorskip("torch", reason="needs the torch extra")
pytest.importorskip("diffusers", reason="needs the torch extra")
import diffusers
import torch
from safetensors.torch import load_file, save_file

from benchmarks import published_models
from benchmarks.published import psnr

pytestmark = [
    pytest.mark.filterwarnings("ignore::sdlite.errors.SdliteWarning"),  # 64 px
    pytest.mark.parity,
    pytest.mark.skipif(
        published_models.merges_file() is None,
        reason="CLIP's merges: pip install --no-deps open_clip_torch",
    ),
]
SD = "bk-sdm-v2-tiny"  # pads with another token than the end's
STEPS, GUIDANCE, SIDE = 2, 5.0, 64
LONG = ", ".join(f"a {w} house number {i}" for i, w in enumerate(["red", "green", "blue"] * 8))
# prompt -> its chunks by hand: runs of (text, weight)
PROMPTS = {
    "a (red:1.4) fox in [deep] snow": [
        [("a", 1), ("red", 1.4), ("fox in", 1), ("deep", 1 / 1.1), ("snow", 1)]
    ],
    "a fox BREAK ((two)) cats": [[("a fox", 1)], [("two", 1.1 * 1.1), ("cats", 1)]],
}
NEGATIVE = ("(blurry:1.2) photo", [[("blurry", 1.2), ("photo", 1)]])


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """name -> our pipeline and diffusers' of one folder."""
    made = {}

    torch.set_num_threads(1)

    def both(name):
        if name not in made:
            folder = published_models.write(name, tmp_path_factory.mktemp("folders") / name)
            with_means(folder)
            more = {} if name.startswith("sdxl") else {"safety_checker": None}
            theirs = diffusers.DiffusionPipeline.from_pretrained(folder, **more)
            theirs.set_progress_bar_config(disable=True)
            ours = sdlite.Pipeline.from_pretrained(folder, backend="torch", threads=1)
            made[name] = (ours, theirs)
        return made[name]

    return both


def with_means(folder):
    """A trained encoder's hidden states have a mean; those of a fresh layer norm have none."""
    for path in folder.glob("text_encoder*/model.safetensors"):
        tensors = load_file(path)
        for name in ("weight", "bias"):
            norm = tensors[f"text_model.final_layer_norm.{name}"]
            norm += 0.2 * torch.randn(norm.shape, generator=torch.Generator().manual_seed(0))
        save_file(tensors, path, {"format": "pt"})


def by_hand(tokenizer, encode, chunks, count):
    """What the web UI makes of chunks, in torch: (1, 77 x count, D), from transformers' own
    tokenizer; and the outputs of the first chunk.
    """
    parts, first = [], None
    for runs in [*chunks, *[[]] * (count - len(chunks))]:
        ids, weights = [tokenizer.bos_token_id], [1.0]
        for text, weight in runs:
            own = tokenizer(text, add_special_tokens=False).input_ids
            ids, weights = ids + own, weights + [weight] * len(own)
        room = 77 - len(ids)
        ids += [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (room - 1)
        with torch.no_grad():
            states, out = encode(torch.tensor([ids]))
        first = out if first is None else first
        weighted = states * torch.tensor(weights + [1.0] * room)[None, :, None]
        parts.append(weighted * (states.mean() / weighted.mean()))
    return torch.cat(parts, dim=1), first


def last_state(encoder):
    def encode(ids):
        out = encoder(ids)
        return out[0], out

    return encode


def penultimate(encoder):
    def encode(ids):
        out = encoder(ids, output_hidden_states=True)
        return out.hidden_states[-2], out

    return encode


def pixels(out):
    return (np.asarray(out.images) * 255).round().astype(np.uint8)


def call_of(given):
    steps = {} if {*given} & {"timesteps", "sigmas"} else {"num_inference_steps": STEPS}
    own = {"guidance_scale": GUIDANCE, "output_type": "np", "height": SIDE, "width": SIDE}
    return {**steps, **own, **given}


def theirs_of(pipe, **call):
    return pixels(pipe(**call_of(call), generator=torch.Generator().manual_seed(1)))


def ours_of(pipe, prompt=(), **call):
    return pixels(pipe(prompt, seed=1, **call_of(call)))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_weighted_prompts_are_the_web_uis(pipes, prompt):
    pipe, theirs = pipes(SD)
    encode, count = last_state(theirs.text_encoder), len(PROMPTS[prompt])
    want, _ = by_hand(theirs.tokenizer, encode, PROMPTS[prompt], count)
    without, _ = by_hand(theirs.tokenizer, encode, NEGATIVE[1], count)
    cond, uncond = pipe.conditions(
        [prompt], [NEGATIVE[0]], GUIDANCE, SIDE, SIDE, prompt_weighting="a1111"
    )
    for got, right in ((cond, want), (uncond, without)):
        np.testing.assert_allclose(got["encoder_hidden_states"], right.numpy(), atol=2e-4)
    image = ours_of(pipe, prompt, negative_prompt=NEGATIVE[0], prompt_weighting="a1111")
    right = theirs_of(theirs, prompt_embeds=want, negative_prompt_embeds=without)
    assert psnr(image, right) >= 60


def test_a_prompt_of_any_length_is_read_to_its_end(pipes):
    pipe, theirs = pipes(SD)
    ids = theirs.tokenizer(LONG, add_special_tokens=False).input_ids
    assert len(ids) > 75 * 2
    cond, _ = pipe.conditions([LONG], [], 1.0, SIDE, SIDE, prompt_weighting="a1111")
    assert cond["encoder_hidden_states"].shape[1] == 77 * 3
    a, b = (
        ours_of(pipe, text, prompt_weighting="a1111", guidance_scale=1.0)
        for text in (LONG, LONG.replace("number 23", "number 7"))
    )
    assert (a != b).any()  # the last word counts


@pytest.mark.parametrize("negative", [False, True])
def test_embeddings_in_place_of_prompts_are_diffusers(pipes, negative):
    pipe, theirs = pipes(SD)
    draw = np.random.default_rng(0).standard_normal
    width = pipe.unet_config["cross_attention_dim"]
    embeds = {"prompt_embeds": draw((1, 77, width), np.float32)}
    if negative:
        embeds["negative_prompt_embeds"] = draw((1, 77, width), np.float32)
    given = {k: torch.from_numpy(v) for k, v in embeds.items()}
    assert psnr(ours_of(pipe, **embeds), theirs_of(theirs, **given)) >= 60
    assert np.array_equal(ours_of(pipe, **given), ours_of(pipe, **embeds))


def test_a_reference_of_other_weights_is_another_image(pipes):
    pipe, _ = pipes(SD)
    a, b = (
        ours_of(pipe, f"a (red:{w}) fox", prompt_weighting="a1111", guidance_scale=1.0)
        for w in (1.4, 1.41)
    )
    assert psnr(a, b) < 60


def test_both_encoders_of_sdxl_weigh_and_the_first_chunk_is_pooled(pipes):
    pipe, theirs = pipes("sdxl")
    prompt = "a fox BREAK ((two)) cats"
    made = [
        by_hand(tokenizer, penultimate(encoder), PROMPTS[prompt], 2)
        for tokenizer, encoder in (
            (theirs.tokenizer, theirs.text_encoder),
            (theirs.tokenizer_2, theirs.text_encoder_2),
        )
    ]
    want = {
        "prompt_embeds": torch.cat([states for states, _ in made], dim=-1),
        "pooled_prompt_embeds": made[1][1].text_embeds,
    }
    image = ours_of(pipe, prompt, prompt_weighting="a1111")
    assert psnr(image, theirs_of(theirs, **want)) >= 60  # negative: zeros, as diffusers has it
    assert psnr(ours_of(pipe, **want), theirs_of(theirs, **want)) >= 60
    with pytest.raises(InputError, match="without pooled_prompt_embeds="):
        ours_of(pipe, prompt_embeds=want["prompt_embeds"])


CALLS = {  # of students of SDXL, as their cards have them
    "SDXL-Lightning": ("euler", "EulerDiscreteScheduler", {"num_inference_steps": 4}),
    "TCD": ("tcd", "TCDScheduler", {"num_inference_steps": 4, "eta": 0.3}),
    "Hyper-SD, 1 step": ("lcm", "LCMScheduler", {"timesteps": [800]}),
    "Align Your Steps": ("euler", "EulerDiscreteScheduler", {"sigmas": [14.615, 6.475, 3.861, 0]}),
}


@pytest.mark.parametrize("student", CALLS)
def test_calls_of_few_step_students_are_diffusers(pipes, student, monkeypatch):
    sampler, kind, call = CALLS[student]
    pipe, theirs = pipes("sdxl")
    config = {**theirs.scheduler.config, "timestep_spacing": "trailing"}
    monkeypatch.setattr(theirs, "scheduler", getattr(diffusers, kind).from_config(config))
    monkeypatch.setattr(pipe, "schedule", Schedule.from_config({**config, "_class_name": kind}))
    call = {"guidance_scale": 0.0, **call}
    want = theirs_of(theirs, prompt="a fox", **call)
    assert psnr(ours_of(pipe, "a fox", sampler=sampler, **call), want) >= 60
