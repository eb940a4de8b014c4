"""What `quantize` is asked for, checked before any work: names, prompts, layers that stay in float,
the float pipeline, and room on the disk.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdlite import arguments, disk, hub
from sdlite.artifact import Artifact
from sdlite.errors import InputError, PrecisionError, UnknownNameError
from sdlite.instrument import LARGE, on_demand
from sdlite.pipeline import Pipeline
from sdlite.quant import dynamic, insert
from sdlite.quant.calibrate import Calibration
from sdlite.quant.gate import Gate
from sdlite.sampling import known_sampler

log = logging.getLogger("sdlite")
QUANTIZED = ("int8-static", "int8-dynamic")
Keep = Mapping[str, Sequence[str]]  # part -> regular expressions of layers that stay in float

# By torch module name: few parameters, and each error there reaches every pixel or every layer.
KEEP_FLOAT: dict[str, tuple[str, ...]] = {
    "unet": (r"(time|add)_embedding\.", r"time_emb_proj$", r"^conv_in$", r"^conv_out$"),
    "controlnet": (
        r"time_embedding\.",
        r"time_emb_proj$",
        r"^conv_in$",
        r"^controlnet_(cond_embedding|down_blocks|mid_block)\b",
    ),
    "vae_encoder": (r"^quant_conv$", r"encoder\.conv_in$", r"encoder\.conv_out$"),
    "vae_decoder": (r"^post_quant_conv$", r"decoder\.conv_in$", r"decoder\.conv_out$"),
}


def check_names(
    model: object, out: object, threads: object, precision: object, scheme: object, sampler: object
) -> None:
    """Types and names of `quantize`'s arguments.

    Raises:
        UnknownNameError, InputError: one is not accepted.
    """
    if not isinstance(model, Pipeline):
        arguments.path("model", model, arguments.MODEL)
    arguments.path("out", out)
    arguments.threads(threads)
    if arguments.text("precision", precision) not in QUANTIZED:
        raise UnknownNameError(
            f"precision={precision!r} cannot be quantized to; choose one of {', '.join(QUANTIZED)}."
        )
    arguments.one_of("scheme", scheme, tuple(insert.SCHEMES))
    if precision == "int8-dynamic" and scheme not in dynamic.SCHEMES:
        raise InputError(
            f"scheme={scheme!r} is not one of int8-dynamic, whose activations are uint8; choose one"
            f" of {', '.join(dynamic.SCHEMES)}, or int8-static."
        )
    if sampler is not None:
        arguments.text("sampler", sampler)


def check_keep_float(keep_float: object) -> None:
    """Parts and regular expressions of layers that stay in float; None is accepted.

    Raises:
        InputError: not a dict of parts to regular expressions.
    """
    if keep_float is None:
        return
    if not isinstance(keep_float, Mapping):
        raise InputError(
            f"keep_float={keep_float!r}; accepted: a dict of networks, such as unet, to regular"
            " expressions of module names."
        )
    for part, given in keep_float.items():
        name = f"keep_float[{part!r}]"
        for expression in arguments.lines(name, given) if len(given) else ():
            try:
                re.compile(expression)
            except re.error as e:
                raise InputError(
                    f"{name}: {expression!r} is not a regular expression ({e})."
                ) from e


def kept_in_float(asked: Keep | None, artifact: Artifact) -> dict[str, Sequence[str]]:
    """Part -> regular expressions: what was asked for, else the model's own, else `KEEP_FLOAT`. A
    part that is not named has its `KEEP_FLOAT`.
    """
    given: Keep = artifact.calibration.get("keep_float", {}) if asked is None else asked
    known = (*artifact.parts, *artifact.family.optional)
    if unknown := sorted(set(given) - set(known)):
        raise InputError(
            f"keep_float names {unknown[0]!r}; the networks of {artifact.name} are"
            f" {', '.join(known)}."
        )
    return {p: given.get(p, KEEP_FLOAT.get(p, ())) for p in known}


def open_float(
    model: Pipeline | str | Path, scratch: Path, threads: int | None, sampler: str | None
) -> Pipeline:
    """The float pipeline on onnxruntime that quantizing starts from, its networks opened when they
    are called. A plain diffusers folder is converted into `scratch` first.

    Raises:
        InputError: an export. PrecisionError: the model holds no float graphs, or the pipeline is
            not float on onnxruntime.
    """
    if isinstance(model, Pipeline):
        if model.report.backend != "onnxruntime" or model.report.precision not in ("fp32", "fp16"):
            raise PrecisionError(
                f"the pipeline is {model.report.precision} on {model.report.backend}; quantizing"
                " starts from fp32 (or fp16) on onnxruntime: Pipeline.from_pretrained(model,"
                " precision='fp32', backend='onnxruntime')."
            )
        return on_demand(model.artifact.with_sampler(sampler), threads, aside=scratch / "float32")
    artifact = Artifact.open(hub.resolve(model, None))
    if artifact.export:
        raise InputError(
            f"{artifact.folder} is an export for {artifact.export.target}; quantize the model that"
            " it was made from."
        )
    known_sampler(sampler or artifact.sampler_name)  # before any work
    if artifact.manifest is None:
        artifact = _converted(artifact, scratch / "onnx")
    if not artifact.has_onnx("fp32"):
        held = ", ".join(artifact.precisions) or "none"
        raise PrecisionError(
            f"{artifact.name} holds no float ONNX graphs (it holds: {held}); quantize the float"
            " model that it came from."
        )
    return on_demand(artifact.with_sampler(sampler), threads, aside=scratch / "float32")


def _converted(artifact: Artifact, folder: Path) -> Artifact:
    from sdlite.converter import convert

    log.warning(
        "%s has no ONNX graphs: converting it into a temporary folder first", artifact.folder
    )
    return Artifact.open(convert(artifact.folder, folder, name=artifact.name))


def with_prompts(
    artifact: Artifact, calibration: Calibration, gate: Gate
) -> tuple[Calibration, Gate]:
    """Both with their prompts filled in, apart from each other where there are enough.

    Raises:
        InputError: there are no calibration prompts, or the gate has no prompts or seeds.
    """
    prompts = calibration.prompts or artifact.calibration.get("prompts")
    if not prompts:
        raise InputError(
            f"{artifact.name} has no calibration prompts of its own; give some that are like your"
            " users' (16 or more): --prompts FILE, or Calibration(prompts=[...])."
        )
    shown = [p for p in prompts if p.strip()]
    judged = gate.prompts
    if judged is None:
        judged = shown[calibration.samples :] or shown
    judged = list(judged)[: gate.num_prompts]
    if not judged or not gate.seeds:
        raise InputError("the gate has no prompts or no seeds; give at least one of each.")
    return (
        dataclasses.replace(calibration, prompts=shown),
        dataclasses.replace(gate, prompts=judged),
    )


def doubts(calibration: Calibration, gate: Gate) -> list[str]:
    """What the prompts cannot show, in sentences."""
    shown = set(calibration.shown[: calibration.samples])
    out = []
    if len(shown) == 1:
        out.append(
            f"ranges are measured on a single prompt ({next(iter(shown))!r}), so other prompts may"
            " leave them; give 16 or more that are like your users'."
        )
    if both := len(shown & set(gate.shown)):
        out.append(
            f"{both} of the gate's {len(set(gate.shown))} prompts were calibrated on too, so the"
            " gate cannot tell how the model does on others; give more prompts than samples"
            f" ({calibration.samples}), or Gate(prompts=[...])."
        )
    return out


def check_disk(artifact: Artifact, precision: str, out: Path) -> None:
    """Whether there is room: calibration writes every network in float32, as does a large model in
    float16, and the model has a quarter of that at least.

    Raises:
        InputError: too little disk, with what is needed and what is free.
    """
    floats = sum(disk.sizes(artifact, "fp32").values())
    widened = artifact.network("fp32", "unet")["storage"] == "float16" and floats >= 2 * LARGE
    aside = floats if precision == "int8-static" or widened else 0
    if said := disk.lacking(precision, aside, floats // 4, out):
        raise InputError(said)
