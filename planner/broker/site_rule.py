"""A site's own rule for the order of the queue, kept from stopping the queue when it fails."""

from __future__ import annotations

import logging
import sys
from typing import Final

import numpy as np

from ..queue.order import RULES, Asked, Numbers, Rule, shortest

log = logging.getLogger("corral.planner.queue")

LAST: Final = sys.float_info.max
"""Key in place of one that is no number: such a request goes last of its priority until it is overdue."""


def guarded(rule: Rule) -> Rule:
    """Return a rule that gives each request a finite key, whatever a site's own rule does.

    Where that raises an error, or gives another number of keys, the keys are those of `shortest`, and the log says so
    once. A key that is no number is the last.
    """
    if rule in RULES.values():
        return rule
    failed = False

    def keys(asked: Asked) -> Numbers:
        nonlocal failed
        try:
            found = np.broadcast_to(np.asarray(rule(asked), dtype=float), np.shape(asked.arrived_at))
        except Exception:
            if not failed:
                log.exception("the site's rule for the queue failed: requests that it fails for are sorted by shortest")
            failed = True
            return shortest(asked)
        return np.nan_to_num(found, nan=LAST, posinf=LAST, neginf=-LAST)

    return keys


__all__ = ["LAST", "guarded"]
