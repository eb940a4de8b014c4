"""Recipes and profiles: a TOML table -> a plain dataclass, by pydantic. Types, ranges and names
come from the dataclass's annotations; whatever is wrong is one line: key, given, accepted.

    Share = Annotated[float, At(0, 1)]

    @settings
    @dataclass(frozen=True)
    class Output:
        caption_dropout: Share = 0.1
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import reprlib
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar, cast

from sdlite.errors import InputError, need, printable

T = TypeVar("T")
# Nothing is parsed or rounded ("4" is no number, 4.0 no whole number), and no name is left over.
_RULES = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
_SAID = {
    "missing": "it is needed",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a finite number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "string_too_short": "a string that is not empty",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a table",
    "dataclass_type": "a table",
    "dataclass_exact_type": "a table",
}


class At:
    """Both ends of a range, included. For `Annotated[int, At(1, 1000)]` and the like.

    pydantic asks an annotation for `ge` and `le` by way of annotated_types' `Interval`, which
    this makes; so the module can be imported without either.
    """

    def __init__(self, low: float, high: float = math.inf):
        self.low, self.high = low, high

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """pydantic's hook: the schema of the type, narrowed."""
        schema = handler(source)
        schema["ge"] = self.low
        if self.high != math.inf:
            schema["le"] = self.high
        return schema


def settings(cls: type[T]) -> type[T]:
    """A dataclass that `read` fills: it refuses unknown keys and other types."""
    cls.__pydantic_config__ = _RULES  # type: ignore[attr-defined]
    return cls


@functools.cache
def _adapter(cls: Hashable) -> Any:
    need("reading recipes and profiles", "quantize", "pydantic")
    import pydantic

    return pydantic.TypeAdapter(cls)


def read(cls: type[T], raw: Mapping[str, Any], label: str) -> T:
    """Fill a dataclass from a table.

    Args:
        raw: name -> value, as TOML gives them.
        label: what the error calls the table, such as "profile phone" or "stage 1 (output)".

    Raises:
        InputError: the first key that is unknown, missing, of another type or out of range, with
            what was given and what is accepted.
        MissingExtraError: pydantic is not installed.
    """
    adapter = _adapter(cast(Hashable, cls))
    import pydantic

    try:
        # as JSON, in which a list is a tuple, a table a dataclass, and 1 a float, but "1" is not
        out: T = adapter.validate_json(json.dumps(raw, default=str))
        return out
    except pydantic.ValidationError as e:
        raise InputError(_line(cls, label, e.errors(include_url=False)[0])) from None


def check(made: object) -> None:
    """Refuse what `read` would: for the `__post_init__` of a dataclass that people also make in
    Python.

    Raises:
        InputError: the first value of another type or out of range, named as `read` names it.
        MissingExtraError: pydantic is not installed.
    """
    cls = type(made)
    given = dataclasses.asdict(cast(Any, made))
    read(_unchecked(cast(Hashable, cls)), given, cls.__name__)


@functools.cache
def _unchecked(cls: Any) -> Any:
    """A dataclass of the same fields whose `__post_init__` does not check again."""
    import typing

    kinds = typing.get_type_hints(cls, include_extras=True)
    own = [(f.name, kinds[f.name]) for f in dataclasses.fields(cls)]
    return settings(dataclasses.make_dataclass(cls.__name__, own))


def _line(cls: Any, label: str, error: Mapping[str, Any]) -> str:
    key = ".".join(printable(x, 80) for x in error["loc"] if not str(x).startswith("function-"))
    kind, about = error["type"], error.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        known = ", ".join(f.name for f in dataclasses.fields(_owner(cls, error["loc"])))
        return f"{label}: {key} is not known; known: {known}."
    if kind == "missing":
        return f"{label}: {key} is missing; give it."
    given = printable(reprlib.repr(error["input"]), 100)
    if kind == "value_error":
        return f"{label}: {key}={given}; accepted: {about['error']}."
    return f"{label}: {key}={given}; accepted: {_accepted(kind, about, error['msg'])}."


def _accepted(kind: str, about: Mapping[str, Any], words: str) -> str:
    if kind == "literal_error":
        return str(about["expected"])
    if kind == "greater_than_equal":
        return f"at least {about['ge']:g}"
    if kind == "less_than_equal":
        return f"at most {about['le']:g}"
    return _SAID.get(kind, words[:1].lower() + words[1:])


def _owner(cls: Any, loc: tuple[Any, ...]) -> Any:
    """The dataclass in which a key stands that is not known."""
    import typing

    for name in loc[:-1]:
        kinds = typing.get_type_hints(cls)
        if name in kinds:
            inner = [kinds[name], *typing.get_args(kinds[name])]
            cls = next((k for k in inner if dataclasses.is_dataclass(k)), cls)
    return cls
