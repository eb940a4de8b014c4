"""One rule for what measured students say: `benchmarks`' tables and `advise` both judge by it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

# identity@1 (share of images whose subject is recognized first) below this is chance: such a
# student draws nothing, and its rows rank losses but promise no students.
DRAWS = 0.05


@dataclass(frozen=True)
class Verdict:
    """KID of one strategy against another's, seed by seed.

    Attributes:
        gain: mean over the seeds of how much lower KID is; above 0 is better.
        spread: standard deviation of it over the seeds.
        seeds: how many seeds both have.
    """

    gain: float
    spread: float
    seeds: int

    @property
    def word(self) -> str:
        """Whether it helps, by more than the seeds spread."""
        if self.gain > self.spread:
            return "helps"
        if self.gain < -self.spread:
            return "harms"
        return "makes no difference beyond the seeds' spread"

    def __str__(self) -> str:
        return (
            f"KID lower by {self.gain:.1f} ± {self.spread:.1f}, the same {self.seeds} seeds: it"
            f" {self.word}"
        )


def judge(base: Mapping[int, float], other: Mapping[int, float]) -> Verdict | None:
    """Does `other` lower KID? Only seeds of both are compared; None where fewer than two are.

    Args:
        base, other: seed -> KID.
    """
    both = sorted(set(base) & set(other))
    if len(both) < 2:
        return None
    gains = [base[s] - other[s] for s in both]
    return Verdict(statistics.fmean(gains), statistics.stdev(gains), len(both))
