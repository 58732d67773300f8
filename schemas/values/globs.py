"""Glob patterns over names, as in shells: `*`, `?`, `[abc]`, `[!a-z]`. No pattern can make matching slow.

`fnmatch` of the standard library searches for the end of every `[` anew, so that a few thousand of them take minutes,
and it keeps 32,768 compiled patterns forever. Here a pattern with `*` alone, as most are, is never compiled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import translate
from functools import lru_cache
from typing import Final

from ..codec import DecodeError

MAX_COMPLEX: Final = 32
"""Patterns with `?` or `[` that one request may have: each of them is compiled."""
MAX_CHARACTERS: Final = 256
"""Characters that one pattern may have."""

_STARS: Final = re.compile(r"\*+")


def containing(text: str) -> str:
    """The pattern for names that contain a text; a text with wildcards is a pattern already."""
    return text if set(text) & set("*?[") else f"*{text}*"


def matches(text: str, glob: str) -> bool:
    """True if a pattern matches the whole of a text; case-sensitive."""
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
    """True if at least one of the patterns matches the whole of a text; case-sensitive."""
    return any(matches(text, glob) for glob in globs)


def check(globs: Sequence[str], path: str) -> None:
    """Refuse patterns that would take too long to match.

    Args:
        globs: patterns of a request.
        path: path of the field that they are in.

    Raises:
        DecodeError: a pattern is too long, or too many have to be compiled.
    """
    if any(len(glob) > MAX_CHARACTERS for glob in globs):
        raise DecodeError(f"A pattern has more than {MAX_CHARACTERS} characters - at `{path}`", "invalid", path)
    if sum("?" in glob or "[" in glob for glob in globs) > MAX_COMPLEX:
        raise DecodeError(f"More than {MAX_COMPLEX} patterns have ? or [ in them - at `{path}`", "invalid", path)


@lru_cache(1024)
def _compiled(glob: str) -> Callable[[str], object]:
    at = glob.find("[")
    while at >= 0:
        # The first character of a set may be `]` itself.
        inside = at + 2 if glob.startswith("!", at + 1) else at + 1
        end = glob.find("]", inside + glob.startswith("]", inside))
        if end < 0:  # this set is never closed, nor is any after it: each `[` stands for itself
            glob = glob[:at] + glob[at:].replace("[", "[[]")
            break
        at = glob.find("[", end + 1)
    return re.compile(translate(glob)).match
