"""The published models in int8, and on every export target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.tables.rows import read, table
from benchmarks.targets import LAYOUTS, TARGETS

Row = dict[str, Any]
RUNS = {  # of a row of published_int8: the column's title
    "onnxruntime int8-dynamic": "onnxruntime, dynamic",
    "torch int8-dynamic": "torch, dynamic",
    "onnxruntime int8-static": "onnxruntime, static",
    "openvino int8-static in float32": "OpenVINO, static, in float32",
    "openvino int8-static": "OpenVINO, static",
}
PARTS = {
    "text_encoder": "text",
    "text_encoder_2": "text 2",
    "unet": "UNet",
    "vae_decoder": "decoder",
    "vae_encoder": "encoder",
}


class Notes:
    """Words below a table, numbered in the order in which cells name them."""

    def __init__(self) -> None:
        self.said: dict[str, int] = {}

    def mark(self, words: str) -> str:
        """(n) of these words."""
        return f"({self.said.setdefault(words, len(self.said) + 1)})"

    def lines(self) -> list[str]:
        """The numbered list, with an empty line before."""
        return [*([""] if self.said else []), *(f"{n}. {w}" for w, n in self.said.items())]


def int8() -> list[str]:
    """Published model x engine in int8; refusals are numbered and quoted below."""
    last = {r["model"]: r for r in read("published_int8")}
    if not last:
        return ["Not measured yet: run `python -m benchmarks.published_int8`."]
    apart = {r["model"]: r.get("another_prompt") for r in read("published")}
    notes = Notes()
    body = []
    for name, r in last.items():
        why = f"refused: {r['refused']}" if "refused" in r else f"fault: {r.get('error')}"
        runs = {k: r.get("runs", {}).get(k, why) for k in RUNS}
        other = apart.get(name)
        body.append(
            [
                f"`{name}`",
                "" if other is None else f"{other:.1f}",
                *(_figure(v, notes) for v in runs.values()),
                _figure(r.get("apart", ""), notes),
                *(_lowest(r, *of) for of in _NETWORKS),
                f"{r['date']} `{r['commit']}`",
            ]
        )
    head = ["model", "another prompt", *RUNS.values(), "the two engines apart"]
    head += [f"lowest network, {k}" for k in ("dynamic", "static", "static on OpenVINO")]
    one = list(last.values())[-1]
    versions = ", ".join(f"{k} {v}" for k, v in one["versions"].items())
    return [
        *table([*head, "measured"], body),
        *notes.lines(),
        "",
        f"Least of 3 images, dB; 128 px; {one['cpu']}; {versions}. {_refused(last)}",
    ]


_NETWORKS = (
    ("int8-dynamic", "onnxruntime"),
    ("int8-static", "onnxruntime"),
    ("int8-static", "openvino"),
)


def _figure(value: float | str, notes: Notes) -> str:
    if not isinstance(value, str):
        return f"{value:.1f}"
    kind, _, words = value.partition(": ")
    return f"{kind} {notes.mark(words)}" if words else ""


def _lowest(r: Row, precision: str, engine: str) -> str:
    """The network that int8 changes most, and its SQNR."""
    found = r.get("networks", {}).get(precision, {}).get(engine, {})
    if not found:
        return ""
    part = min(found, key=found.__getitem__)
    return f"{found[part]:.1f}, {PARTS[part]}"


def _refused(last: dict[str, Row]) -> str:
    """What the engines without a column say."""
    said = {
        run: words.removeprefix("refused: ")
        for r in last.values()
        if "networks" in r
        for run, words in r["runs"].items()
        if run not in RUNS
    }
    return " ".join(f"{run}: {words}" for run, words in said.items())


def targets() -> list[str]:
    """Published model x export target; refusals are numbered and quoted below."""
    cells: dict[str, dict[str, Row]] = {}
    when: dict[str, dict[str, None]] = {}
    for r in read("targets"):
        cells.setdefault(r["model"], {}).update(r["targets"])
        when.setdefault(r["model"], {})[f"{r['date']} `{r['commit']}`"] = None
    if not cells:
        return ["Not measured yet: run `python -m benchmarks.targets`."]
    for name, target, found, measured in _exported():
        if target not in cells.get(name, {target: {}}):
            cells[name][target] = found
            when[name][measured] = None
    every = [t for t in TARGETS if any(t in found for found in cells.values())]
    notes = Notes()
    body = [
        [f"`{name}`", *(_cell(cells[name].get(t), notes) for t in every), ", ".join(when[name])]
        for name in dict.fromkeys([*LAYOUTS, *cells])
        if name in cells
    ]
    return [*table(["model", *(f"`{t}`" for t in every), "measured"], body), *notes.lines()]


def _exported() -> Iterator[tuple[str, str, Row, str]]:
    """(model, target, cell, when) of the same models' rows of `benchmarks.export`."""
    for r in read("exports"):
        name, kind, _ = r["model"].partition(", narrow")
        if kind and r["model"].endswith(kind) and "parity" in r:
            images = [*(r["parity"]["psnr"] or []), *(r["parity"].get("edit") or [])]
            least = min(n["sqnr"] for n in r["parity"]["networks"].values())
            found = {"psnr": min(images), "sqnr": least, "run": r["not_run"] is None}
            yield name, r["profile"], found, f"{r['date']} `{r['commit']}`"


def _cell(found: Row | None, notes: Notes) -> str:
    """Image / network in dB, and what is to be said of it."""
    if found is None:
        return ""
    for kind in ("refused", "fault"):
        if kind in found:
            return f"{kind} {notes.mark(found[kind])}"
    figures = f"{found['psnr']:.1f} / {found['sqnr']:.1f}" if "psnr" in found else ""
    if "failed" in found:
        return f"failed {notes.mark(found['failed'])} {figures}".rstrip()
    return figures + ("" if found["run"] else "*") + (", ddim" if found.get("sampler") else "")
