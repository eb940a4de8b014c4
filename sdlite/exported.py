"""A folder that `sdlite export` wrote: what its report says, and which backends open it.

The report lists every file with its SHA-256, and each network's files, inputs and output. Folders
with a manifest (`onnx` profiles of free shapes) are models as any other and need nothing of this.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlite import schema
from sdlite.arguments import MOST_PIXELS
from sdlite.errors import ArtifactError
from sdlite.files import read_listing
from sdlite.manifest import (
    PART,
    REPORT,
    ROW,
    SIZE_MULTIPLE,
    TEXT,
    FileRow,
    Variants,
    check_row,
    listed,
    plain_path,
    safe_path,
)

OPENED_BY = {  # target -> backends that run what it makes
    "onnx": ("onnxruntime", "openvino"),
    "web": ("onnxruntime", "openvino"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt",),
}


def _made(file: str | Path, key: str, path: object) -> None:
    """A path of what a converter made: OpenVINO's and ncnn's networks end in .bin."""
    name = str(path)
    (plain_path if name.endswith(".bin") else safe_path)(name, file)


_REPORT = schema.record(
    {
        "files": listed(_made),
        "companions": listed(lambda file, key, path: safe_path(str(path), file)),
        "networks": schema.optional(schema.table(PART, ROW)),
        "size": schema.optional(schema.each(schema.whole(1, MOST_PIXELS), 2, 2)),
        "size_multiple": SIZE_MULTIPLE,
        "profile": schema.record(
            {
                "name": TEXT,
                "target": TEXT,
                "precision": TEXT,
                "dynamic": schema.BOOL,
                "batch": schema.whole(),
                "options": schema.OBJECT,
            },
            ("target", "precision"),
        ),
        "model": TEXT,
        "tools": schema.OBJECT,
        "checked_by": TEXT,
        "not_run": schema.OBJECT,
        "parity": schema.OBJECT,
        "failed": schema.each(schema.text(10_000)),
        "opened_by": schema.each(TEXT),  # of a target that is not sdlite's own
    },
    ("files", "profile"),
)


@dataclass(frozen=True)
class Export:
    """Attributes:
    variants: {precision: {part: {file, weights, storage, arithmetic}}}, as a manifest has them.
    files: path -> {sha256, bytes} of every file but the report.
    size: (height, width) in pixels where shapes are fixed; None where they are free.
    """

    report: dict[str, Any]
    variants: Variants
    files: dict[str, FileRow]
    size: tuple[int, int] | None
    size_multiple: int

    @classmethod
    def open(cls, folder: Path) -> Export | None:
        """The export in `folder`, None where there is no report.

        Raises:
            ArtifactError: a report that is damaged, or that names files outside the folder.
        """
        if not os.path.lexists(folder / REPORT):
            return None
        path = folder / REPORT
        report = read_listing(folder, REPORT)
        _REPORT(path, "", report)
        files = {**report["files"], **report.get("companions", {})}
        networks = report.get("networks") or {}
        for part, row in networks.items():
            check_row(path, f"networks.{part}", part, row, files)
        size = report.get("size")
        return cls(
            report,
            {report["profile"]["precision"]: networks} if networks else {},
            files,
            None if size is None else (size[0], size[1]),
            report.get("size_multiple", 8),
        )

    @property
    def target(self) -> str:
        """Runtime that the folder was exported for."""
        return str(self.report["profile"]["target"])

    @property
    def precision(self) -> str:
        """Precision that it was exported in."""
        return str(self.report["profile"]["precision"])

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of the backends that open it; () where only the target's own runtime does."""
        if not self.variants:  # of an sdlite that did not list the networks
            return ("tensorrt",) if self.target == "tensorrt" else ()
        if self.report["profile"].get("options", {}).get("fuse_schedule"):
            return ("onnxruntime",)
        return OPENED_BY.get(self.target, tuple(self.report.get("opened_by", ())))

    def describe(self) -> dict[str, Any]:
        """What `sdlite info` shows of it."""
        about, profile = self.report, self.report["profile"]
        return {
            "target": self.target,
            "profile": profile.get("name"),
            "precision": self.precision,
            "size": None if self.size is None else list(self.size),
            "batch": None if profile.get("dynamic") else profile.get("batch"),
            "model": about.get("model"),
            "tools": about.get("tools"),
            "checked_by": about.get("checked_by"),
            "not_run": about.get("not_run"),
            "psnr": about.get("parity", {}).get("psnr"),
            "opened_by": list(self.backends),
            "networks": self.variants.get(self.precision, {}),
        }

    def refusal(self, folder: Path, backend: str) -> ArtifactError:
        """Why `backend` does not open it, and what does."""
        if self.backends:
            how = f"use backend={' or '.join(map(repr, self.backends))}"
        elif self.target in OPENED_BY:
            how = "export the model again: its report does not list the networks"
        else:
            how = (
                f"its README.md shows how {self.target} runs it; or give the model it was made from"
            )
        who = "sdlite" if backend == "auto" else f"backend {backend!r}"
        what = f"{folder} was exported for {self.target} ({self.precision})"
        return ArtifactError(f"{what}, which {who} does not open; {how}.")
