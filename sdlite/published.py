"""Published models by name: `bk-sdm-tiny` is `nota-ai/bk-sdm-tiny` at one commit.

`published.json` beside this file is the table, and nothing else says which models they are. What it
says was read from model cards and configurations; the layouts were tested with random weights
(`benchmarks/published.py`), the weights themselves were not run.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sdlite import schema

TABLE = Path(__file__).parent / "published.json"
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class License:
    """`name`, and what it does not allow, in a sentence."""

    name: str
    restrictions: str


@dataclass(frozen=True)
class Measured:
    """One image of the model's shape with random weights, on the machine that `where` tells.

    Attributes:
        seconds: median of a call. peak_mib: highest memory of the process, MiB.
    """

    precision: str
    seconds: float
    peak_mib: int
    where: str


@dataclass(frozen=True)
class Published:
    """A row of the table.

    Attributes:
        name: what `--model` takes. repo: id on the hub.
        revision: commit, 40 hex digits; None: not pinned, the main branch.
        about: what it is, in a few words. note: what else one must know, or "".
        family: one of `families.known()`.
        layout: key of `benchmarks.published_models.MODELS`, by which it was tested.
        unet_parameters: of the published configuration.
        size_px: side of the images that it was trained for.
        steps, guidance: what its model card calls it with.
        measured: of its shape; empty where that was not measured.
    """

    name: str
    repo: str
    revision: str | None
    about: str
    note: str
    family: str
    layout: str
    unet_parameters: int
    size_px: int
    steps: int
    guidance: float
    license: License
    measured: tuple[Measured, ...]

    @property
    def pinned(self) -> str:
        """The repository and the commit's first 12 digits, or that there is none."""
        return f"{self.repo}@{self.revision[:12]}" if self.revision else f"{self.repo}, not pinned"

    @property
    def made_for(self) -> str:
        """Size, steps and guidance in words."""
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return f"{self.size_px} px, {steps}, guidance {self.guidance:g}"

    def describe(self) -> dict[str, object]:
        """The row as JSON has it."""
        return asdict(self)


_TEXT = schema.text(400)
_REVISION = schema.rule(
    "a commit of 40 hex digits", lambda v: isinstance(v, str) and bool(COMMIT.fullmatch(v))
)
_ROW = {
    "repo": schema.rule("an id org/name", lambda v: isinstance(v, str) and v.count("/") == 1),
    "revision": schema.optional(_REVISION),
    "about": _TEXT,
    "note": _TEXT,
    "family": _TEXT,
    "layout": _TEXT,
    "unet_parameters": schema.whole(1),
    "size_px": schema.whole(8),
    "steps": schema.whole(1),
    "guidance": schema.number(),
    "license": _TEXT,
    "shape": schema.optional(_TEXT),
}
_LICENSE = {"name": _TEXT, "restrictions": _TEXT}
_RUN = {"precision": _TEXT, "seconds": schema.number(), "peak_mib": schema.whole(1)}
_MEASURED = {
    "where": _TEXT,
    "shapes": schema.table(_TEXT, schema.each(schema.record(_RUN, need=_RUN))),
}
_FILE = schema.record(
    {
        "licenses": schema.table(_TEXT, schema.record(_LICENSE, need=_LICENSE)),
        "measured": schema.record(_MEASURED, need=_MEASURED),
        "models": schema.table(_TEXT, schema.record(_ROW, need=_ROW)),
    },
    need=("licenses", "measured", "models"),
)


def read(raw: schema.Json, file: str = TABLE.name) -> dict[str, Published]:
    """The rows of a table by name.

    Raises:
        ArtifactError: a value that the table may not hold. KeyError: a row names a license or a
            shape that the table lacks.
    """
    _FILE(file, "", raw)
    where = raw["measured"]["where"]
    shapes = {
        shape: tuple(Measured(**run, where=where) for run in runs)
        for shape, runs in raw["measured"]["shapes"].items()
    }
    licenses = {key: License(**row) for key, row in raw["licenses"].items()}
    out = {}
    for name, row in raw["models"].items():
        given = {k: v for k, v in row.items() if k not in ("license", "shape")}
        measured = () if row["shape"] is None else shapes[row["shape"]]
        license_ = licenses[row["license"]]
        out[name] = Published(name=name, license=license_, measured=measured, **given)
    return out


@functools.cache
def table() -> Mapping[str, Published]:
    """Every published model that has a name here, in the order of the file."""
    return read(json.loads(TABLE.read_text(encoding="utf-8")))


def near(name: str, names: Iterable[str]) -> list[str]:
    """Up to three names that a mistyped one may have meant, the nearest first."""
    known = {n.lower(): n for n in names}
    return [known[n] for n in difflib.get_close_matches(name.lower()[:100], known, 3)]
