"""Name and instruction sets of this machine's processor, as far as the system tells."""

from __future__ import annotations

import functools
import platform
from pathlib import Path


@functools.cache
def fields() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo, {} where there is none (not Linux)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0].splitlines()
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in first)}


def features() -> frozenset[str]:
    """Instruction sets by Linux' names, such as "avx512_vnni"; empty where the system does not
    tell.
    """
    return frozenset(fields().get("flags", fields().get("Features", "")).split())


def name() -> str:
    """The processor's name as the system has it."""
    return fields().get("model name") or platform.processor() or platform.machine()
