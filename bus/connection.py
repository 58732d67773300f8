"""A connection to the bus that outlives what nats-py's own does not."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from nats.aio.client import Client

log = logging.getLogger("corral.bus")

RENEW_SECONDS: Final = 5.0
"""A connection that was made anew is given so long before it is given up again."""


class Connection(Client):
    """A client that may be told to leave a connection over which nothing is answered, and whose reading outlives a
    flush that was given up: nats-py ends it at the late answer, and the connection hears nothing more until its pings
    are found to be unanswered."""

    _renewed_at = float("-inf")

    async def renew(self) -> None:
        """Leave a connection over which nothing is answered for a new one, to another server where there are several:
        one that vanished without a word is not waited for, and neither is a network that is healed already."""
        now = asyncio.get_running_loop().time()
        if now - self._renewed_at > RENEW_SECONDS and self.is_connected:
            self._renewed_at = now
            log.warning("nothing is answered over this connection: making a new one")
            await self.force_reconnect()

    async def _process_pong(self) -> None:
        waiting = self._pongs
        if waiting and waiting[0].done():
            waiting[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()
