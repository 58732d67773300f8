"""Order of the messages to a target, and times of further attempts. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Final

from .messages import Message, digest
from .rules import Delivery

MOST_AT_ONCE: Final = 100
"""Deliveries in one message."""
MOST_SINGLE: Final = 3
"""Deliveries that are due at once and still go out as messages of their own."""
FIRST_RETRY_SECONDS: Final = 2.0
LAST_RETRY_SECONDS: Final = 300.0


def due(waiting: Iterable[Delivery], now: datetime) -> list[Delivery]:
    """Deliveries of a target for the next message, oldest first; empty if none is due.

    Those that have waited for the end of a quiet time go out together, and so do many that are due at once. One with
    files is a message of its own.
    """
    ready = sorted(
        (each for each in waiting if each.not_before is None or each.not_before <= now), key=lambda each: each.made_at
    )
    if ready and ready[0].message.files:
        return ready[:1]
    ready = [each for each in ready if not each.message.files]
    deferred = [each for each in ready if each.not_before is not None]
    if len(deferred) > 1 or len(ready) > MOST_SINGLE:
        return ready[:MOST_AT_ONCE]
    return ready[:1]


def message_for(deliveries: Sequence[Delivery]) -> Message:
    """The message of deliveries that go out together."""
    if len(deliveries) == 1:
        return deliveries[0].message
    return digest([each.message for each in deliveries], waited=any(each.not_before for each in deliveries))


def next_at(waiting: Iterable[Delivery]) -> datetime | None:
    """Time at which the first of them is due; None without any."""
    return min((each.not_before or each.made_at for each in waiting), default=None)


def retry_seconds(failures: int, random: float) -> float:
    """Time until the next attempt: it doubles with each failure, and is cut to some of it, at random.

    Args:
        failures: attempts that failed in a row, from 1.
        random: 0 to 1.
    """
    longest = min(LAST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** min(failures - 1, 20))
    return longest * (0.5 + random / 2)


def expired(waiting: Iterable[Delivery], give_up_seconds: float, now: datetime) -> list[Delivery]:
    """Deliveries that could not be sent for too long since they were due."""
    limit = timedelta(seconds=give_up_seconds)
    return [each for each in waiting if now - max(each.made_at, each.not_before or each.made_at) > limit]
