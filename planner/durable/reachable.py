"""Check that requests reach a planner: a message that it sends to itself over their connection comes back.

The leader writes its heartbeat over a connection of its own, so that it does not wait behind requests. It must not go
on leading by that where the connection for requests is dead.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Final

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from ...bus.connection import Connection
from ...bus.elapsed import elapsed_seconds

log = logging.getLogger("corral.planner.leader")

SILENT_SECONDS: Final = 5.0
"""Time without the message after which a connection counts as dead: it may wait behind thousands of requests."""


class Reachable:
    """Messages to itself, one at a time.

    Args:
        nc: connection for requests.
    """

    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._subject = f"{nc.new_inbox()}.self"
        self._subscription: Subscription | None = None
        self._heard_at = 0.0
        self._back = True

    async def open(self) -> None:
        """Subscribe to the messages."""
        self._subscription = await self._nc.subscribe(self._subject, cb=self._on_message)
        self._heard_at = elapsed_seconds()

    async def close(self) -> None:
        """Unsubscribe."""
        if self._subscription is not None and not self._nc.is_closed:
            with contextlib.suppress(NatsError, OSError):
                await self._subscription.unsubscribe()

    async def check(self) -> bool:
        """Send the next message if the last one is back; returns true if the last one that came back is recent.

        A connection that is silent for too long is renewed.
        """
        nc = self._nc
        if not nc.is_connected:
            self._back = True  # what was sent before is lost
            return False
        silent = elapsed_seconds() - self._heard_at
        if silent > SILENT_SECONDS:
            self._back = True
            if isinstance(nc, Connection):
                await nc.renew()
        if self._back:
            try:
                await nc.publish(self._subject, b"")
                self._back = False
            except (NatsError, OSError) as error:
                log.debug("the planner can't send to itself: %r", error)
        return silent <= SILENT_SECONDS

    async def _on_message(self, _: Msg) -> None:
        self._heard_at = elapsed_seconds()
        self._back = True
