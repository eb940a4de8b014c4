"""On a CUDA device: the images of the CPU's float32, edits, and threads. Run with -m gpu."""

from __future__ import annotations

import numpy as np
import pytest

import sdlite
from sdlite import image_input
from sdlite.errors import UnknownNameError

torch = pytest.importorskip("torch", reason="needs the torch extra")
CALL = {"seed": 1, "output_type": "np", "num_inference_steps": 4}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


def image(device, backend="torch", **how):
    with sdlite.Pipeline.from_pretrained("emoji", backend=backend, device=device, **how) as pipe:
        return pipe("a red apple", **CALL).images[0]


def closeness(a, b):
    return -10 * np.log10(np.square(a - b).mean() + 1e-15)


@pytest.fixture(scope="module")
def right():
    return image("cpu", precision="fp32")


@pytest.fixture(autouse=True)
def exact():
    """float32 is float32: torch rounds convolutions on CUDA to TF32 unless it is told not to."""
    both = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [b.allow_tf32 for b in both]
    for b in both:
        b.allow_tf32 = False
    yield
    for b, was in zip(both, before, strict=True):
        b.allow_tf32 = was


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(
    ("how", "least"),
    [
        ({"precision": "fp32"}, 60),
        ({"precision": "fp16"}, 40),
        ({"precision": "fp16", "arithmetic": "bfloat16"}, 22),
        ({"precision": "fp16", "arithmetic": "float32"}, 40),
    ],
)
def test_torch_on_cuda_makes_the_cpus_image(right, how, least):
    assert closeness(image("cuda", **how), right) >= least


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(("precision", "least"), [("fp32", 60), ("fp16", 40)])
def test_onnxruntime_on_cuda_makes_the_cpus_image(right, precision, least):
    ort = pytest.importorskip("onnxruntime", reason="needs the cuda extra")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no CUDAExecutionProvider: pip install onnxruntime-gpu")
    assert closeness(image("cuda", "onnxruntime", precision=precision), right) >= least


@pytest.mark.gpu
@needs_cuda
def test_an_edit_on_cuda_is_the_cpus():
    picture, mask = image_input.example(64, 64)
    made = []
    how = {"backend": "torch", "precision": "fp32"}
    for device in ("cpu", "cuda"):
        with sdlite.Pipeline.from_pretrained("emoji", device=device, **how) as pipe:
            made.append(pipe("a ball", image=picture, mask_image=mask, **CALL).images[0])
    assert closeness(*made) >= 60


@pytest.mark.gpu
@needs_cuda
def test_threads_on_cuda_make_the_images_of_one_after_another():
    from concurrent.futures import ThreadPoolExecutor

    with sdlite.Pipeline.from_pretrained("emoji", backend="torch", device="cuda") as pipe:
        call = {k: v for k, v in CALL.items() if k != "seed"}
        alone = [pipe("a ball", seed=s, **call).images[0] for s in range(8)]
        with ThreadPoolExecutor(8) as pool:
            at_once = list(pool.map(lambda s: pipe("a ball", seed=s, **call).images[0], range(8)))
    assert all(np.array_equal(a, b) for a, b in zip(alone, at_once, strict=True))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("sharded", [False, True])
def test_a_training_on_cuda_goes_on_from_its_checkpoint(tmp_path, monkeypatch, sharded):
    """The loss of an uninterrupted run: kernels may add in another order, so it is not bit for
    bit.
    """
    from dataclasses import replace

    from tests.unit import test_train

    if sharded:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    config = replace(test_train.CONFIG, mixed_precision="bf16")
    try:
        whole = test_train.fit(test_train.task(), config, tmp_path / "whole")
        part = test_train.interrupt_after(test_train.task(), 3)
        assert test_train.fit(part, config, tmp_path / "parts")["step"] == 3
        assert next(part.modules["unet"].parameters()).device.type == "cuda"
        rest = test_train.fit(test_train.task(), config, tmp_path / "parts", resume=True)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert (rest["step"], whole["step"]) == (6, 6)
    a, b = (test_train.last(tmp_path / k) for k in ("whole", "parts"))
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("output", {"multi_scale_weight": 0.1, "channel_weight": 0.1, "mask": True}),
        ("output", {"article": True}),
        ("guidance", {}),
        ("progressive", {"loss_type": "x0"}),
        ("consistency", {}),
        ("adversarial", {"guidance_scale": 2.0}),
    ],
)
def test_losses_stay_on_the_device_of_the_networks(name, options, monkeypatch):
    """Without a GPU, on a device that does not compute: sums of it and the CPU are refused."""
    from sdlite.distill.encoders import STATES
    from sdlite.distill.tasks import KINDS, base, few_step, student
    from tests.unit import test_train

    class Encoder(test_train.Text):  # `CachedEncoder` reads what it is given
        names = (STATES,)

        def __init__(self, network):
            super().__init__()

        def conditions(self, ids):
            return {STATES: self(ids)[0]}

    for module in (few_step, student):
        monkeypatch.setattr(module, "CachedEncoder", Encoder)
    networks = [test_train.task().modules["unet"] for _ in range(2)]
    given = base.Given(*networks, test_train.Text(), test_train.Source(), {}, base.V_ZERO_SNR)
    task = KINDS[name](**options).task(given)
    batch = task.batch(4, torch.Generator().manual_seed(0))
    task.to(torch.device("meta"))
    modules = {k: m.to("meta") for k, m in task.modules.items()}
    terms = task.loss(modules, {k: v.to("meta") for k, v in batch.items()}, 3)
    terms["loss"].backward()
    assert {v.device.type for v in terms.values()} == {"meta"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_without_a_device_cuda_is_refused_in_one_line(backend):
    pytest.importorskip(backend, reason=f"needs {backend}")
    with pytest.raises(UnknownNameError, match="device='cuda'") as e:
        image("cuda", backend)
    assert "\n" not in str(e.value)
