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
    for device in ("cpu", "cuda"):
        with sdlite.Pipeline.from_pretrained("emoji", backend="torch", device=device) as pipe:
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_without_a_device_cuda_is_refused_in_one_line(backend):
    pytest.importorskip(backend, reason=f"needs {backend}")
    with pytest.raises(UnknownNameError, match="device='cuda'") as e:
        image("cuda", backend)
    assert "\n" not in str(e.value)
