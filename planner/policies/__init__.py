"""Ranking policies by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from .policy import Choice, Policy
from .simple import BestFit, Pack, Random, Score, Spread

POLICIES: Final[dict[str, Callable[[], Policy]]] = {
    "random": Random,
    "best-fit": BestFit,
    "spread": Spread,
    "pack": Pack,
    "score": Score,
}
DEFAULT: Final = "best-fit"

__all__ = ["DEFAULT", "POLICIES", "Choice", "Policy", "make"]


def make(name: str) -> Policy:
    """A fresh policy: it may learn, and two planners must not share what it knows.

    Raises:
        KeyError: there is none of that name.
    """
    return POLICIES[name]()
