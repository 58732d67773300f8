"""A lease that is held for the length of a block: renewed in the background, released at the end, missed when lost."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import os
import socket
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from ..schemas import bus, codec, requests
from ..schemas.holders import own_name
from .errors import CorralError, LeaseLost, ServiceError, TimedOut, TooManyRequests, Unavailable
from .notebook import lease_html

if TYPE_CHECKING:
    from .aio import Client, Waiting

Lost = Callable[[LeaseLost], object]
"""Told when a lease has ended before its holder was done with it."""

_ENDS: Final = (
    requests.LeaseEventKind.EXPIRED,
    requests.LeaseEventKind.LOST,
    requests.LeaseEventKind.EVICTED,
    requests.LeaseEventKind.RELEASED,
)
_OVER: Final = ("ended", "not_found", "not_owner")
"""Codes by which the planner says that a lease is its holder's no more; any other refusal passes."""
_LOOK_EVERY_SECONDS: Final = 1.0
"""An end that is told is looked into no more often: anybody may tell one."""
_SHORTEST_PAUSE_SECONDS: Final = 0.05


class HeldLease:
    """A lease and the task that keeps it.

    Attributes:
        lease: as it was at the last renewal.
        lost: why it has ended too early; None while it holds.
    """

    def __init__(self, client: Client, lease: requests.Lease, on_lost: Lost) -> None:
        self.client = client
        self.lease = lease
        self.lost: LeaseLost | None = None
        self._on_lost = on_lost
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
        """What to set for the work on this host (or on the only host that was granted)."""
        return environment_for(self.lease)

    def _repr_html_(self) -> str:
        return lease_html(self.lease)

    def check(self) -> None:
        """Raise `LeaseLost` if the lease has ended; cheap enough to call between steps."""
        if self.lost is not None:
            raise self.lost

    def start(self) -> None:
        """Begin to renew and to listen for the end."""
        self._tasks = [asyncio.create_task(self._renew()), asyncio.create_task(self._listen())]

    async def release(self) -> None:
        """Stop renewing and give the lease back, unless it has ended by itself."""
        if self._released:
            return
        self._released = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.lost is None:
            # Whatever goes wrong here, the lease ends by itself: nobody renews it any more.
            with contextlib.suppress(ServiceError, Unavailable, TimedOut):
                await self.client.release(self.lease_id, owner=self.lease.owner)

    def _lose(self, reason: str) -> None:
        if self.lost is None and not self._released:
            self.lost = LeaseLost(self.lease_id, reason)
            self._on_lost(self.lost)

    async def _renew(self) -> None:
        """Renew after each third of the time to live, and where an end is told; between failures try again each tenth.

        Only the planner's word ends the lease before its time: a refusal that passes (too many requests, say) does not.
        """
        loop = asyncio.get_running_loop()
        ttl = self.lease.ttl_seconds
        ends, pause, refusal = loop.time() + ttl, ttl / 3, ""
        while self.lost is None:
            await self._pause(min(pause, ends - loop.time()))
            if loop.time() >= ends:
                why = refusal or "bus or planner away, or this program was stopped"
                self._lose(f"it could not be renewed in its time ({why})")
                return
            sent = loop.time()
            try:
                async with asyncio.timeout(max(_SHORTEST_PAUSE_SECONDS, ends - sent)):
                    lease = await self.client.renew(self.lease_id, owner=self.lease.owner)
            except ServiceError as error:
                if error.code in _OVER:
                    self._lose(str(error))
                    return
                pause, refusal = _again_in(error, ttl), str(error)
                continue
            except (CorralError, codec.DecodeError, TimeoutError):
                pause, refusal = ttl / 10, ""
                continue
            if lease.state is not requests.LeaseState.ACTIVE:
                self._lose(lease.reason or lease.state.value)
                return
            self.lease = lease
            ends, pause, refusal = sent + ttl, ttl / 3, ""

    async def _pause(self, seconds: float) -> None:
        """Until it is time to ask the planner: sooner where an end is told."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(max(_SHORTEST_PAUSE_SECONDS, seconds)):
                await self._end_told.wait()
                await asyncio.sleep(self._look_at - loop.time())
        except TimeoutError:
            return
        self._end_told.clear()
        self._look_at = loop.time() + _LOOK_EVERY_SECONDS

    async def _listen(self) -> None:
        """An eviction is heard at once, not only at the next renewal.

        It is a hint: whoever may read stored events can have one delivered here, so the planner is asked.
        """
        with contextlib.suppress(Unavailable):
            async for event in self.client.lease_events(lease_id=self.lease_id):
                if event.kind in _ENDS:
                    self._end_told.set()


class LeaseContext:
    """`async with` for a lease; as a decorator it asks anew for each call of the function.

    A decorated coroutine function that has a parameter `lease` is given the `HeldLease`.
    """

    def __init__(
        self,
        client: Client,
        request: requests.WorkRequest,
        *,
        on_lost: Lost | None = None,
        on_wait: Waiting | None = None,
        set_environment: bool = False,
    ) -> None:
        self._client = client
        self._request = request
        self._on_lost = on_lost
        self._on_wait = on_wait
        self._set_environment = set_environment
        self._exit = contextlib.AsyncExitStack()
        self._held: HeldLease | None = None
        self._body: asyncio.Task[Any] | None = None
        self._cancelled = False

    async def __aenter__(self) -> HeldLease:
        assignment = await self._client.submit(held_here(self._request), on_wait=self._on_wait)
        held = self._held = HeldLease(self._client, assignment.lease, self._lost)
        self._body, self._cancelled = asyncio.current_task(), False
        if self._set_environment:
            self._exit.enter_context(environment_set(held.environment))
        held.start()
        return held

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held = self._held
        assert held is not None
        self._body, body = None, self._body
        await self._exit.aclose()
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


def _again_in(refusal: ServiceError, ttl_seconds: float) -> float:
    """Seconds until a refused renewal is tried again."""
    told = refusal.retry_after_seconds if isinstance(refusal, TooManyRequests) else None
    return ttl_seconds / 10 if told is None else told


def held_here(request: requests.WorkRequest) -> requests.WorkRequest:
    """The request, with this process as the holder: what it does itself, and its children, count as work under the
    lease, though a variable that is set in a running process can't be seen from outside."""
    return request if request.holder else replace(request, holder=own_name())


def environment_for(lease: requests.Lease, host: str | None = None) -> dict[str, str]:
    """The environment that a lease wants on a host: this one by default, or the only one granted."""
    host = host or local_host()
    if host in lease.environment:
        return dict(lease.environment[host])
    if len(lease.environment) == 1:
        return dict(next(iter(lease.environment.values())))
    return {"CORRAL_LEASE": lease.lease_id}


def local_host() -> str:
    """This host's name as collectors write it."""
    return bus.host_token(os.environ.get("CORRAL_HOST") or socket.gethostname())


@contextlib.contextmanager
def environment_set(values: dict[str, str]) -> Generator[None]:
    """Set environment variables, and put back what was there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
