"""Sessions inside running jobs, with a real runner: terminals, pipes, who may, and that nothing is left of them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from corral.cli.local.server import EmbeddedServer
from corral.client import Client, NotOwner, ServiceError, SyncClient, Unavailable
from corral.client.attach import AttachedSession, ask
from corral.schemas import codec, subjects
from corral.schemas.requests import WorkRequest
from corral.schemas.work.attach import AttachEnd, AttachNews, AttachStep
from corral.schemas.work.jobs import JobSpec, JobState, JobTask, TaskPart
from corral.schemas.work.runs import Run
from nats.aio.client import Client as Bus
from support.jobs_planner import JobsPlanner, jobs_planner
from support.local_cluster import CORRAL, alive, environment, wait_for
from support.planner_of_runs import PlannerOfRuns, RunnerProcess, a_run

JOB = "1000"


@pytest_asyncio.fixture
async def job(planner: PlannerOfRuns, runner: RunnerProcess, nc: Bus, tmp_path: Path) -> AsyncIterator[Run]:
    """A job of alice that runs on node-7, as the planner lists it."""
    async with jobs_planner(nc) as listed:
        run = a_run(
            *("sh", "-c", 'until [ -e "$0/go" ]; do sleep 0.05; done', str(tmp_path)),
            job=int(JOB),
            run_id=f"{JOB}_0.1",
            directory=str(tmp_path),
            environment={"COLOR": "blue"},
        )
        await planner.until(lambda: planner.token)
        await planner.push(run)
        await planner.state(run.run_id, JobState.RUNNING)
        _list_as_running(listed, run)
        yield run


def _list_as_running(listed: JobsPlanner, run: Run) -> None:
    listed.specs[JOB] = JobSpec(request=WorkRequest(owner=run.owner))
    part = TaskPart(host="node-7", state=JobState.RUNNING)
    listed.tasks[JOB] = {0: JobTask(index=0, attempt=1, state=JobState.RUNNING, parts=[part])}


def with_lease(run: Run) -> set[int]:
    """Processes that name the lease of a run."""
    found: set[int] = set()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"CORRAL_LEASE={run.lease_id}".encode() in entry.read_bytes().split(b"\0"):
                found.add(int(entry.parent.name))
    return found


async def nothing_left(run: Run, before: set[int]) -> None:
    """Wait until only the job's own processes are left: a `sleep` of its own comes and goes."""

    def left() -> set[str]:
        return {name for pid in with_lease(run) - before if "sleep 0.05" not in (name := words(pid))} - {""}

    await asyncio.to_thread(wait_for, lambda: not left(), 20)


def words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


class Typed:
    """`corral attach` at a terminal of its own."""

    def __init__(self, url: str, *arguments: str) -> None:
        self.ours, theirs = pty.openpty()
        self.resize(30, 90)
        self.process = subprocess.Popen(
            [*CORRAL, "attach", *arguments],
            env=environment(CORRAL_NATS_URL=url, CORRAL_OWNER="alice", TERM="vt100"),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.text = ""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    async def until(self, pattern: str) -> re.Match[str]:
        """Wait until something is on the terminal, and forget what was there so far."""
        async with asyncio.timeout(20):
            while not (found := re.search(pattern, self.text)):
                try:
                    self.text += (await asyncio.to_thread(os.read, self.ours, 4096)).decode()
                except OSError:
                    code = await asyncio.to_thread(self.process.wait, 20)
                    raise AssertionError(f"the client has ended with {code}: {self.text}") from None
        self.text = self.text[found.end() :]
        return found


async def test_a_terminal_inside_a_job(job: Run, server: EmbeddedServer, tmp_path: Path) -> None:
    before = with_lease(job)
    terminal = await asyncio.to_thread(Typed, server.url, JOB, "--", "sh")
    await terminal.until("[#$] $")
    terminal.type('PS1=; echo "a $COLOR $CUDA_VISIBLE_DEVICES $CORRAL_JOB_ID $TERM"; pwd; tty; stty size\n')
    await terminal.until(rf"a blue GPU-1 {JOB} vt100\r\n{tmp_path}\r\n/dev/pts/\d+\r\n30 90\r\n")
    terminal.resize(40, 100)
    terminal.process.send_signal(signal.SIGWINCH)
    terminal.type("until stty size | grep '40 100'; do :; done\n")
    await terminal.until("\n40 100")
    # Control-C ends the command inside, not the client.
    terminal.type("echo now; sleep 1000\n")
    await terminal.until("\nnow")
    await asyncio.to_thread(wait_for, lambda: any(words(pid) == "sleep 1000" for pid in with_lease(job)))
    terminal.type("\x03")
    await terminal.until("\\^C")
    terminal.type("echo after $?\n")
    await terminal.until("\nafter 130")
    terminal.type("nohup sleep 1001 &\nexit 7\n")
    assert await asyncio.to_thread(terminal.process.wait, 20) == 7
    await nothing_left(job, before)


@pytest.fixture
async def alice(nc: Bus) -> Client:
    return Client(nc, owner="alice", timeout=5, patience=0.5)


async def whole(session: AttachedSession) -> tuple[bytes, bytes]:
    output = errors = b""
    async for some in session.output():
        output += some.output
        errors += some.error_output
    return output, errors


async def test_pipes_and_exit_codes(job: Run, server: EmbeddedServer, alice: Client) -> None:
    data = os.urandom(2**20)
    done = await asyncio.to_thread(
        lambda: subprocess.run(
            [*CORRAL, "attach", JOB, "--", "sh", "-c", "cat; echo wrong >&2; exit 3"],
            env=environment(CORRAL_NATS_URL=server.url, CORRAL_OWNER="alice"),
            input=data,
            capture_output=True,
            timeout=30,
            check=False,
        )
    )
    assert (done.stdout == data, done.stderr, done.returncode) == (True, b"wrong\n", 3)
    for command, end, code, number in (
        (["sh", "-c", "kill -9 $$"], AttachEnd.EXITED, None, 9),
        (["no-such-command"], AttachEnd.NOT_EXECUTED, 127, None),
    ):
        session = await alice.jobs.attach(JOB, command)
        await whole(session)
        assert session.exit is not None
        assert (session.exit.end, session.exit.exit_code, session.exit.signal) == (end, code, number)
    assert await asyncio.to_thread(_without_asyncio, server.url) == (b"hello", 3)


def _without_asyncio(url: str) -> tuple[bytes, int | None]:
    """Output and exit code of a session of the synchronous client."""
    with (
        SyncClient(url, owner="alice") as client,
        client.jobs.attach(JOB, ["sh", "-c", "cat; exit 3"]) as session,
    ):
        session.write(b"hello", ended=True)
        output = b"".join(some.output for some in session.output())
        assert session.exit is not None
        return output, session.exit.exit_code


async def test_a_reader_that_is_slow_and_a_command_that_does_not_read(job: Run, alice: Client, tmp_path: Path) -> None:
    """Neither fills the memory of the runner: the other side waits."""
    count = tmp_path / "count"
    program = (
        "import os, sys\nfor at in range(300):\n"
        f" os.write(1, b'x' * 10_000); os.write(2, b'')\n open({str(count)!r}, 'w').write(str(at))"
    )
    session = await alice.jobs.attach(JOB, [sys.executable, "-c", program])
    sizes: list[str] = []
    while len(sizes) < 10 or sizes[-10] != sizes[-1]:
        await asyncio.sleep(0.05)
        sizes.append(count.read_text() if count.exists() else str(len(sizes)))
    assert int(sizes[-1]) < 100
    output, _ = await whole(session)
    assert len(output) == 3_000_000
    deaf = await alice.jobs.attach(JOB, ["sleep", "1000"])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await deaf.write(b"x" * 2**20)
    assert deaf._written < 8
    await deaf.close()


async def test_only_the_owner_and_operators(job: Run, nc: Bus, alice: Client) -> None:
    bob = Client(nc, owner="bob", timeout=5, patience=0.5)
    with pytest.raises(NotOwner):
        await bob.jobs.attach(JOB, ["id"])
    # With an id that has become known, but under another name, one gets no further either.
    session = await alice.jobs.attach(JOB, ["cat"])
    step = codec.encode(AttachStep(session=session._session, number=1, data=b"forged\n"))
    for name, override in (("bob", False), ("alice", True)):
        subject = subjects.attach_subject("node-7", name, step=True, override=override)
        with pytest.raises(ServiceError, match="no such session"):
            await ask(nc, subject, step, AttachNews, 5)
    await session.write(b"mine\n", ended=True)
    assert (await whole(session))[0] == b"mine\n"
    operator = await bob.jobs.attach(JOB, ["printenv", "CORRAL_OWNER"], operator=True)
    assert (await whole(operator))[0] == b"alice\n"


KILLED = """
import asyncio, os
from corral.client import connect
STUBBORN = "trap '' HUP TERM; echo ready; sleep 1000"
async def main():
    async with connect(os.environ["CORRAL_NATS_URL"], owner="alice") as client:
        session = await client.jobs.attach("1000", ["sh", "-c", STUBBORN], lost_seconds=4)
        async for some in session.output():
            print(some.output.decode(), flush=True)
asyncio.run(main())
"""


async def killed_client(url: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", KILLED), env=environment(CORRAL_NATS_URL=url), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    process.kill()
    await process.wait()


@pytest.mark.parametrize("killed", ["client", "runner", "job"])
async def test_nothing_is_left_of_a_session_without_its(
    killed: str,
    job: Run,
    server: EmbeddedServer,
    alice: Client,
    runner: RunnerProcess,
    planner: PlannerOfRuns,
    tmp_path: Path,
) -> None:
    before = with_lease(job)
    ended: Callable[[], object] = lambda: not any(words(pid) == "sleep 1000" for pid in with_lease(job))  # noqa: E731
    if killed == "client":
        await killed_client(server.url)
        assert not ended()
    else:
        stubborn = "trap '' HUP TERM; echo ready; setsid sleep 1000 & wait; sleep 1000"
        session = await alice.jobs.attach(JOB, ["sh", "-c", stubborn])
        output = session.output()
        assert (await anext(output)).output == b"ready\n"
        await asyncio.to_thread(wait_for, lambda: not ended())
        if killed == "runner":
            runner.kill()
            with pytest.raises(Unavailable, match="is lost"):
                await whole(session)
        else:
            (tmp_path / "go").touch()
            await whole(session)
            assert session.exit is not None
            assert session.exit.end is AttachEnd.JOB_ENDED
            await planner.ended(job.run_id)
    await asyncio.to_thread(wait_for, ended, 20)
    await nothing_left(job, before)
    assert all(alive(pid) for pid in before if "until" in words(pid)) or killed == "job"
