"""Networks of a diffusers folder as torch modules that take and give numpy arrays."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from sdlite import families, running
from sdlite.artifact import Artifact
from sdlite.backends.network import AUTOENCODER, Network, Overflowing, RowByRow
from sdlite.backends.report import NetworkReport
from sdlite.errors import MissingExtraError, UnknownNameError
from sdlite.files import Files
from sdlite.spec import Arrays, IOSpec, spec_of
from sdlite.torch_networks import control_residuals, latent_parameters, open_network, text_states
from sdlite.weights import dtypes, weight_files, weight_index

# transformers and diffusers patch torch while they load: two threads at once see each other's
# patches
_LOADING = threading.Lock()


def _quantize_linear(module: torch.nn.Module) -> int:
    """In place: every Linear to int8 weights and int8 activations scaled per token at run time.
    Returns how many.
    """
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
        from torchao.utils import should_reduce_range
    except ImportError as e:
        raise MissingExtraError(
            "int8-dynamic on the torch backend needs torchao: pip install 'sdlite[torchao]'."
        ) from e
    count = sum(isinstance(m, torch.nn.Linear) for m in module.modules())
    if count:
        narrow = should_reduce_range(torch.device("cpu"))  # no VNNI: 8-bit products would overflow
        quantize_(
            module,
            Int8DynamicActivationInt8WeightConfig(set_inductor_config=False, reduce_range=narrow),
        )
    return count


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch's threads, which are the calling thread's own setting and start as what was set last in
    another; put back afterwards.
    """
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Module:
    """One network as a function of named numpy arrays."""

    def __init__(
        self, part: str | IOSpec, module: torch.nn.Module, device: str, threads: int | None
    ):
        self.spec, self.module, self.device = spec_of(part), module, torch.device(device)
        self.threads = torch.get_num_threads() if threads is None else threads
        self.dtype = next(module.parameters()).dtype

    @torch.inference_mode()
    def __call__(self, **inputs: np.ndarray) -> Arrays:
        running.check()
        with _threads(self.threads):
            return self._run(inputs)

    def _run(self, inputs: Arrays) -> Arrays:
        t = {
            k: torch.from_numpy(np.ascontiguousarray(v)).to(self.device) for k, v in inputs.items()
        }
        t = {
            k: v.to(self.dtype) if v.is_floating_point() and k != "timestep" else v
            for k, v in t.items()
        }
        m: Any = self.module
        out: tuple[torch.Tensor, ...]
        if "input_ids" in t:
            out = text_states(m, t["input_ids"], [x.name for x in self.spec.outputs])
        elif self.spec.part == "unet":
            first = [t.pop(k) for k in ("sample", "timestep", "encoder_hidden_states")]
            out = m(*first, return_dict=False, **families.unet_arguments(t))[:1]
        elif self.spec.part == "controlnet":
            out = control_residuals(m, *(t[x.name] for x in self.spec.inputs))
        elif self.spec.part == "vae_encoder":
            out = (latent_parameters(m, t["sample"]),)
        else:
            out = m.decode(t["latent_sample"], return_dict=False)[:1]
        return {
            x.name: y.float().cpu().numpy() for x, y in zip(self.spec.outputs, out, strict=True)
        }


def open_part(
    artifact: Artifact,
    part: str,
    precision: str,
    device: str,
    threads: int | None,
    told: str | None = None,
) -> tuple[Network, NetworkReport]:
    """A network and what the report says of it. `told`: the arithmetic that was asked for.

    Raises:
        UnknownNameError: no CUDA device. ArtifactError: the weights are missing or damaged.
            MissingExtraError: int8-dynamic without torchao.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UnknownNameError(
            f"device='cuda': torch {torch.__version__} finds no CUDA device; use device='cpu' or"
            " install a CUDA build."
        )
    spec = artifact.spec(part)
    source = spec.source
    folder = artifact.files.part(source)
    weights = weight_files(folder)
    with _LOADING:
        module, linear = _opened(folder, part, precision, device, told)
    arithmetic = str(next(module.parameters()).dtype).removeprefix("torch.")
    if linear is not None:
        arithmetic = f"int8 Linear ({linear} layers), rest float32"
    size = sum(w.stat().st_size for w in weights)
    file = f"{source}/{weights[0].name}" + (
        f" and {len(weights) - 1} more" if len(weights) > 1 else ""
    )
    storage = " and ".join(dtypes(weight_index(weights)))
    network: Network = Module(spec, module.to(device), device, threads)
    if part in AUTOENCODER and arithmetic == "float16":
        network = Overflowing(
            network, lambda: Module(spec, copy.deepcopy(module).float(), device, threads), part
        )
    if (
        precision == "int8-dynamic" and device == "cpu"
    ):  # float's last bits differ with the batch, and an int8 step is large
        network = RowByRow(network)
    return network, NetworkReport(part, file, size, storage, arithmetic)


def _opened(
    folder: Files, part: str, precision: str, device: str, told: str | None
) -> tuple[torch.nn.Module, int | None]:
    """The module in the arithmetic that is told, else the precision's on this device; and how many
    of its layers became int8.
    """
    module = open_network(folder).eval().requires_grad_(False)
    if part == "vae_decoder":
        module.encoder = None
    if part == "vae_encoder":
        module.decoder = None
    if precision == "fp16":
        module = module.half()
    if told is not None or device == "cpu":
        module = module.to(getattr(torch, told or "float32"))  # after rounding
    return module, _quantize_linear(module) if precision == "int8-dynamic" else None
