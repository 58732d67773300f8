"""Text from a driver or the operating system, made fit for a message.

Neither promises UTF-8: drivers have given names of random bytes, and a file name or an account may be any bytes at all.
A message takes no lone surrogate, and a table no NUL, so that one such name would make a whole host's messages fail.
"""

from __future__ import annotations

import re
from typing import Any, Final, cast

import msgspec

_SURROGATE: Final = re.compile("[\ud800-\udfff]")
MAX_CHARACTERS: Final = 256
"""Longer text is cut: NVML's longest string has 96 bytes, a path in `/proc` up to 4,096."""


def clean(value: bytes | str, most: int = MAX_CHARACTERS) -> str:
    """Clean a text for UTF-8: what can't be decoded is replaced, control characters become spaces.

    It ends at the first NUL, and is cut and stripped.

    Args:
        value: raw bytes, or text that Python has decoded from bytes (with surrogate escapes).
        most: number of characters to keep.
    """
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else _SURROGATE.sub("\ufffd", value)
    text = text.partition("\0")[0]
    if not text.isprintable():
        text = "".join(character if character.isprintable() else " " for character in text)
    return text.strip()[:most].rstrip()


def cleaned(message: object) -> object:
    """Clean every text in a message; returns the plain values that it is encoded from."""
    return _walk(msgspec.to_builtins(message, builtin_types=(bytes,)))


def _walk(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value, len(value))
    if isinstance(value, dict):
        return {_walk(key): _walk(item) for key, item in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list):
        return [_walk(item) for item in cast("list[Any]", value)]
    return value
