"""Clock of the NATS server: read every `ASK_SECONDS`, and extrapolated in between."""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import UTC, datetime, timedelta
from typing import Final

from nats.aio.client import Client
from nats.errors import Error as NatsError

from ..bus.stream_reader import server_time
from ..bus.tasks import heed_cancellation
from ..schemas import subjects

ASK_SECONDS: Final = 20.0
KEPT_SECONDS: Final = 600.0
"""An answer older than this is not used: the server may be another one by now."""


class ServerClock:
    """Time by the server's clock."""

    def __init__(self) -> None:
        self._server = 0.0
        self._asked = -KEPT_SECONDS

    def now(self) -> datetime | None:
        """Current time by the server's clock; None if it has not answered within `KEPT_SECONDS`."""
        elapsed = time.monotonic() - self._asked
        if not self._server or elapsed > KEPT_SECONDS:
            return None
        return datetime.fromtimestamp(self._server, UTC) + timedelta(seconds=elapsed)

    async def run(self, nc: Client) -> None:
        """Read the server's clock repeatedly, until cancelled."""
        while True:
            heed_cancellation()
            with contextlib.suppress(NatsError, TimeoutError, OSError):
                server = await server_time(nc, subjects.TELEMETRY_STREAM)
                if server is not None:
                    self._server, self._asked = server, time.monotonic()
            await asyncio.sleep(ASK_SECONDS)
