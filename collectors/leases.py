"""The leases that are active now, followed on the bus, for a source whose numbers obey them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js import api

from ..schemas import bus, codec
from ..schemas.requests import Lease, LeaseEvent, LeaseState

log = logging.getLogger("corral.collector")

TELL_SECONDS: Final = 0.05
EXPIRY_CHECK_SECONDS: Final = 2.0
EXPIRY_GRACE_SECONDS: Final = 10.0
"""A lease whose end was not announced so long after its time (the planner is down) counts as ended."""


class LeaseFeed:
    """A fold of lease events: the newest of each lease decides.

    Args:
        changed: takes all active leases whenever they change.
    """

    def __init__(self, changed: Callable[[list[Lease]], None]) -> None:
        self._changed = changed
        self._active: dict[str, Lease] = {}
        self._newest: dict[str, datetime] = {}
        self._telling: asyncio.TimerHandle | None = None

    async def follow(self, nc: Client) -> None:
        """Read what the stream still has, then listen, until cancelled."""
        subject = f"{bus.LEASE_EVENTS}.>"
        # Listen first: what is announced while the past is read is not missed, and events carry their times.
        subscription = await nc.subscribe(subject, cb=self._on_message)
        try:
            try:
                await self._catch_up(nc, subject)
            except (NatsError, TimeoutError) as error:
                log.warning("leases granted before now are not known: %s", error)
            while True:
                bus.heed_cancellation()
                await asyncio.sleep(EXPIRY_CHECK_SECONDS)
                self._expire()
        finally:
            if self._telling is not None:
                self._tell()
            if not nc.is_closed:
                await subscription.unsubscribe()

    async def _catch_up(self, nc: Client, subject: str) -> None:
        js = nc.jetstream()
        consumer = await js.pull_subscribe(
            subject,
            stream=bus.FACTS_STREAM,
            config=api.ConsumerConfig(
                deliver_policy=api.DeliverPolicy.LAST_PER_SUBJECT,
                ack_policy=api.AckPolicy.NONE,
                inactive_threshold=30,
                mem_storage=True,
            ),
        )
        try:
            left = (await consumer.consumer_info()).num_pending or 0
            while left > 0:
                bus.heed_cancellation()
                for message in await consumer.fetch(min(left, 256), timeout=2):
                    self.apply(message.data, tell=False)
                    left -= 1
        finally:
            await consumer.unsubscribe()
        self._tell()

    def _tell_soon(self) -> None:
        """A busy planner announces many at once: they are told together."""
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TELL_SECONDS, self._tell)

    def _tell(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        self._changed(list(self._active.values()))

    async def _on_message(self, message: Msg) -> None:
        self.apply(message.data)

    def apply(self, payload: bytes, *, tell: bool = True) -> None:
        """Fold one event in; what is no lease event is left alone."""
        try:
            event = codec.decode(payload, LeaseEvent, codec.JSON)
        except codec.DecodeError as error:
            log.debug("no lease event: %s", error)
            return
        lease = event.lease
        newest = self._newest.get(lease.lease_id)
        if newest is not None and event.time < newest:
            return
        self._newest[lease.lease_id] = event.time
        before = self._active.get(lease.lease_id)
        if lease.state is LeaseState.ACTIVE and not _is_over(lease):
            self._active[lease.lease_id] = lease
        else:
            self._active.pop(lease.lease_id, None)
        if tell and before != self._active.get(lease.lease_id):
            self._tell_soon()

    def _expire(self) -> None:
        over = [lease_id for lease_id, lease in self._active.items() if _is_over(lease)]
        for lease_id in over:
            del self._active[lease_id]
        if over:
            self._tell()
        if len(self._newest) > 10 * len(self._active) + 10_000:
            self._newest = {key: time for key, time in self._newest.items() if key in self._active}


def _is_over(lease: Lease) -> bool:
    return (datetime.now(UTC) - lease.expires_at).total_seconds() > EXPIRY_GRACE_SECONDS
