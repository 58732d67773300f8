"""Subscriptions to samples and lease events as asynchronous iterators."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Sequence

import nats.aio.client
import nats.errors

from ..schemas import codec, columns, requests, speakers, subjects
from ..schemas.metrics import DeviceSample
from ..schemas.telemetry import SampleBatch
from ..schemas.values.globs import matches_any

log = logging.getLogger("corral.client")

_PENDING_MESSAGES = 4096


async def samples(
    nc: nats.aio.client.Client, hosts: Sequence[str], devices: Sequence[str]
) -> AsyncIterator[DeviceSample]:
    """Stream samples as rows. `hosts` and `devices` are globs; an empty one means all. Bad messages are skipped."""
    plain = len(hosts) == 1 and not set(hosts[0]) & set("*?[")
    subject = subjects.samples_subject(subjects.host_token(hosts[0]) if plain else "*")
    subscription = await nc.subscribe(subject, pending_msgs_limit=_PENDING_MESSAGES)
    try:
        async for message in subscription.messages:
            try:
                batch = codec.decode(message.data, SampleBatch)
                speakers.check(batch, message.subject)
                columns.check(batch)
            except codec.DecodeError as error:
                log.debug("%s: %s", message.subject, error)
                continue
            if hosts and not matches_any(batch.host, hosts):
                continue
            for row in columns.rows(columns.possible(batch)):
                if not devices or matches_any(row.device, devices):
                    yield row
    finally:
        with contextlib.suppress(nats.errors.Error):  # the connection may be closed already
            await subscription.unsubscribe()


async def lease_events(nc: nats.aio.client.Client, lease_id: str, kind: str) -> AsyncIterator[requests.LeaseEvent]:
    """Stream lease events, of one lease and kind, or of all (`*`).

    An event that doesn't match its subject is ignored: a user who may read stored events chooses the subject on which
    they are delivered, and so could forge them.
    """
    subscription = await nc.subscribe(subjects.lease_subject(kind, lease_id), pending_msgs_limit=_PENDING_MESSAGES)
    try:
        async for message in subscription.messages:
            try:
                event = codec.decode(message.data, requests.LeaseEvent, codec.JSON)
            except codec.DecodeError as error:
                log.debug("%s: %s", message.subject, error)
                continue
            if message.subject == subjects.lease_subject(event.kind.value, event.lease.lease_id):
                yield event
    finally:
        with contextlib.suppress(nats.errors.Error):  # the connection may be closed already
            await subscription.unsubscribe()
