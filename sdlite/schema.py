"""What a JSON file of a model may hold: types and ranges, checked where it enters.

A rule raises one line with the file, the key, what was given and what is accepted.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdlite.errors import ArtifactError, printable

Json = dict[str, Any]  # content of a JSON or TOML file
Config = Mapping[str, Any]  # the same, to be read only
Rule = Callable[[str | Path, str, object], object]  # (file, key, value); raises ArtifactError


def refused(file: str | Path, key: str, value: object, accepted: str) -> ArtifactError:
    """The error of a value that is not accepted."""
    where = f"{printable(file)}: {printable(key, 200)}" if key else printable(file)
    return ArtifactError(
        f"{where} is {shown(value)}; accepted: {accepted}. Fetch or save the model again."
    )


def shown(value: object) -> str:
    """A value for a message, however long it is."""
    if isinstance(value, int) and value.bit_length() > 512:  # Python prints 4,300 digits at most
        return f"a number of {value.bit_length()} bits"
    return printable(repr(value[:100] if isinstance(value, (str, list)) else value), 100)


def rule(accepted: str, holds: Callable[[Any], bool]) -> Rule:
    """A rule of one value."""

    def check(file: str | Path, key: str, value: object) -> None:
        if not holds(value):
            raise refused(file, key, value, accepted)

    return check


def whole(least: int = 0, most: int = 2**63 - 1) -> Rule:
    """A whole number of a range; true and 1.0 are none."""
    top = "" if most == 2**63 - 1 else f", {most} at most"
    return rule(
        f"a whole number, {least} or more{top}", lambda v: type(v) is int and least <= v <= most
    )


def number(least: float = 0.0, most: float = math.inf) -> Rule:
    """A finite number of a range."""

    def holds(value: object) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        try:
            return math.isfinite(value) and least <= value <= most
        except OverflowError:  # a whole number that no float holds
            return False

    top = "" if most == math.inf else f", {most:g} at most"
    return rule(f"a number, {least:g} or more{top}", holds)


def text(most: int = 200) -> Rule:
    """Text of at most `most` characters, none of which controls a terminal."""
    return rule(
        f"text of at most {most} characters, no control characters",
        lambda v: isinstance(v, str) and len(v) <= most and not unclean(v),
    )


def unclean(value: str) -> bool:
    """Whether text has control characters, line ends or lone surrogates."""
    return any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in value)


def one_of(names: Collection[str]) -> Rule:
    """A string that is one of `names`."""
    return rule(", ".join(names), lambda v: isinstance(v, str) and v in names)


OBJECT = rule("an object", lambda v: isinstance(v, dict))
BOOL = rule("true or false", lambda v: isinstance(v, bool))


def optional(inner: Rule) -> Rule:
    """What `inner` accepts, or null."""
    return lambda file, key, value: None if value is None else inner(file, key, value)


def either(accepted: str, *rules: Rule) -> Rule:
    """What one of the rules accepts; `accepted` are their words."""

    def holds(value: object) -> bool:
        for inner in rules:
            with suppress(ArtifactError):
                inner("", "", value)
                return True
        return False

    return rule(accepted, holds)


def each(inner: Rule, least: int = 0, most: int = 10_000) -> Rule:
    """A list whose entries obey a rule; or a tuple, as live configurations have it."""
    many = f"a list of {least} to {most} entries" if least or most != 10_000 else "a list"
    outer = rule(many, lambda v: isinstance(v, (list, tuple)) and least <= len(v) <= most)

    def check(file: str | Path, key: str, value: object) -> None:
        outer(file, key, value)
        assert isinstance(value, (list, tuple))
        for i, entry in enumerate(value):
            inner(file, f"{key}[{i}]", entry)

    return check


def table(name: Rule, inner: Rule) -> Rule:
    """An object whose keys obey `name` and whose values `inner`."""

    def check(file: str | Path, key: str, value: object) -> None:
        OBJECT(file, key, value)
        assert isinstance(value, dict)
        for k, entry in value.items():
            name(file, f"a key of {key}", k)
            inner(file, f"{key}.{k}", entry)

    return check


def record(rules: Mapping[str, Rule], need: Collection[str] = ()) -> Rule:
    """An object with some keys, of which those in `need` must be there. Other keys are not looked
    at.
    """

    def check(file: str | Path, key: str, value: object) -> None:
        OBJECT(file, key, value)
        assert isinstance(value, dict)
        if missing := [k for k in need if k not in value]:
            raise refused(file, key, value, f"an object with {', '.join(missing)} too")
        for k in (k for k in rules if k in value):
            rules[k](file, f"{key}.{k}" if key else k, value[k])

    return check
