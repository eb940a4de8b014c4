"""`quantize`: a float pipeline to an int8 model that passed its quality check."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

from sdlite.errors import SdliteWarning
from sdlite.io import check_out, scratch
from sdlite.pipeline import Pipeline
from sdlite.quant import insert, options
from sdlite.quant.calibrate import Calibration
from sdlite.quant.candidate import Builder, Work
from sdlite.quant.dynamic import DynamicBuilder
from sdlite.quant.gate import Gate
from sdlite.quant.reports import Report
from sdlite.quant.search import until_it_holds
from sdlite.quant.static import StaticBuilder


def quantize(
    model: Pipeline | str | Path,
    precision: str,
    *,
    out: str | Path,
    calibration: Calibration | None = None,
    gate: Gate | None = None,
    scheme: str = "u8s7",
    keep_float: dict[str, Sequence[str]] | None = None,
    threads: int | None = None,
    progress: bool = False,
    sampler: str | None = None,
    keep_failed: bool = False,
) -> Report:
    """Quantize a model to int8, compare it with the float one, and write it.

    Args:
        model: a loaded float32 `Pipeline` on onnxruntime, or what `Pipeline.from_pretrained` takes.
        precision: "int8-static" (activations and weights of Conv and Linear) or "int8-dynamic"
            (Linear weights; activations at run time).
        out: new or empty folder; written beside and renamed when the gate holds. It holds the
            graphs, tokenizer, scheduler and configurations, not the float weights.
        calibration: what static quantization is shown; default: the model's own prompts.
        gate: what must hold; default: the thresholds of `Gate`.
        scheme: "u8s7" (default) gives weights 7 bits: x86 CPUs without VNNI saturate u8 x
            s8 products, and a gate on the machine that quantizes cannot see the machine that runs.
            "u8s8" where every target has VNNI or is ARM; "s8s8" for TensorRT, int8-static alone.
        keep_float: part -> regular expressions of torch module names that stay in float; default:
            the model's own (`calibration.keep_float` in its manifest), else
            `sdlite.quant.KEEP_FLOAT`. A part that is not named has its `KEEP_FLOAT`.
        threads: CPU threads of the sessions.
        progress: show tqdm bars.
        sampler: what calibration and gate sample with, and the new model's own; default: the
            model's.
        keep_failed: when the gate does not hold, keep the model too, in `out`.failed/model. It
            opens with a warning, and does not verify.

    Returns:
        The report, as written to `quantize-report.json`.

    Raises:
        UnknownNameError, PrecisionError, InputError: an argument is not accepted, or there are no
            calibration prompts.
        QuantizationError: the gate does not hold; no model is written, and the report and the grid
            of images go to `out`.failed.
    """
    options.check_names(model, out, threads, precision, scheme, sampler)
    calibration = dataclasses.replace(calibration or Calibration())
    gate = dataclasses.replace(gate or Gate())
    calibration.check()
    gate.check()
    options.check_keep_float(keep_float)
    check_out(out)
    with scratch("quantize") as aside:
        pipe = options.open_float(model, aside, threads, sampler)
        calibration, gate = options.with_prompts(pipe.artifact, calibration, gate)
        options.check_disk(pipe.artifact, precision, Path(out))
        doubts = options.doubts(calibration, gate) if precision == "int8-static" else []
        for doubt in doubts:
            warnings.warn(doubt, SdliteWarning, stacklevel=2)
        work = Work(pipe, precision, aside, calibration, gate, threads, progress, doubts)
        keep = options.kept_in_float(keep_float, pipe.artifact)
        builder: Builder
        if precision == "int8-dynamic":
            builder = DynamicBuilder(work, keep, insert.SCHEMES[scheme])
        else:
            builder = StaticBuilder(work, insert.SCHEMES[scheme], keep)
        return until_it_holds(work, builder, Path(out), keep_failed)
