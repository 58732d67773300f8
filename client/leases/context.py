"""A lease that is held for a block of asynchronous code, or for each call of a coroutine function."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

from ...bus.tasks import BackgroundTasks
from ...schemas import requests
from ..errors import LeaseLost
from ..request_calls import RequestCalls
from ..rpc import Waiting
from .child_processes import CHILDREN_GRACE_SECONDS
from .environment import environment_set
from .lease import HeldLease, Lost, Noticed, OnOutage, Resizing, hold

N = TypeVar("N")


class AsyncHeldLease(HeldLease):
    """A lease that is held by a program of asyncio."""

    async def saved(self) -> None:
        """Say that the work is saved as of now.

        While the notice of a preemption is out, that ends the lease at once: it is lost then, as in any other end.

        Raises:
            CorralError: as in `Client.saved`.
        """
        await self.checkpoint()

    async def busy(self, seconds: float) -> None:
        """Put the end of a preemption off to `seconds` from now, once, and at most by the grace of the lease again.

        Raises:
            CorralError: as in `Client.busy`.
        """
        await self.checkpoint(seconds)

    async def accept_resize(self, devices: Sequence[str] = ()) -> None:
        """Agree to the notice of a resize: take what is offered, or give back what is asked for.

        The lease has its new devices afterwards. Those that it gives back must not be in use any more.

        Args:
            devices: uuids: of an offer, those to take; of a request, those to give back instead. Without a notice they
                are given back.

        Raises:
            CorralError: as in `Client.resize`.
        """
        await self.answer_resize(True, devices)

    async def decline_resize(self) -> None:
        """Decline the notice of a resize: the lease keeps its devices.

        Raises:
            CorralError: as in `Client.resize`.
        """
        await self.answer_resize(False)


class LeaseContext:
    """Asynchronous context manager that holds a lease; as a decorator, it requests a new lease for each call.

    A decorated coroutine function that has a parameter `lease` is given the `HeldLease`.
    """

    def __init__(
        self,
        client: RequestCalls,
        request: requests.WorkRequest,
        *,
        on_lost: Lost | None = None,
        on_preempt: Noticed | None = None,
        on_resize: Resizing | None = None,
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
        self._on_preempt = on_preempt
        self._on_resize = on_resize
        self._callbacks = BackgroundTasks()
        self._on_wait = on_wait
        self._set_environment = set_environment
        self._exit = contextlib.AsyncExitStack()
        self._held: AsyncHeldLease | None = None
        self._body: asyncio.Task[Any] | None = None
        self._cancelled = False

    async def __aenter__(self) -> AsyncHeldLease:
        def made(lease: requests.Lease, confirmed_at: float) -> AsyncHeldLease:
            return AsyncHeldLease(
                self._client,
                lease,
                self._lost,
                self._on_outage,
                confirmed_at,
                self._in_task(self._on_preempt, "on_preempt"),
                self._in_task(self._on_resize, "on_resize"),
            )

        held = await hold(self._client, self._request, self._on_wait, made)
        self._held = held
        self._body, self._cancelled = asyncio.current_task(), False
        if self._set_environment:
            try:
                self._exit.enter_context(environment_set(held.lease))
            except BaseException:  # such as a warning that is raised as an error
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
        await self._callbacks.cancel()
        try:
            await held.wait_for_children(self._children_grace)
        finally:
            await asyncio.shield(held.release())
        if held.lost is None or self._on_lost is not None:
            return
        # As `asyncio.timeout` does: a cancellation made here becomes `LeaseLost`, any other stays a cancellation.
        if self._cancelled and body is not None and body.uncancel() == 0 and kind is asyncio.CancelledError:
            raise held.lost from error
        if kind is None:
            raise held.lost

    def __call__(self, function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """Wrap a coroutine function so that each call runs under a new lease."""
        wants = "lease" in inspect.signature(function).parameters

        @functools.wraps(function)
        async def leased(*args: Any, **kwargs: Any) -> Any:
            once = LeaseContext(
                self._client,
                self._request,
                on_lost=self._on_lost,
                on_preempt=self._on_preempt,
                on_resize=self._on_resize,
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

    def _in_task(self, callback: Callable[[N], object] | None, name: str) -> Callable[[N], object] | None:
        """The callback in a task of its own, since it may be a coroutine function."""
        if callback is None:
            return None
        return lambda notice: self._callbacks.start(_call(callback, notice), name=name)


async def _call(callback: Callable[[N], object], notice: N) -> None:
    found = callback(notice)
    if inspect.isawaitable(found):
        await found
