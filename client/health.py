"""How the services of a fleet are, asked over the bus."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Final

from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg

from ..schemas import codec
from ..schemas.health import ServiceHealth, health_subject

FIRST_SECONDS: Final = 2.0
"""Whoever is alive answers within it."""
QUIET_SECONDS: Final = 0.25
"""After an answer, others are waited for so long."""
MOST_SECONDS: Final = 3.0
"""Beyond the first answer: more are not waited for, whatever comes in."""
_MOST: Final = 100_000


async def ask_health(
    nc: NatsClient,
    service: str | None = None,
    instance: str | None = None,
    *,
    known: Sequence[tuple[str, str]] = (),
    first_seconds: float = FIRST_SECONDS,
) -> list[ServiceHealth]:
    """Ask services how they are; those that do not answer are left out.

    Args:
        nc: a connected client of the bus.
        service: only of this kind; all by default.
        instance: only this one of them.
        known: service and instance of those that should answer: once all of them have, nobody else is waited for.
        first_seconds: wait so long for the first answer.

    Returns:
        The answers, by service and instance.
    """
    found: dict[tuple[str, str], ServiceHealth] = {}
    came = asyncio.Event()

    async def take(message: Msg) -> None:
        if (message.headers or {}).get("Status") != "503" and len(found) < _MOST:
            with contextlib.suppress(codec.DecodeError):  # a newer service, or a stranger
                health = codec.decode(message.data, ServiceHealth, codec.JSON)
                found[health.service.value, health.instance] = health
        came.set()

    wanted = set(known)
    if service is not None and instance is not None:
        wanted = {(service, instance)}
    inbox = nc.new_inbox()
    subscription = await nc.subscribe(inbox, cb=take)
    try:
        await nc.publish(health_subject(service, instance), b"", reply=inbox)
        seconds = first_seconds
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(first_seconds + MOST_SECONDS):
                while not (wanted and wanted <= found.keys()):
                    came.clear()
                    async with asyncio.timeout(seconds):
                        await came.wait()
                    # Nobody in one account is no word about others: they have the usual time.
                    seconds = QUIET_SECONDS
    finally:
        await subscription.unsubscribe()
    return sorted(found.values(), key=lambda health: (health.service, health.instance))
