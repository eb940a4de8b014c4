"""ControlNets against diffusers' three pipelines, and without a control image the model alone."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import sdlite

torch = pytest.importorskip("torch", reason="needs the torch extra")
diffusers = pytest.importorskip("diffusers", reason="needs the torch extra")

from benchmarks import published_models  # noqa: E402
from sdlite.checkpoints import controlnet  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        published_models.merges_file() is None,
        reason="CLIP's merges: pip install --no-deps open_clip_torch",
    ),
]
KINDS = {
    "text": diffusers.StableDiffusionControlNetPipeline,
    "image": diffusers.StableDiffusionControlNetImg2ImgPipeline,
    "mask": diffusers.StableDiffusionControlNetInpaintPipeline,
}
CALLS = {"4 steps": (4, 0.0, 0.5), "guided": (25, 5.0, 0.3)}
WEIGHTS = {
    "scale": {"controlnet_conditioning_scale": 0.7},
    "late": {"control_guidance_start": 0.1},
    "early": {"control_guidance_end": 0.6},
    "guess": {"guess_mode": True},
}


def noise(seed, side=64):
    """A colorful image of blocks."""
    values = np.random.default_rng(seed).random((8, 8, 3))
    return Image.fromarray((np.kron(values, np.ones((side // 8, side // 8, 1))) * 255).astype("u1"))


def painted():
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:56] = 255
    return Image.fromarray(mask)


def psnr(a, b):
    return -10 * np.log10(np.square(a.astype(np.float64) - b).mean() + 1e-30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Name -> a published layout, its ControlNet, and both as one folder."""
    root = tmp_path_factory.mktemp("controlnet")

    def write(name):
        base, hint = root / name, root / f"{name}-canny"
        if not base.exists():
            published_models.write(name, base)
            published_models.write_controlnet(base, hint)
            controlnet.added(base, hint, root / f"{name}-both", None)
        return base, hint, root / f"{name}-both"

    return write


def by_diffusers(base, hint, kind, call):
    network = diffusers.ControlNetModel.from_pretrained(hint)
    # a checker would blacken images; SD-2's folders have none to leave out
    theirs = KINDS[kind].from_pretrained(
        base, controlnet=network, safety_checker=None, feature_extractor=None
    )
    theirs.set_progress_bar_config(disable=True)
    call = {**call, "generator": torch.Generator().manual_seed(3), "output_type": "np"}
    call = {k: v for k, v in call.items() if v is not None}
    if kind == "text":
        call["image"] = call.pop("control_image")
    return theirs("a red fox", **call).images[0]


def arguments(kind, how):
    """A call's, for both."""
    steps, guidance, strength = CALLS[how]
    out = {"num_inference_steps": steps, "guidance_scale": guidance, "control_image": noise(1)}
    out |= {} if kind == "text" else {"image": noise(0), "strength": strength}
    return out | ({"mask_image": painted()} if kind == "mask" else {})


@pytest.mark.parametrize(
    ("kind", "weights"),
    [(k, "scale") for k in KINDS]
    + [("image", "late"), ("text", "early"), ("text", "guess"), ("mask", "guess")],
)
def test_a_controlled_image_is_that_of_diffusers(folder, kind, weights):
    base, hint, both = folder("bk-sdm-v2-tiny")  # three blocks, none in the middle
    where = np.asarray(painted()) >= (128 if kind == "mask" else 0)
    with sdlite.Pipeline.from_pretrained(both, backend="torch", threads=1) as ours:
        for how in CALLS:
            call = arguments(kind, how) | WEIGHTS[weights]
            right = by_diffusers(base, hint, kind, call)
            got = ours("a red fox", seed=3, output_type="np", **call).images[0]
            assert psnr(right[where], got[where]) >= 60
            without = {k: v for k, v in call.items() if not k.startswith(("control", "guess"))}
            size = {"height": 64, "width": 64}
            plain = ours("a red fox", seed=3, output_type="np", **size, **without).images[0]
            assert psnr(plain[where], got[where]) + 10 < psnr(right[where], got[where])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", ["sd14", "bk-sdm-tiny"])
def test_engines_make_the_images_of_diffusers(folder, name, backend):
    pytest.importorskip(backend, reason=f"needs {backend}")
    base, hint, both = folder(name)
    out = both.with_name(f"{name}-model")
    if not out.exists():
        sdlite.convert(base, out, controlnet=hint)
    with sdlite.Pipeline.from_pretrained(out, backend=backend, precision="fp32") as ours:
        for kind in KINDS:
            where = np.asarray(painted()) >= (128 if kind == "mask" else 0)
            for how in CALLS:
                call = arguments(kind, how) | WEIGHTS["scale"]
                right = by_diffusers(base, hint, kind, call)
                got = ours("a red fox", seed=3, output_type="np", **call).images[0]
                assert psnr(right[where], got[where]) >= 60


@pytest.fixture(scope="module")
def controlled(plain, tmp_path_factory):
    """The embedded student with a ControlNet of random weights, converted."""
    root = tmp_path_factory.mktemp("controlled")
    hint = published_models.write_controlnet(plain, root / "sd-controlnet-canny")
    return sdlite.convert(plain, root / "model", controlnet=hint)


@pytest.fixture(scope="module")
def alone(plain):
    with sdlite.Pipeline.from_pretrained(plain, backend="torch", threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def by_torch(controlled):
    with sdlite.Pipeline.from_pretrained(controlled, backend="torch", threads=1) as pipe:
        yield pipe


SIZES = {"own": {}, "other": {"height": 72, "width": 88}}  # no multiple of the UNet's 32 px


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_engines_control_as_torch_does(controlled, by_torch, alone, backend):
    pytest.importorskip(backend, reason=f"needs {backend}")
    call = {"seed": 1, "output_type": "np", "guidance_scale": 2.0, "num_inference_steps": 4}
    with sdlite.Pipeline.from_pretrained(controlled, backend=backend, precision="fp32") as pipe:
        for size in SIZES.values():
            free = alone("an apple", **call, **size).images[0]
            assert psnr(pipe("an apple", **call, **size).images[0], free) >= 60
            size = {**size, "control_image": noise(1, 128)} if size else {"control_image": noise(1)}
            right, got = (p("an apple", **call, **size).images[0] for p in (by_torch, pipe))
            assert right.shape == free.shape
            assert psnr(right, got) >= 60
            assert psnr(right, free) < 30


def test_a_batch_has_a_control_image_for_each(by_torch):
    call = {"seed": 5, "output_type": "np", "num_inference_steps": 2, "guidance_scale": 3.0}
    hints = [noise(1), noise(2)]
    two = by_torch(["an apple", "a house"], control_image=hints, **call).images
    for i, prompt in enumerate(["an apple", "a house"]):
        one = by_torch(prompt, control_image=hints[i], **call | {"seed": 5 + i}).images[0]
        assert psnr(two[i], one) >= 60


QUICK = {"num_inference_steps": 2}


@pytest.mark.parametrize("precision", ["int8-dynamic", "int8-static"])
def test_a_controlnet_in_int8_passes_the_same_check(controlled, tmp_path, precision):
    from sdlite.quant import Calibration, Gate

    prompts = ["an apple", "a house", "a fox", "a pizza", "a ghost", "a red car"]
    calibration = Calibration(prompts=prompts, samples=4, **QUICK)
    loose = {"psnr_mean": 10, "psnr_worst": 5, "ssim_mean": -1, "engines": ["onnxruntime"]}
    gate = Gate(seeds=(0,), **loose, **QUICK)
    out = tmp_path / "int8"
    report = sdlite.quantize(controlled, precision, out=out, calibration=calibration, gate=gate)
    [found] = report["engines"]
    assert found["pictures"] == 2 + 2  # of two prompts, an edit, and one after a control image
    assert found["networks"]["controlnet"] > 15  # 2 to 3 prompts are few, and its weights random
    row = report["networks"]["controlnet"]
    # int8-dynamic leaves convolutions in float
    share = 0.5 if precision == "int8-static" else 0.8
    assert row["bytes"] < share * row["float_bytes"]
    call = {"seed": 1, "output_type": "np", "control_image": noise(1), **QUICK}
    made = []
    for model in (controlled, out):
        with sdlite.Pipeline.from_pretrained(model, backend="onnxruntime") as pipe:
            made.append(pipe("an apple", **call).images[0])
    assert 100 > psnr(*made) > 15


def test_an_onnx_export_holds_the_controlnet_and_others_say_so(controlled, tmp_path):
    from sdlite.exporters.export import export

    report = export(controlled, tmp_path / "out", target="onnx", prompts=["a fox"], **QUICK)
    assert report["parity"]["networks"]["controlnet"]["sqnr"] > 100
    assert [t["shape"] for t in report["networks"]["unet"]["inputs"]][-1] == [
        "batch",
        128,
        "height/32",
        "width/32",
    ]
    call = {"seed": 1, "output_type": "np", "control_image": noise(1), **QUICK}
    made = []
    for model in (controlled, tmp_path / "out"):
        with sdlite.Pipeline.from_pretrained(model, backend="onnxruntime") as pipe:
            made.append(pipe("an apple", **call).images[0])
    assert psnr(*made) > 100
    with pytest.raises(sdlite.errors.InputError, match=r"for onnx alone, not for openvino;"):
        export(controlled, tmp_path / "no", target="openvino")


def test_the_code_in_an_exports_readme_runs_without_a_control_image(controlled, tmp_path):
    from sdlite.artifact import Artifact
    from sdlite.families import family_of

    artifact = Artifact.open(controlled)
    code = family_of(artifact.index, artifact.config).snippet(
        artifact.index, artifact.config("unet")
    )
    start = code.index("\nadded = ")
    given = {"np": np, "height": 72, "width": 88, "conditions": [{}, {}]}
    exec(code[start:].replace("@STRIDE@", "8"), given)
    sample = np.zeros((1, 8, 9, 11), np.float32)
    right = artifact.family.uncontrolled(artifact.config("unet"), sample)
    for made in given["conditions"]:
        assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in right.items()}
