"""The metrics on cases with known answers: a benchmark that cannot be wrong in our favour."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.cases import ENGINES, SUITES
from benchmarks.quality import fid, kid


def test_fid_of_two_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5_000, 3)) * [1, 2, 3]
    y = rng.standard_normal((5_000, 3)) * [2, 2, 1] + [1, 0, 0]
    assert fid(x, y) == pytest.approx(1 + (1 - 2) ** 2 + (3 - 1) ** 2, rel=0.1)
    assert fid(x, x) == pytest.approx(0, abs=1e-8)


def test_kid_is_unbiased_and_sees_a_shift():
    rng = np.random.default_rng(0)
    same = [kid(*rng.standard_normal((2, 100, 8))) for _ in range(20)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 20**0.5
    assert kid(rng.standard_normal((200, 8)), rng.standard_normal((200, 8)) + 1) > 10 * np.std(same)


def test_every_suite_compares_every_engine_on_equal_terms():
    for name, cases in SUITES.items():
        groups = {}
        if name.startswith("int8"):  # precisions against each other, with the float peer among them
            assert len({(c.model, c.steps, c.size_px, c.guidance, c.batch, c.threads, c.repeats) for c in cases}) == 1
            assert {("diffusers", "fp32"), ("sdlite-ort", "int8-static")} <= {(c.engine, c.precision) for c in cases}
            continue
        for c in cases:
            groups.setdefault((c.model, c.steps, c.size_px, c.guidance, c.batch, c.threads, c.precision, c.repeats), set()).add(c.engine)
        assert all(engines == set(ENGINES) for engines in groups.values())
