"""The bars of the code, and that the counting finds what it should."""

from __future__ import annotations

import ast

import pytest

from benchmarks import house

TREES = house.sources(house.ROOT, "sdlite")


def test_no_line_is_wider_than_100_columns_and_none_escapes_the_formatter():
    lines = house.code_lines(house.ROOT, "sdlite", "benchmarks", "tests", "export")
    assert len(lines) > 40_000
    wide = [f"{p}:{i}" for p, i, line in lines if len(line) > house.WIDTH and "noqa" not in line]
    assert not wide
    assert not [f"{p}:{i}" for p, i, line in lines if "# fmt: " + "skip" in line]


def test_functions_are_short():
    lengths = sorted((n, f"{m}.{f}") for m, tree in TREES.items() for f, n in house.bodies(tree))
    assert len(lengths) > 1_000
    assert lengths[len(lengths) * 9 // 10][0] <= 25
    assert not [row for row in lengths if row[0] > 60]
