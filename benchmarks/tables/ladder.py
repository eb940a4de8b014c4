"""The original's shape and its students, beside the article's figures."""

from __future__ import annotations

from pathlib import Path

from benchmarks.tables.machine import share
from benchmarks.tables.rows import (
    NAMES,
    RESULTS,
    Result,
    failed,
    missing,
    number,
    results,
    spread,
    table,
)

# row of the article -> (parameters, GB, seconds); its hardware and step count are not given
ARTICLE = {
    "original": ("860M", 16.0, 12.3),
    "distilled": ("340M", 6.5, 4.8),
    "quantized": ("340M", 2.1, 2.1),
    "extreme": ("120M", 0.8, 0.9),
}
TWIN = {  # (model, precision) -> the article's row
    ("shape:sd14", "fp32"): "original",
    ("shape:w0.62", "fp32"): "distilled",
    ("shape:w0.62", "int8-static"): "quantized",
    ("shape:extreme-120m", "int8-static"): "extreme",
}


_ZOO = [
    "model",
    "run as",
    "batch",
    "UNet + text + VAE, M",
    "weights MB",
    "load s",
    "s/step",
    "s/image",
    "images/s",
    "peak MiB",
    "x original, same engine",
    "x original, diffusers",
    "article: x, GB",
    "of the limit",
]


def zoo(folder: Path = RESULTS) -> list[str]:
    """Every rung and the published students; ratios are to the original on the same engine, and on
    diffusers.
    """
    found = results("zoo-512", folder)
    if not found:
        return missing("zoo-512")
    good = {(r.case["model"], *r.name, r.case["batch"]): r for r in found if not r.error}
    originals = [
        good.get(("shape:sd14", engine, "fp32", 1)) for engine in ("sdlite-openvino", "diffusers")
    ]
    body = []
    for r in found:
        head = [*_who(r), str(r.case["batch"])]
        if r.error:
            body.append([*head, failed(r), *[""] * (len(_ZOO) - 4)])
        else:
            ratios = [number(b and b.seconds / r.seconds * r.case["batch"]) for b in originals]
            body.append([*head, *_costs(r), *ratios, _twin(r), share(r, folder)])
    return table(_ZOO, body)


def _who(r: Result) -> list[str]:
    c = r.case
    return [NAMES.get(c["model"], c["model"]), f"{c['engine']} {c['precision']}"]


def _costs(r: Result) -> list[str]:
    counts, step = r.rows[0]["parameters"], r.stage("unet")
    return [
        " + ".join(f"{counts[k] / 1e6:.0f}" for k in ("unet", "text_encoder", "vae")),
        number(r.median("bytes"), 0, 1e-6),
        number(r.median("load_seconds"), 1),
        number(None if step is None else step / r.case["steps"], 3),
        spread([s / r.case["batch"] for s in r.samples]),
        number(r.images_per_second, 3),
        number(r.median("peak_mib"), 0),
    ]


def _twin(r: Result) -> str:
    """The article's figures of this rung."""
    twin = TWIN.get((r.case["model"], r.case["precision"]))
    if twin is None or r.case["batch"] != 1:
        return ""
    _, gigabytes, seconds = ARTICLE[twin]
    return f"{ARTICLE['original'][2] / seconds:.1f}x, {gigabytes:g} GB"


def best(folder: Path = RESULTS) -> list[str]:
    """Each model at the steps that its kind needs."""
    found = results("best-512", folder)
    if not found:
        return missing("best-512")
    first = next(
        (
            r
            for r in found
            if (r.case["model"], r.case["steps"]) == ("shape:sd14", 25) and not r.error
        ),
        None,
    )
    body = []
    for r in found:
        calls = "guided" if r.case["guidance"] != 1 else "one call each"
        head = [*_who(r), f"{r.case['steps']}, {calls}"]
        if r.error:
            body.append([*head, failed(r), "", ""])
            continue
        faster = number(first and first.seconds / r.seconds, 1)
        body.append([*head, spread(r.samples), number(r.median("peak_mib"), 0), faster])
    return table(["model", "run as", "steps", "s/image", "peak MiB", "x original"], body)


def article(folder: Path = RESULTS) -> list[str]:
    """The article's first table, its figures and ours side by side (ours: this machine's CPU,
    OpenVINO, four steps).
    """
    found = {
        TWIN[r.case["model"], r.case["precision"]]: r
        for r in results("zoo-512", folder)
        if not r.error
        and r.case["batch"] == 1
        and r.case["engine"] == "sdlite-openvino"
        and (r.case["model"], r.case["precision"]) in TWIN
    }
    if not found:
        return missing("zoo-512")
    original = found.get("original")
    body = []
    for name, (parameters, gigabytes, seconds) in ARTICLE.items():
        _, most, longest = ARTICLE["original"]
        theirs = [parameters, f"{gigabytes:g}", f"{seconds:g}"]
        theirs += [f"{longest / seconds:.1f}x", f"{most / gigabytes:.1f}x"]
        body.append([name, *theirs, *_ours(found.get(name), original)])
    header = [
        "model",
        "article: UNet",
        "GB",
        "s",
        "faster",
        "smaller",
        "ours: UNet",
        "peak GB",
        "s",
        "faster",
        "smaller",
    ]
    return table(header, body)


def _ours(r: Result | None, original: Result | None) -> list[str]:
    """UNet, peak memory and seconds of a rung, and how much faster and smaller it is."""
    if r is None:
        return [""] * 5
    peak = r.median("peak_mib") or 0.0
    parameters = r.rows[0]["parameters"]["unet"]
    out = [f"{parameters / 1e6:.0f}M", number(peak * 2**20 / 1e9), spread(r.samples)]
    if original is None:
        return [*out, "", ""]
    smaller = (original.median("peak_mib") or 0.0) / peak
    return [*out, f"{original.seconds / r.seconds:.1f}x", f"{smaller:.1f}x"]
