"""A lease that is held for the length of a block: renewed in the background, released at the end, missed when lost."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import Awaitable, Callable
from enum import StrEnum
from types import TracebackType
from typing import Any, Final

from msgspec.structs import replace

from ..bus.elapsed import elapsed_seconds
from ..bus.process_identity import own_name
from ..schemas import codec, requests
from .confirmed import given_back_on_failure, renewed
from .environment import environment_for, environment_set
from .errors import CorralError, Forked, LeaseLost, ServiceError, TimedOut, TooManyRequests, Unavailable
from .holder import check_no_other_holds, held_by_this_process
from .leftovers import CHILDREN_GRACE_SECONDS, ticks_now, wait_for_children
from .notebook import lease_html
from .request_calls import RequestCalls
from .rpc import Waiting

Lost = Callable[[LeaseLost], object]
"""Told when a lease has ended before its holder was done with it."""

_ENDS: Final = (
    requests.LeaseEventKind.EXPIRED,
    requests.LeaseEventKind.LOST,
    requests.LeaseEventKind.EVICTED,
    requests.LeaseEventKind.RELEASED,
)
_LOOK_EVERY_SECONDS: Final = 1.0
"""An end that is told is looked into no more often: anybody may tell one."""
_SHORTEST_PAUSE_SECONDS: Final = 0.05
_LONGEST_PAUSE_SECONDS: Final = 10.0
"""Between tries, however long the lease lives: the outage may be over."""
_CONFIRMED_SECONDS: Final = 1.0
"""What the planner has said within it needs no other word before work starts."""
_START_WITHIN_SECONDS: Final = 10.0
_START_FRACTION: Final = 0.8
"""Of a time to live: nobody else has the devices by then, and the lease is renewed meanwhile."""
_NAP_SECONDS: Final = 1.0
"""A machine that has slept is noticed within it."""


class OnOutage(StrEnum):
    """What becomes of work whose lease can't be renewed in its time, since bus or planner can't be reached."""

    CONTINUE = "continue"
    """It goes on until a planner says that the lease has ended."""
    STOP = "stop"
    """The lease is given up at its time, as if it had ended: nothing ever runs on devices that somebody else may have
    been granted meanwhile."""


class HeldLease:
    """A lease and the task that keeps it.

    Attributes:
        lease: as it was at the last renewal.
        lost: why it has ended too early; None while it holds.
        since_ticks: when this process got it, clock ticks since the boot, as processes' starts are counted.
    """

    def __init__(
        self,
        client: RequestCalls,
        lease: requests.Lease,
        on_lost: Lost,
        on_outage: OnOutage = OnOutage.CONTINUE,
        confirmed_at: float | None = None,
    ) -> None:
        self.client = client
        self.lease = lease
        self.lost: LeaseLost | None = None
        self.since_ticks = ticks_now()
        self._on_lost = on_lost
        self._on_outage = on_outage
        self._confirmed_at = elapsed_seconds() if confirmed_at is None else confirmed_at
        self._released = False
        self._tasks: list[asyncio.Task[None]] = []
        self._end_told = asyncio.Event()
        self._look_at = 0.0

    @property
    def lease_id(self) -> str:
        """Names the lease."""
        return self.lease.lease_id

    @property
    def grants(self) -> list[requests.Grant]:
        """The devices, each with its memory, share, score and work items."""
        return self.lease.grants

    @property
    def devices(self) -> list[str]:
        """The uuids of the devices."""
        return [grant.device for grant in self.lease.grants if grant.device]

    @property
    def hosts(self) -> list[str]:
        """The hosts, each once, in the order of the grants."""
        return list(dict.fromkeys(grant.host for grant in self.lease.grants))

    @property
    def environment(self) -> dict[str, str]:
        """What to set for the work on this host. Where the lease holds no GPU here, none is visible."""
        return environment_for(self.lease)

    def environment_of(self, host: str) -> dict[str, str]:
        """What to set for the work on another host."""
        return environment_for(self.lease, host)

    @property
    def unconfirmed_seconds(self) -> float:
        """Since the planner was last asked with success whether the lease holds; sleep is counted."""
        return elapsed_seconds() - self._confirmed_at

    @property
    def overdue(self) -> bool:
        """Whether it could not be renewed in its time. It may hold all the same: a planner that comes back gives each
        lease a whole time to live. One that was there all the time may have given the devices to somebody else."""
        return self.lost is None and self.unconfirmed_seconds > self.lease.ttl_seconds

    def _repr_html_(self) -> str:
        return lease_html(self.lease)

    def check(self) -> None:
        """Raise `LeaseLost` if the lease has ended; cheap enough to call between steps.

        Raises:
            Forked: this is a fork of the process that holds the lease: nothing is heard of it here.
        """
        _ = self.client.nc
        if self.lost is not None:
            raise self.lost

    def start(self) -> None:
        """Begin to renew and to listen for the end."""
        held_by_this_process.add(self.lease_id)
        self._tasks = [asyncio.create_task(self._renew()), asyncio.create_task(self._listen())]

    async def release(self) -> None:
        """Stop renewing and give the lease back, unless it has ended by itself; in a fork of the holder do nothing."""
        if self._released or self.client.forked:
            return
        self._released = True
        held_by_this_process.discard(self.lease_id)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.lost is None:
            # Whatever goes wrong here, the lease ends by itself: nobody renews it any more.
            with contextlib.suppress(ServiceError, Unavailable, TimedOut):
                await self.client.release(self.lease_id, owner=self.lease.owner)

    async def wait_for_children(self, seconds: float) -> None:
        """Wait, for so many seconds at most, until nothing works under the lease that this process has started."""
        await wait_for_children(self.lease_id, self.since_ticks, lambda: self.lost is None, seconds)

    def _lose(self, reason: str) -> None:
        if self.lost is None and not self._released:
            self.lost = LeaseLost(self.lease_id, reason)
            self._on_lost(self.lost)

    async def _renew(self) -> None:
        """Renew after each third of the time to live, and where the planner tells of the lease; between failures try
        again each tenth.

        Only the planner's word ends the lease: neither a refusal that passes (too many requests, say) nor silence does,
        unless silence was asked to.
        """
        ttl = self.lease.ttl_seconds
        pause, refusal = ttl / 3, ""
        while self.lost is None:
            await self._pause(pause)
            if self._on_outage is OnOutage.STOP and self.overdue:
                why = refusal or "bus or planner away, or this program was stopped"
                self._lose(f"it could not be renewed in its time ({why})")
                return
            try:
                async with asyncio.timeout(self._patience()):
                    await self.confirm()
            except LeaseLost as lost:
                self._lose(lost.reason)
                return
            except ServiceError as error:
                pause, refusal = _again_in(error, ttl), str(error)
            except (CorralError, codec.DecodeError, TimeoutError):
                pause, refusal = min(ttl / 10, _LONGEST_PAUSE_SECONDS), ""
            else:
                pause, refusal = ttl / 3, ""

    async def confirm(self) -> None:
        """Ask the planner for a whole time to live from now on.

        Raises:
            LeaseLost: it says that the lease has ended.
            ServiceError: it refused for now.
            Unavailable, NoService, TimedOut: nobody answered.
        """
        asked_at = elapsed_seconds()
        self.lease = await renewed(self.client, self.lease)
        self._confirmed_at = asked_at

    async def take_over(self, holder: str) -> None:
        """Confirm it, and say which process holds it from now on."""
        asked_at = elapsed_seconds()
        self.lease = await renewed(self.client, self.lease, holder)
        self._confirmed_at = asked_at

    async def ready(self) -> float:
        """Make sure that the lease holds, right before work starts: that costs nothing where the planner has just said
        so, and catches a process or a machine that has slept since.

        Returns:
            The time by which work must have started (see `bus/elapsed.py`); later, ask again.

        Raises:
            LeaseLost: it has ended.
            CorralError: nobody answered.
        """
        if self.unconfirmed_seconds > _CONFIRMED_SECONDS:
            try:
                await self.confirm()
            except LeaseLost as lost:
                self._lose(lost.reason)
                raise
        return self._confirmed_at + min(_START_WITHIN_SECONDS, self.lease.ttl_seconds * _START_FRACTION)

    def _patience(self) -> float:
        """Seconds for one renewal: where silence ends the lease, no longer than it holds."""
        left = self.lease.ttl_seconds - self.unconfirmed_seconds
        longest = self.client.timeout + self.client.patience
        return max(_SHORTEST_PAUSE_SECONDS, left) if self._on_outage is OnOutage.STOP else longest

    async def _pause(self, seconds: float) -> None:
        """Until it is time to ask the planner: sooner where it tells of the lease, the connection was made again, or
        the machine has slept."""
        until = elapsed_seconds() + max(_SHORTEST_PAUSE_SECONDS, seconds)
        if self._on_outage is OnOutage.STOP:
            left = self.lease.ttl_seconds - self.unconfirmed_seconds
            until = min(until, elapsed_seconds() + max(_SHORTEST_PAUSE_SECONDS, left))
        connection = self.client.nc.stats["reconnects"]
        while (left := until - (now := elapsed_seconds())) > 0:
            if self._end_told.is_set() and now >= self._look_at:
                self._end_told.clear()
                self._look_at = now + _LOOK_EVERY_SECONDS
                return
            if self.client.nc.stats["reconnects"] != connection:
                return
            nap = min(left, _NAP_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(nap):
                    if self._end_told.is_set():
                        await asyncio.sleep(self._look_at - now)
                    else:
                        await self._end_told.wait()

    async def _listen(self) -> None:
        """An eviction is heard at once, not only at the next renewal.

        It is a hint: whoever may read stored events can have one delivered here, so the planner is asked.
        """
        with contextlib.suppress(Unavailable, Forked):
            async for event in self.client.lease_events(lease_id=self.lease_id):
                if event.kind in _ENDS or event.kind is requests.LeaseEventKind.EXPIRING:
                    self._end_told.set()


class LeaseContext:
    """`async with` for a lease; as a decorator it asks anew for each call of the function.

    A decorated coroutine function that has a parameter `lease` is given the `HeldLease`.
    """

    def __init__(
        self,
        client: RequestCalls,
        request: requests.WorkRequest,
        *,
        on_lost: Lost | None = None,
        on_wait: Waiting | None = None,
        set_environment: bool = False,
        on_outage: OnOutage | str = OnOutage.CONTINUE,
        children_grace: float = CHILDREN_GRACE_SECONDS,
    ) -> None:
        self._client = client
        self._on_outage = OnOutage(on_outage)
        self._children_grace = children_grace
        self._request = request
        self._on_lost = on_lost
        self._on_wait = on_wait
        self._set_environment = set_environment
        self._exit = contextlib.AsyncExitStack()
        self._held: HeldLease | None = None
        self._body: asyncio.Task[Any] | None = None
        self._cancelled = False

    async def __aenter__(self) -> HeldLease:
        held = await hold(self._client, self._request, self._lost, self._on_wait, self._on_outage)
        self._held = held
        self._body, self._cancelled = asyncio.current_task(), False
        if self._set_environment:
            try:
                self._exit.enter_context(environment_set(held.lease))
            except BaseException:  # a warning that is an error, say
                await held.release()
                raise
        held.start()
        return held

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held = self._held
        assert held is not None
        self._body, body = None, self._body
        await self._exit.aclose()
        if self._client.forked:
            return
        try:
            await held.wait_for_children(self._children_grace)
        finally:
            await asyncio.shield(held.release())
        if held.lost is None or self._on_lost is not None:
            return
        # As `asyncio.timeout` does: a cancellation of ours becomes an error, anybody else's stays one.
        if self._cancelled and body is not None and body.uncancel() == 0 and kind is asyncio.CancelledError:
            raise held.lost from error
        if kind is None:
            raise held.lost

    def __call__(self, function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """The coroutine function, under a lease of its own each time that it is called."""
        wants = "lease" in inspect.signature(function).parameters

        @functools.wraps(function)
        async def leased(*args: Any, **kwargs: Any) -> Any:
            once = LeaseContext(
                self._client,
                self._request,
                on_lost=self._on_lost,
                on_wait=self._on_wait,
                set_environment=self._set_environment,
                on_outage=self._on_outage,
                children_grace=self._children_grace,
            )
            async with once as held:
                if wants:
                    kwargs["lease"] = held
                return await function(*args, **kwargs)

        return leased

    def _lost(self, lost: LeaseLost) -> None:
        if self._on_lost is not None:
            self._on_lost(lost)
        elif self._body is not None:
            self._cancelled = True
            self._body.cancel()


async def hold(
    client: RequestCalls, request: requests.WorkRequest, on_lost: Lost, on_wait: Waiting | None, on_outage: OnOutage
) -> HeldLease:
    """Ask for a lease that this process is to hold alone; it is not renewed before `HeldLease.start`.

    Raises:
        Conflict: another process holds the lease of a request id that was given.
        CorralError: as `Client.submit`.
    """
    named, request = request.request_id is not None, held_here(request)
    granted = await client.granted(request, on_wait=on_wait)
    held = HeldLease(client, granted.assignment.lease, on_lost, on_outage, granted.confirmed_at)
    if named:  # it may be the lease of an earlier time, with little of it left
        await check_no_other_holds(client, held.lease, request.holder)
        await given_back_on_failure(client, held.lease, request.holder, held.take_over(request.holder))
    return held


def _again_in(refusal: ServiceError, ttl_seconds: float) -> float:
    """Seconds until a refused renewal is tried again."""
    told = refusal.retry_after_seconds if isinstance(refusal, TooManyRequests) else None
    return ttl_seconds / 10 if told is None else told


def held_here(request: requests.WorkRequest) -> requests.WorkRequest:
    """The request, with this process as the holder: what it does itself, and its children, count as work under the
    lease, though a variable that is set in a running process can't be seen from outside."""
    return request if request.holder else replace(request, holder=own_name())
