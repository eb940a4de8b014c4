"""`quantize`: a float pipeline to an int8 artefact, with proof or not at all."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdlite import arguments, disk, families, hub
from sdlite.artifact import Artifact
from sdlite.errors import (
    InputError,
    PrecisionError,
    QuantizationError,
    SdliteWarning,
    UnknownNameError,
)
from sdlite.instrument import Call, NamedOutputs, let_go, on_demand
from sdlite.io import check_out, remove, scratch, writing
from sdlite.manifest import PARTS, Manifest, write_manifest
from sdlite.metrics import sqnr
from sdlite.onnx_graph import Graph, Layer
from sdlite.pipeline import Pipeline
from sdlite.quant import gate as gates
from sdlite.quant import insert, reports, rewrite
from sdlite.quant.calibrate import Calibration, walk
from sdlite.quant.dynamic import build_dynamic
from sdlite.quant.gate import Comparison, Gate
from sdlite.quant.observe import ChannelMax, Histogram, choose_range
from sdlite.sampling import known_sampler

log = logging.getLogger("sdlite")
QUANTISED = ("int8-static", "int8-dynamic")

# Kept in float, by torch module name: few parameters, and each error there reaches every pixel or
# every layer.
KEEP_FLOAT: dict[str, tuple[str, ...]] = {
    "unet": (r"time_embedding\.", r"time_emb_proj$", r"^conv_in$", r"^conv_out$"),
    "vae_decoder": (r"^post_quant_conv$", r"decoder\.conv_in$", r"decoder\.conv_out$"),
    "text_encoder": (),
}


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
) -> dict[str, Any]:
    """Quantise a pipeline to int8, compare it with the float one, and write it as an artefact.

    Args:
        model: a loaded float32 `Pipeline` on onnxruntime, or what `Pipeline.from_pretrained` takes.
        precision: "int8-static" (activations and weights, Conv and Linear) or "int8-dynamic"
            (Linear weights; activations at run time).
        out: new or empty folder; written beside and renamed when the gate holds. It holds the
            graphs, tokenizer, scheduler and configs, not the float weights.
        calibration: what static quantisation is shown; default: the artefact's own prompts.
        gate: what must hold; default thresholds in `Gate`.
        scheme: "u8s7" (static, default) gives weights 7 bits: x86 CPUs without VNNI saturate u8 x
            s8 products, and a gate on the machine that quantises cannot see the machine that runs.
            "u8s8" where every target has VNNI or is ARM; "s8s8" for TensorRT.
        keep_float: part -> regular expressions of torch module names that stay float; default: the
            artefact's own (`calibration.keep_float` in its manifest), else `KEEP_FLOAT`. A part
            that is not named has its `KEEP_FLOAT`.
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
    if not isinstance(model, Pipeline):
        arguments.path("model", model, arguments.MODEL)
    arguments.path("out", out)
    arguments.threads(threads)
    if arguments.text("precision", precision) not in QUANTISED:
        raise UnknownNameError(
            f"precision={precision!r} cannot be quantised to; choose one of {', '.join(QUANTISED)}."
        )
    if arguments.text("scheme", scheme) not in insert.SCHEMES:
        raise UnknownNameError(
            f"scheme={scheme!r} is not known; choose one of {', '.join(insert.SCHEMES)}."
        )
    calibration, gate = (
        dataclasses.replace(calibration or Calibration()),
        dataclasses.replace(gate or Gate()),
    )
    calibration.check()
    gate.check()
    arguments.optional(arguments.text, "sampler", sampler)
    _kept(keep_float)
    check_out(out)
    with scratch("quantize") as aside:
        pipe = _float_pipeline(model, aside, threads, sampler)
        _prompts(pipe, calibration, gate)
        _room(pipe.artifact, precision, Path(out))
        doubts = _doubts(calibration, gate) if precision == "int8-static" else []
        for doubt in doubts:
            warnings.warn(doubt, SdliteWarning, stacklevel=2)
        work = _Work(pipe, precision, aside, calibration, gate, threads, progress, doubts)
        own = (pipe.artifact.manifest.calibration or {}) if pipe.artifact.manifest else {}
        asked = own.get("keep_float", {}) if keep_float is None else keep_float
        keep = {p: asked.get(p, KEEP_FLOAT[p]) for p in PARTS}
        candidate: Callable[[Iterable[str]], dict[str, Any]]
        if precision == "int8-dynamic":
            graphs = {p: work.graph(p) for p in PARTS}
            candidate = build_dynamic(
                graphs, {p: _quantisable(g, keep[p]) for p, g in graphs.items()}
            )
        else:
            candidate = _static(work, insert.SCHEMES[scheme], keep)
        return _until_it_holds(work, candidate, Path(out), keep_failed)


def _room(artifact: Artifact, precision: str, out: Path) -> None:
    """Refuse what cannot end well: calibration writes every network in float32, and the model has a
    quarter of that at least.

    Raises:
        InputError: too little disk, with what is needed and what is free.
    """
    floats = sum(disk.sizes(artifact, "fp32").values())
    if said := disk.lacking(
        precision, floats if precision == "int8-static" else 0, floats // 4, out
    ):
        raise InputError(said)


def _kept(keep_float: Any) -> None:
    """Parts and regular expressions of `keep_float`, or an InputError."""
    if keep_float is None:
        return
    if not isinstance(keep_float, Mapping) or set(keep_float) - set(PARTS):
        raise InputError(
            f"keep_float={keep_float!r}; accepted: a dict of {', '.join(PARTS)} to regular"
            " expressions of module names."
        )
    for part, expressions in keep_float.items():
        for expression in (
            arguments.lines(f"keep_float[{part!r}]", expressions) if len(expressions) else ()
        ):
            try:
                re.compile(expression)
            except re.error as e:
                raise InputError(
                    f"keep_float[{part!r}]: {expression!r} is not a regular expression ({e})."
                ) from e


def _float_pipeline(
    model: Pipeline | str | Path, scratch: Path, threads: int | None, sampler: str | None
) -> Pipeline:
    if isinstance(model, Pipeline):
        if model.report.backend != "onnxruntime" or model.report.precision not in ("fp32", "fp16"):
            raise PrecisionError(
                f"the pipeline is {model.report.precision} on {model.report.backend}; quantising"
                " starts from fp32 (or fp16) on onnxruntime: Pipeline.from_pretrained(model,"
                " precision='fp32', backend='onnxruntime')."
            )
        return on_demand(model.artifact.with_sampler(sampler), threads)
    artifact = Artifact.open(hub.resolve(model, None))
    if artifact.export:
        raise InputError(
            f"{artifact.folder} is an export for {artifact.export.target}; quantize the model that"
            " it was made from."
        )
    known_sampler(sampler or artifact.sampler_name)  # before any work
    if artifact.manifest is None:
        from sdlite.converter import convert

        log.warning(
            "%s has no ONNX graphs: converting it into a temporary folder first", artifact.folder
        )
        artifact = Artifact.open(convert(artifact.folder, scratch / "onnx", name=artifact.name))
    if not artifact.has_onnx("fp32"):
        held = ", ".join(artifact.manifest.variants) if artifact.manifest else "none"
        raise PrecisionError(
            f"{artifact.name} holds no float ONNX graphs (it holds: {held}); quantise the float"
            " model that it came from."
        )
    return on_demand(artifact.with_sampler(sampler), threads)


def _prompts(pipe: Pipeline, calibration: Calibration, gate: Gate) -> None:
    """Fill in the prompts of both, apart from each other where there are enough."""
    if calibration.prompts is None:
        own = (
            (pipe.artifact.manifest.calibration or {}).get("prompts")
            if pipe.artifact.manifest
            else None
        )
        if not own:
            raise InputError(
                f"{pipe.artifact.name} has no calibration prompts of its own; give some that are"
                " like your users' (16 or more): --prompts FILE, or Calibration(prompts=[...])."
            )
        calibration.prompts = list(own)
    calibration.prompts = [p for p in calibration.prompts if p.strip()]
    if gate.prompts is None:
        gate.prompts = calibration.prompts[calibration.samples :] or calibration.prompts
    gate.prompts = list(gate.prompts)[: gate.num_prompts]
    if not gate.prompts or not gate.seeds:
        raise InputError("the gate has no prompts or no seeds; give at least one of each.")


def _doubts(calibration: Calibration, gate: Gate) -> list[str]:
    """What the prompts cannot show, in words."""
    assert calibration.prompts is not None
    assert gate.prompts is not None
    shown = set(calibration.prompts[: calibration.samples])
    out = []
    if len(shown) == 1:
        out.append(
            f"ranges are measured on a single prompt ({next(iter(shown))!r}), so other prompts may"
            " leave them; give 16 or more that are like your users'."
        )
    if both := len(shown & set(gate.prompts)):
        out.append(
            f"{both} of the gate's {len(set(gate.prompts))} prompts were calibrated on too, so the"
            " gate cannot tell how the model does on others; give more prompts than samples"
            f" ({calibration.samples}), or Gate(prompts=[...])."
        )
    return out


@dataclasses.dataclass
class _Work:
    pipe: Pipeline
    precision: str
    scratch: Path
    calibration: Calibration
    gate: Gate
    threads: int | None
    progress: bool
    warnings: list[str]

    def let_go(self) -> None:
        """Close the float networks and remove the graphs of finished passes."""
        let_go(self.pipe)
        for path in self.scratch.glob("*.onnx*"):
            path.unlink()

    def graph(self, part: str) -> Graph:
        return Graph.load(self.pipe.artifact.graph("fp32", part))

    def bar(self, run: Iterable[Any], total: int, text: str) -> Iterable[Any]:
        if not self.progress:
            return run
        from tqdm import tqdm

        return tqdm(run, total=total, desc=text)


# --- static


def _static(
    work: _Work, scheme: insert.Scheme, keep: dict[str, Sequence[str]]
) -> Callable[[Iterable[str]], dict[str, Any]]:
    graphs = {p: work.graph(p) for p in PARTS}
    floats = {p: g.total_bytes() for p, g in graphs.items()}
    total = {
        p: sum(w.size for w in g.weights.values() if w.dtype == np.float32)
        for p, g in graphs.items()
    }
    rewrites = _rewrite(work, graphs, keep)
    layers = {p: _quantisable(g, keep[p]) for p, g in graphs.items()}
    histograms = _histograms(work, graphs, layers)
    work.let_go()
    ranges = {
        p: {
            t: choose_range(
                h,
                work.calibration.observer,
                work.calibration.percentile,
                scheme.activation == "int8",
            )
            for t, h in histograms[p].items()
        }
        for p in PARTS
    }
    ratios = _layer_sqnr(work, graphs, layers, ranges, scheme)
    work.let_go()
    for p in PARTS:
        rewrites[p]["embeddings"] = rewrite.integer_embeddings(graphs[p])

    def build(back: Iterable[str]) -> dict[str, Any]:
        back, out = set(back), {}
        for p in PARTS:
            chosen = [layer for layer in layers[p] if f"{p}/{layer.name}" not in back]
            graph = insert.insert(graphs[p], chosen, ranges[p], scheme)
            integer = sum(layer.parameters for layer in chosen) + sum(
                rewrites[p]["embeddings"].values()
            )
            out[p] = {
                "graph": graph,
                "scheme": scheme.name,
                "arithmetic": f"int8 ({scheme.name}), rest float32",
                "bytes": graph.total_bytes(),
                "float_bytes": floats[p],
                "float_share": 1 - integer / total[p],
                "rewrites": rewrites[p],
                "layers": [
                    _row(
                        layer,
                        ranges[p],
                        histograms[p],
                        ratios[f"{p}/{layer.name}"],
                        "float" if layer not in chosen else scheme.name,
                    )
                    for layer in layers[p]
                ],
            }
        return out

    build.order = sorted(ratios, key=lambda k: ratios[k])  # type: ignore[attr-defined]
    build.sizes = {f"{p}/{layer.name}": layer.parameters for p in PARTS for layer in layers[p]}  # type: ignore[attr-defined]
    return build


def _quantisable(graph: Graph, keep: Sequence[str]) -> list[Layer]:
    return [layer for layer in graph.layers() if not any(re.search(k, layer.name) for k in keep)]


def _row(
    layer: Layer,
    ranges: dict[str, Any],
    histograms: dict[str, Histogram],
    ratio: float,
    scheme: str,
) -> dict[str, Any]:
    h = histograms[layer.input]
    row = {
        "name": layer.name,
        "op": layer.op,
        "parameters": layer.parameters,
        "scheme": scheme,
        "input_seen": [h.low, h.high],
        "input_range": list(ranges[layer.input]),
        "sqnr": None if np.isinf(ratio) else ratio,
        "input_seen_per_step": [list(h.steps[s]) for s in sorted(h.steps)],
    }
    if layer.output in ranges:
        row["output_range"] = list(ranges[layer.output])
    return row


def _rewrite(
    work: _Work, graphs: dict[str, Graph], keep: dict[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """Split and smooth in place, from one look at a few samples."""
    linear: dict[str, set[str]] = {}
    seen: dict[str, dict[str, ChannelMax]] = {}
    sessions: dict[str, NamedOutputs] = {}
    for p, graph in graphs.items():
        producers, layers = graph.producers(), graph.layers()
        concats = [
            producers[layer.input]
            for layer in layers
            if layer.op == "Conv" and layer.input in producers
        ]
        linear[p] = {layer.input for layer in layers if layer.op != "Conv"}
        seen[p] = {
            x: ChannelMax()
            for x in linear[p] | {x for n in concats if n.op_type == "Concat" for x in n.input}
        }
        inputs = {i.name for i in graph.proto.graph.input}
        watched = graph.outputs(sorted(set(seen[p]) - inputs))
        sessions[p] = _EchoSession(
            watched, work.scratch / f"{p}-rewrite.onnx", work.threads, linear[p] & inputs
        )

    def visit(part: str, _: int, name: str, x: np.ndarray) -> None:
        if name in seen[part]:
            seen[part][name].shape = x.shape
            if name in linear[part]:
                seen[part][name].add(x)

    samples = min(4, work.calibration.samples)
    for _ in work.bar(
        walk(work.pipe, work.calibration, sessions, visit, samples), 2 * samples, "outliers"
    ):
        pass
    sessions.clear()
    work.let_go()
    alpha, out = work.calibration.smooth_alpha, {}
    for p, graph in graphs.items():
        done: dict[str, Any] = {
            "split_concat": rewrite.split_concat(
                graph, {x: s.shape for x, s in seen[p].items() if s.shape}
            )
        }
        text = seen[p].get("encoder_hidden_states")
        outlier = text is not None and text.first_token > 2 * text.other_tokens
        done["split_first_token"] = (
            rewrite.split_first_token(graph, "encoder_hidden_states") if outlier else []
        )
        done["smooth"] = (
            rewrite.smooth(graph, seen[p], alpha, keep=keep[p]) if alpha is not None else {}
        )
        out[p] = done
    return out


class _EchoSession(NamedOutputs):
    """Also returns these inputs."""

    def __init__(self, graph: Graph, path: Path, threads: int | None, echo: Iterable[str]):
        super().__init__(graph, path, threads)
        self.echo = set(echo)

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        return {**super().__call__(**inputs), **{k: v for k, v in inputs.items() if k in self.echo}}


def _histograms(
    work: _Work, graphs: dict[str, Graph], layers: dict[str, list[Layer]]
) -> dict[str, dict[str, Histogram]]:
    out: dict[str, dict[str, Histogram]] = {}
    sessions: dict[str, NamedOutputs] = {}
    for p in PARTS:
        wanted = {layer.input for layer in layers[p]} | {
            layer.output for layer in layers[p] if layer.op == "Conv"
        }
        inputs = {i.name for i in graphs[p].proto.graph.input}
        out[p] = {t: Histogram() for t in sorted(wanted)}
        sessions[p] = _EchoSession(
            graphs[p].outputs(sorted(wanted - inputs)),
            work.scratch / f"{p}-observe.onnx",
            work.threads,
            wanted & inputs,
        )

    def visit(part: str, step: int, name: str, x: np.ndarray) -> None:
        if name in out[part]:
            out[part][name].add(x, step, f"{part}/{name}")

    samples = work.calibration.samples
    for _ in work.bar(
        walk(work.pipe, work.calibration, sessions, visit, samples), 2 * samples, "ranges"
    ):
        pass
    # the text encoder is cheap and its words are many: it sees every calibration prompt, not only
    # those that were painted
    judged = set(work.gate.prompts or ())
    for prompt in [p for p in work.calibration.prompts or () if p not in judged][:512]:
        for name, x in sessions["text_encoder"](input_ids=work.pipe.tokenize([prompt])).items():
            visit("text_encoder", 0, name, x)
    return out


def _layer_sqnr(
    work: _Work,
    graphs: dict[str, Graph],
    layers: dict[str, list[Layer]],
    ranges: dict[str, dict[str, insert.Range]],
    scheme: insert.Scheme,
) -> dict[str, float]:
    """Each layer alone, on float inputs: dB by "part/module"."""
    sessions = {
        p: NamedOutputs(
            insert.insert(graphs[p], layers[p], ranges[p], scheme, twin=True),
            work.scratch / f"{p}-twin.onnx",
            work.threads,
        )
        for p in PARTS
    }
    sums: dict[tuple[str, str], float] = {}

    def visit(part: str, _: int, name: str, x: np.ndarray) -> None:
        if x.ndim == 0:
            sums[part, name] = sums.get((part, name), 0.0) + float(x)

    samples = min(4, work.calibration.samples)
    for _ in work.bar(
        walk(work.pipe, work.calibration, sessions, visit, samples), 2 * samples, "layer by layer"
    ):
        pass
    return {
        f"{p}/{layer.name}": sqnr(
            sums[p, insert.signal_name(layer)], sums[p, insert.noise_name(layer)]
        )
        for p in PARTS
        for layer in layers[p]
    }


# --- the search, the gate and the writing


def _until_it_holds(
    work: _Work, build: Callable[[Iterable[str]], dict[str, Any]], out: Path, keep_failed: bool
) -> dict[str, Any]:
    """Put the worst layers back to float until the gate holds on every engine."""
    order: list[str] = getattr(build, "order", [])
    sizes: dict[str, int] = getattr(build, "sizes", {})
    budget = work.gate.max_float * sum(sizes.values())
    assert work.gate.prompts is not None
    reference = gates.pictures(work.pipe, work.gate.prompts, work.gate)
    floats = gates.calls(work.pipe, work.gate.prompts, work.gate)
    let_go(
        work.pipe
    )  # what it answered is kept: the quantised networks do not need to fit beside it
    back: list[str] = []
    history: list[dict[str, Any]] = []
    with writing(out) as tmp:
        while True:
            parts = build(back)
            _write(work, parts, tmp)
            results, made = _check(work, tmp, reference, floats)
            failures = [f for c in results for f in c.fails(work.gate)]
            history.append(
                {
                    "float_layers": len(back),
                    "psnr_mean": {c.engine: c.psnr_mean for c in results},
                    "failures": failures,
                }
            )
            if not failures:
                break
            more = [k for k in order if k not in back][: max(1, len(order) // 20)]
            if not more or sum(sizes[k] for k in [*back, *more]) > budget:
                report = _report(work, parts, results, back, history)
                if keep_failed:
                    _manifest(work, parts, tmp, results, failures)
                write = functools.partial(
                    reports.write, report=report, reference=reference, made=made
                )
                kept = reports.keep_failed(out, write, tmp if keep_failed else None)
                raise QuantizationError(_failure(work, results, failures, back, kept))
            back += more
            log.info(
                "the gate does not hold (%s); back to float: %s",
                "; ".join(failures),
                ", ".join(more),
            )
        report = _report(work, parts, results, back, history)
        reports.write(tmp, report, reference, made)
        _manifest(work, parts, tmp, results)
    return report


def _failure(
    work: _Work, results: list[Comparison], failures: list[str], back: list[str], kept: str
) -> str:
    """The error's words: what fails, how far the search went, where the images are, and what this
    mode lets one do.
    """
    part, ratio = min(results[0].networks.items(), key=lambda kv: kv[1])
    said = (
        f"the gate does not hold: {'; '.join(failures)}; worst network {part} ({ratio:.1f} dB),"
        f" worst picture {results[0].worst}"
    )
    if work.precision == "int8-dynamic":
        advice = (
            "Keep the worst network's layers in float (keep_float), try int8-static, which searches"
            " for them, or lower the gate on purpose."
        )
    else:
        said += (
            f"; {len(back)} layers are back in float and max_float={work.gate.max_float} allows no"
            " more"
        )
        advice = (
            "Give more calibration samples, another observer, a larger max_float, or lower the gate"
            " on purpose."
        )
    return f"{said}. No model was written; {kept}. {advice}"


def _report(
    work: _Work,
    parts: dict[str, Any],
    results: list[Comparison],
    back: list[str],
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    return reports.report(
        work.pipe,
        work.precision,
        work.calibration,
        work.gate,
        parts,
        results,
        back_to_float=back,
        search=history,
        warnings=work.warnings,
    )


def _write(work: _Work, parts: dict[str, Any], folder: Path) -> None:
    source = work.pipe.artifact
    for child in folder.iterdir():
        remove(child) if child.is_dir() else child.unlink()
    (folder / "model_index.json").write_text(
        json.dumps(families.listed_index(source.index), indent=1) + "\n"
    )
    for part in ("tokenizer", "scheduler", "text_encoder", "unet", "vae", "vae_decoder"):
        if (source.folder / part).is_dir():
            source.files.part(part).copy_configs(folder / part)
    for part, built in parts.items():
        built["files"] = built["graph"].save(folder / part / f"model.{work.precision}.onnx")
    _manifest(work, parts, folder, [])


def _manifest(
    work: _Work,
    parts: dict[str, Any],
    folder: Path,
    results: list[Comparison],
    failures: Sequence[str] = (),
) -> None:
    own = work.pipe.artifact.manifest
    assert own is not None
    c = work.calibration
    manifest = Manifest(
        name=own.name, student=own.student, sampler=own.sampler, size_multiple=own.size_multiple
    )
    manifest.variants = {
        work.precision: {
            p: {
                "file": f"{p}/{built['files'][0].name}",
                "weights": [f"{p}/{f.name}" for f in built["files"][1:]],
                "opset": built["graph"].proto.opset_import[0].version,
                "storage": "int8",
                "arithmetic": built["arithmetic"],
                "scheme": built["scheme"],
            }
            for p, built in parts.items()
        }
    }
    if work.precision == "int8-static":
        prompts = list(c.prompts or [])
        manifest.calibration = {
            "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
            "num_prompts": len(prompts),
            "samples": c.samples,
            "seed": c.seed,
            "num_inference_steps": c.num_inference_steps or work.pipe.defaults.num_inference_steps,
            "observer": c.observer,
        }
    if results:
        manifest.quality = {
            "against": "fp32 onnxruntime",
            "engines": {r.engine: r.to_dict() for r in results},
        }
    if failures:
        manifest.quality = {**(manifest.quality or {}), "failed": list(failures)}
    write_manifest(folder, manifest)


def _engines(work: _Work) -> list[str]:
    from sdlite.backends import installed_with

    return (
        list(work.gate.engines) if work.gate.engines is not None else installed_with(work.precision)
    )


def _check(
    work: _Work, folder: Path, reference: np.ndarray, floats: dict[str, list[Call]]
) -> tuple[list[Comparison], np.ndarray]:
    assert work.gate.prompts is not None
    results, shown = [], reference
    for i, engine in enumerate(_engines(work)):
        pipe = Pipeline.from_pretrained(
            folder, precision=work.precision, backend=engine, threads=work.threads
        )
        result, made = gates.compare(reference, floats, pipe, work.gate.prompts, work.gate)
        del pipe  # the next engine's networks do not need to fit beside these
        results.append(result)
        shown = made if i == 0 else shown
    return results, shown
