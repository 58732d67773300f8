"""Health checks of a fleet's services over the bus."""

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
"""Default time to wait for the first answer, in seconds."""
QUIET_SECONDS: Final = 0.25
"""Time to wait for another answer after each one, in seconds."""
MAX_SECONDS: Final = 3.0
"""Limit on the total waiting time beyond the wait for the first answer, in seconds."""
_MAX_ANSWERS: Final = 100_000


async def ask_health(
    nc: NatsClient,
    service: str | None = None,
    instance: str | None = None,
    *,
    known: Sequence[tuple[str, str]] = (),
    first_seconds: float = FIRST_SECONDS,
) -> list[ServiceHealth]:
    """Run a health check of services; those that don't answer are left out.

    Args:
        nc: a connected client of the bus.
        service: kind of service to check; all kinds by default.
        instance: instance of that service to check; all instances by default.
        known: service and instance of each service that should answer; once all of them have, the check ends.
        first_seconds: seconds to wait for the first answer.

    Returns:
        The answers, sorted by service and instance.
    """
    found: dict[tuple[str, str], ServiceHealth] = {}
    came = asyncio.Event()

    async def take(message: Msg) -> None:
        if (message.headers or {}).get("Status") != "503" and len(found) < _MAX_ANSWERS:
            with contextlib.suppress(codec.DecodeError):  # from a newer version, or from another program
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
            async with asyncio.timeout(first_seconds + MAX_SECONDS):
                while not (wanted and wanted <= found.keys()):
                    came.clear()
                    async with asyncio.timeout(seconds):
                        await came.wait()
                    # "No responders" in one account says nothing about others, so the usual time is waited.
                    seconds = QUIET_SECONDS
    finally:
        await subscription.unsubscribe()
    return sorted(found.values(), key=lambda health: (health.service, health.instance))
