"""Model patterns of groups: case-insensitive globs, which match names that contain them if they have no wildcard."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final

from ...schemas.values import globs

ANY: Final = "*"
"""Pattern that matches every model; it comes after all others."""

_WILDCARD: Final = re.compile(r"[*?\[]")
_STARS: Final = re.compile(r"\*+")


@lru_cache(4096)
def pattern_of(pattern: str) -> str:
    """The glob that a pattern stands for, in lower case: `H100` is `*h100*`."""
    lower = pattern.lower()
    return _STARS.sub("*", lower) if _WILDCARD.search(lower) else f"*{lower}*"


def matches(pattern: str, model: str) -> bool:
    """True if a pattern matches a device's name."""
    return globs.matches(model.lower(), pattern_of(pattern))


def is_within(inner: str, outer: str) -> bool:
    """True if every name that `inner` matches is certainly matched by `outer`, too.

    Exact for patterns with `*` alone: a `*` of `inner` may stand for any text, so only a `*` of `outer` takes it in. A
    pattern with `?` or `[` is within itself and within `*`.
    """
    narrow, wide = pattern_of(inner), pattern_of(outer)
    if narrow == wide or wide == ANY:
        return True
    if any(sign in narrow or sign in wide for sign in "?["):
        return False
    return globs.matches(narrow, wide)


def in_order(amounts: Mapping[str, float]) -> list[tuple[str, float]]:
    """Amounts by pattern in the order in which patterns are compared with a model: as written, but `*` last."""
    return sorted(amounts.items(), key=lambda pair: pattern_of(pair[0]) == ANY)


def first_match(patterns: Iterable[str], model: str) -> str | None:
    """The pattern that a device of a model counts for: the first that matches; None if none does."""
    return next((pattern for pattern in patterns if matches(pattern, model)), None)
