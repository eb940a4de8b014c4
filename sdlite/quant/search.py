"""The search: candidates with more and more layers back in float, until the gate holds."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdlite.backends import installed_with
from sdlite.errors import QuantizationError
from sdlite.instrument import Call, let_go
from sdlite.io import writing
from sdlite.pipeline import Pipeline
from sdlite.quant import gate as gates
from sdlite.quant import reports, write
from sdlite.quant.candidate import Builder, Candidate, SearchRow, Work
from sdlite.quant.gate import Comparison

log = logging.getLogger("sdlite")


@dataclass(frozen=True)
class _Reference:
    """The float model's images, uint8 (N, H, W, 3), and its networks' calls in the first."""

    images: np.ndarray
    calls: dict[str, list[Call]]


def until_it_holds(work: Work, builder: Builder, out: Path, keep_failed: bool) -> reports.Report:
    """Put the worst layers back to float until the gate holds on every backend, and write the
    model.

    Returns:
        The report, as it is written beside the model.

    Raises:
        QuantizationError: the gate does not hold within `Gate.max_float`.
    """
    reference = _reference(work)
    back: list[str] = []
    search: list[SearchRow] = []
    with writing(out) as tmp:
        while True:
            found = _candidate(work, builder, back, tmp, reference)
            search.append(found.row())
            report = reports.report(work, found, search)
            if not found.failures:
                reports.write(tmp, report, reference.images, found.images)
                write.manifest(work, found.parts, tmp, found.comparisons)
                return report
            more = _next_layers(work, builder, back)
            if not more:
                raise _failed(work, found, report, reference, out, tmp if keep_failed else None)
            back = [*back, *more]
            said = "; ".join(found.failures)
            log.info("the gate does not hold (%s); back to float: %s", said, ", ".join(more))


def _reference(work: Work) -> _Reference:
    prompts = work.gate.shown
    found = _Reference(
        gates.images(work.pipe, prompts, work.gate), gates.calls(work.pipe, prompts, work.gate)
    )
    # what it answered is kept: the quantized networks do not need to fit beside it
    let_go(work.pipe)
    return found


def _next_layers(work: Work, builder: Builder, back: list[str]) -> list[str]:
    """The worst twentieth of the layers that are still integer, as far as `max_float` allows."""
    more = [k for k in builder.order if k not in back][: max(1, len(builder.order) // 20)]
    budget = work.gate.max_float * sum(builder.sizes.values())
    return [] if sum(builder.sizes[k] for k in [*back, *more]) > budget else more


def _candidate(
    work: Work, builder: Builder, back: list[str], folder: Path, reference: _Reference
) -> Candidate:
    """One candidate, written to `folder` and compared on each backend."""
    parts = builder.build(back)
    write.model(work, parts, folder)
    comparisons: list[Comparison] = []
    shown = reference.images
    for i, engine in enumerate(_engines(work)):
        pipe = Pipeline.from_pretrained(
            folder, precision=work.precision, backend=engine, threads=work.threads
        )
        found, made = gates.compare(
            reference.images, reference.calls, pipe, work.gate.shown, work.gate
        )
        del pipe  # the next backend's networks do not need to fit beside these
        comparisons.append(found)
        shown = made if i == 0 else shown
    failures = [f for c in comparisons for f in c.fails(work.gate)]
    return Candidate(parts, back, comparisons, shown, failures)


def _engines(work: Work) -> list[str]:
    named = work.gate.engines
    return installed_with(work.precision) if named is None else list(named)


def _failed(
    work: Work,
    found: Candidate,
    report: reports.Report,
    reference: _Reference,
    out: Path,
    model: Path | None,
) -> QuantizationError:
    """The error of a search that ended; report, images and the model, if it is asked for, are kept
    in `out`.failed.
    """
    if model is not None:
        write.manifest(work, found.parts, model, found.comparisons, found.failures)
    keep = functools.partial(
        reports.write, report=report, reference=reference.images, made=found.images
    )
    return QuantizationError(_failure(work, found, reports.keep_failed(out, keep, model)))


def _failure(work: Work, found: Candidate, kept: str) -> str:
    """The error's words: what fails, how far the search went, where the images are, and what this
    mode lets one do.
    """
    first = found.comparisons[0]
    part, ratio = min(first.networks.items(), key=lambda kv: kv[1])
    said = (
        f"the gate does not hold: {'; '.join(found.failures)}; worst network {part} ({ratio:.1f}"
        f" dB), worst image {first.worst}"
    )
    if work.precision == "int8-dynamic":
        advice = (
            "Keep the worst network's layers in float (keep_float), try int8-static, which searches"
            " for them, or lower the gate on purpose."
        )
    else:
        said += (
            f"; {len(found.back)} layers are back in float and max_float={work.gate.max_float}"
            " allows no more"
        )
        advice = (
            "Give more calibration samples, another observer, a larger max_float, or lower the gate"
            " on purpose."
        )
    return f"{said}. No model was written; {kept}. {advice}"
