"""Tables and plots of speed and memory from benchmarks/results: used by `benchmarks.report`, which
writes them into models.md and README.md.

Rows of the last run of a suite only (same command, commit and date as its newest row), all rounds
and samples of a case together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
PLOTS = Path(__file__).parent / "plots"
# row of the article -> (parameters, GB, seconds); its hardware and step count are not given
ARTICLE = {
    "original": ("860M", 16.0, 12.3),
    "distilled": ("340M", 6.5, 4.8),
    "quantised": ("340M", 2.1, 2.1),
    "extreme": ("120M", 0.8, 0.9),
}
TWIN = {  # (model, precision) -> the article's row
    ("shape:sd14", "fp32"): "original",
    ("shape:w0.62", "fp32"): "distilled",
    ("shape:w0.62", "int8-static"): "quantised",
    ("shape:extreme-120m", "int8-static"): "extreme",
}
NAMES = {
    "shape:sd14": "SD-1.4 (original)",
    "shape:w0.62": "`w0.62`",
    "shape:extreme-120m": "`extreme-120m`, tiny VAE",
    "shape:bk-base": "`bk-base`",
    "shape:bk-small": "`bk-small`",
    "shape:bk-tiny": "`bk-tiny`",
}
ARITHMETIC = {
    "bf16": "bfloat16",
    "f16": "float32",
    "q8_0": "int8",
    "int8": "int8",
    "int8-static": "int8",
    "int8-dynamic": "int8",
}


def read(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def last_run(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the date, commit and command of the last one."""
    key = ("date", "commit", "command")
    return [r for r in rows if all(r.get(k) == rows[-1].get(k) for k in key)] if rows else []


@dataclass(frozen=True)
class Result:
    """One case over all rounds. Seconds are of a whole call, which makes `batch` pictures."""

    case: dict[str, Any]
    samples: tuple[float, ...]
    rows: tuple[dict[str, Any], ...]
    error: str | None

    @property
    def name(self) -> tuple[str, str]:
        return self.case["engine"], self.case["precision"]

    @property
    def ours(self) -> bool:
        return bool(self.case["engine"].startswith("sdlite"))

    @property
    def seconds(self) -> float:
        return float(np.median(self.samples))

    @property
    def images_per_second(self) -> float:
        return float(self.case["batch"] * self.case.get("pipelines", 1) / self.seconds)

    def median(self, key: str) -> float | None:
        values = [r[key] for r in self.rows if r.get(key) is not None]
        return float(np.median(values)) if values else None

    def stage(self, key: str) -> float | None:
        values = [r["stage_seconds"][key] for r in self.rows if key in r.get("stage_seconds", {})]
        return float(np.median(values)) if values else None


def results(suite: str, folder: Path = RESULTS) -> list[Result]:
    """The last run of a suite, one entry a case, in the order of its first round; rows older than
    `setting` are not shown.
    """
    rows = last_run([r for r in read("speed", folder) if r["suite"] == suite and "setting" in r])
    cases: dict[str, list[dict[str, Any]]] = {}
    for r in rows:
        cases.setdefault(json.dumps(r["case"], sort_keys=True), []).append(r)
    out = []
    for found in cases.values():
        good = tuple(r for r in found if "error" not in r)
        error = None if good else found[-1]["error"]
        out.append(
            Result(
                found[0]["case"], tuple(s for r in good for s in r["samples_seconds"]), good, error
            )
        )
    return out


def teacher(folder: Path = RESULTS) -> list[str]:
    """The embedded student against its teacher, the same engine in each line."""
    found = {
        (r.case["model"], r.case["engine"]): r for r in results("teacher", folder) if not r.error
    }
    body = []
    for (model, engine), r in found.items():
        slow = found.get(("emoji-teacher", engine))
        if model == "emoji" and slow is not None:
            body.append(
                [
                    f"`{engine}`",
                    (
                        f"{slow.seconds * 1e3:,.0f} ({min(slow.samples) * 1e3:,.0f} to"
                        f" {max(slow.samples) * 1e3:,.0f})"
                    ),
                    (
                        f"{r.seconds * 1e3:.1f} ({min(r.samples) * 1e3:.1f} to"
                        f" {max(r.samples) * 1e3:.1f})"
                    ),
                    f"{slow.seconds / r.seconds:.0f}x",
                ]
            )
    if not body:
        return missing("teacher")
    return table(
        ["engine, fp32", "teacher, 50 guided steps, ms", "student, 4 steps, ms", "faster"], body
    )


def floats(suite: str = "emoji", folder: Path = RESULTS) -> list[str]:
    """A suite of float32 engines: seconds of a picture, memory, load, first picture."""
    found = [r for r in results(suite, folder) if not r.error]
    if not found:
        return missing(suite)
    body = [
        [
            f"`{r.case['engine']}`",
            str(r.case["steps"]),
            f"{r.case['guidance']:g}",
            spread(r.samples),
            number(r.median("peak_mib"), 0),
            number(r.median("load_seconds")),
            number(r.median("first_call_seconds")),
        ]
        for r in sorted(found, key=lambda r: (r.case["steps"], r.seconds))
    ]
    return table(
        ["engine, fp32", "steps", "g", "s/image", "peak MiB", "load s", "first call s"], body
    )


# --- the limit


def peaks(threads: int, folder: Path = RESULTS) -> dict[tuple[str, str], float]:
    """(dtype, op) -> the highest operations per second measured."""
    out: dict[tuple[str, str], float] = {}
    for r in last_run(read("roofline", folder)):
        if r["kind"] == "peak" and r["threads"] == threads and "error" not in r:
            key = (r["dtype"], r["op"])
            out[key] = max(out.get(key, 0.0), r["gops"] * 1e9)
    return out


def limit_seconds(case: dict[str, Any], folder: Path = RESULTS) -> float | None:
    """Least seconds of a call by this CPU's peaks, or None where the shape or the peak was not
    measured.
    """
    best, dtype = peaks(case["threads"], folder), ARITHMETIC.get(case["precision"], "float32")
    demand = {
        r["part"]: r
        for r in read("roofline", folder)
        if r["kind"] == "demand"
        and f"shape:{r['shape']}" == case["model"]
        and r["size_px"] == case["size_px"]
    }
    if not demand or not {(dtype, "conv"), (dtype, "matmul")} <= set(best):
        return None
    rows = case["batch"] * (1 if case["guidance"] == 1 else 2)
    calls = {"text_encoder": rows, "unet": rows * case["steps"], "vae_decoder": case["batch"]}
    return sum(
        n * sum(demand[p][op] / best[dtype, op] for op in ("conv", "matmul"))
        for p, n in calls.items()
    )


def share(r: Result, folder: Path = RESULTS) -> str:
    limit = limit_seconds(r.case, folder)
    return "" if limit is None or r.case.get("pipelines", 1) > 1 else f"{limit / r.seconds:.0%}"


# --- tables


def table(header: list[str], body: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(r) + " |" for r in body),
    ]


def number(value: float | None, digits: int = 2, scale: float = 1.0) -> str:
    return "" if value is None else f"{value * scale:,.{digits}f}"


def spread(samples: Sequence[float]) -> str:
    """Median (lowest to highest), seconds; four digits behind the point where there are only
    milliseconds.
    """
    digits = 2 if np.median(samples) >= 0.2 else 4
    return (
        f"{np.median(samples):.{digits}f} ({min(samples):.{digits}f} to {max(samples):.{digits}f})"
    )


def missing(suite: str) -> list[str]:
    return [f"Not measured yet: run `python -m benchmarks.run {suite}`."]


def footnotes(suite: str, folder: Path = RESULTS) -> list[str]:
    rows = last_run([r for r in read("speed", folder) if r["suite"] == suite and "setting" in r])
    if not rows:
        return []
    r, found = rows[-1], results(suite, folder)
    counts = sorted({len(x.samples) for x in found if not x.error})
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}" if counts else "0"
    v = ", ".join(f"{k} {x}" for k, x in r["versions"].items() if k != "sdlite")
    dirty = ", with uncommitted changes" if r["dirty"] else ""
    return [
        f"N = {n} pictures a row in {1 + max(x['round'] for x in rows)} interleaved processes;"
        f" seconds are the median (lowest to highest). {r['cpu']}, {r['cores']} cores, threads"
        f" {'/'.join(map(str, sorted({x['case']['threads'] for x in rows})))}; {v}. {r['date']},"
        f" commit `{r['commit']}`{dirty}, `{r['command']}`."
    ]


def order(found: list[Result]) -> list[Result]:
    """Fastest first, failed rows last."""
    return sorted(found, key=lambda r: (r.error is not None, r.seconds if r.samples else 0.0))


def peers(suite: str = "peers-512", folder: Path = RESULTS, full: bool = True) -> list[str]:
    found = order(results(suite, folder))
    if not found:
        return missing(suite)
    base = next((r for r in found if r.name == ("diffusers", "fp32") and not r.error), None)
    header = ["engine", "precision", "s/image", "x diffusers fp32", "peak MiB", "weights MB"]
    more = [
        "UNet s/step",
        "VAE s",
        "text s",
        "load s",
        "first call s",
        "of the limit",
        "PSNR to our fp32, dB",
        "setting",
    ]
    body = []
    for r in found:
        setting = (r.rows[0]["setting"] if r.rows else "") if full else ""
        mark = "**" if r.ours else ""
        if r.error:
            width = len(header) + (len(more) if full else 0)
            body.append(
                [
                    r.case["engine"],
                    r.case["precision"],
                    f"failed: {r.error.replace('|', '/')[:160]}",
                    *[""] * (width - 3),
                ]
            )
            continue
        ratio = "" if base is None else f"{base.seconds / r.seconds:.2f}"
        cells = [
            f"{mark}{r.case['engine']}{mark}",
            r.case["precision"],
            spread(r.samples),
            ratio,
            number(r.median("peak_mib"), 0),
            number(r.median("bytes"), 0, 1e-6),
        ]
        if full:
            step = r.stage("unet")
            cells += [
                number(
                    None if step is None else step / r.case["steps"], 3 if r.seconds >= 0.2 else 4
                ),
                number(r.stage("vae_decoder"), 2 if r.seconds >= 0.2 else 4),
                number(r.stage("text_encoder"), 3),
                number(r.median("load_seconds"), 1),
                number(r.median("first_call_seconds"), 1 if r.seconds >= 0.2 else 2),
                share(r, folder),
                number(r.median("psnr_to_sdlite_ort"), 1),
                setting,
            ]
        body.append(cells)
    return table([*header, *(more if full else [])], body)


def verdict(suite: str = "peers-512", folder: Path = RESULTS) -> list[str]:
    """Fastest of all, fastest int8 against the best peer's int8, least memory: as measured, whoever
    wins.
    """
    found = [r for r in results(suite, folder) if not r.error]
    if not any(r.ours for r in found) or all(r.ours for r in found):
        return []
    lines = []

    def best(rows: list[Result], key: Any) -> Result | None:
        return min(rows, key=key, default=None)

    for title, key, fit in (
        ("Fastest", lambda r: r.seconds, lambda r: True),
        (
            "Fastest in int8",
            lambda r: r.seconds,
            lambda r: ARITHMETIC.get(r.case["precision"]) == "int8",
        ),
        ("Least peak memory", lambda r: r.median("peak_mib"), lambda r: True),
    ):
        mine, other = (
            best([r for r in found if fit(r) and r.ours is us], key) for us in (True, False)
        )
        if mine and other:
            a, b, unit = key(mine), key(other), "MiB" if "memory" in title else "s"
            digits = 0 if unit == "MiB" else 2
            lines.append(
                f"- {title}: ours {' '.join(mine.name)} {a:.{digits}f} {unit}, best peer"
                f" {' '.join(other.name)} {b:.{digits}f} {unit}: {b / a:.2f}x."
            )
    return lines


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


def memory(folder: Path = RESULTS) -> list[str]:
    """Least memory of a 512 px picture, decoded at once and in tiles."""
    found = [r for r in results("memory-512", folder) if not r.error]
    if not found:
        return missing("memory-512")
    body = [
        [
            f"`{r.case['engine']}`",
            f"tiles of {r.case['tile_px']} px" if r.case["tile_px"] else "at once",
            number(r.median("peak_mib"), 0),
            number((r.median("peak_mib") or 0) * 2**20, 2, 1e-9),
            spread(r.samples),
            number(r.stage("vae_decoder")),
        ]
        for r in found
    ]
    return table(
        ["engine, int8-static", "decoded", "peak MiB", "peak GB", "s/image", "VAE s"], body
    )


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


STRATEGIES = [  # the article's second table: strategy, fewer parameters, faster, FID
    ["feature", "40%", "2.5x", "18.2"],
    ["output", "60%", "4.0x", "22.1"],
    ["progressive", "50%", "3.2x", "16.8"],
    ["adversarial", "45%", "2.8x", "15.3"],
]


STEPS_TITLE = (
    "Fewer steps, and no guidance pass. `start` is the shipped UNet after 60,000 more images of"
    " task, output and feature losses (`train_student.py --init`): it comes from a four-step"
    " student, so its own 4 steps are better than a fresh student's would be. Strategies go on from"
    " it, each halving from the halving before:"
)
AIDS = (
    "feature + output + multi-scale",
    "feature + output + mask",
    "feature + output + channel, temperature 4 to 1",
)  # against feature + output
RECOGNISABLE = 0.05  # identity@1 below this is chance and luck
SCORES = {  # column -> (key of a row, factor, digits)
    "KID x1000": ("kid", 1, 1),
    "FID": ("fid", 1, 1),
    "identity@1 %": ("identity@1", 100, 1),
    "colour %": ("colour", 100, 1),
    "held-out exact@1 %": ("heldout@1", 100, 1),
    "PSNR to teacher, dB": ("paired_psnr", 1, 2),
}


def strategies(folder: Path = RESULTS) -> list[str]:
    """The article's second table as it stands there, and ours: each strategy of
    `benchmarks.distil`, mean and deviation over seeds.
    """
    rows = read("distil", folder)
    out = [
        "As the article has it:",
        "",
        *table(["strategy", "fewer parameters", "faster", "FID"], STRATEGIES),
        "",
    ]
    if not rows:
        return [*out, "Ours: not measured yet: run `python -m benchmarks.distil size` and `steps`."]
    for which, title in (
        ("size", "The student made smaller, sampled in 25 guided steps:"),
        ("steps", STEPS_TITLE),
    ):
        mine = [r for r in rows if r["table"] == which]
        if not mine:
            continue
        fastest: dict[
            tuple[float, int], float
        ] = {}  # equal networks and calls are equal work, whatever else the machine did
        for r in mine:
            key = (r["parameters"], r["calls"])
            fastest[key] = min(fastest.get(key, r["seconds_per_image"]), r["seconds_per_image"])
        teacher = next((r for r in mine if r["strategy"] == "teacher"), None)
        groups = _budgets(mine)
        body = []
        for (name, images), same in groups.items():
            of = {
                k: float(np.median([r[k] for r in same])) for k in ("parameters", "macs", "minutes")
            }
            of["seconds_per_image"] = fastest[same[0]["parameters"], same[0]["calls"]]
            against = (
                (None, None)
                if teacher is None
                else (
                    fastest[teacher["parameters"], teacher["calls"]] / of["seconds_per_image"],
                    teacher["parameters"] / of["parameters"],
                )
            )
            body.append(
                [
                    name,
                    f"{of['parameters'] / 1e6:.1f}M",
                    "" if against[1] is None else f"{1 - 1 / against[1]:.0%}",
                    f"{of['macs'] / 1e6:,.0f}",
                    f"{same[0]['steps']} ({same[0]['calls']})",
                    f"{of['seconds_per_image']:.3f}",
                    "" if against[0] is None else f"{against[0]:.1f}x",
                    *(
                        f"{np.mean(v):.{d}f} ± {np.std(v, ddof=1) if len(v) > 1 else 0:.{d}f}"
                        for v, d in (([r[k] * f for r in same], d) for k, f, d in SCORES.values())
                    ),
                    f"{images:,}" if images else "",
                    f"{of['minutes']:.1f}" if images else "",
                    str(len(same)),
                ]
            )
        header = [
            "strategy",
            "UNet",
            "fewer parameters",
            "M MACs a call",
            "steps (network calls)",
            "s/image",
            "faster",
            *SCORES,
            "images",
            "minutes",
            "seeds",
        ]
        r = next((r for r in reversed(mine) if r["images"]), mine[-1])
        note = (
            f"Mean ± standard deviation over seeds; {r['prompts']} prompts and {r['heldout']}"
            " held-out ones a seed; s/image: torch, batch 1, float32, the fastest of the rows with"
            " the same network and calls. FID is biased at this N, and not comparable with the"
            f" article's. Trained in {r.get('mixed_precision', 'no')}; {r['cpu']}, {r['cores']}"
            f" cores; {r['date']}, commit `{r['commit']}`, `{r['command']}`."
        )
        best = max((r["identity@1"] for r in mine if r["images"]), default=1.0)
        short = (
            f"No student of this budget draws recognisable pictures (identity@1 {best:.1%} at"
            " best): the table ranks losses, it does not promise students. "
        )
        out += [
            title,
            "",
            *table(header, body),
            "",
            *([*aids(groups), ""] if which == "size" else []),
            (short if best < RECOGNISABLE else "") + note,
            "",
        ]
    return out[:-1]


def _budgets(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """(strategy, images) -> one row a seed, of each strategy's largest budget; a seed that was
    measured twice counts once, the last time.
    """
    most = {
        name: max(r["images"] for r in rows if r["strategy"] == name)
        for name in dict.fromkeys(r["strategy"] for r in rows)
    }
    return {
        (n, i): list(
            {r["seed"]: r for r in rows if (r["strategy"], r["images"]) == (n, i)}.values()
        )
        for n, i in most.items()
    }


def aids(groups: dict[tuple[str, int], list[dict[str, Any]]]) -> list[str]:
    """Does an aid lower KID, seed by seed, by more than the seeds spread? Whoever loses is named
    too.
    """
    by_name = {name: {r["seed"]: r["kid"] for r in rows} for (name, _), rows in groups.items()}
    plain, out = by_name.get("feature + output", {}), []
    for name in (*AIDS, "feature + output"):
        against, base = (
            ("feature + output", plain) if name in AIDS else ("task", by_name.get("task", {}))
        )
        both = sorted(set(base) & set(by_name.get(name, {})))
        if len(both) < 2:
            continue
        gains = [base[s] - by_name[name][s] for s in both]
        mean, spread_ = float(np.mean(gains)), float(np.std(gains, ddof=1))
        said = (
            "helps"
            if mean > spread_
            else "harms"
            if mean < -spread_
            else "makes no difference beyond the seeds' spread"
        )
        out.append(
            f"- {name} against {against}: KID lower by {mean:.1f} ± {spread_:.1f}, the same"
            f" {len(both)} seeds: it {said}."
        )
    return out


def line_fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """slope, intercept and the largest relative residual of a least-squares line."""
    slope, intercept = np.polyfit(x, y, 1)
    fitted = slope * np.asarray(x) + intercept
    return float(slope), float(intercept), float(np.max(np.abs(fitted - y) / np.asarray(y)))


def scaling(folder: Path = RESULTS) -> list[str]:
    found = [r for r in results("scaling", folder) if not r.error]
    if not found:
        return missing("scaling")
    base = {"steps": 4, "batch": 1, "size_px": 512, "threads": 2, "tile_px": 0, "pipelines": 1}
    body, lines = [], []
    for r in results("scaling", folder):
        c = r.case
        what = (
            ", ".join(f"{k.removesuffix('_px')} {c[k]}" for k in base if c[k] != base[k]) or "base"
        )
        if r.error:
            body.append([what, f"failed: {r.error.replace('|', '/')[:160]}", "", "", "", ""])
            continue
        body.append(
            [
                what,
                spread(r.samples),
                number(r.stage("unet")),
                number(r.stage("vae_decoder")),
                number(r.images_per_second, 3),
                number(r.median("peak_mib"), 0),
            ]
        )
    steps = [r for r in found if all(r.case[k] == v for k, v in base.items() if k != "steps")]
    if len(steps) > 2:
        slope, intercept, worst = line_fit(
            [r.case["steps"] for r in steps], [r.seconds for r in steps]
        )
        lines = [
            (
                f"Seconds against steps: {slope:.3f} s a step + {intercept:.3f} s (text, VAE, the"
                f" rest); largest residual {worst:.0%}."
            ),
            "",
        ]
    c = found[0].case
    lines += [
        (
            f"{NAMES.get(c['model'], c['model'])}, {c['engine']} {c['precision']}, 512 px, 4 steps,"
            " batch 1, 2 threads, decoded at once; one thing changed a row."
        ),
        "",
    ]
    return lines + table(["changed", "s/call", "UNet s", "VAE s", "images/s", "peak MiB"], body)


def roofline(folder: Path = RESULTS) -> list[str]:
    rows = [r for r in last_run(read("roofline", folder)) if r["kind"] == "peak"]
    if not rows:
        return ["Not measured yet: run `python -m benchmarks.roofline`."]
    body = []
    for threads in sorted({r["threads"] for r in rows}):
        best = peaks(threads, folder)
        for dtype in ("float32", "bfloat16", "int8"):
            failed = next(
                (
                    r["error"]
                    for r in rows
                    if r["dtype"] == dtype and r["threads"] == threads and "error" in r
                ),
                "",
            )
            cells = [
                number(best.get((dtype, op)), 0, 1e-9) or f"failed: {failed[:80]}"
                for op in ("matmul", "conv")
            ]
            body.append(
                [str(threads), dtype, "openvino" if dtype == "int8" else "torch (oneDNN)", *cells]
            )
    return [
        *table(["threads", "arithmetic", "by", "matmul GOPS", "3x3 convolution GOPS"], body),
        "",
        (
            f"{rows[-1]['cpu']}; {rows[-1]['date']}, commit `{rows[-1]['commit']}`. Definitions:"
            " `benchmarks/roofline.py`."
        ),
    ]


def profiles(folder: Path = RESULTS) -> list[str]:
    rows = {
        (r["model"], r["engine"], r["precision"], r["size_px"]): r
        for r in read("profile", folder)
        if r["kind"] == "profile"
    }
    if not rows:
        return ["Not measured yet: run `python -m benchmarks.profile shape:bk-tiny`."]
    from benchmarks.profile import table as stages

    out: list[str] = []
    for (model, engine, precision, px), r in rows.items():
        out += [
            (
                f"{NAMES.get(model, model)}, {px} px, {r['steps']} steps, {engine} {precision},"
                f" {r['threads']} threads ({r['date']}, `{r['commit']}`):"
            ),
            "",
            *stages(r),
            "",
        ]
    return out[:-1]


# --- plots


def _points(folder: Path) -> dict[str, Any]:
    """What each plot shows, as plain data: {} where nothing was measured."""
    quality = {(r["precision"], r["backend"]): r for r in read("quality", folder)}
    backend = {"sdlite-ort": "onnxruntime", "sdlite-openvino": "openvino"}
    emoji = [
        (f"{r.name[0]} {r.name[1]}", r.seconds, quality[k]["mean"]["identity@1"])
        for r in results("int8-emoji", folder)
        if not r.error
        and (k := (r.case["precision"].replace("fp32", "fp16"), backend.get(r.case["engine"], "")))
        in quality
    ]
    memory = [
        (" ".join(r.name), r.median("peak_mib"), r.seconds)
        for r in order(results("peers-512", folder))
        if not r.error
    ]
    scale = [
        (r.case, r.seconds, r.median("peak_mib")) for r in results("scaling", folder) if not r.error
    ]
    return {"speed-quality": emoji, "memory": memory, "scaling": scale}


def digest(points: Any) -> str:
    return hashlib.sha256(json.dumps(points, sort_keys=True).encode()).hexdigest()[:16]


def plots(folder: Path = RESULTS) -> dict[str, str]:
    """name -> digest of the data of each plot that has any."""
    return {name: digest(p) for name, p in _points(folder).items() if p}


def stale_plots(folder: Path = RESULTS, out: Path = PLOTS) -> list[str]:
    """Plots whose file is not drawn from the committed results; no matplotlib needed: the data's
    digest stands in the file.
    """
    want = plots(folder)
    there = {p.stem: p.read_text() for p in out.glob("*.svg")}
    return sorted(
        {n for n, d in want.items() if f"data {d}" not in there.get(n, "")}
        | (set(there) - set(want))
    )


def draw(folder: Path = RESULTS, out: Path = PLOTS) -> list[Path]:
    """SVGs that are equal for equal data and matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "sdlite", "svg.fonttype": "none", "figure.figsize": (7, 4), "font.size": 9}
    )
    import matplotlib.pyplot as plt

    out.mkdir(exist_ok=True)
    made = []
    for name, points in _points(folder).items():
        if not points:
            (out / f"{name}.svg").unlink(missing_ok=True)
            continue
        {"speed-quality": _draw_quality, "memory": _draw_memory, "scaling": _draw_scaling}[name](
            plt, points
        )
        path = out / f"{name}.svg"
        plt.tight_layout()
        plt.savefig(
            path,
            metadata={
                "Date": None,
                "Creator": "benchmarks.report",
                "Description": f"data {digest(points)}",
            },
        )
        plt.close("all")
        made.append(path)
    return made


def _draw_quality(plt: Any, points: list[tuple[str, float, float]]) -> None:
    _, ax = plt.subplots()
    for label, seconds, quality in points:
        ax.plot(seconds * 1e3, quality * 100, "o")
        ax.annotate(
            label, (seconds * 1e3, quality * 100), textcoords="offset points", xytext=(5, 4)
        )
    ax.set(
        xlabel="ms a picture (64 px, 4 steps)",
        ylabel="identity@1, %",
        title="Speed against quality, embedded student",
    )


def _draw_memory(plt: Any, points: list[tuple[str, float, float]]) -> None:
    _, ax = plt.subplots()
    names = [p[0] for p in points][::-1]
    ax.barh(
        names,
        [p[1] for p in points][::-1],
        color=["C0" if n.startswith("sdlite") else "0.7" for n in names],
    )
    ax.set(xlabel="peak MiB, BK-Tiny shape, 512 px, 4 steps (blue: ours; fastest on top)")


def _draw_scaling(plt: Any, points: list[tuple[dict[str, Any], float, float]]) -> None:
    _, (left, middle, right) = plt.subplots(1, 3)
    base = {"steps": 4, "batch": 1, "size_px": 512, "threads": 2, "tile_px": 0, "pipelines": 1}

    def along(key: str, at: int = 1, **fixed: int) -> tuple[list[float], list[float]]:
        want = {**base, **fixed}
        found = sorted(
            (p[0][key], p[at])
            for p in points
            if all(p[0][k] == v for k, v in want.items() if k != key)
        )
        return [x for x, _ in found], [y for _, y in found]

    left.plot(*along("steps"), "o-")
    left.set(xlabel="steps", ylabel="s", ylim=(0, None))
    middle.plot(*along("batch"), "o-")
    middle.set(xlabel="batch", ylabel="s", ylim=(0, None))
    right.plot(*along("size_px", 2), "o-", label="at once")
    right.plot(*along("size_px", 2, tile_px=256), "s--", label="tiles of 256 px")
    right.set(xlabel="px", ylabel="peak MiB", ylim=(0, None))
    right.legend()
