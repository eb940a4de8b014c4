"""Write models.md, README.md's marked tables, the matrix of export/README.md and the plots: `python
-m benchmarks.report [--check]`.

All from manifests and committed results. `--check` writes nothing and exits 1 when a file differs:
the test suite runs it, so a figure there cannot drift. In README.md, what stands between `<!--
generated: NAME -->` and `<!-- end: NAME -->` is written here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import reliability
from benchmarks import speed_tables as speed

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
METRICS = {  # column -> (key, scale, digits)
    "identity@1 %": ("identity@1", 100, 1),
    "exact@1 %": ("exact@1", 100, 1),
    "colour %": ("colour", 100, 1),
    "KID x1000": ("kid", 1, 2),
    "FID": ("fid", 1, 1),
    "held-out exact@1 %": ("heldout@1", 100, 1),
    "near copies %": ("memorised", 100, 1),
}


def rows(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def latest(name: str) -> list[dict[str, Any]]:
    """The last row of each model, step count, guidance, precision and backend."""
    out: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in rows(name):
        out[(r["model"], r["steps"], r["guidance"], r["precision"], r["backend"])] = r
    return list(out.values())


def table(header: list[str], body: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(r) + " |" for r in body),
    ]


def embedded() -> list[str]:
    body = []
    for folder in sorted(p.parent for p in (ROOT / "sdlite" / "models").glob("*/sdlite.json")):
        m = json.loads((folder / "sdlite.json").read_text())
        s = m["student"]
        digest = hashlib.sha256((folder / "sdlite.json").read_bytes()).hexdigest()
        size = sum(f["bytes"] for f in m["files"].values()) / 1e6
        body.append(
            [
                f"`{m['name']}`",
                (
                    f"{s['unet_parameters'] / 1e6:.2f}M + {s['text_encoder_parameters'] / 1e6:.2f}M"
                    f" + {s['vae_parameters'] / 1e6:.2f}M"
                ),
                ", ".join(m["variants"]),
                f"{size:.1f} MB",
                (
                    f"{m['sampler']['name']}, {m['sampler']['num_inference_steps']} steps, g ="
                    f" {m['sampler']['guidance_scale']:g}"
                ),
                f"{s.get('training_images') or 0:,}",
                s["licence"],
                f"`{digest[:16]}`",
            ]
        )
    return table(
        [
            "model",
            "UNet + text + VAE",
            "precisions",
            "all files",
            "defaults",
            "training images",
            "licence",
            "manifest sha256",
        ],
        body,
    )


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


def quantising() -> list[str]:
    """The rows of each model's last run: cost, bytes, closeness to float on each engine."""
    run = {r["model"]: (r["date"], r["commit"], r["command"]) for r in rows("quantise")}
    last = {
        (r["model"], r["precision"], r["scheme"]): r
        for r in rows("quantise")
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
                f"{close} ({r['engines'][0]['pictures']} pictures)",
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
        "calibration pictures",
        "s",
        "peak MiB",
        "MB",
        "mean / worst PSNR to float",
        "text / UNet / VAE: SQNR, dB",
        "PSNR with that one alone in int8, dB",
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
    found = list(rows("accumulation"))
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
    last = {(r["model"], r["quantiser"]): r for r in rows("nncf")}
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
            "quantiser",
            "mean / worst PSNR, dB",
            "SSIM",
            "MB",
            "UNet ms (float32)",
            "pictures",
            "measured",
        ],
        body,
    )


def exports() -> list[str]:
    """The matrix of export/README.md: the last row of each model and profile."""
    last = {(r["model"], r["profile"]): r for r in rows("exports")}
    body = []
    for (model, name), r in sorted(last.items()):
        if "error" in r:
            body.append(
                [
                    model,
                    f"`{name}`",
                    "",
                    "",
                    f"failed: {r['error'].splitlines()[0][:120]}",
                    "",
                    "",
                    "",
                    "",
                    r["date"],
                ]
            )
            continue
        how = (
            "on the runtime"
            if r["not_run"] is None
            else f"not run ({r['not_run']}); {r['checked_by']}"
        )
        provider = r["options"].get("provider") or ("vulkan" if r["options"].get("vulkan") else "")
        worst = min(n["sqnr"] for n in r["parity"]["networks"].values())
        made = r.get("picture_seconds")
        if made:
            how += f"; a picture in {made['first']:.1f} s, then {np.median(made['later']):.1f} s"
        to_float = (
            f", {min(r['parity']['reference']):.1f} dB to fp32"
            if r["parity"].get("reference")
            else ""
        )
        body.append(
            [
                model + (f", {r['size_px']} px" if r.get("size_px") else ""),
                f"`{name}`",
                r["precision"],
                f"{r['bytes'] / 1e6:.1f} MB",
                how + (f", {provider}" if provider else ""),
                f"{min(r['parity']['psnr'] or [float('nan')]):.1f} dB / {worst:.1f} dB{to_float}",
                f"{r['seconds']:.0f}",
                " + ".join(f"{p:,.0f}" for p in (r["peak_mib"], r.get("converter_peak_mib")) if p),
                ", ".join(f"{k} {v}" for k, v in r["tools"].items()),
                r["date"],
            ]
        )
    if not body:
        return ["Not measured yet: run `python -m benchmarks.export emoji`."]
    return table(
        [
            "model",
            "profile",
            "precision",
            "networks",
            "checked",
            "worst picture PSNR / network SQNR",
            "s",
            "peak MiB + converter's",
            "tools",
            "date",
        ],
        body,
    )


def published() -> list[str]:
    """Published model x engine: the last row of each model; refusals are numbered and quoted
    below.
    """
    last = {r["model"]: r for r in rows("published")}
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


def fused() -> list[str]:
    """What `--fuse-schedule` saves of the UNet's calls: the last row of each model, size and
    guidance.
    """
    last = {(r["model"], r["size_px"], r["steps"], r["guidance"]): r for r in rows("fused")}
    spread = lambda x: f"{np.median(x):.3f} ({min(x):.3f} to {max(x):.3f})"  # noqa: E731
    body = [
        [
            model,
            f"{size} px" if size else "own",
            str(steps),
            f"{guidance:g}",
            *(spread(r["samples_seconds"][n]) for n in ("onnx-fixed", "onnx-fused")),
            f"{r['saved']:.1%}",
            f"{r['largest_difference']:.1e}",
            str(len(r["samples_seconds"]["onnx-fixed"])),
            f"{r['date']} `{r['commit']}`, {r['cpu']}",
        ]
        for (model, size, steps, guidance), r in sorted(last.items(), key=str)
    ]
    if not body:
        return ["Not measured yet: run `python -m benchmarks.fused emoji`."]
    return table(
        [
            "model",
            "picture",
            "steps",
            "guidance",
            "s, one graph",
            "s, three graphs",
            "saved",
            "largest difference",
            "pictures",
            "measured",
        ],
        body,
    )


MARK = "<!-- generated by python -m benchmarks.report from here on -->"


def export_md() -> str:
    """export/README.md: what is written by hand above the mark, the matrix below."""
    text = (ROOT / "export" / "README.md").read_text()
    return "\n".join(
        [
            text.split(MARK)[0] + MARK,
            "",
            *exports(),
            "",
            "## What `--fuse-schedule` saves",
            "",
            (
                "Seconds of the UNet's calls for one picture with a new prompt, median (least to"
                " most), in turn: `python -m benchmarks.fused`."
            ),
            "",
            *fused(),
            "",
        ]
    )


def models_md() -> str:
    lines = [
        "# Models",
        "",
        (
            "Generated by `python -m benchmarks.report` from the manifests and"
            " `benchmarks/results/`; the tests fail when it is stale."
        ),
        "",
        "## Embedded",
        "",
        *embedded(),
        "",
        (
            "Data, teacher, recipe and licences: the manifest (`sdlite info emoji`),"
            " `benchmarks/emoji/README.md`, `NOTICE`."
        ),
        "",
        "## Quality",
        "",
        *quality(),
        "",
        (
            "Definitions: `benchmarks/quality.py`, which is also the command. FID is biased at this"
            " N; compare rows only with each other."
        ),
        *notes(),
        "",
        "One picture of the embedded student against one of its teacher (64 px, two threads):",
        "",
        *speed.teacher(),
        "",
        *speed.footnotes("teacher"),
        "",
        "## Published models",
        "",
        (
            "Folders with the published configs and file layouts and narrow random networks"
            " (`benchmarks/published_models.py`), as their model cards call"
        ),
        (
            "them, against diffusers' own pipeline in float32 at equal seeds: PSNR in dB, about 80"
            " and more where only rounding differs. OpenVINO computes fp16 in"
        ),
        (
            "bfloat16 where the CPU has it: 8 bits of mantissa, and guidance multiplies the error;"
            " diffusers in bfloat16 is the last column. `python -m benchmarks.published` measures"
            " it again."
        ),
        "",
        *published(),
        "",
        "## Quantising",
        "",
        (
            "Shapes have random weights. Rows from before 2026-11-26 are from before a fault was"
            " mended: smoothing scaled every norm that shared a constant with"
        ),
        (
            "the one it meant, which untrained text encoders do; a text encoder far below 20 dB is"
            " that fault. Seconds of `shape:bk-tiny` are of a machine that had other work beside."
        ),
        "",
        *quantising(),
        "",
        *accumulation(),
        "",
        "OpenVINO's own quantiser on the same model, both on OpenVINO (`benchmarks/nncf_peer.py`):",
        "",
        *nncf(),
        "",
        (
            "Memory of a picture at run time, BK-Tiny shape, 512 px, 4 steps"
            " (`Pipeline.enable_vae_tiling(320)` decodes in four tiles):"
        ),
        "",
        *speed.memory(),
        "",
        *speed.footnotes("memory-512"),
        "",
        "## The article's ladder",
        "",
        (
            "Random weights in SD-1.x shape, 512 px, 4 steps, no guidance. The article does not say"
            " its hardware, size or steps: compare ratios, not seconds."
        ),
        "",
        *speed.article(),
        "",
        "Every rung, and the published students:",
        "",
        *speed.zoo(),
        "",
        *speed.footnotes("zoo-512"),
        "",
        (
            "The same at the steps that each model's kind needs: the original, and students that"
            " imitate it step by step, 25 guided steps (two network rows each); few-step students 4"
            " steps."
        ),
        "",
        *speed.best(),
        "",
        *speed.footnotes("best-512"),
        "",
        "## The article's strategies",
        "",
        *speed.strategies(),
        "",
        "## Against other tools",
        "",
        (
            "The same BK-Tiny-shaped weights, 512 px, 4 steps, no guidance; each peer as its own"
            " documentation says it is fastest (last column). The PSNR of sdlite's int8 rows is"
            ' from before smoothing was mended: 40 dB now ("Quantising").'
        ),
        "",
        *speed.verdict(),
        *([""] if speed.verdict() else []),
        *speed.peers(),
        "",
        *speed.footnotes("peers-512"),
        "",
        "The embedded student, 64 px, 4 steps:",
        "",
        *speed.peers("int8-emoji"),
        "",
        *speed.footnotes("int8-emoji"),
        "",
        "The same, float32, with torch.compile and optimum:",
        "",
        *speed.floats(),
        "",
        *speed.footnotes("emoji"),
        "",
        "The BK-Tiny shape at 256 px, 4 steps, float32:",
        "",
        *speed.floats("bk-tiny-256"),
        "",
        *speed.footnotes("bk-tiny-256"),
        "",
        "## Scaling",
        "",
        *speed.scaling(),
        "",
        *speed.footnotes("scaling"),
        "",
        "## The limit of this CPU",
        "",
        *speed.roofline(),
        "",
        "## Where the time goes",
        "",
        *speed.profiles(),
        "",
        "## Tried to break",
        "",
        (
            "Corpus 0 is what was found by hand, corpus 1 is drawn, and each reader got files"
            " changed at random (`python -m benchmarks.hostile`). An image is wrong where"
        ),
        (
            'it is not the whole model\'s although the manifest is untouched; "run rightly" also'
            " counts files whose change does not matter."
        ),
        "",
        *reliability.hostile(),
        "",
        "Kills at random moments, then a clean run (`python -m benchmarks.kills`):",
        "",
        *reliability.kills(),
        "",
        (
            "Calls of mixed sizes, samplers and batches by 2, 8 and 32 threads, against the same"
            " calls alone, bit by bit (`python -m benchmarks.threads`):"
        ),
        "",
        *reliability.threads(),
        "",
        "Memory in MiB (`python -m benchmarks.soak`):",
        "",
        *reliability.soak(),
        "",
        *pictures(),
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip("\n") + "\n"


def pictures() -> list[str]:
    drawn = speed.plots()
    return (
        ["## Plots", "", *(f"![{n}](benchmarks/plots/{n}.svg)" for n in drawn), ""] if drawn else []
    )


SECTIONS = {  # README.md: mark -> lines
    "speed": lambda: [
        *speed.verdict(),
        *([""] if speed.verdict() else []),
        *speed.peers(full=False),
        "",
        *speed.footnotes("peers-512"),
    ],
    "zoo": lambda: [*speed.zoo(full=False), "", *speed.footnotes("zoo-512")],
    "article": speed.article,
}


def readme_md() -> str:
    """README.md with its marked tables written anew; the rest is by hand."""
    text = (ROOT / "README.md").read_text()
    for name, lines in SECTIONS.items():
        start, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        if start in text:
            head, rest = text.split(start, 1)
            text = (
                head
                + start
                + "\n\n"
                + "\n".join(lines()).strip("\n")
                + "\n\n"
                + end
                + rest.split(end, 1)[1]
            )
    return text


def files() -> dict[Path, str]:
    """Every generated text."""
    return {
        ROOT / "models.md": models_md(),
        ROOT / "export" / "README.md": export_md(),
        ROOT / "README.md": readme_md(),
    }


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--check", action="store_true")
    args = ap.parse_args()
    stale = False
    for path, text in files().items():
        name = path.relative_to(ROOT)
        if not args.check:
            path.write_text(text)
            print(name)
        elif not path.exists() or path.read_text() != text:
            stale = True
            print(f"{name} is stale: run python -m benchmarks.report")
        else:
            print(f"{name} is up to date")
    if not args.check:
        print(*(p.relative_to(ROOT) for p in (speed.draw() if speed.plots() else [])), sep="\n")
    elif old := speed.stale_plots():
        stale = True
        print(f"plots {', '.join(old)} are stale: run python -m benchmarks.report")
    return int(stale)


if __name__ == "__main__":
    raise SystemExit(main())
