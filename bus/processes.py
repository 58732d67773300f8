"""Processes of this host with their leases, from `/proc` (proc(5)): finds, executes and ends them.

On systems other than Linux it finds none. Only the standard library is imported, because `cli/work/reaper.py` and
`runners/supervisor.py` load this file by its path, without the package.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import pwd
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

PROC: Final = Path("/proc")
LEASE_VARIABLE: Final = b"CORRAL_LEASE"
REAPER_FILE: Final = b"reaper.py"
SEARCH_SECONDS: Final = 1.0
"""Interval of searches for processes that name a lease but aren't descendants."""
_MOMENT_SECONDS: Final = 5.0
_FEW: Final = 256
"""Number of process ids that are looked at one by one, rather than all processes of the host."""
_ENVIRONMENT_BYTES: Final = 2**15
UNCATCHABLE: Final = (signal.SIGKILL, signal.SIGSTOP)
FAULTS: Final = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP)
_ENDED: Final = frozenset("ZXx")
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_PR_SET_CHILD_SUBREAPER: Final = 36


class Process(NamedTuple):
    """A process as the kernel lists it.

    Attributes:
        pid: process id.
        parent: process id of the parent.
        started_ticks: start time in clock ticks since boot; 0 if unknown. Together with the process id it identifies a
            process uniquely.
        state: state letter, such as `R`, `S`, `T` (stopped) or `Z` (zombie).
        name: name of the executable, at most 15 characters.
    """

    pid: int
    parent: int
    started_ticks: int
    state: str
    name: str

    @property
    def ended(self) -> bool:
        """True if the process has ended and only remains to be reaped."""
        return self.state in _ENDED

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.name})"


def process(pid: int, root: Path = PROC) -> Process | None:
    """A process by its id; None if there is none."""
    try:
        # Without `Path`, which takes longer than the reading: searches call this for each process of the host.
        text = read(f"{root}/{pid}/stat", 4096).decode("utf-8", "replace")
        # The name in parentheses may contain any character, so fields are counted after it: state, parent, …, start.
        head, _, tail = text.rpartition(")")
        fields = tail.split()
        return Process(pid, int(fields[1]), int(fields[19]), fields[0], head.partition("(")[2])
    except (OSError, IndexError, ValueError):
        return None


def processes(root: Path = PROC, since_pid: int = 0) -> Iterator[Process]:
    """All processes in the process file system; without those whose ids are smaller than `since_pid`."""
    try:
        entries = os.listdir(root)
    except OSError:
        return
    for entry in entries:
        if entry.isdigit() and int(entry) >= since_pid and (found := process(int(entry), root)) is not None:
            yield found


def lease_of(pid: int, root: Path = PROC) -> str:
    """Lease id from `CORRAL_LEASE` in a process's initial environment; empty if it isn't set or can't be read."""
    try:
        environment = (root / str(pid) / "environ").read_bytes()
    except OSError:
        return ""
    prefix = LEASE_VARIABLE + b"="
    for entry in environment.split(b"\0"):
        if entry.startswith(prefix):
            return entry[len(prefix) :].decode("utf-8", "replace")
    return ""


def reaper_of(pid: int, root: Path = PROC) -> str:
    """Id of the lease whose reaper (`cli/work/reaper.py`) a process is; empty if it isn't a reaper."""
    try:
        words = (root / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    for at, word in enumerate(words[:-1]):
        if os.path.basename(word) == REAPER_FILE:
            return words[at + 1].decode("utf-8", "replace")
    return ""


def user_of(pid: int, root: Path = PROC) -> str:
    """Name of the user account that runs a process, or its number if it has no name; empty if the process has ended."""
    try:
        number = (root / str(pid)).stat().st_uid
    except OSError:
        return ""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def processes_under(
    lease_id: str, tops: Collection[int], *, spared: Collection[int] = (), root: Path = PROC
) -> list[Process]:
    """Processes that work under a lease: the given ones and their descendants that have not ended.

    Processes under another lease are left out together with their descendants, and so is a `corral run` that holds
    another lease.

    Args:
        lease_id: id of the lease; if empty, only descent counts.
        tops: ids of the processes to start from.
        spared: ids of processes to leave out, while their descendants are included.
        root: path of the process file system.
    """
    table = {found.pid: found for found in processes(root)}
    children: dict[int, list[int]] = {}
    for found in table.values():
        children.setdefault(found.parent, []).append(found.pid)
    seen: set[int] = set()
    open_ends = [pid for pid in tops if pid in table]
    ours: list[Process] = []
    while open_ends:
        pid = open_ends.pop()
        below = children.get(pid, ())
        if pid in seen or (lease_id and pid not in spared and _under_other_lease(pid, below, lease_id, root)):
            continue
        seen.add(pid)
        open_ends += below
        if pid not in spared and not table[pid].ended:
            ours.append(table[pid])
    return ours


def processes_with_lease(
    lease_id: str, *, since_ticks: int = 0, since_pid: int = 0, root: Path = PROC
) -> list[Process]:
    """Processes whose environment names a lease, whatever their parent; those that can't be read are left out.

    Args:
        lease_id: id of the lease.
        since_ticks: start of the work, in clock ticks since boot; older processes are left out.
        since_pid: process id that was given then, if no ids can have been given again since; smaller ones are left out.
        root: path of the process file system.
    """
    new = (found for found in processes(root, since_pid) if found.started_ticks >= since_ticks and not found.ended)
    return [found for found in new if lease_of(found.pid, root) == lease_id]


def _under_other_lease(pid: int, children: Collection[int], lease_id: str, root: Path) -> bool:
    """True if a process works under another lease, or is the `corral run` that holds another lease."""
    if lease_of(pid, root) not in ("", lease_id):
        return True
    return any(reaper_of(child, root) not in ("", lease_id) for child in children)


def still_runs(found: Process) -> bool:
    """True if a process still runs, and its id hasn't been reused."""
    now = process(found.pid)
    return now is not None and now.started_ticks == found.started_ticks and not now.ended


def send(found: Process, number: int) -> bool:
    """Send a signal to a process, but never to another process that has reused its id.

    Returns:
        False if the signal isn't permitted; true otherwise, also if the process has ended.
    """
    with contextlib.suppress(ProcessLookupError):
        try:
            handle = os.pidfd_open(found.pid)
        except (AttributeError, OSError):  # no such process, or no such call (another system, or Linux before 5.3)
            handle = -1
        try:
            now = process(found.pid)
            if found.started_ticks and (now is None or now.started_ticks != found.started_ticks):
                return True
            if handle >= 0:
                signal.pidfd_send_signal(handle, number)
            else:
                os.kill(found.pid, number)
        except PermissionError:
            return False
        finally:
            if handle >= 0:
                os.close(handle)
    return True


class LeftBehind:
    """Processes that work under a lease: descendants of a process, and those whose environment names the lease.

    Args:
        lease_id: id of the lease; empty if only descent counts.
        top: id of the process whose descendants are meant.
        since_ticks: start of the work, in clock ticks since boot; older processes that name the lease are left out.
    """

    def __init__(self, lease_id: str, top: int, since_ticks: int) -> None:
        self._lease_id = lease_id
        self._top = top
        self._since_ticks = since_ticks
        self._search_at = float("-inf")
        self._named: list[Process] = []
        self._terminated: set[tuple[int, int]] = set()
        self._begun: tuple[int, float] | None = None

    def begun(self, pid: int) -> None:
        """Note that the first process of the work has just been started: none is older that names the lease."""
        self._begun = self._begun or (pid, time.monotonic())

    def find(self, now: float, spared: Collection[int] = (), *, childless: bool = False) -> list[Process]:
        """Processes that are left. Environments are read only once a second, since they may be many.

        Args:
            now: time of a monotonic clock, in seconds.
            spared: ids of processes to leave out, while their descendants are included.
            childless: true if `top` is known to have no children, and adopts orphans.
        """
        if self._lease_id and now >= self._search_at:
            self._search_at = now + SEARCH_SECONDS
            pid, at = self._begun or (self._top, _start_of(self._since_ticks))
            oldest, newest = _ids_since(pid, now - at)
            self._named = (
                processes_with_lease(self._lease_id, since_ticks=self._since_ticks, since_pid=oldest)
                if _may_name(self._lease_id, range(oldest, newest + 1))
                else []
            )
        if childless and not self._named:
            return []
        tops = [self._top, *(one.pid for one in self._named if still_runs(one))]
        return processes_under(self._lease_id, tops, spared={*spared, self._top})

    def end(self, found: Sequence[Process], *, kill: bool) -> None:
        """Send SIGTERM to processes, once to each; or SIGKILL."""
        for one in found:
            if kill:
                send(one, signal.SIGKILL)
            elif (one.pid, one.started_ticks) not in self._terminated:
                self._terminated.add((one.pid, one.started_ticks))
                send(one, signal.SIGTERM)
                # A stopped process handles SIGTERM only after it resumes.
                send(one, signal.SIGCONT)


def _start_of(started_ticks: int) -> float:
    """Start of a process on the monotonic clock; as good as never if that can't be said."""
    try:
        age_seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, ValueError):
        return float("-inf")
    return time.monotonic() - age_seconds


def _ids_since(pid: int, age_seconds: float) -> tuple[int, int]:
    """Smallest and largest id of the processes that may be younger than another one; zeros if that can't be said.

    Ids are given in ascending order, and begin anew at the largest (`kernel.pid_max`), which takes longer.
    """
    try:
        newest = int(read(f"{PROC}/loadavg", 256).split()[-1])
    except (OSError, ValueError):
        return 0, 0
    return (pid, newest) if age_seconds < _MOMENT_SECONDS and newest >= pid else (0, 0)


def _may_name(lease_id: str, pids: range) -> bool:
    """False if surely none of these processes has a lease in its environment: so a look at all processes is saved."""
    if len(pids) > _FEW or pids.start == 0:
        return True
    words = LEASE_VARIABLE + b"=" + lease_id.encode()
    for pid in pids:
        try:
            environment = read(f"{PROC}/{pid}/environ", _ENVIRONMENT_BYTES)
        except OSError:  # it has ended, or belongs to somebody else
            continue
        if words in environment or len(environment) == _ENVIRONMENT_BYTES:
            return True
    return False


def read(path: str, size: int) -> bytes:
    """The first bytes of a file, read at once, with as little effort as can be.

    Raises:
        OSError: it can't be read.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        return os.read(file, size)
    finally:
        os.close(file)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def become_subreaper() -> None:
    """Make this process adopt orphans among its descendants. Works on Linux only; elsewhere it does nothing."""
    if sys.platform == "linux":
        _libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def set_name(name: str) -> None:
    """Set the name of this process in lists of processes, at most 15 characters. Works on Linux only."""
    if sys.platform == "linux":
        _libc().prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def end_with_parent(parent: int) -> bool:
    """Have the kernel send SIGTERM to this process when its parent ends. Works on Linux only.

    Args:
        parent: process id of the parent.

    Returns:
        False if the parent has ended already.
    """
    if sys.platform != "linux":
        return True
    _libc().prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    return os.getppid() == parent


def catch_signals(handler: Callable[[int, object], None]) -> tuple[int, int]:
    """Handle all signals that can be handled, except those for faults of the program itself.

    Args:
        handler: of each signal; it need not do anything.

    Returns:
        The two ends of a pipe; the numbers of the signals that this process gets can be read from the first.
    """
    for one in signal.valid_signals():
        if one not in (*UNCATCHABLE, *FAULTS):
            with contextlib.suppress(OSError, ValueError):
                signal.signal(one, handler)
    ends = new_wakeup()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return ends


def new_wakeup() -> tuple[int, int]:
    """The two ends of a new pipe: the numbers of signals that are handled can be read from the first from now on."""
    receive, give = os.pipe()
    os.set_blocking(receive, False)
    os.set_blocking(give, False)
    signal.set_wakeup_fd(give, warn_on_full_buffer=False)
    return receive, give


def restore_signals(ignored: Collection[int] = ()) -> None:
    """Reset the handling of all signals before another program is executed.

    Args:
        ignored: signals that the program ignores from the start.
    """
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if number not in UNCATCHABLE:
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def execute(words: Sequence[str]) -> OSError:
    """Execute a command as a shell does: search the PATH, and run a script without `#!` with `/bin/sh`.

    Returns:
        The error, if it can't be executed; otherwise the function never returns.
    """
    failed = _try_each(words, os.get_exec_path(), os.execv)
    assert isinstance(failed, OSError)
    return failed


def spawn(words: Sequence[str], environment: dict[str, str], files: tuple[int | None, int, int]) -> int | OSError:
    """Start a command as `execute` does, in a session of its own, and without a copy of this process's memory.

    It has the account, the working directory and the umask of this process, and no signal is blocked.

    Args:
        words: the command and its arguments.
        environment: all of its environment, whose PATH counts.
        files: descriptors of its standard input, output and error; None for an empty input.

    Returns:
        Its process id; or the error, if it can't be executed.

    Raises:
        NotImplementedError: this system can't start sessions so.
        ValueError: a word or a variable can't be passed to a process.
    """
    given, output, errors = files
    actions: list[tuple[int, int, int] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0) if given is None else (os.POSIX_SPAWN_DUP2, given, 0),
        (os.POSIX_SPAWN_DUP2, output, 1),
        (os.POSIX_SPAWN_DUP2, errors, 2),
    ]

    def attempt(path: str, words: list[str]) -> int:
        # Raises the error of a file that there is not, for less than a process that fails.
        os.stat(path)
        return os.posix_spawn(
            path, words, environment, file_actions=actions, setsid=True, setsigmask=(), setsigdef=FAULTS
        )

    return _try_each(words, os.get_exec_path(environment), attempt)


def _try_each(words: Sequence[str], folders: Sequence[str], attempt: Callable[[str, list[str]], int]) -> int | OSError:
    """Try to execute each file that a command may mean. Returns the first result, or the error."""
    name = words[0]
    paths = [name] if "/" in name else [os.path.join(folder, name) for folder in folders]
    failed: OSError = FileNotFoundError(errno.ENOENT, "command not found")
    for path in paths:
        try:
            return attempt(path, list(words))
        except (FileNotFoundError, NotADirectoryError):
            if os.path.exists(path):
                failed = OSError(errno.ENOENT, "the interpreter in its first line doesn't exist")
        except OSError as error:
            if error.errno == errno.ENOEXEC and _is_text(path):
                return attempt("/bin/sh", ["/bin/sh", path, *words[1:]])
            if error.errno != errno.EACCES or "/" in name:
                return error
            # As in a shell: a later entry of the PATH may be executable.
            failed = error
    return failed


def _is_text(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return b"\0" not in file.readline(1024)
    except OSError:
        return True
