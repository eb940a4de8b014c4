"""Models: the embedded one, its quality, int8 of several, published ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.tables.rows import RESULTS, read, table

EMBEDDED = RESULTS.parents[1] / "sdlite" / "models"


METRICS = {  # column -> (key, scale, digits)
    "identity@1 %": ("identity@1", 100, 1),
    "exact@1 %": ("exact@1", 100, 1),
    "color %": ("colour", 100, 1),
    "KID x1000": ("kid", 1, 2),
    "FID": ("fid", 1, 1),
    "held-out exact@1 %": ("heldout@1", 100, 1),
    "near copies %": ("memorised", 100, 1),
}


def latest(name: str) -> list[dict[str, Any]]:
    """The last row of each model, step count, guidance, precision and backend."""
    out: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in read(name):
        out[(r["model"], r["steps"], r["guidance"], r["precision"], r["backend"])] = r
    return list(out.values())


def quality() -> list[str]:
    body = []
    for r in latest("quality"):
        cells = [
            r["model"],
            str(r["steps"]),
            f"{r['guidance']:g}",
            f"{r['precision']} {r['backend']}",
        ]
        cells += [
            f"{r['mean'][k] * scale:.{d}f} ± {r['std'][k] * scale:.{d}f}"
            for k, scale, d in METRICS.values()
        ]
        body.append([*cells, f"{r['date']} `{r['commit']}`"])
    if not body:
        return ["Not measured yet: run `python -m benchmarks.quality emoji`."]
    return table(["model", "steps", "g", "run as", *METRICS, "measured"], body)


def notes() -> list[str]:
    out = []
    for r in latest("quality"):
        v = ", ".join(f"{k} {x}" for k, x in r["versions"].items() if k != "sdlite")
        line = (
            f"- {r['prompts']} prompts and {r['heldout']} held-out prompts, {len(r['seeds'])}"
            f" seeds, mean ± standard deviation over seeds. {r['cpu']}, {r['cores']} cores; {v}."
        )
        if line not in out:
            out.append(line)
    return out


def quantizing() -> list[str]:
    """The rows of each model's last run: cost, bytes, closeness to float on each engine."""
    run = {r["model"]: (r["date"], r["commit"], r["command"]) for r in read("quantise")}
    last = {
        (r["model"], r["precision"], r["scheme"]): r
        for r in read("quantise")
        if run[r["model"]] == (r["date"], r["commit"], r["command"])
    }
    body = []
    for r in last.values():
        size, whole = (sum(n[k] for n in r["networks"].values()) for k in ("bytes", "float_bytes"))
        close = "; ".join(
            f"{e['engine']} {e['psnr_mean']:.1f} / {e['psnr_worst']:.1f} dB, SSIM"
            f" {e['ssim_mean']:.4f}"
            for e in r["engines"]
        )
        body.append(
            [
                f"`{r['model']}`",
                f"{r['precision']} {r['scheme']}",
                str(r["samples"]),
                f"{r['seconds']:.0f}",
                f"{r['peak_mib']:,.0f}",
                f"{size / 1e6:,.1f} ({size / whole:.2f} of the float file)",
                f"{close} ({r['engines'][0]['pictures']} images)",
                " / ".join(decibels(v) for v in r["engines"][0]["networks"].values()),
                " / ".join(decibels(v) for v in r.get("alone", {}).values()),
                f"{r['date']} `{r['commit']}`",
            ]
        )
    if not body:
        return ["Not measured yet: run `python -m benchmarks.quantise emoji`."]
    head = [
        "model",
        "precision",
        "calibration images",
        "s",
        "peak MiB",
        "MB",
        "mean / worst PSNR to float",
        "text / UNet / VAE decoder / encoder: SQNR, dB",
        "PSNR with that one alone in int8, dB",
        "measured",
    ]
    return table(head, body)


def large() -> list[str]:
    """Models of gigabytes at their true shape: the last row of each task."""
    last = {(r["model"], r["dtype"], r["task"]): r for r in read("large_models")}
    body = [
        [
            f"`{model}`",
            f"{task}, {dtype} files",
            f"{r['seconds'] / 60:.1f} ({r['load']:.1f})",
            f"{r['peak_mib']:,.0f} (bar {r['bar_mib']:,.0f})",
            "" if "psnr_mean" not in r else f"{r['psnr_mean']:.1f}",
            ", ".join(f"{p} {decibels(v)}" for p, v in r.get("networks", {}).items()),
            f"{r['env']['date']} `{r['env']['commit']}`",
        ]
        for (model, dtype, task), r in sorted(last.items())
    ]
    head = [
        "model",
        "task",
        "minutes (load of 2 cores)",
        "peak MiB",
        "image, dB",
        "SQNR of networks, dB",
        "measured",
    ]
    return table(head, body)


def rounding() -> list[str]:
    """Int8 networks beside their layers rounded in torch: the last row of each."""
    last = {(r["model"], r["part"], r["precision"]): r for r in read("rounding")}
    body = []
    for (model, part, precision), r in last.items():
        kinds = sorted(r["kinds"].items(), key=lambda kv: kv[1]["both"])
        worst = ", ".join(f"{k} {v['both']:.1f}" for k, v in kinds[:3])
        whole = [
            decibels(r[k]) if k in r else ""
            for k in ("graph", "all", "weights", "inputs", "weights_8_bits", "again", "other")
        ]
        cells = [f"`{model}` {part}", precision, *whole, worst]
        body.append([*cells, f"{r['date']} `{r['commit']}`"])
    head = [
        "network",
        "precision",
        "graph",
        "the same layers rounded in torch",
        "their weights alone (7 bits)",
        "their inputs alone (8 bits)",
        "all, weights of 8 bits",
        "the graph to itself, inputs changed by 1e-5",
        "the graph on OpenVINO to it",
        "kinds of layers alone, worst three",
        "measured",
    ]
    return table(head, body)


def decibels(value: float | None) -> str:
    """Equal numbers are infinitely close, which JSON does not hold."""
    return "equal" if value is None or value == float("inf") else f"{value:.1f}"


def accumulation() -> list[str]:
    """How a decoder's error adds up, and what it is at other numbers of steps than were
    calibrated.
    """
    found = list(read("accumulation"))
    if not found:
        return []
    shape = next(
        r for r in reversed(found) if r["kind"] == "layers" and r["model"].startswith("shape:")
    )
    inner, last = [x for x in shape["layers"] if x["alone"] is not None], shape["layers"][-1]
    alone = [x["alone"] for x in inner]
    marks = [inner[0], *(x for x in inner if x["layer"].endswith("resnets.2.conv2"))]
    added = ", ".join(f"{x['together']:.1f} dB after `{x['layer']}`" for x in marks)
    steps = {(r["model"], r["steps"]): r for r in found if r["kind"] == "steps"}
    body = [
        [
            f"`{model}`",
            str(n),
            f"{r['decoder_input_std']:.1f}",
            *(f"{v:.1f}" for v in r["sqnr"].values()),
        ]
        for (model, n), r in steps.items()
    ]
    head = [
        "model",
        "steps",
        "deviation of the decoder's input",
        "text encoder, dB",
        "UNet, dB",
        "VAE decoder, dB",
    ]
    return [
        (
            f"Where the error of a random network comes from (`{shape['model']}`, {shape['size']}"
            f" px, `benchmarks/accumulation.py`): the decoder's {len(inner)} integer layers are"
            f" {min(alone):.1f} to {max(alone):.1f} dB each on float inputs, near what 8 bits of"
            f" activation and 7 of weight can be, and their errors add up: {added},"
            f" {last['together']:.1f} dB at the end. An untrained UNet does not take noise away, so"
            " the spread of its latents grows with the number of steps; the decoder's upsamplers"
            " and shortcuts read values that no norm has scaled, and ranges of four steps do not"
            " fit another number. The trained student's latents have one spread. SQNR of each"
            " network, calibrated at four steps:"
        ),
        "",
        *table(head, body),
    ]


def nncf() -> list[str]:
    """Our static int8 and NNCF's of the same model, both on OpenVINO, same run."""
    last = {(r["model"], r["quantiser"]): r for r in read("nncf")}
    body = [
        [
            f"`{r['model']}`",
            r["quantiser"],
            f"{r['psnr_mean']:.1f} / {r['psnr_worst']:.1f}",
            f"{r['ssim_mean']:.4f}",
            f"{r['bytes'] / 1e6:.1f}",
            (
                f"{np.median(r['unet_seconds']) * 1e3:.2f}"
                f" ({np.median(r['float_unet_seconds']) * 1e3:.2f})"
            ),
            str(r["pictures"]),
            f"{r['date']} `{r['commit']}`",
        ]
        for r in last.values()
    ]
    if not body:
        return ["Not measured yet: run `python -m benchmarks.nncf_peer emoji`."]
    return table(
        [
            "model",
            "quantizer",
            "mean / worst PSNR, dB",
            "SSIM",
            "MB",
            "UNet ms (float32)",
            "images",
            "measured",
        ],
        body,
    )


def published() -> list[str]:
    """Published model x engine: the last row of each model; refusals are numbered and quoted
    below.
    """
    last = {r["model"]: r for r in read("published")}
    if not last:
        return ["Not measured yet: run `python -m benchmarks.published`."]
    said: dict[str, int] = {}
    runs = list(dict.fromkeys(k for r in last.values() for k in r.get("runs", {})))
    body = []
    for r in last.values():
        apart = r.get("another_prompt")
        cells = [f"`{r['model']}`", "" if apart is None else f"{apart:.1f}"]
        for run in runs:
            value = r.get("runs", {}).get(run, "fault: " + r.get("error", "not run"))
            if isinstance(value, str):
                kind, words = value.split(": ", 1)
                value = f"{kind} ({said.setdefault(words, len(said) + 1)})"
            cells.append(value if isinstance(value, str) else f"{value:.1f}")
        body.append([*cells, f"{r['date']} `{r['commit']}`"])
    one = list(last.values())[-1]
    versions = ", ".join(f"{k} {v}" for k, v in one["versions"].items() if k in PUBLISHED_WITH)
    return [
        *table(["model", "another prompt", *runs, "measured"], body),
        "",
        *(f"{n}. {words}" for words, n in said.items()),
        *([""] if said else []),
        (
            f"Least of {one['prompts']} images, dB; {one['size_px']} px. {one['cpu']},"
            f" {one['cores']} cores; {versions}."
        ),
        *_true_widths(),
    ]


def _true_widths() -> list[str]:
    """What large images in true widths are, a line each."""
    last = {r["model"]: r for r in read("published_large")}
    return [
        line
        for r in last.values()
        if "runs" in r
        for line in (
            "",
            f"`{r['model']}` in the true widths of its UNet and text encoders, with the narrow"
            f" autoencoder, one image of {r['size_px']} px in one step:"
            f" {', '.join(f'{k} {v:.1f} dB' for k, v in r['runs'].items())} to diffusers'"
            f" ({r['date']} `{r['commit']}`).",
        )
    ]


PUBLISHED_WITH = (
    "numpy",
    "onnxruntime",
    "openvino",
    "torch",
    "diffusers",
    "transformers",
    "tokenizers",
)
