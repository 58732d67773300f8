"""Values that a field may have, where it has one of a few: for errors about others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from msgspec import inspect

_OTHER: Final = re.compile(r"Invalid enum value (.*?)(?= - at `|$)", re.DOTALL)
_STEPS: Final = re.compile(r"\.(\w+)|\[(?:\d+|\.\.\.)\]")
_UNIONS: Final = 8
"""Limit on types within types of one step."""


def with_choices(message: str, type: Any) -> str:
    """Add to an error about a value that is none of a few which they are; other messages stay as they are.

    Args:
        message: of msgspec; the path of the field may be at its end.
        type: that was decoded.
    """
    found = _OTHER.match(message)
    if found is None:
        return message
    path = message[found.end() :].removeprefix(" - at `").removesuffix("`")
    choices = list(dict.fromkeys(_choices(inspect.type_info(type), _STEPS.findall(path.removeprefix("$")))))
    if not choices:
        return message
    return f"{found[1]} is none of {', '.join(map(str, choices))}{message[found.end() :]}"


def _choices(at: inspect.Type, steps: list[str], depth: int = 0) -> Iterator[object]:
    """Values of a type after some steps into it: the name of a field, or empty for an entry of a list or an object."""
    if depth > _UNIONS:
        return
    if isinstance(at, inspect.Metadata):
        yield from _choices(at.type, steps, depth + 1)
    elif isinstance(at, inspect.UnionType):
        for each in at.types:
            yield from _choices(each, steps, depth + 1)
    elif not steps:
        if isinstance(at, inspect.EnumType):
            yield from (member.value for member in at.cls)
        elif isinstance(at, inspect.LiteralType):
            yield from at.values
    elif isinstance(at, inspect.StructType):
        for field in at.fields:
            if field.encode_name == steps[0]:
                yield from _choices(field.type, steps[1:])
    elif isinstance(at, (inspect.ListType, inspect.VarTupleType, inspect.SetType)):
        yield from _choices(at.item_type, steps[1:])
    elif isinstance(at, inspect.DictType):
        yield from _choices(at.value_type, steps[1:])
