"""What enters from outside is checked for type and range here: `name=value`, then what is accepted.

numpy's integers and floats are numbers, bool is not, and nothing is rounded or parsed: 4.0 is no
whole number, "4" is none.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TypeVar

import numpy as np

from sdlite.errors import InputError, ShapeError, UnknownNameError

T = TypeVar("T")
MOST_PIXELS = 16384  # a side; more is a typing error, and would ask for memory until there is none
MOST_IMAGES = 4096  # of a prompt in one call, which is one batch
SEEDS = 2**64 - 1
MODEL = "a name that `sdlite models` lists, a folder, or a hub id 'org/name'"


def most_threads() -> int:
    """Threads that a call may ask for: four for each CPU, at least 64, at most 1024."""
    return min(1024, max(64, 4 * (os.cpu_count() or 1)))


def _wrong(name: str, value: object, accepted: str) -> InputError:
    plain = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    kind = "" if plain else f" ({type(value).__name__})"
    return InputError(f"{name}={reprlib.repr(value)}{kind}; accepted: {accepted}.")


def _range(low: float | None, high: float | None) -> str:
    if high is None:
        return "" if low is None else f", at least {low}"
    return f", {low} to {high}" if low is not None else f", at most {high}"


def _inside(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def integer(name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """A whole number of `low` to `high`, both included."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        found = int(value)
        if _inside(found, low, high):
            return found
    raise _wrong(name, value, f"a whole number{_range(low, high)}")


def _finite(value: float | np.number) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:  # a whole number that no float holds
        return False


def number(name: str, value: object, low: float | None = None, high: float | None = None) -> float:
    """A finite number of `low` to `high`, both included."""
    numbers = (int, float, np.integer, np.floating)
    if isinstance(value, numbers) and not isinstance(value, bool) and _finite(value):
        found = float(value)
        if _inside(found, low, high):
            return found
    raise _wrong(name, value, f"a finite number{_range(low, high)}")


def truth(name: str, value: object) -> bool:
    """True or False; 0 and "false" are neither."""
    if not isinstance(value, (bool, np.bool_)):
        raise _wrong(name, value, "true or false")
    return bool(value)


def text(name: str, value: object) -> str:
    """A string."""
    if not isinstance(value, str):
        raise _wrong(name, value, "a string")
    return str(value)


def one_of(name: str, value: object, accepted: Sequence[str]) -> str:
    """One of these strings."""
    if text(name, value) not in accepted:
        raise UnknownNameError(
            f"{name}={value!r} is not known; choose one of {', '.join(accepted)}."
        )
    return str(value)


def function(name: str, value: object) -> Callable[..., object]:
    """Something that can be called."""
    if not callable(value):
        raise _wrong(name, value, "a function")
    return value


def path(name: str, value: object, accepted: str = "a path") -> str | os.PathLike[str]:
    """A string or a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise _wrong(name, value, accepted)
    return value


def optional(check: Callable[..., T], name: str, value: object, *limits: object) -> T | None:
    """`check` of what is not None."""
    return None if value is None else check(name, value, *limits)


def threads(value: object, name: str = "threads") -> int | None:
    """CPU threads; None is the engine's own choice."""
    return None if value is None else integer(name, value, 1, most_threads())


def texts(name: str, value: object) -> list[str]:
    """One string, or several in a list, tuple, array or generator."""
    if isinstance(value, str):
        return [str(value)]
    return _several(name, value, text, "a string or a list of strings")


def lines(name: str, value: object) -> list[str]:
    """Strings in a list, tuple, array or generator; one alone would be taken for its letters."""
    if isinstance(value, str):
        raise _wrong(name, value, "a list of strings")
    return _several(name, value, text, "a list of strings")


def integers(
    name: str, value: object, low: int | None = None, high: int | None = None
) -> list[int]:
    """Whole numbers of `low` to `high` in a list, tuple, array or generator."""
    accepted = f"a list of whole numbers{_range(low, high)}"
    return _several(name, value, lambda n, v: integer(n, v, low, high), accepted)


def numbers(
    name: str, value: object, low: float | None = None, high: float | None = None
) -> list[float]:
    """Finite numbers of `low` to `high` in a list, tuple, array or generator."""
    accepted = f"a list of finite numbers{_range(low, high)}"
    return _several(name, value, lambda n, v: number(n, v, low, high), accepted)


def _several(name: str, value: object, one: Callable[[str, object], T], accepted: str) -> list[T]:
    single = isinstance(value, np.ndarray) and value.ndim == 0
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping, Set)) or single:
        raise _wrong(name, value, accepted)
    out = [one(f"{name}[{i}]", v) for i, v in enumerate(value)]
    if not out:
        raise InputError(f"{name} is an empty list; accepted: {accepted}.")
    return out


def side(name: str, value: object) -> int:
    """Height or width in pixels; what it must be a multiple of is the model's."""
    try:
        return integer(name, value, high=MOST_PIXELS)
    except InputError as e:
        raise ShapeError(str(e)) from None


def pair(name: str, value: object) -> tuple[int, int]:
    """Two whole numbers of pixels, vertical first; negative ones are accepted."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise _wrong(name, value, "two whole numbers of pixels, vertical first")
    first, second = (
        integer(f"{name}[{i}]", v, -MOST_PIXELS, MOST_PIXELS) for i, v in enumerate(value)
    )
    return first, second


def size(name: str, value: object) -> tuple[int, int]:
    """(height, width) in pixels."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise _wrong(name, value, "two whole numbers, height and width in pixels")
    return side(f"{name}[0]", value[0]), side(f"{name}[1]", value[1])
