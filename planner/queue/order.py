"""Order of the queue: a rule turns a waiting request into a key, and the smaller key is served first.

A key is computed once, when the request arrives, and never changes. So the order is a sorted list, and each request has
a bound on its wait that holds whatever arrives later: a key is never less than the arrival, and never more than the
arrival plus `MOST_SLACK_SECONDS`. Whoever arrives after a request's key is behind it.

Priority comes before the key. A site may use a rule of its own, as `module:function` (`rule_of`).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Final, NamedTuple

MOST_SLACK_SECONDS: Final = 30 * 86400.0
"""Longest time by which a rule may put a request behind others that arrive later."""
SLACK: Final = 10.0
"""Seconds of slack per expected second on one device."""
SIZE_EXPONENT: Final = 0.5
"""Exponent of the number of devices in the slack: large requests lose less by it than by their GPU-time."""
FAIR_SLACK: Final = 10.0
"""Seconds of slack per second on one device that the owner has waiting, running or recently used."""


class Asked(NamedTuple):
    """A request, as a rule sees it.

    Attributes:
        arrived_at: time of its arrival, in seconds.
        number: of its arrival, from 1.
        gpus: devices that it asks for; a share counts as a part, cores as the part of a host's devices.
        seconds: expected duration.
        owner: of the request.
        owner_gpu_seconds: device seconds that the owner has waiting, running or recently used, this request excluded.
    """

    arrived_at: float
    number: int
    gpus: float
    seconds: float
    owner: str
    owner_gpu_seconds: float


Rule = Callable[[Asked], float]
"""Returns the key of a request; the smaller goes first."""


def fifo(asked: Asked) -> float:
    """Order of arrival."""
    return asked.arrived_at


def shortest(asked: Asked) -> float:
    """Least expected work first, with a limited slack: arrival + slack by duration and size."""
    return asked.arrived_at + _limited(SLACK * asked.seconds * asked.gpus**SIZE_EXPONENT)


def fair(asked: Asked) -> float:
    """Owners with the least work in the cluster first: arrival + slack by all that the owner has and asks for."""
    mine = asked.owner_gpu_seconds + asked.seconds * asked.gpus
    return asked.arrived_at + _limited(FAIR_SLACK * mine)


RULES: Final[dict[str, Rule]] = {"fifo": fifo, "shortest": shortest, "fair": fair}
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
        own: Callable[[Asked], float] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"rule {name!r} can't be imported: {error}") from None
    if not callable(own):
        raise ValueError(f"rule {name!r} is no function")

    def key(asked: Asked) -> float:
        value = float(own(asked))
        return value if math.isfinite(value) else asked.arrived_at + MOST_SLACK_SECONDS

    return key


def _limited(slack: float) -> float:
    return min(MOST_SLACK_SECONDS, max(0.0, slack))
