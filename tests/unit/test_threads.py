"""Pipelines that threads share, calls that are stopped or too large, and memory that is given
back.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import sdlite
from benchmarks import threads as bench
from sdlite import running
from sdlite.artifact import Artifact
from sdlite.backends import Overflowing, RowByRow, fused
from sdlite.errors import ArtifactError, Cancelled, InputError, SdliteWarning, ShapeError
from sdlite.manifest import Manifest
from tests.conftest import EMOJI

pytest.importorskip("onnxruntime", reason="needs the cpu extra")
CALL = {"num_inference_steps": 1, "guidance_scale": 1.0, "seed": 0}
ENGINES = [
    "onnxruntime",
    pytest.param(
        "openvino",
        marks=pytest.mark.skipif(
            not importlib.util.find_spec("openvino"), reason="needs the openvino extra"
        ),
    ),
]
EVERY = [
    *ENGINES,
    pytest.param(
        "torch",
        marks=pytest.mark.skipif(
            not importlib.util.find_spec("diffusers"), reason="needs the torch extra"
        ),
    ),
]


def load(backend, **more):
    return sdlite.Pipeline.from_pretrained("emoji", backend=backend, threads=1, **more)


def pixels(out):
    return np.stack([np.asarray(i) for i in out.images])


def small(pipe):
    return pixels(pipe("pizza", **CALL))


# --- threads


@pytest.mark.parametrize("backend", EVERY)
def test_threads_get_what_their_calls_give_alone(backend):
    case = bench.Case(
        backend, None, {"backend": backend, "precision": "fp32" if backend == "torch" else "fp16"}
    )
    (row,) = bench.run(
        case, EMOJI, 24, distinct=12 if backend == "onnxruntime" else 3, threads=(8,)
    )
    assert (row["wrong"], row["errors"], row["first_error"]) == (0, 0, None)


def test_openvino_compiles_again_to_the_same_bits(monkeypatch):
    """Shapes that push each other out, by many threads: a call gives one image, whatever was called
    before it.
    """
    pytest.importorskip("openvino", reason="needs the openvino extra")
    from sdlite.backends import openvino_network as openvino

    monkeypatch.setattr(openvino, "SHAPES", 1)
    case = bench.Case("openvino", None, {"backend": "openvino", "precision": "fp16"})
    (row,) = bench.run(case, EMOJI, 6, distinct=2, threads=(3,))
    assert (row["wrong"], row["first_error"]) == (0, None)


def test_pipelines_are_made_by_many_threads_at_once():
    pytest.importorskip("diffusers", reason="needs the torch extra")
    want = small(load("torch"))
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: small(load("torch")), range(4)))
    for got in made:
        np.testing.assert_array_equal(got, want)


def test_torch_threads_are_each_pipelines_own_and_put_back():
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    before, seen = torch.get_num_threads(), []
    pipe = load("torch")
    pipe.networks.unet.module.register_forward_pre_hook(
        lambda *_: seen.append(torch.get_num_threads())
    )
    torch.set_num_threads(3)
    try:
        small(pipe)
        assert (seen, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)


def test_prompts_that_push_each_other_out_of_a_fused_unet():
    """More prompts than are remembered, by many threads: KeyError before, or "dictionary changed
    size".
    """

    def slow(inputs):
        time.sleep(0.001)
        return {"prompt": inputs["encoder_hidden_states"] * 2}

    unet = fused.Hoisted(
        lambda i: {"time": i["timestep"] + 1},
        slow,
        lambda i: {"y": i["sample"] + i["prompt"] + i["time"]},
        [],
        "y",
        keep=2,
    )

    def call(i):
        x = np.float32(i % 5)
        out = unet(sample=x, timestep=np.float32(i % 3), encoder_hidden_states=np.full((1, 2), x))
        return out["y"] - (3 * x + i % 3 + 1)

    with ThreadPoolExecutor(8) as pool:
        assert not np.any(list(pool.map(call, range(400))))


def test_inputs_bound_to_a_device_are_the_calls_own():
    """`BoundSession` is what CUDA runs with; its calls of onnxruntime are the same on the CPU."""
    from sdlite.backends.ort import BoundSession, Session

    path = str(EMOJI / "unet" / "model.onnx")
    want, network = Session(path, "cpu", 1), BoundSession(path, "cpu", 1)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((6, 1, 8, 8, 8), np.float32)
    embeds = rng.standard_normal((3, 1, 28, 192), np.float32)

    def call(run, i):
        return run(
            sample=latents[i % 6],
            timestep=np.array(500, np.float32),
            encoder_hidden_states=embeds[i % 3],
        )["out_sample"]

    wanted = [call(want, i) for i in range(6)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: call(network, i), range(36)))
    for i, x in enumerate(got):
        np.testing.assert_array_equal(x, wanted[i % 6])
    latents[0] = latents[1]  # in place: the array is the same one, what it holds is not
    np.testing.assert_array_equal(call(network, 0), call(want, 0))


def test_a_call_keeps_the_tiling_that_it_began_with():
    pipe = load("onnxruntime")
    call = {**CALL, "height": 96, "width": 64}
    plain = pixels(pipe("pizza", **call))
    pipe.enable_vae_tiling(48)
    tiled = pixels(pipe("pizza", **call))
    over = threading.Event()

    def toggle():
        while not over.is_set():
            pipe.enable_vae_tiling(48)
            pipe.disable_vae_tiling()

    togglers = [threading.Thread(target=toggle) for _ in range(2)]
    for t in togglers:
        t.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(lambda _: pipe("pizza", **call), range(24)))
    finally:
        over.set()
        for t in togglers:
            t.join()
    for out in made:
        said = sum("tiles of" in n for n in out.report.notes)
        np.testing.assert_array_equal(pixels(out), tiled if said else plain)
        assert said <= 1
    assert not any("tiles of" in n for n in pipe.report.notes)


def test_a_warning_comes_once_whoever_calls(emoji, recwarn):
    fresh = sdlite.Pipeline(emoji.artifact, emoji.networks)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: fresh("pizza", height=192, width=64, **CALL), range(16)))
    assert sum(w.category is SdliteWarning for w in recwarn) == 1


def test_asyncio_calls_in_threads(emoji):
    want = [pixels(emoji("pizza", **{**CALL, "seed": i})) for i in range(4)]

    async def every():
        return await asyncio.gather(
            *(asyncio.to_thread(emoji, "pizza", **{**CALL, "seed": i}) for i in range(4))
        )

    for out, image in zip(asyncio.run(every()), want, strict=True):
        np.testing.assert_array_equal(pixels(out), image)


def python(code):
    """Run a script of its own; what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("backend", ENGINES)
def test_a_process_forked_after_a_call_makes_the_same_image(backend):
    assert python(f"""
        import os, sdlite
        pipe = sdlite.Pipeline.from_pretrained("emoji", backend={backend!r}, threads=1)
        image = lambda: pipe("pizza", seed=0, num_inference_steps=1).images[0].tobytes()
        want = image()
        child = os.fork()
        if child == 0:
            os._exit(0 if image() == want else 3)
        print(os.waitpid(child, 0)[1], image() == want)
    """).split() == ["0", "True"]


@pytest.mark.parametrize("backend", ENGINES)
def test_ctrl_c_is_an_exception_when_pipelines_were_closed(backend):
    """OpenVINO left the thread without a stack for signals: a segmentation fault before."""
    assert (
        python(f"""
        import os, signal, time, sdlite
        for _ in range(2):
            with sdlite.Pipeline.from_pretrained("emoji", backend={backend!r}, threads=1) as pipe:
                pipe("pizza", seed=0, num_inference_steps=1)
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            print("interrupted")
    """)
        == "interrupted\n"
    )


# --- cancelling


@pytest.fixture(params=ENGINES)
def engine(request):
    return load(request.param)


def begun(pipe):
    """Wait until a call runs."""
    while not pipe._calls:
        time.sleep(0.001)
    time.sleep(0.2)


def test_cancel_stops_the_calls_that_run_inside_a_network(engine):
    want, failed = small(engine), []

    def large():
        try:
            engine.decode(np.zeros((2, 8, 160, 160), np.float32))
        except Cancelled as e:
            failed.append(str(e))

    callers = [threading.Thread(target=large) for _ in range(2)]
    for c in callers:
        c.start()
    begun(engine)
    engine.cancel()
    for c in callers:
        c.join()
    assert failed == ["cancelled by pipe.cancel() or pipe.close(); nothing was written."] * 2
    np.testing.assert_array_equal(small(engine), want)


def test_ctrl_c_is_seen_while_an_engine_computes(engine):
    want = small(engine)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        engine.decode(np.zeros((2, 8, 160, 160), np.float32))
    np.testing.assert_array_equal(small(engine), want)


def test_cancel_is_seen_between_tiles_and_between_rows(emoji):
    seen = []

    def network(**inputs):
        seen.append(len(inputs["latent_sample"]))
        pipe.cancel()
        sides = (8 * n for n in inputs["latent_sample"].shape[2:])
        return {"sample": np.zeros((1, 3, *sides), np.float32)}

    parts = {**emoji.networks.parts, "vae_decoder": RowByRow(network)}
    networks = sdlite.backends.Networks(parts, emoji.report, emoji.networks.size_multiple)
    pipe = sdlite.Pipeline(emoji.artifact, networks)
    with pytest.raises(Cancelled):
        pipe(["pizza"] * 3, **CALL)
    parts["vae_decoder"] = network
    pipe.enable_vae_tiling(48)
    with pytest.raises(Cancelled):
        pipe("pizza", **CALL)
    assert seen == [1, 1]


def test_cancel_leaves_later_calls_alone(emoji):
    emoji.cancel()
    assert not running.inside()
    assert small(emoji).shape == (1, 64, 64, 3)


# --- closing, and memory


@pytest.mark.parametrize("backend", EVERY)
def test_a_closed_pipeline_frees_its_networks_and_says_so(backend):
    with load(backend) as pipe:
        small(pipe)
        freed = [
            weakref.ref(pipe.networks.parts[part])
            for part in ("text_encoder", "unet", "vae_decoder")
        ]
    gc.collect()
    assert [f() for f in freed] == [None] * 3
    z = np.zeros((1, 8, 8, 8), np.float32)
    for call in (
        lambda: pipe("pizza"),
        lambda: pipe.decode(z),
        lambda: pipe.encode_text(pipe.tokenize("x")),
        lambda: pipe.enable_vae_tiling(),
    ):
        with pytest.raises(InputError, match=r"closed .*from_pretrained\.$"):
            call()
    pipe.close()  # again is nothing


def test_close_stops_the_calls_and_waits_for_them():
    pipe, ended = load("onnxruntime"), []

    def large():
        with pytest.raises(Cancelled):
            pipe.decode(np.zeros((2, 8, 160, 160), np.float32))
        ended.append(True)

    caller = threading.Thread(target=large)
    caller.start()
    begun(pipe)
    pipe.close()
    assert not pipe._calls
    caller.join()
    assert ended


def test_a_callback_may_close_its_pipeline():
    pipe = load("onnxruntime")
    with pytest.raises(Cancelled):
        pipe("pizza", **{**CALL, "num_inference_steps": 3}, callback=lambda *_: pipe.close())


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.parametrize("backend", ENGINES)
def test_what_a_large_call_needed_is_given_back(backend):
    before, large, after, closed = map(
        int,
        python(f"""
        import numpy as np, sdlite
        def rss():
            lines = open("/proc/self/status")
            return int(next(l for l in lines if l.startswith("VmRSS")).split()[1]) >> 10
        pipe = sdlite.Pipeline.from_pretrained("emoji", backend={backend!r}, threads=1)
        call = lambda: pipe("pizza", seed=0, num_inference_steps=1)
        call(), call()
        print(rss())
        pipe.decode(np.zeros((1, 8, 176, 176), np.float32))
        print(rss())
        call(), call()
        print(rss())
        pipe.close()
        print(rss())
    """).split(),
    )
    assert large > before + 300  # MiB: 1408 px
    assert after < before + 40
    assert closed < before


# --- how large a call may be


def test_a_call_that_is_too_large_is_refused_before_any_work(emoji, monkeypatch):
    def never(**inputs):
        raise AssertionError("a network was called")

    pipe = sdlite.Pipeline.from_pretrained("emoji", backend="onnxruntime", threads=1)
    for part in ("text_encoder", "unet", "vae_decoder"):
        monkeypatch.setitem(pipe.networks.parts, part, never)
    for call in (
        {"height": 2048, "width": 2048},
        {"num_images_per_prompt": 1024},
        {"max_pixels": 4095},
    ):
        with pytest.raises(
            ShapeError,
            match=(
                r"x \d+ is \d+ pixels in one call; accepted: up to .*pass max_pixels=\d+, with"
                r" pipe.enable_vae"
            ),
        ):
            pipe("pizza", **call)
    monkeypatch.setitem(pipe.unet_config, "sample_size", 1000)
    pipe.max_pixels = pipe._most()
    with pytest.raises(
        ShapeError, match=r"1 x 8000 x 8000 is 64000000 pixels in one call; accepted: up to 8388608"
    ):
        pipe("pizza")
    for most in (0, 1.5, "all"):
        with pytest.raises(InputError, match=r"max_pixels=.*at least 1"):
            pipe("pizza", max_pixels=most)
        with pytest.raises(InputError, match=r"max_pixels=.*at least 1"):
            sdlite.Pipeline.from_pretrained("emoji", max_pixels=most)


def test_max_pixels_is_the_calls_the_pipelines_or_the_models(copy):
    assert sdlite.Pipeline.from_pretrained(copy, max_pixels=4096).max_pixels == 4096
    pipe = sdlite.Pipeline.from_pretrained(copy, max_pixels=1)
    assert pipe("pizza", **CALL, max_pixels=4096).images[0].size == (64, 64)
    pipe.max_pixels = 4096
    assert pipe("pizza", **CALL).images[0].size == (64, 64)
    text = (copy / "sdlite.json").read_text().rstrip()
    (copy / "sdlite.json").write_text(text[:-1] + ', "max_pixels": 5000}')
    assert (
        Artifact.open(copy).manifest.max_pixels
        == sdlite.Pipeline.from_pretrained(copy).max_pixels
        == 5000
    )
    for bad in (0, True, "5000", 1e9):
        with pytest.raises(ArtifactError, match="max_pixels"):
            Manifest.from_dict({"format": "1.0", "max_pixels": bad})


# --- decoders that overflow


@pytest.fixture(scope="module")
def decoders():
    """A decoder of random weights in float16 and in float32, which overflows in float16 for latents
    of about 30 and more.
    """
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    AutoencoderKL = pytest.importorskip("diffusers", reason="needs the torch extra").AutoencoderKL
    from sdlite.backends.torch_module import Module

    torch.manual_seed(0)
    vae = (
        AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=8,
            norm_num_groups=4,
        )
        .eval()
        .requires_grad_(False)
    )
    vae.decoder.conv_in.weight.mul_(3000)
    half = Module("vae_decoder", vae.half(), "cpu", 1)
    import copy

    return half, Module("vae_decoder", copy.deepcopy(vae).float(), "cpu", 1)


def test_images_that_overflow_in_float16_are_decoded_in_float32(decoders):
    half, whole = decoders
    z = np.stack([np.full((8, 4, 4), x, np.float32) for x in (0.01, 40.0)]) * np.random.default_rng(
        0
    ).standard_normal((2, 8, 4, 4), np.float32)
    assert [
        bool(np.isfinite(half(latent_sample=z[i : i + 1])["sample"]).all()) for i in (0, 1)
    ] == [True, False]
    made = []
    both = Overflowing(half, lambda: made.append(1) or whole)
    for _ in range(2):
        got = both(latent_sample=z)["sample"]
        np.testing.assert_array_equal(
            got[:1], half(latent_sample=z)["sample"][:1]
        )  # of its own: no other image decides how it is made
        np.testing.assert_array_equal(got[1:], whole(latent_sample=z[1:])["sample"])
    assert made == [1]


def test_an_encoder_overflows_too_and_says_what_it_is():
    def half(sample):
        bright = sample.reshape(len(sample), -1).max(1) > 0.5
        return {"latent_sample": np.where(bright[:, None, None, None], np.nan, sample)}

    both = Overflowing(half, lambda: lambda sample: {"latent_sample": sample + 1}, "vae_encoder")
    call = running.Call()
    with running.entered(call):
        pixels = np.stack([np.full((3, 4, 4), x, np.float32) for x in (0, 1)])
        got = both(sample=pixels)["latent_sample"]
    assert [float(g.mean()) for g in got] == [0, 2]
    assert [s.split(":")[1] for s in call.said] == [
        " images for which it does are encoded in float32; precision='fp32' does all of them so"
    ]
    assert call.said[0].startswith("the VAE encoder overflows in float16")


def test_a_pipeline_says_once_that_its_decoder_overflows(decoders, emoji):
    both = Overflowing(decoders[0], lambda: decoders[1])
    parts = {**emoji.networks.parts, "vae_decoder": both}
    networks = sdlite.backends.Networks(parts, emoji.report, emoji.networks.size_multiple)
    pipe = sdlite.Pipeline(emoji.artifact, networks)
    call = {
        **CALL,
        "callback_on_step_end": lambda pipe, step, t, given: {"latents": given["latents"] * 1000},
    }
    with pytest.warns(SdliteWarning, match="overflows in float16") as caught:
        out = pipe("pizza", **call)
    assert [w.filename for w in caught] == [__file__]
    pipe("pizza", **call)
    for report in (out.report, pipe.report):
        assert sum("overflows in float16" in n for n in report.notes) == 1
    assert not any("overflows" in n for n in emoji.report.notes)
    assert pixels(out).std() > 0


def test_a_decoder_that_is_no_number_in_float32_either_is_an_error(decoders, emoji):
    whole = {"sample": np.full((1, 3, 64, 64), np.nan, np.float32)}
    nan = Overflowing(decoders[0], lambda: lambda latent_sample: whole)
    parts = {**emoji.networks.parts, "vae_decoder": nan}
    networks = sdlite.backends.Networks(parts, emoji.report, 8)
    with pytest.raises(InputError, match="VAE decoder are not finite"), pytest.warns(SdliteWarning):
        sdlite.Pipeline(emoji.artifact, networks).decode(np.full((1, 8, 8, 8), 1000, np.float32))
