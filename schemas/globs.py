"""Patterns over names, as shells have them: `*`, `?`, `[abc]`, `[!a-z]`. Whoever writes them can't make it slow.

`fnmatch` of the standard library looks for the end of every `[` anew, so that a few thousand of them take it minutes,
and keeps 32,768 compiled patterns for ever. Here a pattern of stars alone, as most are, is never compiled at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import translate
from functools import lru_cache
from typing import Final

from .codec import DecodeError

MOST_COMPLEX: Final = 32
"""Patterns with `?` or `[` that one question may have: each of them is compiled."""
MOST_CHARACTERS: Final = 256
"""Of one pattern."""

_STARS: Final = re.compile(r"\*+")


def matches(text: str, glob: str) -> bool:
    """Whether a pattern fits the whole of a text, upper and lower case apart."""
    if "?" in glob or "[" in glob:
        return _compiled(glob)(text) is not None
    if "*" not in glob:
        return text == glob
    first, *middle, last = _STARS.split(glob)
    if not (text.startswith(first) and text.endswith(last) and len(text) >= len(first) + len(last)):
        return False
    at, end = len(first), len(text) - len(last)
    for piece in middle:
        found = text.find(piece, at, end)
        if found < 0:
            return False
        at = found + len(piece)
    return True


def matches_any(text: str, globs: Iterable[str]) -> bool:
    """Whether one of some patterns fits."""
    return any(matches(text, glob) for glob in globs)


def check(globs: Sequence[str], path: str) -> None:
    """Refuse patterns that would take too long.

    Args:
        globs: as somebody sent them.
        path: of the field that they are in.

    Raises:
        DecodeError: too long, or too many that have to be compiled.
    """
    if any(len(glob) > MOST_CHARACTERS for glob in globs):
        raise DecodeError(f"A pattern has more than {MOST_CHARACTERS} characters - at `{path}`", "invalid", path)
    if sum("?" in glob or "[" in glob for glob in globs) > MOST_COMPLEX:
        raise DecodeError(f"More than {MOST_COMPLEX} patterns have ? or [ in them - at `{path}`", "invalid", path)


@lru_cache(1024)
def _compiled(glob: str) -> Callable[[str], object]:
    at = glob.find("[")
    while at >= 0:
        # The first character of a set may be `]` itself.
        inside = at + 2 if glob.startswith("!", at + 1) else at + 1
        end = glob.find("]", inside + glob.startswith("]", inside))
        if end < 0:  # it is never closed, and nothing behind it is: each stands for itself
            glob = glob[:at] + glob[at:].replace("[", "[[]")
            break
        at = glob.find("[", end + 1)
    return re.compile(translate(glob)).match
