"""A TOML table to a dataclass: every wrong key, type and range is one line that names all three."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

pytest.importorskip("pydantic", reason="needs the quantize extra")

from sdlite.errors import InputError
from sdlite.settings import At, check, read, settings


@settings
@dataclass(frozen=True)
class Gate:
    psnr: Annotated[float, At(0, 200)] = 40.0


@settings
@dataclass(frozen=True)
class Settings:
    images: Annotated[int, At(1)]
    kind: Literal["v", "x0"] = "v"
    share: Annotated[float, At(0, 1)] = 0.5
    dynamic: bool = False
    steps: tuple[Annotated[int, At(1, 1000)], ...] = ()
    gate: Gate = field(default_factory=Gate)
    weights: dict[str, float] = field(default_factory=dict)
    size: tuple[int, int] | None = None


def test_a_table_fills_the_dataclass():
    raw = {"images": 3, "share": 1, "steps": [4, 2], "gate": {"psnr": 38}, "size": [64, 96]}
    got = read(Settings, raw, "x")
    assert got == Settings(3, share=1.0, steps=(4, 2), gate=Gate(38.0), size=(64, 96))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "recipe: images is missing; give it."),
        ({"images": "many"}, "recipe: images='many'; accepted: a whole number."),
        ({"images": -5}, "recipe: images=-5; accepted: at least 1."),
        ({"images": 4.0}, "recipe: images=4.0; accepted: a whole number."),
        ({"images": True}, "recipe: images=True; accepted: a whole number."),
        ({"images": 1, "share": "fast"}, "recipe: share='fast'; accepted: a finite number."),
        ({"images": 1, "share": 1.5}, "recipe: share=1.5; accepted: at most 1."),
        ({"images": 1, "share": float("nan")}, "recipe: share=nan; accepted: a finite number."),
        ({"images": 1, "dynamic": "yes"}, "recipe: dynamic='yes'; accepted: true or false."),
        ({"images": 1, "dynamic": 1}, "recipe: dynamic=1; accepted: true or false."),
        ({"images": 1, "kind": "eps"}, "recipe: kind='eps'; accepted: 'v' or 'x0'."),
        ({"images": 1, "gate": {"psnr": "high"}}, "recipe: gate.psnr='high'; accepted: a finite"),
        ({"images": 1, "gate": 3}, "recipe: gate=3; accepted: a table."),
        ({"images": 1, "gate": {"x": 1}}, "recipe: gate.x is not known; known: psnr."),
        ({"images": 1, "steps": [4, 0]}, "recipe: steps.1=0; accepted: at least 1."),
        ({"images": 1, "steps": 4}, "recipe: steps=4; accepted: a list."),
        ({"images": 1, "weights": {"a": None}}, "recipe: weights.a=None; accepted: a finite"),
        ({"images": 1, "stepz": 4}, "recipe: stepz is not known; known: images, kind, share"),
        ({"images": 1, "\x1b[2J": 4}, r"recipe: \x1b[2J is not known; known: images"),
    ],
)
def test_what_is_wrong_is_one_line(given, line):
    with pytest.raises(InputError) as refused:
        read(Settings, given, "recipe")
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


@settings
@dataclass(frozen=True)
class Checked:
    images: Annotated[int, At(1)]
    share: Annotated[float, At(0, 1)] = 0.5
    gate: Gate = field(default_factory=Gate)

    def __post_init__(self):
        check(self)


def test_what_is_made_in_python_is_checked_as_a_table_is():
    assert Checked(2, share=1).gate == Gate()
    assert read(Checked, {"images": 2}, "x") == Checked(2)
    for given, words in (
        ({"images": 0}, "Checked: images=0; accepted: at least 1."),
        ({"images": 1, "share": "all"}, "Checked: share='all'; accepted: a finite number."),
    ):
        with pytest.raises(InputError) as refused:
            Checked(**given)
        assert str(refused.value) == words
    with pytest.raises(InputError, match=r"^recipe: images=0; accepted: at least 1"):
        read(Checked, {"images": 0}, "recipe")
