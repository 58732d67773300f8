"""Claim on sending: of several notifiers one sends, and the others stand by.

It is an entry of the bucket that expires unless it is renewed. A notifier that starts again on the same machine sees
that the process of its predecessor is gone, and need not wait for that.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from typing import Final

from msgspec import Struct
from nats.errors import Error as NatsError

from ..bus.process_identity import boot_id, pid_namespace, process_stat
from ..bus.tasks import heed_cancellation
from ..schemas import codec
from .store import Store, StoreFailed

log = logging.getLogger("corral.notifier")

CLAIM_SECONDS: Final = 15.0
RENEW_SECONDS: Final = 4.0
_TRY_SECONDS: Final = 1.0
_KEY: Final = "claim"


class Claimant(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A notifier that sends.

    Attributes:
        instance: its id.
        pid: id of its process.
        machine: boot and pid namespace in which that id counts; empty if unknown.
        started_ticks: the kernel's start time of the process; 0 if unknown.
    """

    instance: str
    pid: int = 0
    machine: str = ""
    started_ticks: int = 0


def _myself(instance: str) -> Claimant:
    boot, namespace, stat = boot_id(), pid_namespace(), process_stat(os.getpid())
    return Claimant(
        instance=instance,
        pid=os.getpid(),
        machine=f"{boot}/{namespace}" if boot and namespace else "",
        started_ticks=0 if stat is None else stat.started_ticks,
    )


def instance_id() -> str:
    """Id of the notifier of this process."""
    return f"{socket.gethostname()}-{os.getpid()}"


class Claim:
    """This notifier's claim.

    Args:
        store: the bucket.

    Attributes:
        instance: id of this notifier.
        holder: id of the one that sends, if it is another; empty otherwise.
    """

    def __init__(self, store: Store) -> None:
        self.instance = instance_id()
        self.holder = ""
        self._store = store
        self._mine = _myself(self.instance)
        self._revision = 0
        self._renewed_at = float("-inf")

    @property
    def sure(self) -> bool:
        """True if no other can have taken it: it was renewed lately."""
        return time.monotonic() - self._renewed_at < CLAIM_SECONDS - 2 * RENEW_SECONDS

    async def take(self) -> None:
        """Take the claim; waits while another has it.

        Raises:
            nats.errors.Error: the bus failed.
            StoreFailed: the bus did not store it.
        """
        while True:
            heed_cancellation()
            entry = await self._store.get(_KEY)
            if entry is None or not entry[0]:
                after = 0 if entry is None else entry[1]
            else:
                other = _decode(entry[0])
                if other is not None and not self._is_gone(other):
                    if self.holder != other.instance:
                        log.info("the notifier %s sends; standing by", other.instance)
                    self.holder = other.instance
                    await asyncio.sleep(_TRY_SECONDS)
                    continue
                after = entry[1]
            if await self._write(after):
                self.holder = ""
                return

    async def hold(self) -> None:
        """Renew the claim; returns when another notifier has it."""
        while True:
            heed_cancellation()
            await asyncio.sleep(RENEW_SECONDS)
            try:
                if await self._write(self._revision):
                    continue
                # It has expired while the bus was away, or the bucket is another one.
                entry = await self._store.get(_KEY)
                other = _decode(entry[0]) if entry is not None and entry[0] else None
                if other is not None and other != self._mine:
                    log.warning("the notifier %s has taken over", other.instance)
                    return
                await self._write(0 if entry is None else entry[1])
            except (StoreFailed, NatsError, OSError, TimeoutError) as error:
                log.debug("the claim was not renewed: %s", error)

    async def release(self) -> None:
        """Release the claim, so that another notifier need not wait for its expiry."""
        try:
            await self._store.put(_KEY, b"", after=self._revision, seconds=1)
        except StoreFailed as error:
            log.debug("the claim was not released, and will expire: %s", error)

    async def _write(self, after: int) -> bool:
        asked_at = time.monotonic()
        value = codec.encode(self._mine, codec.JSON)
        revision = await self._store.put(_KEY, value, after=after, seconds=CLAIM_SECONDS)
        if revision is None:
            return False
        self._revision, self._renewed_at = revision, asked_at
        return True

    def _is_gone(self, other: Claimant) -> bool:
        if other == self._mine:
            return True
        if not other.machine or other.machine != self._mine.machine or not other.started_ticks:
            return False
        stat = process_stat(other.pid)
        return stat is None or stat.ended or stat.started_ticks != other.started_ticks


def _decode(value: bytes) -> Claimant | None:
    try:
        return codec.decode(value, Claimant, codec.JSON)
    except codec.DecodeError:
        return None
