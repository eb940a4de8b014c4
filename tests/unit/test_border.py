"""Values of a stranger's configurations are looked at before they are used: file, key, what was
given, what is accepted, in one line.
"""

from __future__ import annotations

import json
import math
import time

import pytest

import sdlite
from sdlite.errors import ArtifactError, InputError, SdliteError, UnknownNameError
from sdlite.sampling import Schedule
from sdlite.sampling.schedule import DEFAULTS
from tests import folders, strangers

SCHEDULER, UNET, VAE = "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"
TEXT, CONFIG, VOCAB, MERGES = (
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
)


@pytest.fixture
def model(tmp_path):
    return strangers.copied(tmp_path / "model")


def refused(model, *says):
    """The model is refused before anything is computed: in one line, without much time."""
    begin = time.perf_counter()
    with pytest.raises(SdliteError) as e:
        sdlite.Pipeline.from_pretrained(model, backend="onnxruntime", threads=1)
    assert all(s in str(e.value) for s in says), str(e.value)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 700
    assert time.perf_counter() - begin < 5


def put(key, value):
    return lambda config: config.update({key: value})


# --- scheduler

STEPS, BETAS = (
    "accepted: a whole number, 2 or more, 100000 at most",
    "accepted: a number, 1e-06 or more, 0.9999 at most",
)
WRONG = [
    *[
        ("num_train_timesteps", v, STEPS)
        for v in (0, -1, 1, 10**9, 10**12, "1000", 1000.5, 1000.0, None, [1000], True)
    ],
    *[("beta_start", v, BETAS) for v in (-1.0, 5.0, "x", None, 0.0, 1.0, 1e-46, True, [0.1])],
    *[("beta_end", v, BETAS) for v in (-2.0, 10**400, {})],
    ("beta_end", 0.0001, "beta_start is 0.00085; accepted: at most beta_end, 0.0001"),
    *[
        ("trained_betas", v, "accepted: ")
        for v in ("abc", [], ["a", "b"], [[1]] * 1000, {"a": 1}, 3)
    ],
    (
        "trained_betas",
        [0.1, 0.2],
        "accepted: 1000 of them, as num_train_timesteps says; there are 2",
    ),
    (
        "trained_betas",
        [-0.1] * 1000,
        "trained_betas[0] is -0.1; accepted: a number, 1e-06 or more, 1 at most",
    ),
    *[
        ("prediction_type", v, "accepted: epsilon, v_prediction, sample")
        for v in ("evil", ["epsilon"], None, 3)
    ],
    ("beta_schedule", "evil", "accepted: linear, scaled_linear, squaredcos_cap_v2"),
    ("beta_schedule", None, "accepted: linear"),
    *[
        ("timestep_spacing", v, "accepted: leading, trailing, linspace")
        for v in ("evil", [1], None)
    ],
    *[("steps_offset", v, "accepted: a whole number") for v in (10**9, -(10**9), "a", 0.5)],
    ("steps_offset", 1000, "less than num_train_timesteps, 1000"),
    *[("clip_sample_range", v, "accepted: a number") for v in ("x", -1, 0)],
    *[("clip_sample", v, "accepted: true or false") for v in ("no", 1)],
    *[("rescale_betas_zero_snr", v, "accepted: true or false") for v in (1, "true", [])],
    ("set_alpha_to_one", None, "accepted: true or false"),
    ("solver_order", 9, "accepted: a whole number, 1 or more, 3 at most"),
    ("sigma_max", -1, "accepted: a number"),
    ("original_inference_steps", 10**9, "accepted: a whole number"),
    *[
        ("_class_name", v, "accepted: text of at most 200 characters")
        for v in (["a"], None, 3, "x" * 10_000)
    ],
]


@pytest.mark.parametrize(("key", "value", "says"), WRONG)
def test_scheduler_values(key, value, says):
    own = json.loads((strangers.EMOJI / SCHEDULER).read_text())
    with pytest.raises((InputError, UnknownNameError)) as e:
        Schedule.from_config({**own, key: value})
    assert "scheduler_config.json: " in str(e.value)
    assert key in str(e.value)
    assert says in str(e.value)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 400


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_of_every_class_are_values_that_are_accepted(name):
    Schedule.from_config({"_class_name": name, **DEFAULTS[name]})


def test_infinity_is_read_where_diffusers_writes_it(model):
    """`lambda_min_clipped` of DPM solvers is -Infinity in published files, which is no JSON."""
    path = SCHEDULER
    config = {
        **DEFAULTS["DPMSolverMultistepScheduler"],
        "_class_name": "DPMSolverMultistepScheduler",
    }
    assert "-Infinity" in json.dumps(config)
    strangers.with_json(model, path, lambda _: config)
    pipe = sdlite.Pipeline.from_pretrained(model, backend="onnxruntime", threads=1)
    assert pipe.schedule.settings["lambda_min_clipped"] == -math.inf
    for value in (math.inf, math.nan):
        refused(
            strangers.with_json(model, path, put("lambda_min_clipped", value)),
            path,
            "is not a number",
        )
    refused(
        strangers.with_json(model, path, lambda _: {**config, "beta_start": -math.inf}),
        "beta_start is -inf",
    )


# --- networks

COUNT, SIZE = (
    "accepted: a whole number, 1 or more, 1024 at most",
    "accepted: a whole number, 1 to 2048, or [height, width]",
)
NETWORKS = [
    *[
        (UNET, "sample_size", v, SIZE)
        for v in (0, -8, 10**6, "8", [8, 8, 8], 8.5, True, [8, 10**6])
    ],
    (UNET, "sample_size", None, "sample_size is None"),
    *[(UNET, "in_channels", v, COUNT) for v in (0, -1, 10**9, "4", None)],
    (UNET, "in_channels", 5, "its UNet takes 5 channels, the latents have 8"),
    *[
        (UNET, "block_out_channels", v, "accepted: a ")
        for v in ([], 4, [0], ["a"], [10**9], [64] * 10**5)
    ],
    (UNET, "layers_per_block", 10**6, "accepted: a whole number, 1 "),
    (UNET, "cross_attention_dim", 10**9, "cross_attention_dim is 1000000000"),
    (
        UNET,
        "transformer_layers_per_block",
        [[10**9]],
        "transformer_layers_per_block is [[1000000000]]",
    ),
    *[
        (VAE, "block_out_channels", v, "a list of 1 to 8 entries")
        for v in ([], [1] * 10**5, 4, None, "abcd")
    ],
    *[
        (VAE, "scaling_factor", v, "a number, 0.0001 or more, 10000 at most")
        for v in (0, -1.0, "x", None, [1, 2, 3], 1e-40, True)
    ],
    *[(VAE, "shift_factor", v, "shift_factor is ") for v in ("x", 1e30, [0])],
    (VAE, "latent_channels", 10**9, COUNT),
    *[
        (VAE, "sample_size", v, "a whole number, 1 or more, 16384 at most")
        for v in (10**9, "512", 0)
    ],
    *[
        (TEXT, "vocab_size", v, "a whole number, 1 or more, 1048576 at most")
        for v in (10**8, 0, "2947", None)
    ],
    *[
        (TEXT, "max_position_embeddings", v, "a whole number, 3 or more, 4096 at most")
        for v in (10**9, 2, -1, 28.0)
    ],
    (TEXT, "num_hidden_layers", 2_000_000, "accepted: a whole number, 1 "),
    (TEXT, "hidden_size", 10**6, "a whole number, 1 or more, 16384 at most"),
]


@pytest.mark.parametrize(("file", "key", "value", "says"), NETWORKS)
def test_network_values(model, file, key, value, says):
    refused(
        strangers.with_json(model, file, put(key, value)),
        file.split("/")[0] if key == "in_channels" and value == 5 else file,
        says,
    )


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN", "1e999"])
def test_numbers_that_are_none(model, value):
    path = model / VAE
    path.write_text(path.read_text().replace('"scaling_factor": 1.0', f'"scaling_factor": {value}'))
    refused(strangers.rehashed(model), VAE, "number")


@pytest.mark.parametrize(
    ("part", "keys", "says"),
    [
        (
            "text_encoder",
            {"vocab_size": 1_000_000, "hidden_size": 4096},
            r"asks for \d+ numbers, its weights hold \d+",
        ),
        (
            "text_encoder",
            {"max_position_embeddings": 4096, "intermediate_size": 65536},
            r"asks for \d+ numbers",
        ),
        (
            "text_encoder",
            {"num_hidden_layers": 256},
            r"asks for 256 layers, its weights have \d+ tensors",
        ),
        ("unet", {"block_out_channels": [16384] * 3}, r"asks for \d+ numbers"),
        (
            "unet",
            {"cross_attention_dim": 16384, "time_embedding_dim": 16384},
            r"asks for \d+ numbers",
        ),
        (
            "unet",
            {"layers_per_block": 256, "transformer_layers_per_block": 256},
            "asks for 65536 layers",
        ),
        ("vae", {"block_out_channels": [16384] * 4}, r"asks for \d+ numbers"),
    ],
)
def test_torch_reserves_nothing_that_the_weights_do_not_fill(tmp_path, part, keys, says):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    pytest.importorskip("diffusers", reason="needs the torch extra")
    from sdlite.torch_networks import open_network

    model = folders.write(tmp_path / "tiny")
    folders.configure(model / part / "config.json", **keys)
    begin = time.perf_counter()
    with pytest.raises(ArtifactError, match=rf"{part}/config\.json {says}"):
        open_network(model / part)
    assert time.perf_counter() - begin < 10
    assert torch.get_default_device().type == "cpu"


# --- tokenizer

NO_ID = "which is no whole number from 0"
VOCABULARIES = {
    "empty": (lambda v: {}, "no vocabulary"),
    "a list": (lambda v: [], "holds list, not an object"),
    "texts": (lambda v: {k: str(i) for k, i in v.items()}, NO_ID),
    "floats": (lambda v: {k: i + 0.5 for k, i in v.items()}, NO_ID),
    "negative": (lambda v: {k: -i - 1 for k, i in v.items()}, NO_ID),
    "2**40": (lambda v: {k: i + 2**40 for k, i in v.items()}, NO_ID),
    "2**31 - 1": (lambda v: {**v, next(iter(v)): 2**31 - 1}, "no token with id"),
    "a million more": (lambda v: {k: i + 10**6 for k, i in v.items()}, "id"),
    "one id": (lambda v: dict.fromkeys(v, 0), "one id to two tokens"),
    "null": (lambda v: dict.fromkeys(v), NO_ID),
    "a letter less": (
        lambda v: {k: i for k, i in v.items() if k != "!</w>"},
        "no token with id 256",
    ),
    "an end beyond": (lambda v: {**v, "<|endoftext|>": 10**6}, "id"),
    "half of a surrogate": (
        lambda v: {("\ud800" if k == "!" else k): i for k, i in v.items()},
        "which is no text",
    ),
}
FLAGS = {"content": "<|startoftext|>", "lstrip": "no"}
CONFIGS = [
    *[
        ("model_max_length", v, "no number of tokens from 3")
        for v in (0, 1, 2, -5, "77", "x", [77], True)
    ],
    *[
        ("pad_token", v, "2947 embeddings" if v == "evil" else "which is no object with content")
        for v in ("evil", 3, ["a"], {"a": 1})
    ],
    ("added_tokens_decoder", [1], "added_tokens_decoder that is no object"),
    ("added_tokens_decoder", {"x": {"content": "a"}}, NO_ID),
    ("added_tokens_decoder", {"2945": FLAGS}, "has lstrip 'no', which is neither true nor false"),
    ("added_tokens_decoder", {str(2**31 - 1): {"content": "a"}}, "the id 2147483647"),
    ("split_special_tokens", 1, "has split_special_tokens 1, which is neither true nor false"),
    ("extra_special_tokens", "abc", "which is no list of tokens"),
    ("tokenizer_class", "Evil", "only CLIPTokenizer is read"),
    ("padding_side", "left", "CLIP's is 'right'"),
]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_vocabularies(model, name):
    change, says = VOCABULARIES[name]
    refused(strangers.with_json(model, VOCAB, change), "tokenizer", says)


@pytest.mark.parametrize(("key", "value", "says"), CONFIGS)
def test_tokenizer_values(model, key, value, says):
    refused(strangers.with_json(model, CONFIG, put(key, value)), "tokenizer", says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: "", "no merge makes"),
        (lambda t: t[: len(t) // 2 + 3], "is damaged"),
        (lambda t: t.replace(" ", "", 5), "is damaged"),
        (lambda t: t.replace("\n", " x\n", 5), "is damaged"),
        (lambda t: t + "zz qq\n", "which is no token"),
        (lambda t: t + "\x00\x1b[2J a\n", "which is no token"),
    ],
    ids=["empty", "cut in a line", "no spaces", "three", "unknown", "escapes"],
)
def test_merges(model, change, says):
    path = model / MERGES
    path.write_text(change(path.read_text()))
    refused(strangers.rehashed(model), MERGES, says)


@pytest.mark.parametrize("given", [10**9, 10**30, 1e30, 78, 29, None])
def test_a_longer_window_than_the_text_encoders_is_the_text_encoders(model, given):
    strangers.with_json(model, CONFIG, put("model_max_length", given))
    pipe = sdlite.Pipeline.from_pretrained(model, backend="onnxruntime", threads=1)
    assert pipe.tokenizer.max_length == 28


def test_a_shorter_window_than_a_fixed_graphs_is_one_line(model):
    strangers.with_json(model, CONFIG, put("model_max_length", 20))
    with pytest.raises(SdliteError, match=r"text_encoder with input_ids \[1, 20\]") as e:
        sdlite.Pipeline.from_pretrained(model, backend="onnxruntime", threads=1)("x")
    assert "\n" not in str(e.value)
