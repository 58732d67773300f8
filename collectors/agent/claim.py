"""Claim on a host: one agent speaks for a host, by an entry in the hosts bucket that it renews.

An entry that is not renewed expires by the bucket's time to live, so that the host of a killed agent is free again by
itself. An agent that restarts on the same machine recognizes that its predecessor is dead and need not wait.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from typing import Final

import msgspec
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.errors import KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue

from ...bus.process_identity import boot_id, pid_namespace, process_stat
from ...bus.tasks import heed_cancellation
from ...schemas import subjects

log = logging.getLogger("corral.collector")

RENEW_SECONDS: Final = 4.0


class Claim(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The value in the hosts bucket, JSON.

    Attributes:
        agent: id of the collector's run.
        pid: id of its process.
        address: the host name that its operating system gives.
        started_at_ns: when it started, nanoseconds since the epoch.
        machine: the machine and its pid namespace, where both are known; empty otherwise.
        process_started: the kernel's start time of the process, in clock ticks since boot; 0 if unknown.
    """

    agent: str
    pid: int
    address: str
    started_at_ns: int
    machine: str = ""
    process_started: int = 0

    def describe(self) -> str:
        """Describe the holder for people."""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.started_at_ns / 1e9))
        return f"agent {self.agent} (process {self.pid} on {self.address}, since {since})"


class HostTaken(RuntimeError):
    """Another agent that is alive speaks for the host; the message names it.

    Attributes:
        holder: claim of that agent.
    """

    def __init__(self, name: str, holder: Claim) -> None:
        super().__init__(
            f"{name} is already collected by {holder.describe()}. Stop that one, or give this one another --host."
        )
        self.holder = holder


class HostClaim:
    """This agent's claim on a name.

    Args:
        name: name of the host.
        agent: id of this run.

    Attributes:
        held: True if this run has ever held the claim.
    """

    def __init__(self, name: str, agent: str) -> None:
        self.name = name
        self._mine = Claim(
            agent=agent,
            pid=os.getpid(),
            address=socket.gethostname(),
            started_at_ns=time.time_ns(),
            machine=_machine(),
            process_started=_process_started(os.getpid()) or 0,
        )
        self._value = msgspec.json.encode(self._mine)
        self._revision: int | None = None
        self.held = False

    async def take(self, nc: Client) -> None:
        """Claim the name; waits for an entry that is not renewed to expire.

        Raises:
            HostTaken: the agent that holds the name is alive.
            nats.errors.Error: the bus failed.
        """
        await self._take(nc)
        self.held = True

    async def _take(self, nc: Client) -> None:
        bucket = await nc.jetstream().key_value(subjects.HOSTS_BUCKET)
        seen: int | None = None
        while True:
            heed_cancellation()
            entry = await _get(bucket, self.name)
            try:
                if entry is None:
                    self._revision = await bucket.create(self.name, self._value)
                    return
                assert entry.revision is not None
                holder = _decode(entry)
                if holder is None or holder.agent == self._mine.agent or self._is_dead(holder):
                    self._revision = await bucket.update(self.name, self._value, last=entry.revision)
                    return
            except KeyWrongLastSequenceError:
                continue  # another agent wrote at the same time: read again
            if seen is not None and entry.revision != seen:
                raise HostTaken(self.name, holder)
            if seen is None:
                log.warning("%s is claimed by %s; waiting to see whether it is alive", self.name, holder.describe())
            seen = entry.revision
            await asyncio.sleep(0.5)

    async def renew(self, nc: Client) -> None:
        """Renew the claim until cancelled.

        Raises:
            HostTaken: another agent has taken it while this one could not renew.
        """
        bucket = await nc.jetstream().key_value(subjects.HOSTS_BUCKET)
        while True:
            heed_cancellation()
            await asyncio.sleep(RENEW_SECONDS)
            try:
                self._revision = await bucket.update(self.name, self._value, last=self._revision)
            except KeyWrongLastSequenceError:
                # It has expired while the bus was slow, or was taken.
                await self.take(nc)
            except (NatsError, TimeoutError) as error:
                log.debug("the claim on %s was not renewed: %s", self.name, error)

    async def release(self, nc: Client) -> None:
        """Release the claim, so that another agent can have the name at once."""
        if self._revision is None:
            return
        try:
            bucket = await nc.jetstream().key_value(subjects.HOSTS_BUCKET)
            await bucket.delete(self.name, last=self._revision)
        except (NatsError, TimeoutError, OSError) as error:
            log.debug("the claim on %s was not released and will expire: %s", self.name, error)
        self._revision = None

    def _is_dead(self, holder: Claim) -> bool:
        """True if the holder ran on this machine and its process is gone; False where that can't be seen."""
        if not holder.machine or holder.machine != self._mine.machine or not holder.process_started:
            return False
        return _process_started(holder.pid) != holder.process_started


async def _get(bucket: KeyValue, key: str) -> KeyValue.Entry | None:
    try:
        return await bucket.get(key)
    except KeyNotFoundError:
        return None


def _decode(entry: KeyValue.Entry) -> Claim | None:
    try:
        return msgspec.json.decode(entry.value or b"", type=Claim)
    except msgspec.DecodeError:
        return None


def _machine() -> str:
    """Boot id and pid namespace, within which a pid names the same process to all agents; empty if unknown."""
    boot, namespace = boot_id(), pid_namespace()
    return f"{boot}/{namespace}" if boot and namespace else ""


def _process_started(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None if it has ended, also where it waits to be reaped."""
    stat = process_stat(pid)
    return None if stat is None or stat.ended else stat.started_ticks
