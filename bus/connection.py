"""NATS client that survives failures which end a connection of nats-py."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final, cast

from nats.aio.client import Client
from nats.aio.transport import TcpTransport

from .tasks import heed_cancellation

log = logging.getLogger("corral.bus")

RENEW_SECONDS: Final = 5.0
"""Minimum time between two forced reconnects."""
_POLL_SECONDS: Final = 0.1


CLOSE_SECONDS: Final = 1.0
"""Time to send the rest of what was written to a connection that ends."""


class Connection(Client):
    """NATS client that reconnects on demand and after every failure, and whose `flush` works across reconnections.

    In nats-py (2.16):

    - The late answer to a flush that was given up ends the read loop. The connection then receives nothing more until
      its pings are found to be unanswered.
    - An error that is none of the operating system's ends the attempts to reconnect, for ever. uvloop has one for a
      connection that was reset a moment ago, as when a server is killed while it is connected to.
    - What the read loop takes in between the end of a connection and its own end is kept: the first message of the
      next connection goes on with a part of the last one of before.
    - A ping is written at once, ahead of what still waits to be written: a `flush` right behind a `subscribe` ends
      before the server has the subscription.
    - To end a connection it waits until all is sent, which lasts for as long as TCP tries to reach a server that has
      vanished: a quarter of an hour by default.
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

    async def _send_ping(self, future: asyncio.Future[Any] | None = None) -> None:
        if self.is_connected and self._pending and self._transport is not None:
            self._transport.writelines(self._pending)
            self._pending, self._pending_data_size = [], 0
        await super()._send_ping(future)

    async def _attempt_reconnect(self) -> None:
        self._abort_later()
        while True:
            try:
                return await super()._attempt_reconnect()
            except Exception as error:
                # Of the callback, say; or another attempt has begun.
                if self.is_connected or self.is_closed or self._reconnection_task is not asyncio.current_task():
                    raise
                log.debug("reconnecting failed, and is tried again: %r", error)
                self._status = Client.RECONNECTING
            await asyncio.sleep(self.options["reconnect_time_wait"])

    async def _connect_to_server(self, s: Any) -> None:
        # An attempt that fails at the moment of its cancellation swallows that, and the next would go on for ever.
        heed_cancellation()
        await super()._connect_to_server(s)

    async def _process_connect_init(self) -> None:
        self._ps.reset()
        await super()._process_connect_init()

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        self._abort_later()
        try:
            await super()._close(status, do_cbs)
        except (OSError, RuntimeError):  # what was left can't be sent: close without it
            self._pending, self._pending_data_size = [], 0
            self._status = Client.DISCONNECTED
            await super()._close(status, do_cbs)

    def _abort_later(self) -> None:
        """Drop what the present connection has not sent within `CLOSE_SECONDS`."""
        writer = cast("Any", self._transport)._io_writer if isinstance(self._transport, TcpTransport) else None
        if writer is not None:
            asyncio.get_running_loop().call_later(CLOSE_SECONDS, writer.transport.abort)

    async def _process_pong(self) -> None:
        waiting = self._pongs
        if waiting and waiting[0].done():
            waiting[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()
