"""Order of the queue: a rule gives each waiting request a key, and the smaller key is served first.

A rule is arithmetic over `Asked`, whose fields are numbers, or arrays of them for all that wait. Keys change with the
time that a request has waited, slowly, and are renewed for all at once (`KEYS_SECONDS`).

Before the key come the priority, and whether a request is overdue: one that has waited for `LIMIT_SECONDS` goes ahead
of all of its priority that have not, by arrival. That bounds each wait, whatever arrives and however wrong estimates
are: from then on only those go ahead that came before it, and no reservation but theirs binds it.

`shortest` is the generalized cμ rule [1] for a cost of waiting that grows with the time waited: per second it is
1 + wait / `TAU_SECONDS`, and the request with the greatest cost per expected work goes first. It asks for no scale of
the site: among waits much longer than `TAU_SECONDS` the order is that of wait / work. Where a duration is learned from
other work alone, the cost grows with the power `UNKNOWN_EXPONENT` of that: the less is known, the more arrival counts.

A site may use a rule of its own, as `module:function` (`rule_of`).

[1] J. A. Van Mieghem: Dynamic Scheduling with Convex Delay Costs: The Generalized cμ Rule. Annals of Applied
    Probability 5 (1995).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Final, NamedTuple

TAU_SECONDS: Final = 86_400.0
"""Wait after which another second costs twice as much as the first."""
UNKNOWN_EXPONENT: Final = 1.25
"""Power in which that cost grows where the duration is learned from other work than that of the same name."""
LIMIT_SECONDS: Final = 90 * 86_400.0
"""Wait after which a request goes ahead of all that have waited less."""
KEYS_SECONDS: Final = 300.0
"""Time after which keys are renewed: they change by less than four thousandths meanwhile."""
LEAST_SECONDS: Final = 10.0
"""Least duration that is expected: what a start and an end cost."""

Numbers = Any
"""A float, or an array of them."""


class Asked(NamedTuple):
    """A request, or all that wait, as a rule sees them.

    Attributes:
        arrived_at: time of arrival, in seconds.
        waited: seconds since.
        gpus: devices that it takes; a share counts as a part, cores as the part of a host's devices.
        seconds: expected duration, at least `LEAST_SECONDS`.
        owner_gpu_seconds: device seconds that its owner has running, or has used recently.
        owner_share: the same in units of an equal share: of all recent use, over the number of owners that have any.
        known: 1 if the duration was given or learned from work of the same name, 0 if from other work.
    """

    arrived_at: Numbers
    waited: Numbers
    gpus: Numbers
    seconds: Numbers
    owner_gpu_seconds: Numbers
    owner_share: Numbers = 0.0
    known: Numbers = 1.0


Rule = Callable[[Asked], Numbers]
"""Returns the key of a request, or of all; the smaller goes first."""


def fifo(asked: Asked) -> Numbers:
    """Order of arrival."""
    return asked.arrived_at


def _age(asked: Asked) -> Numbers:
    """Cost of another second of waiting."""
    return (1.0 + asked.waited / TAU_SECONDS) ** (UNKNOWN_EXPONENT + (1.0 - UNKNOWN_EXPONENT) * asked.known)


def shortest(asked: Asked) -> Numbers:
    """Least expected work for the cost of waiting."""
    return asked.seconds * asked.gpus / _age(asked)


def fair(asked: Asked) -> Numbers:
    """As `shortest`, where work counts the more, the more of the fleet its owner has used recently.

    Work of an owner with `n` times an equal share counts `1 + n` times: of equal work that of the lighter owner goes
    first, and the brief work of a heavy one still goes before long work.
    """
    return asked.seconds * asked.gpus * (1.0 + asked.owner_share) / _age(asked)


RULES: Final[dict[str, Rule]] = {"fifo": fifo, "shortest": shortest, "fair": fair}
TIMELESS: Final = frozenset({fifo})
"""Rules whose keys do not change with time."""
DEFAULT: Final = "shortest"


def rule_of(name: str) -> Rule:
    """Rule of a name, or of `module:function`.

    Raises:
        ValueError: there is no such rule; the message says what there is.
    """
    found = RULES.get(name)
    if found is not None:
        return found
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"rule {name!r} is not known: use one of {', '.join(RULES)}, or module:function")
    try:
        own: Rule = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"rule {name!r} can't be imported: {error}") from None
    if not callable(own):
        raise ValueError(f"rule {name!r} is no function")
    return own
