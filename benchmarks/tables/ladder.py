"""The original's shape and its students, beside the article's figures."""

from __future__ import annotations

from pathlib import Path

from benchmarks.tables.machine import share
from benchmarks.tables.rows import NAMES, RESULTS, missing, number, results, spread, table

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


def zoo(folder: Path = RESULTS, full: bool = True) -> list[str]:
    found = results("zoo-512", folder)
    if not found:
        return missing("zoo-512")
    good = {(r.case["model"], *r.name, r.case["batch"]): r for r in found if not r.error}
    plain = good.get(("shape:sd14", "diffusers", "fp32", 1))
    same = good.get(("shape:sd14", "sdlite-openvino", "fp32", 1))
    header = [
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
    ]
    ratios = ["x original, same engine", "x original, diffusers", "article: x, GB", "of the limit"]
    body = []
    for r in found:
        c = r.case
        head = [
            NAMES.get(c["model"], c["model"]),
            f"{c['engine']} {c['precision']}",
            str(c["batch"]),
        ]
        if r.error:
            body.append(
                [
                    *head,
                    f"failed: {r.error.replace('|', '/')[:160]}",
                    *[""] * (len(header) + (len(ratios) if full else 0) - 4),
                ]
            )
            continue
        p = r.rows[0]["parameters"]
        step, each = r.stage("unet"), [s / c["batch"] for s in r.samples]
        cells = [
            *head,
            " + ".join(f"{p[k] / 1e6:.0f}" for k in ("unet", "text_encoder", "vae")),
            number(r.median("bytes"), 0, 1e-6),
            number(r.median("load_seconds"), 1),
            number(None if step is None else step / c["steps"], 3),
            spread(each),
            number(r.images_per_second, 3),
            number(r.median("peak_mib"), 0),
        ]
        if full:
            twin = TWIN.get((c["model"], c["precision"])) if c["batch"] == 1 else None
            cells += [number(b and b.seconds / r.seconds * c["batch"]) for b in (same, plain)]
            cells += [
                (
                    f"{ARTICLE['original'][2] / ARTICLE[twin][2]:.1f}x, {ARTICLE[twin][1]:g} GB"
                    if twin
                    else ""
                ),
                share(r, folder),
            ]
        body.append(cells)
    return table([*header, *(ratios if full else [])], body)


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
        c = r.case
        calls = f"{c['steps']}, {'guided' if c['guidance'] != 1 else 'one call each'}"
        head = [NAMES.get(c["model"], c["model"]), f"{c['engine']} {c['precision']}", calls]
        if r.error:
            body.append([*head, f"failed: {r.error.replace('|', '/')[:160]}", "", ""])
            continue
        body.append(
            [
                *head,
                spread(r.samples),
                number(r.median("peak_mib"), 0),
                number(first and first.seconds / r.seconds, 1),
            ]
        )
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
    body = []
    first = found.get("original")
    for name, (params, gb, seconds) in ARTICLE.items():
        r = found.get(name)
        ours = ["", "", "", "", ""]
        if r:
            p = r.rows[0]["parameters"]["unet"]
            peak = r.median("peak_mib") or 0.0
            ours = [f"{p / 1e6:.0f}M", number(peak * 2**20 / 1e9), spread(r.samples)]
            ours += (
                [
                    f"{first.seconds / r.seconds:.1f}x",
                    f"{(first.median('peak_mib') or 0.0) / peak:.1f}x",
                ]
                if first
                else ["", ""]
            )
        body.append(
            [
                name,
                params,
                f"{gb:g}",
                f"{seconds:g}",
                f"{ARTICLE['original'][2] / seconds:.1f}x",
                f"{ARTICLE['original'][1] / gb:.1f}x",
                *ours,
            ]
        )
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
