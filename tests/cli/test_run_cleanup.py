"""Processes that a command leaves behind end with its lease, whichever process dies first; others are untouched."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from corral.bus import processes
from corral.cli.work.children import Child, NotStarted, TooLate
from corral.cli.work.remote import Remote
from support.local_cluster import alive, wait_for

# In $1 each writes its process id under its name. All but the last ignore what ends others politely.
LEAVING = """
stubborn='trap "" TERM HUP INT; echo $$ > "$1.new"; mv "$1.new" "$1"; while :; do sleep 0.05; done'
sh -c "$stubborn" - "$1/background" &
setsid sh -c "$stubborn" - "$1/session" &
(setsid sh -c "$stubborn" - "$1/daemon" &)
env -i "PATH=$PATH" sh -c "$stubborn" - "$1/bare" &
(env -i "PATH=$PATH" setsid sh -c "$stubborn" - "$1/bare-daemon" &)
sh -c 'echo $$ > "$1.new"; mv "$1.new" "$1"; kill -STOP $$; sleep 60' - "$1/stopped" &
"""
KINDS = ("background", "session", "daemon", "bare", "bare-daemon", "stopped")
READY = f'while [ "$(ls "$1" | grep -vc new)" -lt {len(KINDS)} ]; do sleep 0.05; done\n'


class Run:
    """A command under a reaper, without a bus."""

    def __init__(self, lease_id: str = "") -> None:
        self.lease_id = lease_id or uuid.uuid4().hex
        self.said: list[str] = []

    async def start(self, *words: str, grace: float = 0.3, ttl: float = 60.0, **more: Any) -> Child:
        child = Child(say=self.said.append, stopped=lambda _: None)
        given = {"own_group": True, "settle_seconds": 0.1, **more}
        await child.start(
            words,
            os.environ | {"CORRAL_LEASE": self.lease_id},
            lease_id=self.lease_id,
            grace_seconds=grace,
            ttl_seconds=ttl,
            **given,
        )
        return child

    async def __call__(self, *words: str, **more: Any) -> int:
        child = await self.start(*words, **more)
        async with asyncio.timeout(30):
            return await child.wait()


class Holder:
    """A command that another process holds, which is a fork of this one, so that nothing has to be imported anew."""

    def __init__(self, words: tuple[str, ...], *, lease_id: str, ttl_seconds: float) -> None:
        self._receive, give = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(give)
            return
        try:
            os.close(self._receive)
            run = Run(lease_id)
            os.write(give, f"{asyncio.run(run(*words, ttl=ttl_seconds))}\n".encode())
            os._exit(0)
        finally:
            os._exit(1)

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        _, status = wait_for(lambda: (found := os.waitpid(self.pid, os.WNOHANG))[0] and found)
        return os.waitstatus_to_exitcode(status)

    def out(self) -> str:
        """What it has written; behind `wait`."""
        with os.fdopen(self._receive) as file:
            return file.read()


def pids(folder: Path, names: tuple[str, ...] = KINDS) -> list[int]:
    return wait_for(lambda: all((folder / one).exists() for one in names)) and [
        int((folder / one).read_text()) for one in names
    ]


@contextlib.contextmanager
def stranger(*words: str, **values: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that no lease's command has started."""
    one = subprocess.Popen(words or ("sleep", "60"), env=os.environ | values)
    try:
        yield one
    finally:
        one.kill()
        one.wait()


@pytest.mark.parametrize("end", ["by itself", "by SIGKILL", "told", "lease lost"])
async def test_all_that_a_command_has_started_ends_with_it(tmp_path: Path, end: str) -> None:
    run = Run()
    last = {"by itself": "exit 3", "by SIGKILL": "kill -9 $$"}.get(end, "wait; wait; sleep 60")
    child = await run.start("sh", "-c", LEAVING + READY + last, "-", str(tmp_path))
    found = await asyncio.to_thread(pids, tmp_path)
    if end == "told":
        child.signal(signal.SIGTERM)
    elif end == "lease lost":
        child.end(0.3)
    async with asyncio.timeout(30):
        code = await child.wait()
    assert code == {"by itself": 3, "by SIGKILL": -9}.get(end, -15)
    assert not any(alive(pid) for pid in found), dict(zip(KINDS, map(alive, found), strict=True))
    assert end == "lease lost" or "the command has left" in run.said[0]


@pytest.mark.parametrize("end", ["by itself", "told", "shell killed", "connection killed"])
def test_what_a_command_on_another_host_has_left_ends_before_its_connection(tmp_path: Path, end: str) -> None:
    lease_id = uuid.uuid4().hex
    # A session of its own is what sshd gives a command. Nothing there finds what has left both it and the environment.
    there = Remote("setsid -w sh -c", "node-7", "node-7", terminal=False)
    last = "exit 3" if end == "by itself" else "wait; wait; sleep 60"
    out, shell = tmp_path / "out", tmp_path / "shell"
    folder = tmp_path / "pids"
    folder.mkdir()
    command = ["sh", "-c", f"echo $PPID > {shell}; " + LEAVING + READY + last, "-", str(folder)]
    # Into a file: what keeps a pipe of the connection open holds that, and the lease.
    with out.open("wb") as file:
        words = there.start(command, {"CORRAL_LEASE": lease_id}, lease_id, 0)
        connection = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    found = dict(zip(KINDS, pids(folder), strict=True))
    try:
        if end == "told":
            subprocess.run(there.tell(lease_id, "TERM"), check=False)
        elif end == "shell killed":
            os.kill(int(shell.read_text()), signal.SIGKILL)
        elif end == "connection killed":
            connection.kill()
        connection.wait(30)
        wait_for(lambda: [name for name, pid in found.items() if alive(pid)] == ["bare-daemon"])
        if end in ("by itself", "told"):
            assert connection.returncode == {"by itself": 3, "told": 143}[end]
            assert "the command has left pid " in out.read_text()
    finally:
        for pid in found.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_command_on_another_host_that_leaves_nothing_of_its_own_says_nothing() -> None:
    there = Remote("setsid -w sh -c", "node-7", "node-7", terminal=False)
    script = "CORRAL_LEASE=another sleep 60 >&- 2>&- & echo $!; sleep 0.3 & exit 4"
    done = subprocess.run(
        there.start(["sh", "-c", script], {}, uuid.uuid4().hex, 0), capture_output=True, text=True, check=False
    )
    other = int(done.stdout)
    try:
        assert (done.returncode, done.stderr, alive(other)) == (4, "", True)
    finally:
        os.kill(other, signal.SIGKILL)


@pytest.mark.parametrize("victim", ["corral", "reaper"])
def test_nothing_stays_where_corral_or_the_reaper_is_killed_outright(tmp_path: Path, victim: str) -> None:
    words = ("sh", "-c", LEAVING + "wait; sleep 60", "-", str(tmp_path))
    corral = Holder(words, lease_id=uuid.uuid4().hex, ttl_seconds=6)
    found = pids(tmp_path)
    if victim == "corral":
        os.kill(corral.pid, signal.SIGKILL)
    else:
        [reaper] = [one.pid for one in processes.processes() if one.parent == corral.pid]
        os.kill(reaper, signal.SIGKILL)
    code = corral.wait()
    wait_for(lambda: not any(alive(pid) for pid in found))
    assert (code, corral.out().splitlines()[-1:]) == ((-9, []) if victim == "corral" else (0, ["-9"]))


async def test_what_carries_the_lease_ends_with_it_wherever_it_was_started() -> None:
    run = Run()
    child = await run.start("sleep", "60")
    with stranger(CORRAL_LEASE=run.lease_id) as marked, stranger() as other:
        child.signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            assert await child.wait() == -15
        assert marked.wait(10) == -15
        assert other.poll() is None


async def test_what_works_under_another_lease_lives_on(tmp_path: Path) -> None:
    # As after `eval "$(corral request --export)"` within; what that starts with no environment at all is its own, too.
    script = (
        'CORRAL_LEASE=another sh -c \'echo $$ > "$1/other"; env -i sleep 60 & echo $! > "$1/bare"; wait\' - "$1" &\n'
        'while [ ! -s "$1/bare" ]; do sleep 0.05; done'
    )
    run = Run()
    try:
        assert await run("sh", "-c", script, "-", str(tmp_path)) == 0
        assert [alive(pid) for pid in pids(tmp_path, ("other", "bare"))] == [True, True]
        assert run.said == []
    finally:
        for pid in pids(tmp_path, ("other", "bare")):
            os.kill(pid, signal.SIGKILL)


async def test_a_corral_run_within_keeps_its_own_lease(tmp_path: Path) -> None:
    inner = (
        "import asyncio, os, sys\n"
        "from corral.cli.work.children import Child\n"
        "async def main():\n"
        "    child = Child(say=print, stopped=print)\n"
        "    await child.start(['sleep', '60'], os.environ | {'CORRAL_LEASE': 'inner'}, lease_id='inner',\n"
        "        grace_seconds=0.3, ttl_seconds=60, own_group=True)\n"
        f"    open({str(tmp_path / 'inner')!r}, 'w').write(str(os.getpid()))\n"
        "    sys.exit(await child.wait() + 100)\n"
        "asyncio.run(main())\n"
    )
    ready = f"while [ ! -s {tmp_path / 'inner'} ]; do sleep 0.05; done"
    assert await Run()("sh", "-c", f'"$@" & {ready}', "-", sys.executable, "-c", inner) == 0
    [pid] = pids(tmp_path, ("inner",))
    assert alive(pid)
    os.kill(pid, signal.SIGKILL)


async def test_the_tail_of_a_pipe_is_let_finish(tmp_path: Path) -> None:
    # The shell does not wait for what reads its output.
    run = Run()
    script = f"exec > >(while read line; do sleep 0.2; echo $line; done > {tmp_path}/log); echo one; echo two"
    assert await run("bash", "-c", script, settle_seconds=10.0) == 0
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
    assert run.said == []


def test_a_corral_that_is_stopped_for_longer_than_its_lease_lives_has_no_command_any_more(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    corral = Holder(("sh", "-c", f"echo $$ > {pid_file}; exec sleep 60"), lease_id="x", ttl_seconds=1)
    pid = int(wait_for(lambda: pid_file.exists() and pid_file.read_text()))
    os.kill(corral.pid, signal.SIGSTOP)
    wait_for(lambda: not alive(pid))
    os.kill(corral.pid, signal.SIGCONT)
    assert (corral.wait(), corral.out()) == (0, "-15\n")


async def test_a_command_is_executed_as_a_shell_would(tmp_path: Path) -> None:
    def file(name: str, content: bytes, mode: int = 0o755) -> str:
        path = tmp_path / name
        path.write_bytes(content)
        path.chmod(mode)
        return str(path)

    out = tmp_path / "out"
    assert await Run()(file("plain", f'echo "$0 $1" > {out}; exit 7'.encode()), "word") == 7
    assert out.read_text() == f"{tmp_path}/plain word\n"
    for words, code, says in (
        (["no-such-command"], 127, "command not found"),
        (["/no/such/command"], 127, "command not found"),
        ([file("lost", b"#!/no/such/interpreter\n")], 127, "interpreter"),
        ([file("data", b"\x7fELF\0\0\0\n")], 126, "exec format error"),
        ([file("text", b"echo hi", 0o644)], 126, "permission denied"),
        (["/tmp"], 126, "permission denied"),
    ):
        with pytest.raises(NotStarted, match=says) as error:
            await Run()(*words)
        assert (words, error.value.code) == (words, code)


async def test_a_command_is_not_started_when_its_time_is_over(tmp_path: Path) -> None:
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert await Run()("touch", str(tmp_path / "in time"), start_by=now + 60) == 0
    with pytest.raises(TooLate):
        await Run()("touch", str(tmp_path / "late"), start_by=now - 0.001)
    assert os.listdir(tmp_path) == ["in time"]


async def test_a_command_gets_the_files_and_ignores_the_signals_that_it_was_started_with(tmp_path: Path) -> None:
    receive, give = os.pipe()
    os.set_inheritable(give, True)
    probe = (
        "import os, signal, sys\n"
        "os.write(int(sys.argv[1]), str([int(n) for n in sorted(signal.valid_signals())"
        " if signal.getsignal(n) is signal.SIG_IGN and n not in (signal.SIGPIPE, signal.SIGXFSZ)]).encode())"
    )
    ignored = [signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD]
    assert await Run()(sys.executable, "-c", probe, str(give), ignored=ignored) == 0
    os.close(give)
    assert os.read(receive, 1000).decode() == str([int(number) for number in ignored])
    assert os.read(receive, 1) == b""  # nobody else has it open any more
    os.close(receive)
