"""Errors of validation in words; msgspec names Python's types, and shows patterns as regular expressions."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Final

from .names import WORDS
from .units import exact_seconds

_TYPES: Final = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "a boolean",
    "array": "a list",
    "object": "an object",
    "datetime": "a time",
    "null": "null",
}
_SIGNS: Final = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}
_UNITS: Final = {"str": "characters", "array": "entries", "object": "fields", "bytes": "bytes"}
_TIME: Final = "Expected a time with its zone, such as 2026-01-31T08:00:00Z"

_AT: Final = " - at `"
_PATTERN: Final = re.compile(r"Expected `str` matching regex (.*)", re.DOTALL)
_RANGE: Final = re.compile(r"Expected `(?:int|float)` ([<>]=?) (\S+)")
_LENGTH: Final = re.compile(r"Expected `(\w+)` of length ([<>]=?) (\d+)")
_TYPE: Final = re.compile(r"Expected `([^`]+)`(?:, got `([^`]+)`)?")
_NO_TIME: Final = re.compile(r"Expected `datetime` with a timezone component|Invalid RFC3339 encoded datetime")


def in_words(message: str) -> str:
    """Put an error of msgspec in words. The path of the field at its end, as in «- at `$.gpus`», stays.

    A message of an unknown form is returned as it is.
    """
    head, at, path = message.rpartition(_AT)
    if not at:
        head, path = path, ""
    field = path.rstrip("`").rpartition(".")[2]
    for form, words in _FORMS:
        if found := form.fullmatch(head):
            return f"{words(found, field)}{at}{path}"
    return message


def _pattern(found: re.Match[str], field: str) -> str:
    words = WORDS.get(ast.literal_eval(found[1]))
    return f"Expected {words}" if words else found[0]


def _range(found: re.Match[str], field: str) -> str:
    sign, number = _SIGNS[found[1]], Decimal(found[2])
    plain = f"{number:f}".removesuffix(".0")
    if field.endswith("_seconds"):
        short = exact_seconds(float(number))
        return f"Expected a duration of {sign} {short}" + ("" if short == f"{plain}s" else f" ({plain} seconds)")
    return f"Expected a number of {sign} {plain}"


def _length(found: re.Match[str], field: str) -> str:
    kind = found[1]
    if (found[2], found[3]) == (">=", "1"):
        return f"Expected {_TYPES.get(kind, kind)} that is not empty"
    return f"Expected {_TYPES.get(kind, kind)} of {_SIGNS[found[2]]} {found[3]} {_UNITS.get(kind, 'entries')}"


def _type(found: re.Match[str], field: str) -> str:
    return f"Expected {_kinds(found[1])}" + (f", got {_kinds(found[2])}" if found[2] else "")


def _kinds(text: str) -> str:
    return " or ".join(_TYPES.get(kind, kind) for kind in text.split(" | "))


def _time(found: re.Match[str], field: str) -> str:
    return _TIME


_FORMS: Final[tuple[tuple[re.Pattern[str], Callable[[re.Match[str], str], str]], ...]] = (
    (_NO_TIME, _time),
    (_PATTERN, _pattern),
    (_RANGE, _range),
    (_LENGTH, _length),
    (_TYPE, _type),
)
