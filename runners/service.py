"""The runner service: finds the runs of earlier starts, connects to the bus, and carries out its orders."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct
from nats.aio.client import Client

from ..bus.connect import connect, until_closed
from ..bus.health import HealthEndpoint
from ..bus.layout import ensure_layout
from ..bus.permissions import may_make_streams
from ..bus.tasks import cancel_all, heed_cancellation
from ..schemas import subjects
from ..schemas.health import HealthStatus
from ..schemas.instruments import SECONDS, Histogram, ServiceKind
from .accounts import Accounts
from .attach import AttachService
from .executors import Executors
from .host import Host
from .launcher import Launcher
from .metrics import health_status
from .reports import LogPublisher, Reporter

log = logging.getLogger("corral.runner")

KEEP_SECONDS: Final = 7 * 86400.0
CHECK_SECONDS: Final = 5.0
CLEAN_SECONDS: Final = 3600.0


class RunnerSettings(Struct, frozen=True, kw_only=True):
    """Settings of a runner.

    Attributes:
        hosts: names of the hosts whose jobs it runs, as their collectors give them. A simulated fleet has many.
        state: folder of its state.
        accounts: accounts of the owners.
        executors: what can confine jobs.
        nats_url: URLs of the servers, as in `bus.connect`.
        keep_seconds: time for which the output of a run is kept after its end.
        end_seconds: when it is stopped, it ends all runs, and waits for so long; 0 leaves them running.
    """

    hosts: Sequence[str]
    state: Path
    accounts: Accounts
    executors: Executors
    nats_url: str | None = None
    keep_seconds: float = KEEP_SECONDS
    end_seconds: float = 0.0


def state_folder(base: Path | None = None) -> Path:
    """Folder of a runner's state: `<base>/runner`.

    The base is, in this order: the argument, `CORRAL_STATE_DIR`, systemd's `STATE_DIRECTORY`, `XDG_STATE_HOME/corral`,
    `~/.local/state/corral`.
    """
    if base is None:
        given = os.environ.get("CORRAL_STATE_DIR") or os.environ.get("STATE_DIRECTORY", "").split(":")[0]
        home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
        base = Path(given) if given else Path(home) / "corral"
    return base.absolute() / "runner"


class Runner:
    """Runs the jobs of its hosts.

    Args:
        settings: see `RunnerSettings`.
    """

    def __init__(self, settings: RunnerSettings) -> None:
        self._settings = settings
        self._id = uuid.uuid4().hex
        self._token = secrets.token_hex(32)
        self._starts = Histogram(SECONDS)
        self._launcher = Launcher()
        self._reporters: dict[str, Reporter] = {}
        self._publishers: list[LogPublisher] = []
        self._attached: dict[str, AttachService] = {}
        self._hosts = [
            Host(
                name,
                settings.state / subjects.host_token(name),
                settings.accounts,
                settings.executors,
                self._launcher,
                self._changed,
                self._starts.observe,
            )
            for name in settings.hosts
        ]
        self._health = HealthEndpoint(ServiceKind.RUNNER, settings.hosts[0], self._judge)

    async def run(self) -> None:
        """Run until cancelled; the jobs go on then, unless `end_seconds` is given.

        Raises:
            BusClosed: the server has closed the connection for good.
        """
        for host in self._hosts:
            host.load()
            host.open()
        tasks = [asyncio.create_task(self._check(), name="check"), asyncio.create_task(self._serve(), name="bus")]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            self._health.stopping = True
            if self._settings.end_seconds > 0:
                await asyncio.gather(*(host.end_all(self._settings.end_seconds) for host in self._hosts))
            await cancel_all(tasks)
            for host in self._hosts:
                await host.close()
            self._launcher.close()

    def _changed(self, host: str, keys: Collection[str]) -> None:
        if (reporter := self._reporters.get(host)) is not None:
            reporter.change(keys)
        if (attached := self._attached.get(host)) is not None:
            attached.changed(keys)

    def _judge(self) -> HealthStatus:
        reporters = list(self._reporters.values())
        return health_status(self._hosts, reporters, self._publishers, self._starts, self._settings.executors)

    async def _check(self) -> None:
        """Check supervisors, and remove old output."""
        checks = 0
        while True:
            heed_cancellation()
            for host in self._hosts:
                host.check()
                if checks % round(CLEAN_SECONDS / CHECK_SECONDS) == 0:
                    host.clean(self._settings.keep_seconds)
            checks += 1
            await asyncio.sleep(CHECK_SECONDS)

    async def _serve(self) -> None:
        """Connect, and report until the connection is closed for good. The jobs don't wait for it."""
        closed = asyncio.Event()
        name = f"corral-runner {self._settings.hosts[0]}"
        nc = await connect(self._settings.nats_url, name=name, wait_seconds=None, closed=closed)
        try:
            await self._prepare(nc)
            names = [str(name) for name in self._settings.executors.names]
            for host in self._hosts:
                self._reporters[host.name] = Reporter(nc, host, self._id, self._token, names)
                self._publishers.append(LogPublisher(nc, host))
                self._attached[host.name] = AttachService(nc, host)
            await self._health.open(nc)
            log.info(
                "running jobs of %s as runner %s (%s)", _some(self._settings.hosts), self._id[:8], ", ".join(names)
            )
            async with asyncio.TaskGroup() as group:
                for reporter in self._reporters.values():
                    group.create_task(reporter.run())
                for publisher in self._publishers:
                    group.create_task(publisher.run())
                for attached in self._attached.values():
                    group.create_task(attached.run())
                group.create_task(until_closed(nc, closed))
        finally:
            await self._health.close()
            await nc.close()

    async def _prepare(self, nc: Client) -> None:
        if may_make_streams(nc):
            try:
                await ensure_layout(nc.jetstream())
            except Exception as error:  # whatever it is, the planner sees to the streams
                log.debug("could not check the streams: %s", error)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]} ({len(names)} hosts)"
