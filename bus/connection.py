"""NATS client that survives failures which end a connection of nats-py."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from nats.aio.client import Client

log = logging.getLogger("corral.bus")

RENEW_SECONDS: Final = 5.0
"""Minimum time between two forced reconnects."""


class Connection(Client):
    """NATS client that reconnects on demand, and whose read loop survives a flush that was given up.

    In nats-py the late answer to such a flush ends the read loop. The connection then receives nothing more until its
    pings are found to be unanswered.
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

    async def _process_pong(self) -> None:
        waiting = self._pongs
        if waiting and waiting[0].done():
            waiting[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()
