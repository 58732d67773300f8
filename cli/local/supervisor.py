"""Runs a local cluster: the bus and the parts as child processes, restarted when they die, stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Final

from msgspec import Struct

from ...bus.connect import URL_VARIABLE, connect
from ...bus.layout import ensure_layout
from ...bus.tasks import cancel_all
from ..exits import CommandError
from .server import EmbeddedServer, die_with_parent

BACKOFF_FIRST_SECONDS: Final = 0.2
BACKOFF_MAX_SECONDS: Final = 15.0
STEADY_SECONDS: Final = 10.0
"""Uptime after which a part counts as healthy, so that the backoff of its next restart begins anew."""
STOP_SECONDS: Final = 12.0
"""Timeout for stopping a part; a little longer than the parts' timeout for an orderly shutdown."""
_LOG: Final = {"CORRAL_LOG_FORMAT": os.environ.get("CORRAL_LOG_FORMAT", "console")}
"""Log format of the parts: text by default, since users read these logs."""
_LOG_BYTES: Final = 8 * 2**20
_POLL_SECONDS: Final = 0.1


class Part(Struct, frozen=True, kw_only=True):
    """A child process of the cluster.

    Attributes:
        name: name for display, and of the log file.
        arguments: arguments of the `corral` command.
        environment: variables to add to the environment of this process.
        ends: true if the part may end with exit code 0 (as a replay does) and isn't restarted then.
    """

    name: str
    arguments: Sequence[str]
    environment: dict[str, str] = {}
    ends: bool = False


class SupervisorEvent(Struct, frozen=True, kw_only=True):
    """An event in the life of a part.

    Attributes:
        part: name of the part.
        kind: `started`, `died`, `ended`, `stopped` or `killed`.
        detail: description as text.
        pid: process id; 0 if there is no process.
    """

    part: str
    kind: str
    detail: str = ""
    pid: int = 0


class DataFolder:
    """A cluster's data folder, locked by one cluster at a time.

    Args:
        path: path of the folder; created if it is missing.

    Raises:
        CommandError: another cluster holds the lock, or the folder can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = (path / "cluster.json").open("a+")
        except OSError as error:
            raise CommandError(f"the data folder {path} can't be used: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            with contextlib.suppress(ValueError):
                held = json.loads(self._lock.read() or "{}")
                raise CommandError(
                    f"a cluster already runs on {path}: process {held.get('pid', '?')} at {held.get('url', '?')}. "
                    "Use that one, stop it, or name another folder with --data"
                ) from None
            raise CommandError(f"a cluster already runs on {path}; name another folder with --data") from None

    def write(self, url: str) -> None:
        """Write this process's id and the cluster's URL to `cluster.json`, for the error of a second cluster."""
        self._lock.seek(0)
        self._lock.truncate()
        json.dump({"pid": os.getpid(), "url": url}, self._lock)
        self._lock.flush()

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()


class Supervisor:
    """Starts the server and the parts, and restarts them when they die.

    Args:
        server: the embedded bus.
        parts: the parts, in the order of starting; they are stopped in the reverse order, the server last.
        logs: folder for the logs, one per part.
        tell: called with each event.
        credentials: credentials of a user who may create streams; None on a bus without authentication.
    """

    def __init__(
        self,
        server: EmbeddedServer,
        parts: Sequence[Part],
        logs: Path,
        tell: Callable[[SupervisorEvent], None],
        credentials: Path | None = None,
    ) -> None:
        self.server = server
        self.parts = list(parts)
        self._logs = logs
        self._tell = tell
        self._credentials = credentials
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._server_keeper: asyncio.Task[None] | None = None

    @property
    def pids(self) -> dict[str, int]:
        """Ids of the running processes, by name."""
        found = {name: process.pid for name, process in self._processes.items() if process.returncode is None}
        if self.server.process is not None and self.server.process.poll() is None:
            found["nats"] = self.server.process.pid
        return found

    async def start(self) -> None:
        """Start the server, wait until it is ready, create the streams, and start the parts.

        Raises:
            ServerError: the server did not start.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        # In this thread, because Linux sends the parent-death signal when the thread that created the child ends.
        self.server.start()
        credentials = str(self._credentials) if self._credentials else None
        nc = await connect(self.server.url, name="corral-up", credentials=credentials)
        try:
            await ensure_layout(nc.jetstream())
        finally:
            await nc.close()
        self._server_keeper = asyncio.create_task(self._keep_server())
        for part in self.parts:
            self.add(part)

    def add(self, part: Part) -> None:
        """Start a further part."""
        if part not in self.parts:
            self.parts.append(part)
        self._keepers[part.name] = asyncio.create_task(self._keep(part))

    async def stop(self) -> None:
        """Stop the parts, last started first, then the server; processes that take too long are killed."""
        for part in reversed(self.parts):
            await self._stop(part)
        if self._server_keeper is not None:
            await cancel_all([self._server_keeper])
        await asyncio.to_thread(self.server.stop)

    async def _stop(self, part: Part) -> None:
        keeper = self._keepers.pop(part.name, None)
        if keeper is None:
            return
        await cancel_all([keeper])
        process = self._processes.get(part.name)
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
            self._tell(SupervisorEvent(part=part.name, kind="stopped"))
        except TimeoutError:
            process.kill()
            await process.wait()
            self._tell(
                SupervisorEvent(part=part.name, kind="killed", detail=f"it did not stop within {STOP_SECONDS:.0f} s")
            )

    async def _keep(self, part: Part) -> None:
        pause = BACKOFF_FIRST_SECONDS
        while True:
            began = time.monotonic()
            log = self._logs / f"{part.name}.log"
            process, written = await self._spawn(part, log)
            self._processes[part.name] = process
            self._tell(SupervisorEvent(part=part.name, kind="started", pid=process.pid))
            code = await process.wait()
            if part.ends and code == 0:
                self._tell(SupervisorEvent(part=part.name, kind="ended"))
                return
            if time.monotonic() - began > STEADY_SECONDS:
                pause = BACKOFF_FIRST_SECONDS
            detail = f"{ending(code)}; restarting it in {pause:.1f} s. Its log: {log}\n{last_lines(log, written)}"
            self._tell(SupervisorEvent(part=part.name, kind="died", detail=detail))
            await asyncio.sleep(pause)
            pause = min(pause * 2, BACKOFF_MAX_SECONDS)

    async def _spawn(self, part: Part, log: Path) -> tuple[asyncio.subprocess.Process, int]:
        with opened(log) as out:
            written = out.tell()
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "corral.cli.main",
                *part.arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=os.environ | {URL_VARIABLE: self.server.url, "PYTHONUNBUFFERED": "1"} | _LOG | part.environment,
                # As with the server: Ctrl-C reaches only the supervisor, which stops the parts in order.
                start_new_session=True,
                # Parts survive SIGKILL without loss; one that lingered would lock the database of the next cluster.
                preexec_fn=functools.partial(die_with_parent, os.getpid(), signal.SIGKILL),
            )
        return process, written

    async def _keep_server(self) -> None:
        pause = BACKOFF_FIRST_SECONDS
        began = time.monotonic()
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            process = self.server.process
            if process is None or process.poll() is None:
                continue
            if time.monotonic() - began > STEADY_SECONDS:
                pause = BACKOFF_FIRST_SECONDS
            self._tell(SupervisorEvent(part="nats", kind="died", detail=f"{ending(process.returncode)}; restarting it"))
            await asyncio.sleep(pause)
            pause = min(pause * 2, BACKOFF_MAX_SECONDS)
            began = time.monotonic()
            with contextlib.suppress(Exception):  # whatever the error, the start is retried
                self.server.start()
                assert self.server.process is not None
                self._tell(SupervisorEvent(part="nats", kind="started", pid=self.server.process.pid))


def ending(code: int) -> str:
    """Description of how a process ended: its exit code or signal."""
    if code >= 0:
        return f"it ended with code {code}"
    with contextlib.suppress(ValueError):
        return f"it was killed by {signal.Signals(-code).name}"
    return f"it was killed by signal {-code}"


def opened(log: Path) -> IO[bytes]:
    """Open a log for appending; one above 8 MiB is renamed first."""
    if log.exists() and log.stat().st_size > _LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    return log.open("ab")


def last_lines(path: Path, written: int = 0, lines: int = 3) -> str:
    """Last lines of a log, indented; nothing before offset `written`, in bytes."""
    try:
        with path.open("rb") as file:
            file.seek(max(written, path.stat().st_size - 4096))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])
