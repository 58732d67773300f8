"""The fleet that all browsers share: one connection and one live view, refreshed only while a page is open."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

import nats.aio.client
import nats.errors
from msgspec import Struct

from ..bus.health import HealthEndpoint
from ..bus.tasks import cancel_all, heed_cancellation
from ..client import Client, CorralError, NoService, Unavailable, connect
from ..client.fleet_view import DeviceState, FleetSnapshot, FleetView, device_state, holder
from ..schemas import operations, requests
from ..schemas.health import HealthStatus
from ..schemas.instruments import ServiceKind
from ..schemas.telemetry import ProcessSample
from ..schemas.work.groups import Groups
from ..schemas.work.windows import WindowStatus
from . import cells

log = logging.getLogger("corral.dashboard")

T = TypeVar("T")

STALE_SECONDS: Final = 10.0


class Problem(Struct, frozen=True, kw_only=True):
    """Reason why there is nothing to show, and what to do about it.

    Attributes:
        kind: `bus`, `planner`, `history`, `devices`, `groups`, `jobs`, `error` or `page`.
        title: the reason in a few words.
        detail: the reason in a sentence or two.
        commands: commands that would help.
    """

    kind: str
    title: str
    detail: str = ""
    commands: tuple[str, ...] = ()


class _OncePerRefresh(Generic[T]):
    """An answer about the fleet that is requested at most once per refresh."""

    def __init__(self) -> None:
        self._kept: tuple[FleetSnapshot | None, T] | None = None

    async def get(self, snapshot: FleetSnapshot | None, request: Callable[[], Awaitable[T]]) -> T:
        """The answer as of a snapshot; requested if the last is of another."""
        if self._kept is None or self._kept[0] is not snapshot:
            self._kept = (snapshot, await request())
        return self._kept[1]


class Fleet:
    """The fleet as of the last refresh; empty before the first.

    Args:
        url: URL of the bus; None for the default.
        interval_seconds: minimum time between refreshes.

    Attributes:
        view: live view of the fleet; None before the first connection.
        states: states of `devices`, in the same order.
        shape: number that increases when the list of devices changes.
        refreshes: number of refreshes that succeeded.
    """

    def __init__(self, url: str | None, interval_seconds: float) -> None:
        self.url = url
        self.view: FleetView | None = None
        self.states: list[DeviceState] = []
        self.shape = 0
        self.refreshes = 0
        self._levels: dict[cells.Metric, bytes] = {}
        self._holders: tuple[FleetSnapshot | None, dict[str, str]] | None = None
        self._groups = _OncePerRefresh[Groups]()
        self._windows = _OncePerRefresh[list[WindowStatus]]()
        self._problem: Problem | None = None
        self._interval = interval_seconds
        self._watching: dict[int, Callable[[], None]] = {}
        self._next = 0
        self._wake = asyncio.Event()
        self._health = HealthEndpoint(
            ServiceKind.DASHBOARD, f"{socket.gethostname()}-{os.getpid()}", lambda: HealthStatus([])
        )

    # The last snapshot

    @property
    def _last(self) -> FleetSnapshot | None:
        return self.view.last if self.view is not None else None

    @property
    def summary(self) -> operations.FleetSummary | None:
        """Aggregates over the fleet; None before the first refresh."""
        return self._last.fleet if self._last is not None else None

    @property
    def devices(self) -> Sequence[operations.DeviceStatus]:
        """Devices by host and index."""
        return self._last.devices if self._last is not None else ()

    @property
    def leases(self) -> Sequence[requests.Lease]:
        """Active leases, oldest first."""
        return self._last.leases if self._last is not None else ()

    @property
    def queue(self) -> Sequence[operations.QueueEntry]:
        """Requests in the queue."""
        return self._last.queue if self._last is not None else ()

    @property
    def holders(self) -> dict[str, str]:
        """Holder of each active lease, by lease id; computed once per refresh."""
        if self._holders is None or self._holders[0] is not self._last:
            self._holders = (self._last, {lease.lease_id: holder(lease) for lease in self.leases})
        return self._holders[1]

    def device(self, uuid: str) -> operations.DeviceStatus | None:
        """Find a device by its UUID; None if there is none."""
        return next((device for device in self.devices if device.uuid == uuid), None)

    def processes_on(self, device: operations.DeviceStatus) -> list[ProcessSample] | None:
        """Processes on a device, those with the most memory first; None if its collector has published none yet."""
        return self.view.processes_on(device) if self.view is not None else None

    def levels(self, metric: cells.Metric) -> bytes:
        """Levels of all devices, one byte each, as in `cells.levels`; computed once per refresh for all browsers."""
        found = self._levels.get(metric)
        if found is None:
            found = self._levels[metric] = cells.levels(self.devices, self.states, metric)
        return found

    # Connecting

    @property
    def instance(self) -> str:
        """Instance name of this dashboard in health checks."""
        return self._health.instance

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Connect, and refresh the state for the length of a block. If there is no bus, wait until there is one."""
        tasks = [asyncio.create_task(self._connect()), asyncio.create_task(self._refresh_forever())]
        try:
            yield
        finally:
            self._health.stopping = True
            await cancel_all(tasks)
            if self.view is not None:
                await self.view.client.close()

    async def _connect(self) -> None:
        async def on_change() -> None:
            self.refresh_soon()

        client = await connect(
            self.url,
            wait=None,
            timeout=10.0,
            patience=0.5,
            name="corral-dashboard",
            disconnected_cb=on_change,
            reconnected_cb=on_change,
        )
        view = FleetView(client)
        await view.follow_processes()
        await self._health.open(client.nc)
        self.view = view
        self.refresh_soon()

    # Refreshing

    @property
    def connected(self) -> bool:
        """True if the bus is connected."""
        return self.view is not None and self.view.client.nc.is_connected

    @property
    def problem(self) -> Problem | None:
        """Reason why the state isn't current; None if it is."""
        if not self.connected:
            return no_bus(self.url)
        return self._problem

    @property
    def fresh(self) -> bool:
        """True if the last refresh is less than 10 s old, or less than three intervals if these are longer."""
        if self.view is None or self.view.last is None:
            return False
        return time.monotonic() - self.view.refreshed_at < max(STALE_SECONDS, 3 * self._interval)

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call `changed` after every refresh, and refresh now. Returns a function that ends the subscription."""
        self._next += 1
        number = self._next
        self._watching[number] = changed
        self.refresh_soon()
        return lambda: self._watching.pop(number, None) and None

    def refresh_soon(self) -> None:
        """Refresh now, rather than after the interval, because something was changed."""
        self._wake.set()

    async def ready(self, seconds: float = 2.0) -> None:
        """Wait up to `seconds` for a refresh if the state isn't recent, so that a page doesn't start empty."""
        if self.fresh or not self.connected:
            return
        seen = asyncio.Event()
        stop = self.watch(seen.set)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(seen.wait(), seconds)
        finally:
            stop()

    async def _refresh_forever(self) -> None:
        while True:
            heed_cancellation()
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._refresh()
            except asyncio.CancelledError:
                raise
            except Exception:
                log.exception("the fleet could not be refreshed")
                self._problem = Problem(
                    kind="error", title="The fleet can't be shown", detail="The dashboard's log has the error."
                )
            for changed in list(self._watching.values()):
                try:
                    changed()
                except Exception:
                    log.exception("a page could not be updated")
            if self._watching:
                pause = self.view.pause_seconds(self._interval) if self.view is not None else self._interval
                asyncio.get_running_loop().call_later(pause, self._refresh_if_watched)

    def _refresh_if_watched(self) -> None:
        if self._watching:
            self._wake.set()

    async def _refresh(self) -> None:
        view = self.view
        if view is None or not self.connected:
            return
        before = [(one.uuid, one.host, one.index) for one in self.devices]
        try:
            if await view.refresh() is None:
                assert view.error is not None
                self._problem = problem_of(view.error, self.url)
                return
        except (nats.errors.Error, OSError) as error:
            self._problem = Problem(kind="error", title="The bus failed", detail=f"{type(error).__name__}: {error}")
            return
        self._problem = None
        self.refreshes += 1
        self.shape += before != [(one.uuid, one.host, one.index) for one in self.devices]
        self.states = [device_state(device) for device in self.devices]
        self._levels.clear()

    def connection(self) -> nats.aio.client.Client:
        """The shared connection to the bus.

        Raises:
            Unavailable: there is no connection to the bus yet.
        """
        return self._client().nc

    def _client(self) -> Client:
        if self.view is None:
            raise Unavailable(no_bus(self.url).detail)
        return self.view.client

    async def ask(self, question: Callable[[Client], Awaitable[T]], person: str = "") -> T:
        """Call the client on the shared connection.

        Args:
            question: makes the calls with the client it is given.
            person: the user who has logged in; queries and explanations are queued under their name.

        Raises:
            Unavailable: there is no connection to the bus yet.
            CorralError: the call failed.
        """
        return await question(self._client().speaking_for(person))

    async def windows(self) -> list[WindowStatus]:
        """Booked windows as of the last refresh, soonest first; requested as `groups` are.

        Raises:
            Unavailable: there is no connection to the bus yet.
            CorralError: the call failed.
        """
        return await self._windows.get(self._last, lambda: self._client().windows())

    async def groups(self) -> Groups:
        """Groups as of the last refresh; requested once per refresh, and only for a page that shows them.

        Raises:
            Unavailable: there is no connection to the bus yet.
            CorralError: the call failed.
        """
        return await self._groups.get(self._last, lambda: self._client().groups())


def no_bus(url: str | None) -> Problem:
    """Trouble that no NATS server answers at a URL."""
    where = url or "the default address"
    return Problem(
        kind="bus",
        title="No bus",
        detail=f"No NATS server answers at {where}. This page reconnects automatically.",
        commands=("corral up", "corral --nats nats://HOST:4222 dashboard"),
    )


def problem_of(error: CorralError, url: str | None) -> Problem:
    """Convert an error to the message that a page shows."""
    if isinstance(error, NoService):
        if error.service is ServiceKind.PROCESSOR:
            return Problem(
                kind="history",
                title="No history",
                detail="The bus is available, but no processor answers. The bus keeps telemetry for a day.",
                commands=("corral process --db history.duckdb", "corral up"),
            )
        return Problem(
            kind="planner",
            title="No planner",
            detail="The bus is available, but no planner answers. Existing leases stay in effect.",
            commands=("corral plan", "corral up"),
        )
    if isinstance(error, Unavailable):
        return no_bus(url)
    return Problem(kind="error", title="That failed", detail=str(error))


NO_DEVICES: Final = Problem(
    kind="devices",
    title="No devices yet",
    detail="The planner answers, but no collector has reported a GPU. Start one on each GPU host, or simulate some "
    "to try Corral without GPUs.",
    commands=("corral collect", "corral collect --source simulated --hosts 4 --devices 8"),
)
