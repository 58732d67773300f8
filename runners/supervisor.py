"""The supervisor of a run: a process between the runner and the commands of a run, which outlives the runner.

It starts the commands, adopts their orphans, writes how they end, and ends what they leave behind. The runner and it
share a folder:

- `start.json`: what to start, by the runner, where no zygote hands it over; deleted once it has been read, since it
  holds the environment.
- `status`: what became of the run, by the supervisor: lines of JSON, of which the last counts. Whoever creates it has
  claimed the run, so that no other supervisor starts it. After each line the folder's name goes to the pipe `news`.
- `wanted.json`: signals, end and time limit, by the runner, which replaces it as a whole, and then sends SIGUSR1. If it
  can't write that the run shall end, such as on a full disk, it sets the sticky bit of `status` and sends SIGUSR2.
- `attach-….json`: a command to start beside the others for a session (`attached.py`), by the runner, with SIGUSR1;
  deleted once it has been read.

It uses only the standard library, so that it starts within milliseconds and stays small. A process that has supervised
a short run to a plain end may supervise a further one after it, since a fork takes longer than all the rest.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import math
import os
import select
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING or __package__:
    from ..bus import processes
    from . import attached, execution
else:
    _HERE = Path(__file__).resolve().parent
    for _PLACE in (_HERE.parent / "bus" / "processes.py", _HERE / "execution.py", _HERE / "attached.py"):
        # Each finds those that were loaded before it in `sys.modules`.
        _SPEC = importlib.util.spec_from_file_location(f"corral_{_PLACE.stem}", _PLACE)
        sys.modules[_SPEC.name] = importlib.util.module_from_spec(_SPEC)
        _SPEC.loader.exec_module(sys.modules[_SPEC.name])
    processes = sys.modules["corral_processes"]
    execution = sys.modules["corral_execution"]
    attached = sys.modules["corral_attached"]

SCAN_SECONDS: Final = 0.05
FIRST_SAMPLE_SECONDS: Final = 1.0
MOST_SAMPLE_SECONDS: Final = 10.0
"""Longest time between samples of the processes' memory; longer only where a sample takes long."""
SAMPLE_SHARE: Final = 0.001
"""Share of a core that samples may take."""
KILL_MARGIN_SECONDS: Final = 0.5
"""Longest time before the end of a lease at which SIGKILL is sent, so that nothing is left at its end."""
UNKILLABLE_SECONDS: Final = 3.0
"""Time after SIGKILL when remaining processes are named in the status."""
FINISH_SECONDS: Final = 60.0
"""Time limit of a command that removes a container."""
RETRY_SECONDS: Final = 1.0
"""Time after which a status that could not be written is written again."""
LAST_TRIES: Final = 60
"""Number of tries to write the last status."""
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_START: Final = "start.json"
_WANTED: Final = "wanted.json"
_STATUS: Final = "status"


@functools.cache
def boot_id() -> str:
    """Id of this boot of the machine; empty if it can't be read."""
    try:
        return processes.read("/proc/sys/kernel/random/boot_id", 256).decode().strip()
    except OSError:
        return ""


def claim(folder: str) -> tuple[int, dict[str, Any]] | None:
    """Claim a run for this process.

    Returns:
        The descriptor of its status, and the first line there; None if another process has claimed it.
    """
    own = processes.process(os.getpid())
    said = {"pid": os.getpid(), "started_ticks": own.started_ticks if own else 0, "boot_id": boot_id()}
    try:
        file = os.open(f"{folder}/{_STATUS}", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return None
    os.write(file, json.dumps(said).encode() + b"\n")
    return file, said


class Supervisor:
    """Supervises a run from its claim to the end of its last process.

    Args:
        folder: folder of the run.
        start: what to start; see `runners/start.py`.
        status: descriptor of its status.
        claimed: first line there.
        wake: file descriptor that yields the numbers of signals to this process.
        reused: this process has supervised another run before.
        lasting: called once the run is no short one.

    Attributes:
        plain: true once the run has ended, as most do: all that it was is written, and nothing is left of it.
    """

    def __init__(
        self,
        folder: str,
        start: dict[str, Any],
        status: int,
        claimed: dict[str, Any],
        wake: int,
        *,
        reused: bool = False,
        lasting: Callable[[], None] = lambda: None,
    ) -> None:
        self.plain = False
        self._reused = reused
        self._lasting = lasting
        self._folder = folder
        self._start = start
        self._file = status
        self._wake = wake
        self._left_behind = processes.LeftBehind(start["lease_id"], os.getpid(), claimed["started_ticks"])
        self._commands: dict[int, int] = {}
        self._sessions: set[int] = set()
        self._codes: dict[int, int] = {}
        self._first_failed: int | None = None
        self._exited_at: float | None = None
        self._status: dict[str, Any] = {**claimed, "executor": start["executor"], "started_at": None}
        self._grace: float = start["grace_seconds"]
        self._noticed = 0
        self._untold = self._torn = False
        self._stopped: tuple[int, float] | None = None
        self._ends_at = math.inf
        self._settle_until = math.inf
        self._ending = False
        self._kill_at = math.inf
        self._childless = False
        self._empty_scans = 0
        self._scan_seconds = 0.0
        self._peak_memory_bytes = 0
        self._cpu_seconds = 0.0
        self._attached = False
        self._sample_at = math.inf
        self._sample_seconds = FIRST_SAMPLE_SECONDS

    def run(self) -> None:
        """Start the commands, and run until no process of the run is left."""
        if not self._begin():
            self._tell_end(ended_at=time.time())
            return
        self._want(self._start["wanted"])
        self._read_wanted()
        while not self._step():
            if self._untold:
                self._tell()
            ready, _, _ = select.select([self._wake], [], [], self._pause())
            numbers = os.read(self._wake, 4096) if ready else b""
            if signal.SIGUSR1 in numbers:
                self._read_wanted()
                self._attach()
            if signal.SIGUSR2 in numbers and self._stopped is None and self._is_meant():
                self._stopped = (signal.SIGTERM, self._grace)
                self._stop(signal.SIGTERM, time.monotonic() + self._grace)
        self._tell_end(
            exited_at=self._exited_at,
            ended_at=time.time(),
            cpu_seconds=round(self._cpu_seconds, 3),
            message="",
            **self._exit(),
        )
        self.plain = self._childless and not self._untold and self._stopped is None and not self._attached

    def _is_meant(self) -> bool:
        """True if a SIGUSR2 is for this run, and not for one that this process had supervised before."""
        return not self._reused or bool(os.fstat(self._file).st_mode & stat.S_ISVTX)

    # The start

    def _begin(self) -> bool:
        try:
            output = self._prepare()
        except OSError as error:
            named = str(error.filename or self._start["work"])
            # What is not in the folder of the run is the file that the job itself has named, which is its owner's.
            own = named.startswith(self._start["work"])
            what = named if own else "the file of its output"
            return self._failed(126, f"{what}: {(error.strerror or '').lower()}", host_fault=own)
        except ValueError as error:
            # A path with a NUL character.
            return self._failed(126, f"the file of its output: {error}")
        for rank, command in enumerate(self._start["commands"]):
            pid, failure = execution.start(command, self._start, (None, output, output), spawned=True)
            if failure is None:
                self._left_behind.begun(pid)
                self._commands[pid] = rank
            else:
                for pid in self._commands:
                    os.killpg(pid, signal.SIGKILL)
                # Everyone sees the status; what is printed, the owner alone.
                with contextlib.suppress(OSError):
                    os.write(output, f"corral: {failure['message']}\n".encode())
                os.close(output)
                return self._failed(failure["code"], failure["public"])
        os.close(output)
        now = time.monotonic()
        self._sample_at = now + FIRST_SAMPLE_SECONDS
        self._tell(started_at=time.time())
        return True

    def _prepare(self) -> int:
        """Write the script and open the output, with the rights of the account. Returns the output's descriptor."""
        work: str = self._start["work"]
        account = self._start["owner"]
        with contextlib.suppress(FileExistsError):
            os.mkdir(work, 0o700)
        if account is not None:
            os.chown(work, account["uid"], account["gid"])
        with _acting_as(account):
            if self._start["script"]:
                script = os.open(f"{work}/script", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o700)
                with os.fdopen(script, "w", encoding="utf-8") as file:
                    file.write(self._start["script"])
            # A pipe without a reader must not block.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOCTTY | os.O_NONBLOCK
            output = os.open(self._start["output"], flags, 0o640)
        os.set_blocking(output, True)
        found = os.fstat(output)
        self._status |= {
            "output": self._start["output"],
            "output_device": found.st_dev,
            "output_inode": found.st_ino,
        }
        return output

    def _failed(self, code: int, message: str, *, host_fault: bool = False) -> bool:
        self._tell(failed=True, exit_code=code, message=message, host_fault=host_fault)
        return False

    # What is wanted

    def _read_wanted(self) -> None:
        try:
            with open(f"{self._folder}/{_WANTED}", "rb") as file:
                wanted = json.loads(file.read())
        except (OSError, ValueError):
            return
        self._want(wanted)

    def _want(self, wanted: dict[str, Any]) -> None:
        now = time.monotonic()
        ends_at = wanted.get("ends_at")
        self._ends_at = math.inf if ends_at is None else ends_at
        if wanted.get("notice", 0) > self._noticed:
            self._noticed = wanted["notice"]
            self._send(wanted.get("signal") or signal.SIGTERM)
        stop = wanted.get("stop")
        if stop is not None:
            number, grace = stop["signal"] or int(signal.SIGTERM), stop["grace_seconds"]
            if self._stopped != (number, grace):
                self._stopped = (number, grace)
                self._stop(number, now + grace)

    def _stop(self, number: int, kill_at: float) -> None:
        self._send(number)
        # A stopped process handles a signal only after it resumes.
        self._send(signal.SIGCONT)
        self._kill_by(kill_at)

    def _kill_by(self, at: float) -> None:
        """Kill what is left at a time, and before the end of the lease: its devices may be another's then."""
        left = self._ends_at - time.time() - min(KILL_MARGIN_SECONDS, 0.05 * self._limit_seconds())
        self._kill_at = min(self._kill_at, at, time.monotonic() + max(0.0, left))

    def _limit_seconds(self) -> float:
        """Time from the start of the commands to the end of the lease."""
        return self._ends_at - (self._status["started_at"] or time.time())

    def _send(self, number: int) -> None:
        for pid in self._commands:
            with contextlib.suppress(OSError):
                os.killpg(pid, number)

    def _attach(self) -> None:
        """Start the sessions that the runner wants."""
        for path in Path(self._folder).glob("attach-*.json"):
            with contextlib.suppress(OSError, ValueError):
                wanted = json.loads(path.read_bytes())
                path.unlink()
                if self._commands:
                    self._attached = True
                    command = self._start["commands"][0]
                    self._sessions.add(attached.fork(self._folder, wanted, command, self._start))

    # The end

    def _reap(self) -> None:
        while True:
            try:
                pid, status, used = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                # This process adopts orphans, so without children it has no descendants.
                self._childless = True
                return
            self._childless = False
            if pid == 0:
                return
            # With those of its descendants that were waited for.
            self._cpu_seconds += used.ru_utime + used.ru_stime
            self._sampled(used.ru_maxrss * 1024)
            self._sessions.discard(pid)
            if pid in self._commands:
                self._ended(self._commands.pop(pid), os.waitstatus_to_exitcode(status))

    def _ended(self, rank: int, code: int) -> None:
        self._codes[rank] = code
        now = time.monotonic()
        if code != 0 and self._first_failed is None:
            self._first_failed = rank
            if self._commands:
                # The others would wait for it for ever.
                self._stop(signal.SIGTERM, now + self._grace)
        if not self._commands:
            self._settle_until = now + self._start["settle_seconds"]
            self._kill_by(math.inf)
            self._finish()
            self._exited_at = time.time()

    def _exit(self) -> dict[str, Any]:
        code = self._codes[0 if self._first_failed is None else self._first_failed]
        return {"exit_code": None if code < 0 else code, "signal": -code if code < 0 else None}

    def _finish(self) -> None:
        """Execute the commands that remove what is not a descendant, such as containers."""
        for words in self._start["finish"]:
            pid = os.fork()
            if pid == 0:
                try:
                    nowhere = os.open(os.devnull, os.O_RDWR)
                    for number in (0, 1, 2):
                        os.dup2(nowhere, number)
                    processes.restore_signals()
                    processes.execute(words)
                finally:
                    os._exit(127)
            end = time.monotonic() + FINISH_SECONDS
            while time.monotonic() < end and os.waitpid(pid, os.WNOHANG)[0] == 0:
                time.sleep(SCAN_SECONDS)

    def _step(self) -> bool:
        """Do what is due now. Returns true when all is done."""
        self._reap()
        now = time.monotonic()
        self._watch_limit(now)
        if self._commands and now < self._kill_at:
            if now >= self._sample_at:
                self._sample(now)
            return False
        left = self._left_behind.find(now, childless=self._childless)
        if left and self._exited_at is not None and self._status.get("exited_at") is None:
            self._tell(exited_at=self._exited_at, **self._exit())
        self._scan_seconds = time.monotonic() - now
        self._empty_scans = 0 if left or self._commands else self._empty_scans + 1
        # A single scan may miss processes that are just being started.
        if self._empty_scans >= (1 if self._childless else 2):
            return True
        if not self._ending and now < self._kill_at:
            if not left or now < self._settle_until:
                return False
            self._ending = True
            self._kill_by(now + self._grace)
        self._left_behind.end(left, kill=now >= self._kill_at)
        if now >= self._kill_at + UNKILLABLE_SECONDS:
            numbers = ", ".join(str(one.pid) for one in left[:3])
            message = f"waiting for processes that can't be ended: {numbers}"
            if message != self._status.get("message"):
                self._tell(message=message)
        return False

    def _watch_limit(self, now: float) -> None:
        """End the run in time for the end of its lease, which holds whether the bus is there or not."""
        left = self._ends_at - time.time()
        if left == math.inf or self._stopped is not None or self._status.get("expired"):
            return
        margin = min(self._grace, 0.1 * self._limit_seconds())
        if left <= margin and self._commands:
            self._tell(expired=True)
            self._stop(signal.SIGTERM, now + max(0.0, left))

    def _pause(self) -> float:
        return min(self._due_in(), RETRY_SECONDS) if self._untold else self._due_in()

    def _due_in(self) -> float:
        now = time.monotonic()
        if not self._commands or now >= self._kill_at:
            stuck = now > self._kill_at + UNKILLABLE_SECONDS
            return 1.0 if stuck else max(SCAN_SECONDS, 4 * self._scan_seconds)
        due = min(self._kill_at, self._sample_at)
        if self._ends_at < math.inf and not self._status.get("expired"):
            margin = min(self._grace, 0.1 * self._limit_seconds())
            due = min(due, now + max(0.02, self._ends_at - margin - time.time()))
        return max(0.0, min(due - now, 3600.0))

    # Memory

    def _sample(self, now: float) -> None:
        self._lasting()
        total = 0
        for one in self._left_behind.find(now, self._sessions):
            with contextlib.suppress(OSError, IndexError, ValueError):
                total += int(processes.read(f"/proc/{one.pid}/statm", 256).split()[1]) * _PAGE
        self._sampled(total)
        took = time.monotonic() - now
        self._sample_seconds = max(min(2 * self._sample_seconds, MOST_SAMPLE_SECONDS), took / SAMPLE_SHARE)
        self._sample_at = now + self._sample_seconds

    def _sampled(self, memory_bytes: int) -> None:
        self._peak_memory_bytes = max(self._peak_memory_bytes, memory_bytes)
        self._status["peak_memory_bytes"] = self._peak_memory_bytes

    # The runner

    def _tell(self, **changed: Any) -> None:
        """Write the status, and tell the runner of it, if it is there. What can't be written is tried again."""
        self._status |= changed
        self._untold = not self._write(json.dumps(self._status).encode() + b"\n")
        if self._untold:
            return
        with contextlib.suppress(OSError):
            # Without a reader, or with a full pipe, the runner finds the line itself.
            pipe = os.open(self._start["news"], os.O_WRONLY | os.O_NONBLOCK)
            try:
                os.write(pipe, os.path.basename(self._folder).encode() + b"\n")
            finally:
                os.close(pipe)

    def _tell_end(self, **changed: Any) -> None:
        """Write the last status. If that fails for long, such as on a full disk, the runner finds the run lost."""
        self._tell(**changed)
        for _ in range(LAST_TRIES):
            if not self._untold:
                return
            time.sleep(RETRY_SECONDS)
            self._tell()

    def _write(self, line: bytes) -> bool:
        # The line break ends a line of which only a part could be written; readers skip it.
        whole = b"\n" + line if self._torn else line
        try:
            written = os.write(self._file, whole)
        except OSError:
            return False
        self._torn = written < len(whole)
        return not self._torn


@contextlib.contextmanager
def _acting_as(account: dict[str, Any] | None):
    """Act with the rights of an account; with None, with one's own."""
    if account is None:
        yield
        return
    groups = os.getgroups()
    os.setgroups(account["groups"])
    os.setegid(account["gid"])
    os.seteuid(account["uid"])
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def _nothing(number: int, frame: object) -> None:
    """Signal handler that does nothing: the signal's number is read from the wake-up file descriptor."""


def supervise(
    folder: str,
    wake: int,
    given: bytes = b"",
    *,
    reused: bool = False,
    lasting: Callable[[], None] = lambda: None,
) -> bool:
    """Claim a run, and supervise it until its end; does nothing if it is claimed already.

    Args:
        folder: of the run.
        wake: file descriptor that yields the numbers of signals to this process.
        given: content of `start.json`; empty if there is that file.
        reused: this process has supervised another run before.
        lasting: called once the run is no short one.

    Returns:
        True if this process is as it was before, and may supervise another run.
    """
    if not given:
        try:
            # Before the claim: once the runner sees that, it removes the file.
            with open(f"{folder}/{_START}", "rb", buffering=0) as file:
                given = file.read()
        except FileNotFoundError:
            return True
    start: dict[str, Any] = json.loads(given)
    claimed = claim(folder)
    if claimed is None:
        return True
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{folder}/{_START}")
    processes.become_subreaper()
    processes.set_name("corral-run")
    run = Supervisor(folder, start, *claimed, wake, reused=reused, lasting=lasting)
    run.run()
    os.close(claimed[0])
    os.chdir("/")
    return run.plain


if __name__ == "__main__":
    # It survives all signals but SIGKILL.
    supervise(sys.argv[1], processes.catch_signals(_nothing)[0])
