"""Tell engines that send telemetry not to, before they are imported.

- onnxruntime writes a device id and a queue of events into the user's cache folder and uploads
  them; `ORT_DISABLE_TELEMETRY=1` stops it (its Privacy.md).
- OpenVINO sends "import" to Google Analytics by the package `openvino_telemetry`, and writes files
  into `~/intel`. Where that package cannot be imported OpenVINO takes its own stub
  (`openvino.tools.ovc.telemetry_stub`), so here it cannot.

`SDLITE_TELEMETRY=1` in the environment leaves both unchanged.
"""

from __future__ import annotations

import os
import sys


def switch_off() -> None:
    """Switch telemetry off at `import sdlite`. The user's own settings and engines that are
    imported already are left alone.
    """
    if os.environ.get("SDLITE_TELEMETRY") == "1":
        return
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    if "openvino" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
