"""The synchronous client: wraps the asynchronous client, whose event loop runs in a background thread."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar, Unpack

from ..schemas import operations, requests
from ..schemas.metrics import DeviceSample
from ..schemas.models.description import ModelDescription
from ..schemas.models.serving import ServeFit
from ..schemas.query import ProcessorStatus, ResultFormat
from ..schemas.work.groups import Group, Groups, GroupTree
from ..schemas.work.moves import Moves
from ..schemas.work.windows import Window, WindowStatus
from .client import Client, connect
from .errors import Forked, LeaseLost
from .jobs.sync import SyncJobCalls
from .leases.child_processes import CHILDREN_GRACE_SECONDS
from .leases.environment import environment_set, restricted_to_host
from .leases.lease import HeldLease, Lost, Noticed, OnOutage, Resizing, hold
from .notebook import DeviceList
from .request import RequestFields, work_request
from .result import QueryResult
from .rpc import Waiting
from .serving import ServeFields
from .sync_notifications import SyncNotifyCalls

T = TypeVar("T")
N = TypeVar("N")

_ENDING_SECONDS: Final = 4.0
"""Time to wait after an interruption for the cancelled call to clean up; longer than withdrawing a request takes."""


class _Loop:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._made_in = os.getpid()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="corral-client", daemon=True)
        self._thread.start()

    @property
    def forked(self) -> bool:
        """True if this process is a fork of the one whose thread runs the event loop."""
        return os.getpid() != self._made_in

    def run(self, work: Coroutine[Any, Any, T], undo: Callable[[T], Coroutine[Any, Any, object]] | None = None) -> T:
        """Run a coroutine on the loop and wait for its result. Ctrl-C cancels it and waits up to 4 s for its cleanup.

        Args:
            work: the coroutine.
            undo: reverts its result if Ctrl-C arrives just as it completes.

        Raises:
            Forked: this process is a fork of the one that runs the loop.
            RuntimeError: called from a callback on the loop's own thread.
        """
        if self.forked:
            work.close()
            raise Forked(self._made_in)
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("a callback of the client can't call the client: use another thread")
        ended = threading.Event()
        made: list[T] = []

        async def completed() -> T:
            try:
                made.append(await work)
                return made[0]
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(completed(), self.loop)
        try:
            return future.result()
        except BaseException:
            if future.cancel():
                ended.wait(_ENDING_SECONDS)
            if made and undo is not None:
                with contextlib.suppress(Exception):
                    asyncio.run_coroutine_threadsafe(undo(made[0]), self.loop).result(_ENDING_SECONDS)
            raise

    def iterate(self, source: AsyncIterator[T]) -> Iterator[T]:
        """Iterate over an asynchronous iterator, which is closed at the end."""

        async def following() -> T:
            return await anext(source)

        try:
            while True:
                try:
                    yield self.run(following())
                except StopAsyncIteration:
                    return
        finally:
            close = getattr(source, "aclose", None)
            if close is not None and self.loop.is_running() and not self.forked:
                self.run(close())

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        if not self._thread.is_alive():
            self.loop.close()


class SyncHeldLease(HeldLease):
    """A lease that is held by a program without asyncio.

    Args:
        loop: event loop of the client.
        args: as in `HeldLease`.
    """

    def __init__(self, loop: _Loop, *args: Any) -> None:
        super().__init__(*args)
        self._loop = loop

    def saved(self) -> None:
        """See `AsyncHeldLease.saved`."""
        self._loop.run(self.checkpoint())

    def busy(self, seconds: float) -> None:
        """See `AsyncHeldLease.busy`."""
        self._loop.run(self.checkpoint(seconds))

    def accept_resize(self, devices: Sequence[str] = ()) -> None:
        """See `AsyncHeldLease.accept_resize`."""
        self._loop.run(self.answer_resize(True, devices))

    def decline_resize(self) -> None:
        """See `AsyncHeldLease.decline_resize`."""
        self._loop.run(self.answer_resize(False))


class SyncClient:
    """A connection to a fleet for code without asyncio. The methods are those of `Client`.

    It may be shared between threads. Use it as a context manager, or `close` it.

    Args:
        url: URL of the bus. Defaults to `CORRAL_NATS_URL`, then to the context in use, then to the local default.
        owner: owner of requests and leases. Defaults to `CORRAL_OWNER`, then to the context's owner, then to the
            credentials' owner, then to the name of the user account.
        credentials: path of a credentials file. Defaults to `CORRAL_NATS_CREDS`, then to the credentials of the
            context with that URL.
        context: name of a context that `corral context add` or `corral up` has written. It takes precedence over the
            environment.
        timeout: seconds to wait for an answer.
        patience: seconds to keep retrying while a service is absent.
        wait: seconds to wait for the bus at the start; None retries forever.

    Raises:
        Unavailable: no server answered; the message says what to do.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        owner: str | None = None,
        credentials: str | None = None,
        context: str | None = None,
        timeout: float = 10.0,
        patience: float = 2.0,
        wait: float | None = 5.0,
    ) -> None:
        self._loop = _Loop()
        self._closed = False

        async def start() -> Client:
            return await connect(
                url,
                owner=owner,
                credentials=credentials,
                context=context,
                timeout=timeout,
                patience=patience,
                wait=wait,
            )

        try:
            self._client = self._loop.run(start())
        except BaseException:
            self._loop.stop()
            raise

    @property
    def owner(self) -> str:
        """Owner of requests and leases where a call names none."""
        return self._client.owner

    @property
    def jobs(self) -> SyncJobCalls:
        """Calls about jobs: `client.jobs.submit(["python", "train.py"], gpus=2)`."""
        return SyncJobCalls(self._loop, self._client.jobs)

    @property
    def notifications(self) -> SyncNotifyCalls:
        """Calls about rules for notifications: `client.notifications.rules()`."""
        return SyncNotifyCalls(self._loop, self._client.notifications)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and stop the background thread."""
        if not self._closed:
            self._closed = True
            if self._loop.forked:
                return
            self._loop.run(self._client.close())
            self._loop.stop()

    def request(self, *, on_wait: Waiting | None = None, **fields: Unpack[RequestFields]) -> requests.Assignment:
        """See `Client.request`."""
        return self._loop.run(self._client.request(on_wait=on_wait, **fields), undo=self._release_granted)

    def submit(self, request: requests.WorkRequest, *, on_wait: Waiting | None = None) -> requests.Assignment:
        """See `Client.submit`."""
        return self._loop.run(self._client.submit(request, on_wait=on_wait), undo=self._release_granted)

    async def _release_granted(self, assignment: requests.Assignment) -> None:
        await self._client.release(assignment.lease.lease_id, owner=assignment.lease.owner)

    def withdraw(self, request_id: str, *, owner: str | None = None) -> requests.Rejection | requests.Assignment:
        """See `Client.withdraw`."""
        return self._loop.run(self._client.withdraw(request_id, owner=owner))

    def lease(
        self,
        *,
        on_lost: Lost | None = None,
        on_preempt: Noticed | None = None,
        on_resize: Resizing | None = None,
        on_wait: Waiting | None = None,
        set_environment: bool = False,
        on_outage: OnOutage | str = OnOutage.CONTINUE,
        children_grace: float = CHILDREN_GRACE_SECONDS,
        **fields: Unpack[RequestFields],
    ) -> SyncLeaseContext:
        """Hold a lease for the length of a block: `with client.lease(gpus=2, memory="20GiB") as lease: …`

        Args:
            on_lost: called with the `LeaseLost`, on the client's thread, if the lease ends too early. Without it, the
                `LeaseLost` is raised at the end of the block; `lease.check()` raises it earlier.
            on_preempt: called with the `Preemption`, on a thread of its own, when the lease will be preempted.
                `lease.saved()` ends the lease at once, `lease.busy(seconds)` puts its end off.
            on_resize: called with the `Resize`, likewise, when an elastic lease may grow or shrink; the answer is
                `lease.accept_resize()` or `lease.decline_resize()`. Without it every such notice is declined.
            on_wait: as in `request`.
            set_environment: set `CUDA_VISIBLE_DEVICES`, the equivalent variables of other runtimes and `CORRAL_LEASE`
                in this process for the block. Only GPUs of this host are requested, unless `hosts` names others
                (`"any"` for all hosts).
            on_outage: as in `Client.lease`.
            children_grace: as in `Client.lease`.
            fields: as in `request`.
        """
        request = work_request(self._client.owner, restricted_to_host(fields) if set_environment else fields)
        return SyncLeaseContext(
            lambda: (self, False),
            lambda _: request,
            on_lost,
            on_preempt,
            on_resize,
            on_wait,
            set_environment,
            OnOutage(on_outage),
            children_grace,
        )

    def explain(
        self, *, with_more: Sequence[operations.Addition] = (), **fields: Unpack[RequestFields]
    ) -> operations.Explanation:
        """See `Client.explain`."""
        return self._loop.run(self._client.explain(with_more=with_more, **fields))

    def fit(
        self,
        model: ModelDescription | str | Path,
        *,
        with_more: Sequence[operations.Addition] = (),
        serve: ServeFields | None = None,
        measured: bool = True,
        **fields: Unpack[RequestFields],
    ) -> ServeFit:
        """See `Client.fit`."""
        asked = self._client.fit(model, with_more=with_more, serve=serve, measured=measured, **fields)
        return self._loop.run(asked)

    def renew(self, lease_id: str, *, ttl: float | None = None, owner: str | None = None) -> requests.Lease:
        """See `Client.renew`."""
        return self._loop.run(self._client.renew(lease_id, ttl=ttl, owner=owner))

    def release(self, lease_id: str, *, owner: str | None = None) -> requests.Lease:
        """See `Client.release`."""
        return self._loop.run(self._client.release(lease_id, owner=owner))

    def leases(
        self,
        *,
        owner: str | None = None,
        states: Sequence[requests.LeaseState] = (requests.LeaseState.ACTIVE,),
        lease_id: str | None = None,
    ) -> list[requests.Lease]:
        """See `Client.leases`."""
        return self._loop.run(self._client.leases(owner=owner, states=states, lease_id=lease_id))

    def devices(
        self, *, hosts: Sequence[str] = (), models: Sequence[str] = (), devices: Sequence[str] = ()
    ) -> DeviceList:
        """See `Client.devices`."""
        return self._loop.run(self._client.devices(hosts=hosts, models=models, devices=devices))

    def fleet(
        self, *, hosts: Sequence[str] = (), models: Sequence[str] = (), devices: Sequence[str] = ()
    ) -> operations.FleetSummary:
        """See `Client.fleet`."""
        return self._loop.run(self._client.fleet(hosts=hosts, models=models, devices=devices))

    def queue(self, *, owner: str | None = None) -> list[operations.QueueEntry]:
        """See `Client.queue`."""
        return self._loop.run(self._client.queue(owner=owner))

    def drain(
        self,
        *,
        reason: str,
        devices: Sequence[str] = (),
        hosts: Sequence[str] = (),
        host_labels: dict[str, str] | None = None,
        operator: str | None = None,
    ) -> dict[str, str]:
        """See `Client.drain`."""
        return self._loop.run(
            self._client.drain(reason=reason, devices=devices, hosts=hosts, host_labels=host_labels, operator=operator)
        )

    def undrain(
        self,
        *,
        devices: Sequence[str] = (),
        hosts: Sequence[str] = (),
        host_labels: dict[str, str] | None = None,
        operator: str | None = None,
    ) -> dict[str, str]:
        """See `Client.undrain`."""
        return self._loop.run(
            self._client.undrain(devices=devices, hosts=hosts, host_labels=host_labels, operator=operator)
        )

    def saved(self, lease_id: str, *, owner: str | None = None) -> requests.Lease:
        """See `Client.saved`."""
        return self._loop.run(self._client.saved(lease_id, owner=owner))

    def busy(self, lease_id: str, seconds: float, *, owner: str | None = None) -> requests.Lease:
        """See `Client.busy`."""
        return self._loop.run(self._client.busy(lease_id, seconds, owner=owner))

    def resize(
        self,
        lease_id: str,
        *,
        accept: bool = True,
        devices: Sequence[str] = (),
        number: int | None = None,
        owner: str | None = None,
    ) -> requests.Lease:
        """See `Client.resize`."""
        return self._loop.run(self._client.resize(lease_id, accept=accept, devices=devices, number=number, owner=owner))

    def preempt(
        self, lease_id: str, *, reason: str, devices: Sequence[str] = (), operator: str | None = None
    ) -> requests.Lease:
        """See `Client.preempt`."""
        return self._loop.run(self._client.preempt(lease_id, reason=reason, devices=devices, operator=operator))

    def moves(
        self,
        *,
        free_hosts: int | None = None,
        hosts: Sequence[str] = (),
        models: Sequence[str] = (),
        request_id: str | None = None,
        owner: str | None = None,
    ) -> Moves:
        """See `Client.moves`."""
        found = self._client.moves(
            free_hosts=free_hosts, hosts=hosts, models=models, request_id=request_id, owner=owner
        )
        return self._loop.run(found)

    def book(self, window: Window, *, dry_run: bool = False, operator: str | None = None) -> WindowStatus:
        """See `Client.book`."""
        return self._loop.run(self._client.book(window, dry_run=dry_run, operator=operator))

    def cancel_window(self, window_id: str, *, operator: str | None = None) -> WindowStatus:
        """See `Client.cancel_window`."""
        return self._loop.run(self._client.cancel_window(window_id, operator=operator))

    def windows(self, *, owner: str | None = None, window_id: str | None = None) -> list[WindowStatus]:
        """See `Client.windows`."""
        return self._loop.run(self._client.windows(owner=owner, window_id=window_id))

    def evict(self, lease_id: str, *, reason: str, operator: str | None = None) -> requests.Lease:
        """See `Client.evict`."""
        return self._loop.run(self._client.evict(lease_id, reason=reason, operator=operator))

    def groups(self, *, name: str | None = None) -> Groups:
        """See `Client.groups`."""
        return self._loop.run(self._client.groups(name=name))

    def set_groups(
        self,
        *groups: Group,
        delete: Sequence[str] = (),
        replace: GroupTree | None = None,
        revision: int | None = None,
        dry_run: bool = False,
        operator: str | None = None,
    ) -> Groups:
        """See `Client.set_groups`."""
        return self._loop.run(
            self._client.set_groups(
                *groups, delete=delete, replace=replace, revision=revision, dry_run=dry_run, operator=operator
            )
        )

    def query(
        self,
        sql: str,
        *,
        limit: int | None = None,
        timeout: float = 30.0,
        format: ResultFormat | str | None = None,
        query_id: str | None = None,
    ) -> QueryResult:
        """See `Client.query`."""
        return self._loop.run(self._client.query(sql, limit=limit, timeout=timeout, format=format, query_id=query_id))

    def cancel(self, query_id: str) -> None:
        """See `Client.cancel`."""
        self._loop.run(self._client.cancel(query_id))

    def history(self) -> ProcessorStatus:
        """See `Client.history`."""
        return self._loop.run(self._client.history())

    def watch(self, *, hosts: Sequence[str] = (), devices: Sequence[str] = ()) -> Iterator[DeviceSample]:
        """See `Client.watch`."""
        return self._loop.iterate(self._client.watch(hosts=hosts, devices=devices))

    def lease_events(self, *, lease_id: str = "*", kind: str = "*") -> Iterator[requests.LeaseEvent]:
        """See `Client.lease_events`."""
        return self._loop.iterate(self._client.lease_events(lease_id=lease_id, kind=kind))

    def hold(
        self,
        request: requests.WorkRequest,
        on_lost: Lost,
        on_wait: Waiting | None,
        on_outage: OnOutage = OnOutage.CONTINUE,
        on_preempt: Noticed | None = None,
        on_resize: Resizing | None = None,
    ) -> SyncHeldLease:
        """Request a lease and keep it renewed until `let_go`; `lease` is the convenient form."""

        def made(lease: requests.Lease, confirmed_at: float) -> SyncHeldLease:
            return SyncHeldLease(
                self._loop,
                self._client,
                lease,
                on_lost,
                on_outage,
                confirmed_at,
                _in_thread(on_preempt, "corral-on-preempt"),
                _in_thread(on_resize, "corral-on-resize"),
            )

        async def held() -> SyncHeldLease:
            lease = await hold(self._client, request, on_wait, made)
            lease.start()
            return lease

        return self._loop.run(held(), undo=lambda lease: lease.release())

    def let_go(self, held: HeldLease, children_grace: float = 0.0) -> None:
        """Stop renewing a lease from `hold` and release it.

        Args:
            held: the lease.
            children_grace: seconds to wait, before the release, for processes that still work under the lease.
        """

        async def released() -> None:
            try:
                await held.wait_for_children(children_grace)
            finally:
                await held.release()

        self._loop.run(released())


def _in_thread(callback: Callable[[N], object] | None, name: str) -> Callable[[N], None] | None:
    """The callback on a thread of its own: it takes its time, and may call the client."""
    if callback is None:
        return None
    return lambda notice: threading.Thread(target=callback, args=(notice,), name=name, daemon=True).start()


class SyncLeaseContext:
    """Context manager that holds a lease; as a decorator, it requests a new lease for each call.

    A decorated function that has a parameter `lease` is given the `HeldLease`.
    """

    def __init__(
        self,
        client: Callable[[], tuple[SyncClient, bool]],
        request: Callable[[SyncClient], requests.WorkRequest],
        on_lost: Lost | None,
        on_preempt: Noticed | None,
        on_resize: Resizing | None,
        on_wait: Waiting | None,
        set_environment: bool,
        on_outage: OnOutage = OnOutage.CONTINUE,
        children_grace: float = CHILDREN_GRACE_SECONDS,
    ) -> None:
        self._open = client
        self._request = request
        self._on_lost = on_lost
        self._on_preempt = on_preempt
        self._on_resize = on_resize
        self._on_wait = on_wait
        self._set_environment = set_environment
        self._on_outage = on_outage
        self._children_grace = children_grace
        self._client: SyncClient | None = None
        self._own = False
        self._held: SyncHeldLease | None = None
        self._environment: Any = None

    def __enter__(self) -> SyncHeldLease:
        self._client, self._own = self._open()
        try:
            request = self._request(self._client)
            held = self._client.hold(
                request, self._lost, self._on_wait, self._on_outage, self._on_preempt, self._on_resize
            )
        except BaseException:
            if self._own:
                self._client.close()
            raise
        self._held = held
        if self._set_environment:
            environment = environment_set(held.lease)
            try:
                environment.__enter__()
            except BaseException:  # such as a warning that is raised as an error: `__exit__` wouldn't be called
                self.__exit__(None, None, None)
                raise
            self._environment = environment
        return held

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._client is not None
        assert self._held is not None
        if self._environment is not None:
            self._environment.__exit__(None, None, None)
            self._environment = None
        if self._held.client.forked:
            return
        try:
            self._client.let_go(self._held, self._children_grace)
        finally:
            if self._own:
                self._client.close()
        if self._held.lost is not None and self._on_lost is None and kind is None:
            raise self._held.lost

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that each call runs under a new lease."""
        wants = "lease" in inspect.signature(function).parameters

        @functools.wraps(function)
        def leased(*args: Any, **kwargs: Any) -> Any:
            once = SyncLeaseContext(
                self._open,
                self._request,
                self._on_lost,
                self._on_preempt,
                self._on_resize,
                self._on_wait,
                self._set_environment,
                self._on_outage,
                self._children_grace,
            )
            with once as held:
                if wants:
                    kwargs["lease"] = held
                return function(*args, **kwargs)

        return leased

    def _lost(self, lost: LeaseLost) -> None:
        if self._on_lost is not None:
            self._on_lost(lost)


def lease(
    url: str | None = None,
    *,
    on_lost: Lost | None = None,
    on_preempt: Noticed | None = None,
    on_resize: Resizing | None = None,
    on_wait: Waiting | None = None,
    set_environment: bool = False,
    on_outage: OnOutage | str = OnOutage.CONTINUE,
    children_grace: float = CHILDREN_GRACE_SECONDS,
    **fields: Unpack[RequestFields],
) -> SyncLeaseContext:
    """Hold a lease for the length of a block, over a separate connection that is closed at the end.

    `with corral.client.leases.lease(gpus=2, memory="20GiB") as lease: …`, or as a decorator, `@lease(gpus=1)`.

    Args:
        url: URL of the bus; defaults as in `SyncClient`.
        on_lost: as in `SyncClient.lease`.
        on_preempt: as in `SyncClient.lease`.
        on_resize: as in `SyncClient.lease`.
        on_wait: as in `Client.request`.
        set_environment: as in `SyncClient.lease`.
        on_outage: as in `Client.lease`.
        children_grace: as in `Client.lease`.
        fields: as in `Client.request`.
    """
    return SyncLeaseContext(
        lambda: (SyncClient(url), True),
        lambda client: work_request(client.owner, restricted_to_host(fields) if set_environment else fields),
        on_lost,
        on_preempt,
        on_resize,
        on_wait,
        set_environment,
        OnOutage(on_outage),
        children_grace,
    )
