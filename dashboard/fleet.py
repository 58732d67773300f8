"""State of the fleet that all browsers share: one connection, polled only while a page is open."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final, TypeVar

import nats.aio.client
import nats.errors
from msgspec import Struct
from nats.aio.msg import Msg

from ..bus.health import HealthEndpoint
from ..client import Client, CorralError, NoService, Unavailable, connect
from ..schemas import codec, operations, requests, subjects
from ..schemas.health import HealthStatus
from ..schemas.instruments import ServiceKind
from ..schemas.telemetry import ProcessBatch, ProcessSample
from . import cells

log = logging.getLogger("corral.dashboard")

T = TypeVar("T")

SLOWER: Final = 5.0
"""Minimum pause after a refresh, as a multiple of its duration."""
STALE_SECONDS: Final = 10.0


class Problem(Struct, frozen=True, kw_only=True):
    """Reason why there is nothing to show, and what to do about it.

    Attributes:
        kind: `bus`, `planner`, `history`, `devices`, `error` or `page`.
        title: the reason in a few words.
        detail: the reason in a sentence or two.
        commands: commands that would help.
    """

    kind: str
    title: str
    detail: str = ""
    commands: tuple[str, ...] = ()


class Fleet:
    """State of the fleet in the planner, as of the last refresh.

    Args:
        url: URL of the bus; None for the default.
        interval_seconds: minimum time between refreshes.

    Attributes:
        client: client of the bus; None before the first connection.
        devices: devices by host and index.
        states: states of these devices, in the same order.
        summary: aggregates over the fleet; None before the first refresh.
        leases: active leases, oldest first.
        queue: requests in the queue.
        version: number of refreshes so far, failed ones included.
        shape: number that increases when the list of devices changes.
        looked_at: time of the last successful refresh, on the monotonic clock.
    """

    def __init__(self, url: str | None, interval_seconds: float) -> None:
        self.url = url
        self.client: Client | None = None
        self.devices: list[operations.DeviceStatus] = []
        self.states: list[cells.State] = []
        self.summary: operations.FleetSummary | None = None
        self.leases: list[requests.Lease] = []
        self.queue: list[operations.QueueEntry] = []
        self.version = 0
        self.shape = 0
        self.refreshed_at = 0.0
        self._levels: dict[cells.Metric, bytes] = {}
        self._problem: Problem | None = None
        self._interval = interval_seconds
        self._watching: dict[int, Callable[[], None]] = {}
        self._next = 0
        self._wake = asyncio.Event()
        self._processes: dict[str, bytes] = {}
        self._door = HealthEndpoint(
            ServiceKind.DASHBOARD, f"{socket.gethostname()}-{os.getpid()}", lambda: HealthStatus([])
        )

    # Connecting

    @property
    def instance(self) -> str:
        """Instance name of this dashboard in health checks."""
        return self._door.instance

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Connect, and refresh the state for the length of a block. If there is no bus, wait until there is one."""
        tasks = [asyncio.create_task(self._connect()), asyncio.create_task(self._look_for_ever())]
        try:
            yield
        finally:
            self._door.stopping = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self.client is not None:
                await self.client.close()

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
        await client.nc.subscribe(subjects.processes_subject("*"), cb=self._on_processes, pending_msgs_limit=4096)
        await self._door.open(client.nc)
        self.client = client
        self.refresh_soon()

    async def _on_processes(self, message: Msg) -> None:
        self._processes[message.subject.rpartition(".")[2]] = message.data

    def processes_on(self, device: operations.DeviceStatus) -> list[ProcessSample] | None:
        """Processes on a device, those with the most memory first; None if its collector has published none yet."""
        data = self._processes.get(device.host)
        if data is None:
            return None
        try:
            batch = codec.decode(data, ProcessBatch)
        except codec.DecodeError:
            return None
        found = [process for process in batch.processes if process.device == device.uuid]
        return sorted(found, key=lambda process: -(process.memory_used_bytes or 0))

    # Refreshing

    @property
    def connected(self) -> bool:
        """True if the bus is connected."""
        return self.client is not None and self.client.nc.is_connected

    @property
    def problem(self) -> Problem | None:
        """Reason why the state isn't current; None if it is."""
        if not self.connected:
            return no_bus(self.url)
        return self._problem

    @property
    def fresh(self) -> bool:
        """True if the last refresh is less than 10 s old, or less than three intervals if these are longer."""
        return self.summary is not None and time.monotonic() - self.refreshed_at < max(
            STALE_SECONDS, 3 * self._interval
        )

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

    def device(self, uuid: str) -> operations.DeviceStatus | None:
        """Find a device by its UUID; None if there is none."""
        return next((device for device in self.devices if device.uuid == uuid), None)

    def levels(self, metric: cells.Metric) -> bytes:
        """Levels of all devices, one byte each, as in `cells.levels`; computed once per refresh for all browsers."""
        found = self._levels.get(metric)
        if found is None:
            found = self._levels[metric] = cells.levels(self.devices, self.states, metric)
        return found

    async def _look_for_ever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            began = time.monotonic()
            try:
                await self._look()
            except asyncio.CancelledError:
                raise
            except Exception:
                log.exception("a look at the fleet failed")
                self._problem = Problem(kind="error", title="The fleet can't be shown", detail="The log says why.")
            self.version += 1
            for changed in list(self._watching.values()):
                try:
                    changed()
                except Exception:
                    log.exception("a page could not be updated")
            if self._watching:
                pause = max(self._interval, SLOWER * (time.monotonic() - began))
                asyncio.get_running_loop().call_later(pause, self._beat)

    def _beat(self) -> None:
        if self._watching:
            self._wake.set()

    async def _look(self) -> None:
        client = self.client
        if client is None or not client.nc.is_connected:
            return
        try:
            summary, devices, leases, queue = await asyncio.gather(
                client.fleet(), client.devices(), client.leases(), client.queue()
            )
        except CorralError as error:
            self._problem = problem_of(error, self.url)
            return
        except (nats.errors.Error, OSError) as error:
            self._problem = Problem(kind="error", title="The bus failed", detail=f"{type(error).__name__}: {error}")
            return
        self._problem = None
        if [(one.uuid, one.host, one.index) for one in devices] != [
            (one.uuid, one.host, one.index) for one in self.devices
        ]:
            self.shape += 1
        self.summary, self.devices, self.leases, self.queue = summary, list(devices), leases, queue
        self.states = [cells.state(device) for device in self.devices]
        self._levels.clear()
        self.refreshed_at = time.monotonic()

    def connection(self) -> nats.aio.client.Client:
        """The shared connection to the bus.

        Raises:
            Unavailable: there is no connection to the bus yet.
        """
        if self.client is None:
            raise Unavailable(no_bus(self.url).detail)
        return self.client.nc

    async def ask(self, question: Callable[[Client], Awaitable[T]], person: str = "") -> T:
        """Call the client on the shared connection.

        Args:
            question: makes the calls with the client it is given.
            person: the user who has logged in; queries and explanations are queued under their name.

        Raises:
            Unavailable: there is no connection to the bus yet.
            CorralError: the call failed.
        """
        self.connection()
        assert self.client is not None
        return await question(self.client.speaking_for(person))


def no_bus(url: str | None) -> Problem:
    """Trouble that no NATS server answers at a URL."""
    where = url or "the default address"
    return Problem(
        kind="bus",
        title="No bus",
        detail=f"No NATS server answers at {where}. This page comes back by itself once one does.",
        commands=("corral up", "corral --nats nats://HOST:4222 dashboard"),
    )


def problem_of(error: CorralError, url: str | None) -> Problem:
    """Convert an error to the message that a page shows."""
    if isinstance(error, NoService):
        if "processor" in str(error):
            return Problem(
                kind="history",
                title="No history",
                detail="The bus is there, but no processor answers. What happens waits on the bus, for a day.",
                commands=("corral process --db history.duckdb", "corral up"),
            )
        return Problem(
            kind="planner",
            title="No planner",
            detail="The bus is there, but no planner answers. Leases that were granted hold on without one.",
            commands=("corral plan", "corral up"),
        )
    if isinstance(error, Unavailable):
        return no_bus(url)
    return Problem(kind="error", title="That did not work", detail=str(error))


NO_DEVICES: Final = Problem(
    kind="devices",
    title="No devices yet",
    detail="The planner answers, but no collector has told it of a GPU. Start one on each GPU host; to try it without "
    "GPUs, simulate some.",
    commands=("corral collect", "corral collect --source simulated --hosts 4 --devices 8"),
)
