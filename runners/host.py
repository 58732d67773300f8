"""The runs of one host: keeps them on disk, starts and signals their supervisors, and follows what these write."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Final

from ..bus import processes
from ..bus.process_identity import boot_id, process_stat
from ..bus.tasks import BackgroundTasks
from ..schemas.work.jobs import JobState
from ..schemas.work.runs import Run, RunOrders, RunVerb
from .accounts import Accounts
from .ended import Ended
from .executors import Executors, Name, removal
from .journal import Journal, RunFolder, run_key
from .launcher import Launcher
from .output import size_of_output
from .readiness import FolderCheck
from .start import plan, start_of
from .state import Action, EarlyEnd, HostRuns, KnownRun, Stop, Verb
from .status import Status

log = logging.getLogger("corral.runner")

CLAIM_SECONDS: Final = 10.0
"""A supervisor that has not claimed its run after this time is started once more."""
KILL_SECONDS: Final = 10.0
"""Longest time between SIGTERM and SIGKILL for what a killed supervisor leaves."""
_POLL_SECONDS: Final = 0.1


class HostTaken(RuntimeError):
    """Another runner works with the same folder."""


class Host:
    """The runs of one host.

    Args:
        name: name of the host.
        folder: its folder; created if it is missing.
        accounts: accounts of the owners.
        executors: what can confine jobs.
        launcher: starts supervisors.
        changed: called with the keys of runs that have news to report.
        launched: called with the seconds from an order to the start of its supervisor.

    Raises:
        HostTaken: another runner works with the folder.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        accounts: Accounts,
        executors: Executors,
        launcher: Launcher,
        changed: Callable[[str, Collection[str]], None],
        launched: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.name = name
        self.journal = Journal(folder)
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise HostTaken(f"another runner works with {folder}") from None
        self.runs = HostRuns(name, boot_id())
        self.readiness = FolderCheck(name, folder, lambda: changed(name, []))
        self._accounts = accounts
        self._executors = executors
        self._launcher = launcher
        self._changed = changed
        self._launched = launched
        self._launched_at: dict[str, float] = {}
        self._sweeping: set[str] = set()
        self._untold: set[str] = set()
        """Runs whose supervisors could not be told what is wanted, since that could not be written."""
        self._tasks = BackgroundTasks()
        self._orders: asyncio.Queue[tuple[RunOrders, Collection[str], float]] = asyncio.Queue()
        self._news = self._open_news(folder / "news")
        self._buffer = b""
        self.followed: dict[str, KnownRun] = {}

    @staticmethod
    def _open_news(path: Path) -> int:
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        # Open for writing too, so that the pipe is not at its end when no supervisor has it open.
        return os.open(path, os.O_RDWR | os.O_NONBLOCK)

    # The life of the service

    def load(self) -> None:
        """Find the runs of earlier starts of the runner."""
        ended = self.journal.ended.read()
        for folder in self.journal.folders():
            last = ended.pop(folder.key, None) or Ended(key=folder.key, logged=folder.was_logged)
            run = last.run or folder.read_order()
            if run is None:
                folder.remove()
            else:
                self._load(folder, run, closed=last.run is not None or folder.was_closed, logged=last.logged)
        self.journal.ended.forget(ended)
        if self.runs.runs:
            log.info("%s: %d runs of an earlier start are followed", self.name, len(self.runs.runs))

    def _load(self, folder: RunFolder, run: Run, *, closed: bool, logged: bool) -> None:
        key, status = folder.key, folder.read_status()
        begun_in = self.journal.begun_in(key)
        known = KnownRun(key=key, run=run, launched=begun_in is not None or status is not None, status=status)
        known.executor = status.executor if status is not None else ""
        known.unconfined = self._unconfined(known.executor)
        if status is not None and not logged:
            self.followed[key] = known
        if closed:
            # It may have been killed before it had removed that.
            folder.forget_order()
            self.runs.closed.add(key)
            return
        self.runs.runs[key] = known
        if not known.launched:
            if run.verb is RunVerb.STOP:
                known.final = EarlyEnd(state=JobState.CANCELLED, message="it was ended before it was started")
        elif status is None or status.ended_at is None:
            if begun_in not in (None, self.runs.boot_id):
                known.final = EarlyEnd(state=JobState.LOST, message="its host has restarted")
            elif status is None:
                self._tasks.start(self._launch([key]), name="launch")

    def open(self) -> None:
        """Begin to listen to supervisors, and to carry out orders."""
        asyncio.get_running_loop().add_reader(self._news, self._read_news)
        self._tasks.start(self._work(), name=f"orders of {self.name}")

    async def close(self) -> None:
        """Stop listening; the runs go on."""
        asyncio.get_running_loop().remove_reader(self._news)
        await self._tasks.cancel()
        await self.readiness.close()
        os.close(self._news)
        self.journal.close()
        os.close(self._lock)

    async def end_all(self, seconds: float) -> None:
        """End all runs, and wait for their end."""
        for known in self.runs.runs.values():
            if known.launched and not known.over:
                known.stop = Stop(0, max(0.0, seconds - 2.0), "the runner has ended")
                self._tell(known)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    if not any(known.launched and not known.over for known in self.runs.runs.values()):
                        return
                    await asyncio.sleep(_POLL_SECONDS)

    # Orders

    def order(self, orders: RunOrders, asked: Collection[str]) -> None:
        """Carry out orders, in turn; see `HostRuns.apply`."""
        self._orders.put_nowait((orders, asked, time.monotonic()))

    async def _work(self) -> None:
        while True:
            actions: list[Action] = []
            batch = [await self._orders.get()]
            while not self._orders.empty():
                batch.append(self._orders.get_nowait())
            for orders, asked, _ in batch:
                actions += self.runs.apply(orders, self._keyed(orders.runs), asked, time.monotonic())
            if actions:
                await self._act(actions, batch[0][2])

    def _keyed(self, runs: Sequence[Run]) -> list[tuple[str, Run]]:
        found: list[tuple[str, Run]] = []
        for run in runs:
            try:
                found.append((run_key(run), run))
            except ValueError as error:
                log.warning("an order is ignored: %s", error)
        return found

    async def _act(self, actions: Sequence[Action], received: float) -> None:
        launches = list(dict.fromkeys(action.key for action in actions if action.verb is Verb.LAUNCH))
        await self._launch([key for key in launches if self._keep(key)])
        for _ in launches:
            self._launched(time.monotonic() - received)
        for verb, key, run in actions:
            if verb is Verb.PREPARE:
                if self._keep(key):
                    self._prepare(key)
            elif verb is Verb.TELL:
                self._tell(self.runs.runs[key])
            elif verb is Verb.CLOSE:
                self._close(key, run)
        # A start is reported with what its supervisor says of it, which comes within milliseconds.
        changed = {
            key
            for verb, key, _ in actions
            if (known := self.runs.runs.get(key)) is not None and (verb is not Verb.LAUNCH or known.over)
        }
        if changed:
            self._changed(self.name, changed)

    def _keep(self, key: str) -> bool:
        try:
            self.journal.folder_of(key).write_order(self.runs.runs[key].run)
        except OSError as error:
            self._not_kept(key, error)
            return False
        return True

    def _not_kept(self, key: str, error: OSError) -> None:
        """End a run that is not started, since nothing can be written of it, such as on a full disk."""
        log.error("%s can't be started: %s", key, error)
        # What may have been started, or may be by a later start of the runner, must not be started elsewhere.
        gone = self.journal.folder_of(key).forget_order() and self.journal.begun_in(key) is None
        self.readiness.fault(error)
        if not self.runs.runs[key].over:
            words = (error.strerror or str(error)).lower()
            self.runs.failed(key, f"the runner of {self.name} can't keep it in its folder: {words}", host_fault=gone)

    def _close(self, key: str, run: Run) -> None:
        folder = self.journal.folder_of(key)
        try:
            # Not there where it could not be started. Without its folder it would be forgotten.
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder.path, 0o700)
            self.journal.ended.add_closed(key, run)
            folder.forget_order()
        except OSError as error:
            # It is reported once more by the next start of the runner.
            log.error("%s can't be closed: %s", key, error)

    def _prepare(self, key: str) -> None:
        known = self.runs.runs[key]
        if known.over:
            return
        try:
            account = self._accounts.account_of(known.run.owner)
            executor, _ = plan(self.journal.folder_of(key), known.run, account, self._executors)
        except ValueError as error:
            self.runs.failed(key, str(error))
        else:
            self.runs.prepared(key, executor)

    async def _launch(self, keys: Sequence[str]) -> None:
        """Start supervisors; after one sync of the disk for all."""
        units: dict[str, list[str]] = {}
        forked: dict[str, dict[str, Any]] = {}
        for key in keys:
            known, folder = self.runs.runs[key], self.journal.folder_of(key)
            begun_in = self.journal.begun_in(key)
            if begun_in not in (None, self.runs.boot_id):
                known.final = EarlyEnd(state=JobState.LOST, message="its host has restarted")
                continue
            try:
                account = self._accounts.account_of(known.run.owner)
                executor, confined = plan(folder, known.run, account, self._executors)
                start = start_of(folder, known.run, account, executor, confined, known.wanted)
                if confined.unit is None:
                    forked[key] = start
                else:
                    units[key] = confined.unit
                    # What was begun to be started has been written whole, and may be read just now.
                    if begun_in is None or not folder.has_start:
                        folder.write_start(start)
            except ValueError as error:
                self.runs.failed(key, str(error))
            except OSError as error:
                units.pop(key, None)
                self._not_kept(key, error)
            else:
                known.executor = executor
                known.unconfined = self._unconfined(executor)
        begun = [*forked, *units]
        if begun:
            try:
                await asyncio.to_thread(self.journal.begin, begun, self.runs.boot_id)
            except OSError as error:
                for key in begun:
                    self._not_kept(key, error)
                return
        now = time.monotonic()
        for key in begun:
            self._launched_at[key] = now
        try:
            if forked:
                self._launcher.fork({self.journal.folder_of(key).path: start for key, start in forked.items()})
        except ValueError as error:
            # They are started again by `check`.
            log.error("%s can't be started yet: %s", ", ".join(forked), error)
        for key, options in units.items():
            self._tasks.start(self._start_unit(key, options), name=f"unit of {key}")

    def _unconfined(self, executor: str) -> str:
        """Return what a run is not kept from, where its executor should."""
        return self._executors.unconfined if executor == Name.SYSTEMD else ""

    async def _start_unit(self, key: str, options: list[str]) -> None:
        folder = self.journal.folder_of(key)
        try:
            await self._launcher.start_unit(folder.path, options)
        except ValueError as error:
            if folder.read_status() is None and key in self.runs.runs:
                self.runs.failed(key, str(error))
                folder.forget_start()
                self._changed(self.name, [key])

    def _tell(self, known: KnownRun) -> None:
        try:
            self.journal.folder_of(known.key).write_wanted(known.wanted)
        except OSError as error:
            if known.key not in self._untold:
                log.error("%s: its supervisor can't be told what is wanted: %s", known.key, error)
            self._untold.add(known.key)
            if known.stop is not None:
                with contextlib.suppress(OSError):
                    self.journal.folder_of(known.key).mark_stopped()
                self._poke(known, signal.SIGUSR2)
            return
        self._untold.discard(known.key)
        self._poke(known)

    def _poke(self, known: KnownRun, number: int = signal.SIGUSR1) -> None:
        status = known.status
        if status is not None and status.ended_at is None and status.boot_id == self.runs.boot_id:
            supervisor = processes.Process(status.pid, 0, status.started_ticks, "", "")
            processes.send(supervisor, number)

    # Sessions

    def running(self, run_id: str) -> KnownRun | None:
        """The run with an id whose commands run now; None if there is none."""
        found = (known for key, known in self.runs.runs.items() if known.run.run_id == run_id and self.is_running(key))
        return next(found, None)

    def is_running(self, key: str) -> bool:
        """True while the commands of a run have been started, and have not ended."""
        known = self.runs.runs.get(key)
        if known is None or known.status is None or known.over:
            return False
        return known.status.started_at is not None and known.status.exited_at is None

    def poke(self, key: str) -> None:
        """Have the supervisor of a run read what is wanted."""
        if (known := self.runs.runs.get(key)) is not None:
            self._poke(known)

    # Facts

    def _read_news(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._buffer += os.read(self._news, 65536)
        *lines, self._buffer = self._buffer.split(b"\n")
        self.observe({line.decode(errors="replace") for line in lines})

    def observe(self, keys: Collection[str]) -> None:
        """Read what supervisors have written of runs."""
        news = [key for key in keys if key in self.runs.runs and self._observed(key)]
        if news:
            self._changed(self.name, news)

    def _observed(self, key: str) -> bool:
        folder = self.journal.folder_of(key)
        status = folder.read_status()
        known = self.runs.runs[key]
        first = known.status is None
        if status is None or not self.runs.observed(key, status):
            return False
        self.followed[key] = known
        if known.over:
            # What is printed is followed at intervals; the last report has all of it.
            known.log_bytes = size_of_output(status)
        if status.host_fault:
            self.readiness.fault(status.message)
        if first:
            folder.forget_start()
            if known.stop is not None or known.notice:
                # It may have read what is wanted before that was written.
                self._poke(known)
        return True

    def report_soon(self, key: str) -> None:
        """Have a run reported soon, such as for its progress."""
        if key in self.runs.runs:
            self._changed(self.name, [key])

    def check(self) -> None:
        """Check that all supervisors run: start those that never came, and end what killed ones have left."""
        now = time.monotonic()
        self.readiness.check()
        self.observe(list(self.runs.runs))
        for key in list(self._untold):
            known = self.runs.runs.get(key)
            if known is None or known.over:
                self._untold.discard(key)
            else:
                self._tell(known)
        for key, known in list(self.runs.runs.items()):
            if known.over or not known.launched or key in self._sweeping:
                continue
            if known.status is None:
                if now - self._launched_at.get(key, now) > CLAIM_SECONDS:
                    self._tasks.start(self._launch([key]), name=f"launch of {key}")
            elif not _runs(known.status) and (
                known.status.pid or now - self._launched_at.setdefault(key, now) > CLAIM_SECONDS
            ):
                self._sweeping.add(key)
                self._tasks.start(self._sweep(key), name=f"end of {key}")

    async def _sweep(self, key: str) -> None:
        """End what a killed supervisor has left of a run."""
        known = self.runs.runs[key]
        # It may just have begun to write, or have ended.
        await asyncio.sleep(_POLL_SECONDS)
        self.observe([key])
        if known.over or (known.status is not None and _runs(known.status)):
            self._sweeping.discard(key)
            return
        log.warning("%s: the supervisor was killed; what it leaves is ended", key)
        await self._remove(known)
        status = known.status
        since = status.started_ticks if status is not None else 0
        kill_at = time.monotonic() + min(KILL_SECONDS, known.run.grace_seconds)
        left_behind = processes.LeftBehind(known.run.lease_id, 0, since)
        empty = 0
        while empty < 2:
            left = await asyncio.to_thread(left_behind.find, time.monotonic())
            empty = 0 if left else empty + 1
            left_behind.end(left, kill=time.monotonic() >= kill_at)
            await asyncio.sleep(_POLL_SECONDS if left else processes.SEARCH_SECONDS)
        self.runs.vanished(key)
        self._sweeping.discard(key)
        self._changed(self.name, [key])

    async def _remove(self, known: KnownRun) -> None:
        count = known.run.spec.tasks_per_host if known.run.spec is not None else 1
        for words in removal(known.executor, known.key, count):
            with contextlib.suppress(OSError, TimeoutError):
                nowhere = asyncio.subprocess.DEVNULL
                process = await asyncio.create_subprocess_exec(*words, stdin=nowhere, stdout=nowhere, stderr=nowhere)
                async with asyncio.timeout(60):
                    await process.wait()

    def clean(self, keep_seconds: float) -> None:
        """Remove closed runs whose output is older than `keep_seconds`."""
        gone: list[str] = []
        for folder in self.journal.folders():
            if (
                folder.key in self.runs.closed
                and folder.key not in self.followed
                and folder.age_seconds() > keep_seconds
            ):
                folder.remove()
                gone.append(folder.key)
        self.journal.forget(gone)
        self.runs.closed.difference_update(gone)


def _runs(status: Status) -> bool:
    found = process_stat(status.pid)
    return found is not None and found.started_ticks == status.started_ticks and not found.ended
