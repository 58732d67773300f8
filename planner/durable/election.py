"""Leader election among any number of planners: one answers, the others keep their fleet state up to date.

The leader's key names the leader, and its revision is the term that fences every write (see `store`). The leader writes
a second key, the heartbeat, every `HEARTBEAT_SECONDS`. A standby that has seen the same heartbeat for
`TAKEOVER_SECONDS`, by a local clock that counts sleep and can't be set, writes the leader's key over the revision that
it saw. Of several that try, one succeeds, and no clocks are compared. It does not wait if the leader resigned, or was a
process of this machine that has ended.

A leader whose heartbeat goes unacknowledged for longer than `LEASE_SECONDS` does not know if it still leads: it then
answers nothing from memory until a heartbeat is acknowledged. That time is shorter than the takeover, so that no two
planners answer at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, TypeVar

import msgspec
from msgspec import Struct
from nats.errors import Error as NatsError

from ...bus.elapsed import elapsed_seconds
from ...bus.process_identity import boot_id, pid_namespace, process_stat
from ...bus.tasks import heed_cancellation
from .store import HEARTBEAT, LEADER, Deposed, Entry, Store, WriteFailed, decode_or_none

log = logging.getLogger("corral.planner.leader")

T = TypeVar("T")

HEARTBEAT_SECONDS: Final = 0.5
LEASE_SECONDS: Final = 1.5
TAKEOVER_SECONDS: Final = 2.5
_UNREACHABLE_SECONDS: Final = 0.1


class Leader(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The value of the leader's key.

    Attributes:
        planner: id of the leader; empty if it has resigned.
        host: that it runs on, for information.
        process: identity of the process on its machine; empty if not known.
        since: start of the term in seconds since the epoch, for information.
    """

    planner: str
    host: str = ""
    process: str = ""
    since: float = 0.0


class LeaderElection:
    """Takes part in leader election, and reports the begin and end of each term.

    Args:
        store: the bucket, over a connection where nothing waits behind requests.
        planner: id of this planner.
        leadership: makes the context of a term, which is entered when this planner becomes the leader, and left when
            the term has ended. The heartbeat goes on while it is entered.
        reachable: returns true if requests reach this planner. A leader that they do not reach writes no heartbeat.

    Attributes:
        term: revision of the leader's key while this planner leads; 0 otherwise.
        before: last heartbeat of the leader before this one, whose value is the time by that planner's clock; None if
            there was none.
        silent_seconds: time for which this planner had seen no newer heartbeat when it claimed the term.
    """

    def __init__(
        self,
        store: Store,
        planner: str,
        leadership: Callable[[int], AbstractAsyncContextManager[None]],
        reachable: Callable[[], Awaitable[bool]],
    ) -> None:
        self._store = store
        self._reachable = reachable
        self._planner = planner
        self._leadership = leadership
        self._confirmed_at = 0.0
        self._confirmed = asyncio.Event()
        self._beat_now = asyncio.Event()
        self.term = 0
        self.before: Entry | None = None
        self.silent_seconds = 0.0

    @property
    def holds_leadership(self) -> bool:
        """True if this planner certainly leads now: its last acknowledged heartbeat is recent enough."""
        return bool(self.term) and elapsed_seconds() - self._confirmed_at < LEASE_SECONDS

    async def confirm(self, timeout_seconds: float = 1.0) -> bool:
        """Send a heartbeat at once and wait for it; returns true if this planner still leads."""
        if not self.term:
            return False
        self._confirmed.clear()
        self._beat_now.set()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._confirmed.wait()
        except TimeoutError:
            return False
        return self.holds_leadership

    def deposed(self) -> None:
        """After a refused write: send a heartbeat at once, to check if another planner leads."""
        self._confirmed_at = 0.0
        self._beat_now.set()

    async def run(self) -> None:
        """Wait for the leadership and lead, in turn, until cancelled."""
        while True:
            heed_cancellation()
            try:
                term = await self._campaign()
            except (NatsError, OSError, TimeoutError) as error:
                log.debug("no election without the bus: %s", error)
                await asyncio.sleep(HEARTBEAT_SECONDS)
                continue
            except Exception:  # else this planner would silently stop taking part
                log.exception("the election failed, and is tried again")
                await asyncio.sleep(HEARTBEAT_SECONDS)
                continue
            self.term = term
            log.info("planner %s leads from revision %d on", self._planner, term)
            try:
                await self._lead(term)
            except Exception:  # the bus went away in the middle of taking over, say: stand for election again
                log.exception("planner %s could not take over", self._planner)
                await asyncio.sleep(HEARTBEAT_SECONDS)
            finally:
                self.term = 0
                self._confirmed.set()

    async def resign(self, term: int) -> None:
        """Resign, so that a standby takes over at once. Call it after the term's last write."""
        value = msgspec.json.encode(Leader(planner="", host=socket.gethostname(), since=time.time()))
        try:
            async with asyncio.timeout(1.0):
                await self._store.claim(value, term)
        except (NatsError, TimeoutError, OSError):
            log.debug("could not say good-bye")

    async def _campaign(self) -> int:
        """Wait until the leader is gone, then claim the leader's key; returns the new term."""
        seen: tuple[int, int] | None = None
        seen_at = 0.0
        while True:
            heed_cancellation()
            entry = await self._store.get(LEADER)
            beat = await self._store.get(HEARTBEAT)
            now = elapsed_seconds()
            state = (entry.revision if entry else 0, beat.revision if beat else 0)
            if state != seen:
                seen, seen_at = state, now
            leader = _read(entry, Leader)
            if (
                leader is None
                or not leader.planner
                or leader.planner == self._planner
                or _is_gone(leader.process)
                or now - seen_at >= TAKEOVER_SECONDS
            ):
                self._confirmed_at = elapsed_seconds()
                value = Leader(
                    planner=self._planner, host=socket.gethostname(), process=_own_process(), since=time.time()
                )
                # Read before the first heartbeat of the new term is written over it.
                self.before, self.silent_seconds = beat, now - seen_at
                term = await self._store.claim(msgspec.json.encode(value), state[0])
                if term is not None:
                    return term
                seen = None
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _lead(self, term: int) -> None:
        serving = asyncio.ensure_future(self._serve(term))
        try:
            while True:
                heed_cancellation()
                if serving.done():
                    serving.result()
                self._beat_now.clear()
                if not await self._reachable():
                    await asyncio.sleep(_UNREACHABLE_SECONDS)
                    continue
                sent_at = elapsed_seconds()
                try:
                    await self._store.put(HEARTBEAT, heartbeat(time.time()), term)
                except WriteFailed as error:  # a full bucket, say: some entries go away by themselves
                    log.error("planner %s can't write its heartbeat: %s", self._planner, error)
                    await self._store.purge_answers()
                    await asyncio.sleep(HEARTBEAT_SECONDS)
                    continue
                self._confirmed_at = sent_at
                self._confirmed.set()
                if not self.holds_leadership:
                    continue
                try:
                    async with asyncio.timeout(HEARTBEAT_SECONDS):
                        await self._beat_now.wait()
                except TimeoutError:
                    continue
        except Deposed:
            log.warning("planner %s was deposed", self._planner)
        finally:
            self.term = 0
            if not serving.cancelling():
                serving.cancel()
            await asyncio.wait({serving})
            if not serving.cancelled() and (error := serving.exception()) is not None:
                log.error("term %d ended with an error", term, exc_info=error)

    async def _serve(self, term: int) -> None:
        async with self._leadership(term):
            heed_cancellation()  # it may have been deposed while it began
            await asyncio.Event().wait()


def heartbeat(now: float) -> bytes:
    """Value of the heartbeat: of constant size. A full bucket without replicas takes it in place of the one before."""
    return f"{now:.6f}".encode()


def _read(entry: Entry | None, type: type[T]) -> T | None:
    """Value of an entry; None if there is no entry, or it was deleted or can't be decoded."""
    return None if entry is None else decode_or_none(entry.key, entry.value, type)


def _own_process() -> str:
    """Identity of this process: boot, pid namespace, pid and start time, since pids are reused. Empty off Linux."""
    return _process_name(os.getpid())


def _process_name(pid: int) -> str:
    """Identity of a process in this process's pid namespace; empty if it has ended, or off Linux."""
    boot, namespace, stat = boot_id(), pid_namespace(), process_stat(pid)
    return f"{boot} {namespace} {pid} {stat.started_ticks}" if boot and namespace and stat else ""


def _is_gone(process: str) -> bool:
    """True if this was a process of this machine that has ended; False also if that is not known."""
    own = _own_process()
    parts = process.split()
    if not own or len(parts) != 4 or parts[:2] != own.split()[:2] or not parts[2].isdecimal():
        return False
    stat = process_stat(int(parts[2]))
    return stat is None or stat.ended or _process_name(int(parts[2])) != process
