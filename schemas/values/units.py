"""Parse and format amounts of bytes and durations, as people write them."""

from __future__ import annotations

import math
import re
from typing import Final

_BYTE_UNITS: Final = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
}
_SECOND_UNITS: Final = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_PART: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)")


MIN_PLAIN_BYTES: Final = 2**20
"""Smallest text without a unit that counts as bytes: a smaller number, such as 20, is probably meant as GiB."""


def parse_bytes(text: str | int) -> int:
    """Convert `20GiB`, `20g` or `1.5TB` to bytes; a letter alone means the binary unit.

    An `int` is bytes, and so is the text of a plain number from 1 MiB on.

    Raises:
        ValueError: no number, an unknown unit, or a small number without one.
    """
    if isinstance(text, int):
        return text
    match = _PART.fullmatch(text.strip())
    if not match or match[2].lower() not in _BYTE_UNITS:
        raise ValueError(f"{text!r} is no amount of memory: write it like 20GiB, 512MiB or 40GB")
    amount = float(match[1]) * _BYTE_UNITS[match[2].lower()]
    if not math.isfinite(amount):
        raise ValueError(f"{text[:40]!r}… is more memory than there is")
    if not match[2] and 0 < amount < MIN_PLAIN_BYTES:
        raise ValueError(f"{text!r} would be bytes: say {match[1]}GiB or {match[1]}GB, or {match[1]}B if you mean it")
    # A whole number stays exact.
    return round(amount) if "." in match[1] else int(match[1]) * _BYTE_UNITS[match[2].lower()]


def parse_seconds(text: str | float) -> float:
    """Convert `250ms`, `10s`, `1h30m` or a plain number to seconds.

    Raises:
        ValueError: no number, or an unknown unit.
    """
    if isinstance(text, int | float):
        return float(text)
    compact = text.strip()
    parts = list(_PART.finditer(compact))
    whole = "".join(m[0] for m in parts) == compact.replace(" ", "") or "".join(m[0] for m in parts) == compact
    if not parts or not whole or any(m[2].lower() not in _SECOND_UNITS for m in parts):
        raise ValueError(f"{text!r} is no duration: write it like 250ms, 10s, 5m or 1h30m")
    if len(parts) > 1 and not all(m[2] for m in parts):
        raise ValueError(f"{text!r} is no duration: each number needs its unit, as in 1h30m")
    seconds = sum(float(m[1]) * _SECOND_UNITS[m[2].lower()] for m in parts)
    if not math.isfinite(seconds):
        raise ValueError(f"{text[:40]!r}… is longer than anything lasts")
    return seconds


def format_bytes(amount: float) -> str:
    """Format bytes in the largest binary unit that keeps the number at 1 or more, such as `79.6 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """Format seconds as `45s`, `12m`, `3h05m` or `2d4h`."""
    seconds = max(0.0, seconds)
    if seconds < 90:
        return f"{seconds:.0f}s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours < 48 else f"{hours // 24}d{hours % 24}h"


def format_limit(seconds: float) -> str:
    """Format seconds as `format_seconds` does, rounded down: what takes that long at most is over in time."""
    if seconds < 120:
        return f"{seconds // 1:.0f}s"
    unit = 60 if seconds < 172_800 else 3600
    return format_seconds(seconds // unit * unit)


def short_time(seconds: float) -> str:
    """Format a time in milliseconds, or in seconds from 1 s."""
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def exact_bytes(amount: int) -> str:
    """Write bytes as a whole number of the largest binary unit that divides them, such as `2TiB`, for `parse_bytes`."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if amount and amount % _BYTE_UNITS[unit.lower()] == 0:
            return f"{amount // _BYTE_UNITS[unit.lower()]}{unit}"
    return f"{amount}B"


def exact_seconds(seconds: float) -> str:
    """Write a duration as a whole number of the largest unit that divides it, such as `7d`, for `parse_seconds`."""
    for unit in ("d", "h", "m"):
        if seconds and seconds % _SECOND_UNITS[unit] == 0:
            return f"{seconds / _SECOND_UNITS[unit]:.0f}{unit}"
    return f"{seconds:f}".rstrip("0").rstrip(".") + "s" if seconds != int(seconds) else f"{seconds:.0f}s"
