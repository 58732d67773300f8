"""Ranking policies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from ...fleet.state import AskKey
from .fragmentation import Fragmentation
from .opportunity.policy import Opportunity
from .policy import Choice, Policy
from .simple import BestFit, Pack, Random, Score, Spread

POLICIES: Final[dict[str, Callable[..., Policy]]] = {
    "random": Random,
    "best-fit": BestFit,
    "spread": Spread,
    "pack": Pack,
    "score": Score,
    "fragmentation": Fragmentation,
    "opportunity": Opportunity,
}
_LEARNING: Final = {Fragmentation, Opportunity}
DEFAULT: Final = "opportunity"

__all__ = ["DEFAULT", "POLICIES", "Choice", "Policy", "make"]


def make(name: str, profile: Mapping[AskKey, float] | None = None) -> Policy:
    """Make a new policy. Each planner needs one of its own, since policies may learn.

    Args:
        name: of the policy.
        profile: the mix of requests, request → weight, for policies that use one; otherwise they learn it.

    Raises:
        KeyError: there is none of that name.
    """
    kind = POLICIES[name]
    return kind(profile) if profile is not None and kind in _LEARNING else kind()
