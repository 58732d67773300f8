"""NATS client that survives failures which end a connection of nats-py."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from nats.aio.client import Client

log = logging.getLogger("corral.bus")

RENEW_SECONDS: Final = 5.0
"""Minimum time between two forced reconnects."""
_POLL_SECONDS: Final = 0.1


class Connection(Client):
    """NATS client that reconnects on demand, and whose `flush` works across reconnections and never ends the read loop.

    In nats-py (2.16) the late answer to a flush that was given up ends the read loop. The connection then receives
    nothing more until its pings are found to be unanswered.
    """

    _renewed_at = float("-inf")

    async def renew(self) -> None:
        """Reconnect because nothing is answered over this connection: to another server if there are several.

        This saves the wait for unanswered pings if a server vanished silently, or if the network has recovered
        already. Does nothing within `RENEW_SECONDS` of the last reconnect, or while not connected.
        """
        now = asyncio.get_running_loop().time()
        if now - self._renewed_at > RENEW_SECONDS and self.is_connected:
            self._renewed_at = now
            log.warning("no reply over this connection: reconnecting")
            await self.force_reconnect()

    async def flush(self, timeout: float = 10) -> None:
        """Wait until the server has received all that was sent before; after a reconnection, wait for the new server.

        nats-py (2.16) drops the pings of a connection that it replaces: its own flush then waits to its timeout.

        Args:
            timeout: seconds to wait.

        Raises:
            FlushTimeoutError: the server did not answer in time.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while True:
            connection = self.stats["reconnects"]
            left = max(_POLL_SECONDS, end - loop.time())
            flushing = asyncio.ensure_future(super().flush(left))  # pyright: ignore[reportArgumentType]
            try:
                while not flushing.done() and self.stats["reconnects"] == connection:
                    await asyncio.wait({flushing}, timeout=_POLL_SECONDS)
                if flushing.done():
                    return flushing.result()
            finally:
                flushing.cancel()

    async def _process_pong(self) -> None:
        waiting = self._pongs
        if waiting and waiting[0].done():
            waiting[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()
