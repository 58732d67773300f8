"""Findings of `corral doctor`."""

from __future__ import annotations

from msgspec import Struct


class Finding(Struct, frozen=True, kw_only=True):
    """Result of one check.

    Attributes:
        what: subject of the check.
        level: `ok`, `note` (works, with a caveat) or `problem`.
        detail: result in words.
        fix: what to do about it; empty if nothing.
    """

    what: str
    level: str
    detail: str
    fix: str = ""


def ok(what: str, detail: str) -> Finding:
    """A finding without a problem."""
    return Finding(what=what, level="ok", detail=detail)


def note(what: str, detail: str, fix: str) -> Finding:
    """A finding that doesn't prevent operation."""
    return Finding(what=what, level="note", detail=detail, fix=fix)


def problem(what: str, detail: str, fix: str) -> Finding:
    """A finding of something that doesn't work."""
    return Finding(what=what, level="problem", detail=detail, fix=fix)
