"""The bus's clock, as a processor knows it: asked from time to time, and carried on in between."""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import UTC, datetime, timedelta
from typing import Final

from nats.aio.client import Client
from nats.errors import Error as NatsError

from ..bus import stream_messages
from ..bus.tasks import heed_cancellation
from ..schemas import subjects

ASK_SECONDS: Final = 20.0
KEPT_SECONDS: Final = 600.0
"""A server that has not answered for so long may be another one by now."""


class ServerClock:
    """The time by the server's clock."""

    def __init__(self) -> None:
        self._server = 0.0
        self._asked = -KEPT_SECONDS

    def now(self) -> datetime | None:
        """None where the server has not said so of late."""
        elapsed = time.monotonic() - self._asked
        if not self._server or elapsed > KEPT_SECONDS:
            return None
        return datetime.fromtimestamp(self._server, UTC) + timedelta(seconds=elapsed)

    async def run(self, nc: Client) -> None:
        """Ask until cancelled."""
        while True:
            heed_cancellation()
            with contextlib.suppress(NatsError, TimeoutError, OSError):
                server = await stream_messages.clock(nc, subjects.TELEMETRY_STREAM)
                if server is not None:
                    self._server, self._asked = server, time.monotonic()
            await asyncio.sleep(ASK_SECONDS)
