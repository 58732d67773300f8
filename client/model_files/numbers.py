"""Values of a decoded JSON document, each checked for its type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

import msgspec

from ...schemas.models.description import MAX_LAYERS, ModelDescription
from ..errors import InvalidRequest

Table = Mapping[str, Any]
UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are no JSON of the kind, not UTF-8, or nested too deeply."""


class InvalidModelFile(InvalidRequest):
    """A model file can't be read, or does not say what is needed."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "invalid", "")


def checked(model: ModelDescription) -> ModelDescription:
    """A description whose numbers are in range, as the planner would check it.

    Raises:
        InvalidModelFile: one is not.
    """
    try:
        return msgspec.convert(msgspec.to_builtins(model), ModelDescription)
    except msgspec.ValidationError as error:
        raise InvalidModelFile(f"the model has a number out of range: {error}") from None


def layer_count(layers: int) -> int:
    """A number of layers, checked before anything is made for each of them.

    Raises:
        InvalidModelFile: there are more than any model has.
    """
    if layers > MAX_LAYERS:
        raise InvalidModelFile(f"{layers} layers are more than any model has ({MAX_LAYERS} at most)")
    return layers


def whole(table: Table, *names: str, default: int | None = None) -> int:
    """A whole number from 0, under the first of some names that is there and not null.

    Raises:
        InvalidModelFile: it is missing without a default, or something else.
    """
    for name in names:
        value = table.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**40:
            raise InvalidModelFile(f"{name} is {str(value)[:40]!r}, which is no number of this kind")
        return value
    if default is None:
        raise InvalidModelFile(f"{names[0]} is missing")
    return default


def positive(table: Table, *names: str, default: int | None = None) -> int:
    """A whole number from 1; otherwise as `whole`."""
    found = whole(table, *names, default=default)
    if not found:
        raise InvalidModelFile(f"{names[0]} is 0, and has to be 1 or more")
    return found


def truth(table: Table, name: str, default: bool = False) -> bool:
    """A truth value; the default where it is missing or something else."""
    value = table.get(name)
    return value if isinstance(value, bool) else default


def text(table: Table, name: str) -> str:
    """A text, cut to 256 characters; empty where it is missing or something else."""
    value = table.get(name)
    return value[:256] if isinstance(value, str) else ""


def table_of(table: Table, name: str) -> Table:
    """A nested object; empty where it is missing or something else."""
    value = table.get(name)
    return cast("Table", value) if isinstance(value, dict) else {}
