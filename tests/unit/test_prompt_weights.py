"""Prompts that weigh: how they are read, cut into chunks, and refused; and calls that use them."""

from __future__ import annotations

import numpy as np
import pytest

from sdlite import prompt_weights
from sdlite.errors import InputError, ShapeError, UnknownNameError
from sdlite.prompt_weights import Weighted, chunks, emphasize, parse

READ = {
    # those of the web UI's own documentation of its parser
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641000000000006),
        (".", 1.1),
    ],
    "": [("", 1.0)],
    "[calm] sea": [("calm", 1 / 1.1), (" sea", 1.0)],
    "(a:-0.5)": [("a", -0.5)],
    "time 12:30)": [("time 12:30)", 1.0)],
    "closed) too] early": [("closed) too] early", 1.0)],
    r"a\b": [("ab", 1.0)],
    "one BREAK two": [("one", 1.0), None, ("two", 1.0)],
    "(one BREAK two:1.2)": [("one", 1.2), None, ("two", 1.2)],
    "BREAKFAST": [("BREAKFAST", 1.0)],
    "this | that": [("this | that", 1.0)],
}
REFUSED = {
    "(word:1.2.3)": r"':1.2.3\)' in the prompt .*: accepted is a number, such as \(word:1.3\)",
    "((word:20):20)": "its weight is 400; accepted: -100 to 100",
    "a [mountain:lake:0.25]": r"\[mountain:lake:0.25\].*change with the steps are not supported",
    "[cat|dog]": r"'\[cat\|dog\]' .*change with the steps",
    "a cat AND a dog": "'AND' .*prompts joined by AND are not supported",
    "a cat <lora:style:0.8>": "'<lora:' .*fuse a LoRA",
}


@pytest.mark.parametrize("prompt", READ)
def test_a_prompt_is_read_as_the_web_ui_reads_it(prompt):
    assert parse(prompt) == READ[prompt]


@pytest.mark.parametrize("prompt", REFUSED)
def test_what_would_make_another_image_is_refused(prompt):
    with pytest.raises(InputError, match=REFUSED[prompt]) as refused:
        parse(prompt)
    assert "\n" not in str(refused.value)


def test_a_hostile_prompt_is_read_in_no_time():
    for text in ("(" * 50_000, "[(" * 20_000 + "])" * 20_000, " " * 200_000, "<" * 100_000):
        parse(text)
    with pytest.raises(InputError):
        parse("(" * 50_000 + "a" + ")" * 50_000)


def row(text, comma=","):
    """One token a letter; `|` is BREAK."""
    tokens = [None if c == "|" else (ord(c), 1.0) for c in text]
    return ["".join(chr(t) for t, _ in c) for c in chunks(tokens, 30, ord(comma))]


def test_chunks_end_at_a_comma_that_is_near():
    assert row("") == [""]
    assert row("a" * 30) == ["a" * 30]
    assert row("a" * 31) == ["a" * 30, "a"]
    assert row("a" * 20 + "," + "b" * 12) == ["a" * 20 + ",", "b" * 12]
    assert row("a" * 9 + "," + "b" * 22) == ["a" * 9 + "," + "b" * 20, "bb"]  # 20 tokens ago
    assert row("a" * 10 + "," + "b" * 22) == ["a" * 10 + ",", "b" * 22]
    assert row("a" * 29 + ",b") == ["a" * 29 + ",", "b"]
    assert row("a" * 30 + ",b") == ["a" * 30, ",b"]
    assert row("ab|c||d|") == ["ab", "c", "", "d"]


def test_weights_keep_the_mean_of_a_chunk():
    x = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32) + 1
    weights = np.array([[1, 1.3, 1, 0.5, 1], [1, 1, 1, 1, 1]], np.float32)
    out = emphasize(x, weights)
    np.testing.assert_allclose(out[0].mean(), x[0].mean(), rtol=1e-6)
    scale = x[0].mean() / (x[0] * weights[0][:, None]).mean()
    np.testing.assert_allclose(out[0], x[0] * weights[0][:, None] * scale, rtol=1e-5)
    assert np.array_equal(out[1], x[1])
    with pytest.raises(InputError, match="leave next to none of it"):
        emphasize(np.ones((1, 2, 3), np.float32), np.array([[1, -1]], np.float32))


class Encoder:
    """Text encoders whose hidden states are the ids, and whose pooled text is the first ones'."""

    def __init__(self):
        self.index, self.unet_config = {}, {}

    def encode(self, part, ids):
        states = np.repeat(ids[..., None], 3, axis=2).astype(np.float32)
        return {"hidden_states.1": states, "text_embeds": states[:, 1]}


def test_chunks_of_a_prompt_lie_side_by_side(emoji):
    tokenizer = emoji.tokenizer
    long = "a red apple, " * 18
    reader = Weighted(Encoder(), {"text_encoder": tokenizer}, [[long, "a cat"]])
    assert reader.count == 3
    ids = reader.tokenize([long, "a cat"])
    assert ids.shape == (6, tokenizer.max_length)
    assert (ids[:, 0] == tokenizer.bos).all()
    empty = [tokenizer.bos, tokenizer.eos, *[tokenizer.pad] * (tokenizer.max_length - 2)]
    assert ids[4:].tolist() == [empty, empty]
    spoken = [t for r in ids[:3] for t in r if t not in (tokenizer.bos, tokenizer.eos)]
    assert [t for t in spoken if t != tokenizer.pad] == tokenizer.ids(long)
    out = reader.encode("text_encoder", ids)
    assert out["hidden_states.1"].shape == (2, 3 * tokenizer.max_length, 3)
    assert np.array_equal(out["hidden_states.1"][1, :, 0], ids[3:].reshape(-1))
    assert np.array_equal(out["text_embeds"][:, 0], ids[[0, 3], 1])


def test_images_of_a_call_have_as_many_chunks(emoji):
    tokenizers = {"text_encoder": emoji.tokenizer}
    with pytest.raises(InputError, match=r"are 1 to 2 chunks long.*call once for each length"):
        Weighted(Encoder(), tokenizers, [["a cat"], ["a cat BREAK a dog"]])
    with pytest.raises(InputError, match="is 40 chunks long; accepted: up to 32"):
        Weighted(Encoder(), tokenizers, [["a BREAK " * 39 + "b"]])


# --- calls


def pixels(pipe, prompt="a red apple", **call):
    return np.asarray(pipe(prompt, **{"seed": 1, "num_inference_steps": 2, **call}).images)


def test_weights_are_read_when_asked_for_and_only_then(emoji):
    plain = pixels(emoji)
    assert np.array_equal(pixels(emoji, prompt_weighting="a1111"), plain)
    assert np.array_equal(pixels(emoji, "a (red:1) apple", prompt_weighting="a1111"), plain)
    weighted = pixels(emoji, "a (red:1.5) apple", prompt_weighting="a1111")
    assert not np.array_equal(weighted, plain)
    assert not np.array_equal(weighted, pixels(emoji, "a (red:1.5) apple"))
    batch = pixels(emoji, ["a (red:1.5) apple", "a cat"], prompt_weighting="a1111")
    assert np.array_equal(batch[0], weighted[0])
    out = emoji("a (red:1.5) apple", prompt_weighting="a1111", seed=1, num_inference_steps=1)
    assert out.metadata[0]["prompt_weighting"] == "a1111"
    with pytest.raises(UnknownNameError, match=r"prompt_weighting='compel' is not known.*a1111"):
        emoji("a cat", prompt_weighting="compel")


def test_negative_prompts_weigh_too(emoji):
    call = {"guidance_scale": 3.0, "prompt_weighting": "a1111"}
    a = pixels(emoji, negative_prompt="(green:1.4)", **call)
    b = pixels(emoji, negative_prompt="green", **call)
    assert not np.array_equal(a, b)


def test_a_graph_for_one_window_refuses_a_longer_prompt_before_any_work(emoji):
    with pytest.raises(ShapeError, match="make 56 hidden states, and this model's UNet was made"):
        emoji("a cat BREAK a dog", prompt_weighting="a1111")
    assert prompt_weights.STYLES == ("a1111",)


def embeds_of(pipe, prompts):
    return pipe.encode_text(pipe.tokenize(prompts))


def test_embeddings_in_place_of_prompts(emoji):
    embeds = embeds_of(emoji, ["a red apple"])
    assert np.array_equal(pixels(emoji, (), prompt_embeds=embeds), pixels(emoji))
    call = {"guidance_scale": 3.0, "num_images_per_prompt": 2}
    want = pixels(emoji, negative_prompt="blue", **call)
    negative = embeds_of(emoji, ["blue"])
    got = pixels(emoji, (), prompt_embeds=embeds, negative_prompt_embeds=negative, **call)
    assert np.array_equal(got, want)
    assert np.array_equal(
        pixels(emoji, (), prompt_embeds=embeds, negative_prompt="blue", **call), want
    )
    assert np.array_equal(pixels(emoji, negative_prompt_embeds=negative, **call), want)
    out = emoji(prompt_embeds=embeds, seed=1, num_inference_steps=1)
    assert len(out.metadata[0]["prompt_embeds"]) == 16


def test_wrong_embeddings_are_refused(emoji):
    right = embeds_of(emoji, ["a red apple"])
    bad = right.copy()
    bad[0, 3, 5] = np.nan
    for call, words in (
        ({"prompt": "a cat", "prompt_embeds": right}, "prompt and prompt_embeds are both given"),
        ({"prompt_embeds": bad}, "prompt_embeds holds NaN or infinity"),
        ({"prompt_embeds": right[0]}, r"prompt_embeds is float32 \[28, 192\]; accepted: float"),
        ({"prompt_embeds": right[..., :96]}, r"\[1, 28, 96\]; accepted: float \[B, L, 192\]"),
        ({"prompt_embeds": right.astype(int)}, "prompt_embeds is int64"),
        ({"prompt_embeds": "a cat"}, "prompt_embeds is <U5"),
        ({"prompt_embeds": right[:, :20]}, "make 20 hidden states, and this model's UNet"),
        ({"prompt_embeds": right, "pooled_prompt_embeds": right}, "takes no pooled text"),
        ({"prompt_embeds": right, "prompt_weighting": "a1111"}, "embeddings are given"),
        ({"prompt_embeds": right, "negative_prompt_embeds": right}, "has no effect at guidance"),
        (
            {"prompt": "a cat", "guidance_scale": 2.0, "negative_prompt_embeds": right[[0, 0]]},
            "2 rows",
        ),
        (
            {
                "prompt": "a cat",
                "guidance_scale": 2.0,
                "negative_prompt": "x",
                "negative_prompt_embeds": right,
            },
            "negative_prompt and negative_prompt_embeds are both given",
        ),
        (
            {"guidance_scale": 2.0, "prompt_embeds": right, "negative_prompt_embeds": right[:, :9]},
            "give both of one shape",
        ),
    ):
        with pytest.raises((InputError, ShapeError), match=words):
            emoji(**call)


def test_steps_of_ones_own(emoji):
    """The embedded model's own sampler is DDIM, which takes eta."""
    plain = pixels(emoji, num_inference_steps=4)
    assert np.array_equal(pixels(emoji, num_inference_steps=4, eta=0), plain)
    assert not np.array_equal(pixels(emoji, num_inference_steps=4, eta=1.0), plain)
    call = {"sampler": "euler", "num_inference_steps": None}
    own = emoji("a cat", seed=1, timesteps=[999, 749, 499, 249], **call)
    assert own.metadata[0]["timesteps"] == "999,749,499,249"
    assert own.metadata[0]["steps"] == "4"
    trailing = pixels(emoji, "a cat", sampler="euler", num_inference_steps=4)
    assert np.array_equal(np.asarray(own.images), trailing)
    with pytest.raises(InputError, match=r"sampler 'ddim' takes no timesteps=.*choose one of ddpm"):
        emoji("a cat", timesteps=[999, 499])
    with pytest.raises(InputError, match="num_inference_steps=3, but 2 timesteps"):
        emoji("a cat", sampler="euler", timesteps=[999, 499], num_inference_steps=3)


def test_the_command_takes_them(tmp_path, capsys):
    from PIL import Image

    from sdlite.cli import main

    out = tmp_path / "a.png"
    call = ["generate", "a (red:1.4) apple", "--out", str(out), "--seed", "1", "--quiet"]
    own = ["--sampler", "euler", "--timesteps", "999,499", "--prompt-weighting", "a1111"]
    assert main([*call, *own]) == 0
    said = Image.open(out).info
    assert (said["timesteps"], said["steps"], said["prompt_weighting"]) == ("999,499", "2", "a1111")
    assert main([*call, "--sampler", "euler", "--sigmas", "14.6,1,0"]) == 0
    assert main([*call, "--eta", "0.5"]) == 0
    assert main([*call, "--eta", "0.5", "--sampler", "euler"]) == 1
    assert "choose one of ddim, tcd" in capsys.readouterr().err


def test_an_engine_says_how_many_hidden_states_it_takes():
    from sdlite.backends.network import tokens_of

    states = "encoder_hidden_states"
    assert tokens_of({states: ["batch", 77, 768]}) == 77
    for free in ({states: ["batch", "tokens", 768]}, {states: (1, -1, 768)}, {"sample": (1, 4)}):
        assert tokens_of(free) is None
