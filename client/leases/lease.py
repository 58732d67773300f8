"""Leases that this process holds: renewed in the background, released at the end, reported when lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final, TypeVar

from msgspec.structs import replace

from ...bus.elapsed import elapsed_seconds
from ...bus.process_identity import own_name
from ...bus.tasks import BackgroundTasks, cancel_all, heed_cancellation
from ...schemas import codec, requests
from ..errors import CorralError, Forked, LeaseLost, ServiceError, TimedOut, TooManyRequests, Unavailable
from ..notebook import lease_html
from ..request_calls import RequestCalls
from ..rpc import Waiting
from .child_processes import ticks_now, wait_for_children
from .environment import environment_for
from .grant_confirmation import release_on_failure, renewed
from .holder import check_no_other_holds, held_by_this_process

Lost = Callable[[LeaseLost], object]
"""Callback for a lease that ended before its holder released it."""
Noticed = Callable[[requests.Preemption], object]
"""Callback for the notice of a preemption; for a lease of asyncio it may be a coroutine function."""
Resizing = Callable[[requests.Resize], object]
"""Callback for the notice that an elastic lease may grow or shrink; it may be a coroutine function likewise."""

_CHECKED: Final = (
    requests.LeaseEventKind.EXPIRING,
    requests.LeaseEventKind.PREEMPTING,
    requests.LeaseEventKind.RESIZE_OFFERED,
    requests.LeaseEventKind.RESIZE_REQUESTED,
    requests.LeaseEventKind.RESIZED,
    requests.LeaseEventKind.EXPIRED,
    requests.LeaseEventKind.LOST,
    requests.LeaseEventKind.EVICTED,
    requests.LeaseEventKind.RELEASED,
)
"""Kinds of events upon which the planner is asked for the state of the lease."""
_CHECK_EVERY_SECONDS: Final = 1.0
"""Minimum time between checks that lease events trigger: events may be forged, so a flood of them must cost little."""
_SHORTEST_PAUSE_SECONDS: Final = 0.05
_LONGEST_PAUSE_SECONDS: Final = 10.0
"""Maximum time between retries of a failed renewal, whatever the time to live: the outage may be over."""
_CONFIRMED_SECONDS: Final = 1.0
"""A confirmation that is younger than this needs no other before work starts."""
_START_WITHIN_SECONDS: Final = 10.0
_START_FRACTION: Final = 0.8
"""Part of a time to live within which work must start: until then, the devices can't be granted to anyone else."""
_NAP_SECONDS: Final = 1.0
"""Maximum length of one sleep, so that a suspended machine is noticed this soon after it resumes."""


class OnOutage(StrEnum):
    """Policy for work whose lease can't be renewed within its time to live because bus or planner can't be reached."""

    CONTINUE = "continue"
    """Continue until a planner reports that the lease has ended."""
    STOP = "stop"
    """Give the lease up when its time to live is over, as if it had ended. No work then ever runs on devices that may
    have been granted to another owner."""


class HeldLease:
    """A lease, and the background tasks that renew it and listen for its end and for the notice of a preemption.

    The classes of the leases of asyncio and of the synchronous client also have `saved` and `busy`, `accept_resize` and
    `decline_resize`. Without `on_resize` each notice of a resize is declined.

    Attributes:
        lease: the lease as of the last renewal.
        lost: the error with the reason, if the lease ended too early; None while it is held.
        since_ticks: time at which this process got the lease, in clock ticks since boot, as process start times are.
    """

    def __init__(
        self,
        client: RequestCalls,
        lease: requests.Lease,
        on_lost: Lost,
        on_outage: OnOutage = OnOutage.CONTINUE,
        confirmed_at: float | None = None,
        on_preempt: Noticed | None = None,
        on_resize: Resizing | None = None,
    ) -> None:
        self.client = client
        self.lease = lease
        self.lost: LeaseLost | None = None
        self.since_ticks = ticks_now()
        self._on_lost = on_lost
        self._on_preempt = on_preempt
        self._noticed_at: datetime | None = None
        self._on_resize = on_resize
        self._resize_number = 0
        self._declining = BackgroundTasks()
        self._on_outage = on_outage
        self._confirmed_at = elapsed_seconds() if confirmed_at is None else confirmed_at
        self._released = False
        self._tasks: list[asyncio.Task[None]] = []
        self._end_reported = asyncio.Event()
        self._next_check_at = 0.0

    @property
    def lease_id(self) -> str:
        """Id of the lease."""
        return self.lease.lease_id

    @property
    def grants(self) -> list[requests.Grant]:
        """The granted devices, each with its memory, share, score and work items."""
        return self.lease.grants

    @property
    def devices(self) -> list[str]:
        """UUIDs of the devices."""
        return [grant.device for grant in self.lease.grants if grant.device]

    @property
    def hosts(self) -> list[str]:
        """Host names without duplicates, in the order of the grants."""
        return list(dict.fromkeys(grant.host for grant in self.lease.grants))

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for work on this host. If the lease holds no GPU here, they make none visible."""
        return environment_for(self.lease)

    def environment_of(self, host: str) -> dict[str, str]:
        """Environment variables for work on another host. If the lease holds no GPU there, they make none visible."""
        return environment_for(self.lease, host)

    @property
    def preemption(self) -> requests.Preemption | None:
        """Notice of a preemption, as of the last renewal; None while none is out."""
        return self.lease.preemption

    @property
    def resize(self) -> requests.Resize | None:
        """Devices that are offered to the lease, or that it is asked to give back, as of the last renewal."""
        return self.lease.resize

    @property
    def idle(self) -> requests.IdleNotice | None:
        """Warning that all devices are idle, as of the last renewal; None while there is none."""
        return self.lease.idle

    @property
    def preempted_in_seconds(self) -> float | None:
        """Seconds until the lease ends by preemption, as of the last renewal; None while no notice is out.

        The clock of this machine does not count: a renewal says what time it is for the planner.
        """
        lease, notice = self.lease, self.lease.preemption
        if notice is None:
            return None
        if lease.ends_at is not None and lease.expires_at >= lease.ends_at:  # not a time to live from the renewal
            return (notice.ends_at - datetime.now(UTC)).total_seconds()
        renewed_at = lease.expires_at - timedelta(seconds=lease.ttl_seconds)
        return (notice.ends_at - renewed_at).total_seconds() - self.unconfirmed_seconds

    @property
    def unconfirmed_seconds(self) -> float:
        """Seconds since the last successful confirmation or renewal was sent; suspended time is included."""
        return elapsed_seconds() - self._confirmed_at

    @property
    def overdue(self) -> bool:
        """True if the lease isn't known to be lost, but wasn't renewed within its time to live.

        It may still be active: a planner that starts again gives each lease a full time to live. A planner that kept
        running may have granted the devices to another owner.
        """
        return self.lost is None and self.unconfirmed_seconds > self.lease.ttl_seconds

    def _repr_html_(self) -> str:
        return lease_html(self.lease)

    def check(self) -> None:
        """Raise `LeaseLost` if the lease has ended. It sends nothing, so it can be called between steps.

        Raises:
            LeaseLost: the lease has ended.
            Forked: this is a fork of the process that holds the lease, which gets no news of it.
        """
        _ = self.client.nc
        if self.lost is not None:
            raise self.lost

    def start(self) -> None:
        """Start the tasks that renew the lease and listen for its end."""
        held_by_this_process.add(self.lease_id)
        self._note(self.lease)
        self._tasks = [asyncio.create_task(self._renew()), asyncio.create_task(self._listen())]

    async def release(self) -> None:
        """Stop renewing the lease, and release it unless it has already ended. Does nothing in a fork of the holder."""
        if self._released or self.client.forked:
            return
        self._released = True
        held_by_this_process.discard(self.lease_id)
        await asyncio.gather(cancel_all(self._tasks), self._declining.cancel())
        if self.lost is None:
            # If the release fails, the lease expires, because it is no longer renewed.
            with contextlib.suppress(ServiceError, Unavailable, TimedOut):
                await self.client.release(self.lease_id, owner=self.lease.owner)

    async def wait_for_children(self, seconds: float) -> None:
        """Wait, for at most `seconds`, until no other process works under the lease; see `leftovers`."""
        await wait_for_children(self.lease_id, self.since_ticks, lambda: self.lost is None, seconds)

    def _lose(self, reason: str) -> None:
        if self.lost is None and not self._released:
            self.lost = LeaseLost(self.lease_id, reason)
            self._on_lost(self.lost)

    async def _renew(self) -> None:
        """Renew the lease after each third of its time to live, and when an event reports its end.

        After a failure, retry after a tenth of the time to live, and at least every 10 s if no answer came. If the
        planner named a time to retry after, use that. The lease is treated as ended only if the planner says so:
        neither a temporary refusal (too many requests, for example) nor a missing answer ends it, except with
        `OnOutage.STOP`.
        """
        ttl = self.lease.ttl_seconds
        pause, refusal = ttl / 3, ""
        while self.lost is None:
            heed_cancellation()
            await self._pause(pause)
            if self._on_outage is OnOutage.STOP and self.overdue:
                why = refusal or "bus or planner not reachable, or this process was suspended"
                self._lose(f"it could not be renewed within its time to live ({why})")
                return
            try:
                async with asyncio.timeout(self._patience()):
                    await self.confirm()
            except LeaseLost as lost:
                self._lose(lost.reason)
                return
            except ServiceError as error:
                pause, refusal = _retry_seconds(error, ttl), str(error)
            except (CorralError, codec.DecodeError, TimeoutError):
                pause, refusal = min(ttl / 10, _LONGEST_PAUSE_SECONDS), ""
            else:
                pause, refusal = ttl / 3, ""

    async def confirm(self) -> None:
        """Confirm the lease by renewing it for a full time to live from now.

        Raises:
            LeaseLost: the planner says that the lease has ended.
            ServiceError: the planner refused for now.
            Unavailable, NoService, TimedOut: no planner answered.
        """
        asked_at = elapsed_seconds()
        after = await renewed(self.client, self.lease)
        self._confirmed_at = asked_at
        self._note(after)

    async def checkpoint(self, busy_seconds: float | None = None) -> None:
        """Say that the work is saved, or with `busy_seconds` answer the notice of a preemption.

        Raises:
            CorralError: as in `Client.saved` and `Client.busy`.
        """
        if busy_seconds is None:
            self._note(await self.client.saved(self.lease_id, owner=self.lease.owner))
        else:
            self._note(await self.client.busy(self.lease_id, busy_seconds, owner=self.lease.owner))

    async def answer_resize(self, accept: bool, devices: Sequence[str] = (), number: int | None = None) -> None:
        """Answer the notice of a resize, or give devices back; see `Client.resize`.

        Args:
            accept: as in `Client.resize`.
            devices: as in `Client.resize`.
            number: the notice that is answered; None for the last that this process has got, if that is still out.

        Raises:
            CorralError: as in `Client.resize`.
        """
        known = self.lease.resize
        number = known.number if number is None and known is not None else number
        self._note(
            await self.client.resize(
                self.lease_id, accept=accept, devices=devices, number=number, owner=self.lease.owner
            )
        )

    async def _decline(self, number: int) -> None:
        with contextlib.suppress(CorralError, codec.DecodeError):
            await self.answer_resize(False, (), number)

    def _note(self, lease: requests.Lease) -> None:
        """Note the state of the lease as the planner says it; call back if it has a notice that is new."""
        self._note_resize(lease)
        self.lease, notice = lease, lease.preemption
        if lease.state is not requests.LeaseState.ACTIVE:
            self._lose(lease.reason or lease.state.value)
        elif notice is not None and notice.notified_at != self._noticed_at:
            self._noticed_at = notice.notified_at
            if self._on_preempt is not None:
                self._on_preempt(notice)

    def _note_resize(self, lease: requests.Lease) -> None:
        resize = lease.resize
        if resize is None or resize.number <= self._resize_number:
            return
        self._resize_number = resize.number
        if self._on_resize is not None:
            self._on_resize(resize)
        else:
            self._declining.start(self._decline(resize.number), name="declining a resize")

    async def take_over(self, holder: str) -> None:
        """Confirm the lease as `confirm` does, and record `holder` as the process that holds it from now on."""
        asked_at = elapsed_seconds()
        self.lease = await renewed(self.client, self.lease, holder)
        self._confirmed_at = asked_at

    async def ready(self) -> float:
        """Check right before work starts that the lease is still active.

        Nothing is sent if the last confirmation is less than a second old. Otherwise the planner is asked, since this
        process or its machine may have been suspended.

        Returns:
            Time by which work must have started, in the clock of `bus/elapsed.py`; after it, call `ready` again.

        Raises:
            LeaseLost: the lease has ended.
            CorralError: no planner answered, or it refused for now.
        """
        if self.unconfirmed_seconds > _CONFIRMED_SECONDS:
            try:
                await self.confirm()
            except LeaseLost as lost:
                self._lose(lost.reason)
                raise
        return self._confirmed_at + min(_START_WITHIN_SECONDS, self.lease.ttl_seconds * _START_FRACTION)

    def _patience(self) -> float:
        """Timeout of one renewal in seconds; with `OnOutage.STOP`, the rest of the time to live."""
        left = self.lease.ttl_seconds - self.unconfirmed_seconds
        longest = self.client.timeout + self.client.patience
        return max(_SHORTEST_PAUSE_SECONDS, left) if self._on_outage is OnOutage.STOP else longest

    async def _pause(self, seconds: float) -> None:
        """Sleep until the next renewal is due.

        Returns early if an event reports the end of the lease or the client has reconnected. Suspended time counts as
        elapsed.
        """
        until = elapsed_seconds() + max(_SHORTEST_PAUSE_SECONDS, seconds)
        if self._on_outage is OnOutage.STOP:
            left = self.lease.ttl_seconds - self.unconfirmed_seconds
            until = min(until, elapsed_seconds() + max(_SHORTEST_PAUSE_SECONDS, left))
        connection = self.client.nc.stats["reconnects"]
        while (left := until - (now := elapsed_seconds())) > 0:
            if self._end_reported.is_set() and now >= self._next_check_at:
                self._end_reported.clear()
                self._next_check_at = now + _CHECK_EVERY_SECONDS
                return
            if self.client.nc.stats["reconnects"] != connection:
                return
            nap = min(left, _NAP_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(nap):
                    if self._end_reported.is_set():
                        await asyncio.sleep(self._next_check_at - now)
                    else:
                        await self._end_reported.wait()

    async def _listen(self) -> None:
        """Listen for events that report the end of the lease, a preemption or a warning, before the next renewal would.

        An event is only a hint, since any user who may read stored events can have one delivered to this subject. So
        the planner is asked before the lease is treated as ended.
        """
        with contextlib.suppress(Unavailable, Forked):
            async for event in self.client.lease_events(lease_id=self.lease_id):
                # A warning about idle devices, or the withdrawal of a notice, comes as a renewal.
                withdrawn = self.lease.resize is not None and event.lease.resize is None
                if event.kind in _CHECKED or event.lease.idle != self.lease.idle or withdrawn:
                    self._end_reported.set()


H = TypeVar("H", bound=HeldLease)


async def hold(
    client: RequestCalls,
    request: requests.WorkRequest,
    on_wait: Waiting | None,
    make: Callable[[requests.Lease, float], H],
) -> H:
    """Request a lease that only this process holds. It isn't renewed in the background before `HeldLease.start`.

    Args:
        client: to request it.
        request: the request.
        on_wait: as in `Client.request`.
        make: makes the object from the lease and the time of its confirmation.

    Raises:
        Conflict: the caller gave a request id, and another process holds its lease.
        CorralError: as in `Client.submit`.
    """
    named, request = request.request_id is not None, with_own_holder(request)
    granted = await client.granted(request, on_wait=on_wait)
    held = make(granted.assignment.lease, granted.confirmed_at)
    if named:  # it may be a lease that was granted earlier and is about to expire
        await check_no_other_holds(client, held.lease, request.holder)
        await release_on_failure(client, held.lease, request.holder, held.take_over(request.holder))
    return held


def _retry_seconds(refusal: ServiceError, ttl_seconds: float) -> float:
    """Seconds until a refused renewal is tried again."""
    retry_seconds = refusal.retry_after_seconds if isinstance(refusal, TooManyRequests) else None
    return ttl_seconds / 10 if retry_seconds is None else retry_seconds


def with_own_holder(request: requests.WorkRequest) -> requests.WorkRequest:
    """The request, with this process as the holder unless it names one.

    The process and its children then count as work under the lease. `CORRAL_LEASE` alone wouldn't show that, because a
    variable that a running process sets can't be seen by other processes.
    """
    return request if request.holder else replace(request, holder=own_name())
