"""What happens on the bus from now on, as iterators."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import AsyncIterator, Sequence

import nats.aio.client

from ..schemas import bus, codec, columns, requests
from ..schemas.metrics import DeviceSample
from ..schemas.telemetry import SampleBatch

log = logging.getLogger("corral.client")

_PENDING_MESSAGES = 4096


async def samples(
    nc: nats.aio.client.Client, hosts: Sequence[str], devices: Sequence[str]
) -> AsyncIterator[DeviceSample]:
    """Samples as rows; hosts and devices are globs, and none of them means all."""
    plain = len(hosts) == 1 and not set(hosts[0]) & set("*?[")
    subject = bus.samples_subject(bus.host_token(hosts[0]) if plain else "*")
    subscription = await nc.subscribe(subject, pending_msgs_limit=_PENDING_MESSAGES)
    try:
        async for message in subscription.messages:
            try:
                batch = codec.decode(message.data, SampleBatch)
                columns.check(batch)
            except codec.DecodeError as error:
                log.debug("%s: %s", message.subject, error)
                continue
            if hosts and not _matches(batch.host, hosts):
                continue
            for row in columns.rows(batch):
                if not devices or _matches(row.device, devices):
                    yield row
    finally:
        await subscription.unsubscribe()


async def lease_events(nc: nats.aio.client.Client, lease_id: str, kind: str) -> AsyncIterator[requests.LeaseEvent]:
    """Lease events, of one lease or of all."""
    subscription = await nc.subscribe(bus.lease_subject(kind, lease_id), pending_msgs_limit=_PENDING_MESSAGES)
    try:
        async for message in subscription.messages:
            try:
                yield codec.decode(message.data, requests.LeaseEvent, codec.JSON)
            except codec.DecodeError as error:
                log.debug("%s: %s", message.subject, error)
    finally:
        await subscription.unsubscribe()


def _matches(text: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(text, glob) for glob in globs)
