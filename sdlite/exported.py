"""A folder that `sdlite export` wrote: what its report says, and which backends open it.

The report lists every file with its SHA-256, and each network's files, inputs and output. Folders
with a manifest (`onnx` profiles of free shapes) are models as any other and need nothing of this.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlite.artifact import REPORT, plain_path
from sdlite.errors import ArtifactError
from sdlite.io import read_json

OPENED_BY = {  # target -> backends that run what it makes
    "onnx": ("onnxruntime", "openvino"),
    "web": ("onnxruntime", "openvino"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt",),
}


@dataclass(frozen=True)
class Export:
    """Attributes:
    variants: {precision: {part: {file, weights, storage, arithmetic}}}, as a manifest has them.
    files: path -> {sha256, bytes} of every file but the report.
    size: (height, width) in pixels where shapes are fixed; None where they are free.
    """

    report: dict[str, Any]
    variants: dict[str, dict[str, dict[str, Any]]]
    files: dict[str, dict[str, Any]]
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
        report = read_json(folder / REPORT)
        try:
            files = {**report["files"], **report.get("companions", {})}
            for path, entry in files.items():
                plain_path(path, REPORT)
                entry["sha256"], int(entry["bytes"])
            networks = report.get("networks") or {}
            for part, entry in networks.items():
                if missing := [p for p in (entry["file"], *entry["weights"]) if p not in files]:
                    raise ArtifactError(f"{REPORT}: {part} has {missing}, which it does not list.")
            size = tuple(report["size"]) if report.get("size") else None
            precision = str(report["profile"]["precision"])
            str(report["profile"]["target"])
            return cls(
                report,
                {precision: networks} if networks else {},
                files,
                size,
                int(report.get("size_multiple", 8)),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            what = f"{type(e).__name__}: {e}"
            raise ArtifactError(f"{folder / REPORT} is malformed ({what}); export the model again.") from e

    @property
    def target(self) -> str:
        return str(self.report["profile"]["target"])

    @property
    def precision(self) -> str:
        return str(self.report["profile"]["precision"])

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of the backends that open it; () where only the target's own runtime does."""
        if not self.variants:  # of an sdlite that did not list the networks
            return ("tensorrt",) if self.target == "tensorrt" else ()
        if self.report["profile"].get("options", {}).get("fuse_schedule"):
            return ("onnxruntime",)
        return OPENED_BY.get(self.target, ())

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
            how = f"its README.md shows how {self.target} runs it; or give the model it was made from"
        who = "sdlite" if backend == "auto" else f"backend {backend!r}"
        what = f"{folder} was exported for {self.target} ({self.precision})"
        return ArtifactError(f"{what}, which {who} does not open; {how}.")
