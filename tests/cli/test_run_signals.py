"""Signals to `corral run` at the moment of a grant, and its command on a terminal with piped input."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from corral.bus import processes
from corral.client import connect
from support.local_cluster import CORRAL, LocalCluster, environment

AROUND_THE_GRANT = {
    "grant-0": (signal.SIGTERM, 0.0),
    "grant-1": (signal.SIGHUP, 0.0),
    "grant-2": (signal.SIGINT, 0.008),
    "grant-3": (signal.SIGTERM, 0.03),
}
"""A signal to the `corral run` of each name, so many seconds after its grant is told of."""


async def test_a_signal_in_the_moment_of_a_grant_leaves_no_lease_and_nobody_in_line(cluster: LocalCluster) -> None:
    running: dict[str, subprocess.Popen[bytes]] = {}
    async with connect(cluster.url, owner="tester") as client:

        async def strike() -> None:
            struck: set[str] = set()
            async for event in client.lease_events(kind="granted"):
                if (name := event.lease.name) in running:
                    number, delay = AROUND_THE_GRANT[name]
                    asyncio.get_running_loop().call_later(delay, running[name].send_signal, number)
                    struck.add(name)
                if len(struck) == len(AROUND_THE_GRANT):
                    return

        striking = asyncio.create_task(strike())
        await client.fleet()  # the subscription is there before it
        for name in AROUND_THE_GRANT:
            words = [*CORRAL, "run", "-q", "--host", "any", "--ttl", "10m", "--wait", "1m", "--name", name]
            running[name] = subprocess.Popen(  # noqa: ASYNC220
                [*words, "--", "sleep", "60"],
                env=environment(CORRAL_NATS_URL=cluster.url),
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        try:
            async with asyncio.timeout(120):
                await striking
                codes = {name: await asyncio.to_thread(one.wait) for name, one in running.items()}
        finally:
            for one in running.values():
                one.kill()
        assert codes == {name: 128 + number for name, (number, _) in AROUND_THE_GRANT.items()}
        assert [lease.name for lease in await client.leases() if lease.name in running] == []
        assert [entry.name for entry in await client.queue() if entry.name in running] == []


class Screen:
    """An interactive shell on a terminal of its own."""

    def __init__(self, folder: Path, **values: str) -> None:
        self.seen = ""
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment(PS1="$ ", **values))

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._terminal, text.encode())

    def until(self, text: str, seconds: float = 40.0) -> None:
        """Read on until a text is there, behind what was looked for before."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self._terminal], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self._terminal, 65536).decode(errors="replace")
        self.seen = self.seen.partition(text)[2]

    def until_foreground(self, pid: int, seconds: float = 40.0) -> None:
        """Wait until a process has the terminal: until then it gets nothing of what is typed."""
        end = time.monotonic() + seconds
        while os.tcgetpgrp(self._terminal) != os.getpgid(pid):
            assert time.monotonic() < end, f"process {pid} never had the terminal"
            time.sleep(0.02)

    def until_stopped(self, pid: int, seconds: float = 40.0) -> None:
        """Wait until a process is stopped: one that still waits in a read may take what is typed for the shell."""
        end = time.monotonic() + seconds
        while (found := processes.process(pid)) is None or found.state != "T":
            assert time.monotonic() < end, f"process {pid} is not stopped: {found}"
            time.sleep(0.02)

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.close(self._terminal)
        os.waitpid(self.pid, 0)


@pytest.mark.skipif(not shutil.which("bash"), reason="job control is tried in bash")
def test_with_input_from_a_pipe_it_stops_goes_on_asks_on_the_terminal_and_gives_that_back(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    # `stty -echo` without its opposite, as a program that is killed leaves it; a word from the terminal, then the pipe.
    (tmp_path / "probe").write_text(
        'echo $$ >pid; stty -echo </dev/tty; echo "probe ready"\nread -r word </dev/tty; echo "from terminal: $word"\n'
        'echo "from pipe: $(cat)"\nread -r word </dev/tty\nkill -9 $$\n'
    )
    corral = shlex.join([*CORRAL, "run", "-q", "--host", "any", "--name", "on-terminal", "--", "sh", "probe"])
    (tmp_path / "job").write_text(f"printf piped | {corral}\n")
    screen = Screen(tmp_path, CORRAL_NATS_URL=cluster.url)
    try:
        screen.type(". ./job\n")
        screen.until("probe ready")
        screen.type("\x1a")
        screen.until("Stopped")
        probe = int((tmp_path / "pid").read_text())
        screen.until_stopped(probe)
        screen.type("\necho shell $((20 + 3))\n")
        screen.until("shell 23")
        screen.type("fg\n")
        screen.until("printf piped")
        screen.until_foreground(probe)
        screen.type("word\n")
        screen.until("from terminal: word")
        screen.until("from pipe: piped")
        screen.type("end\n")
        screen.type("echo code $?; stty -a\n")
        screen.until("code 137")
        screen.until("isig")
        screen.until(" echo ")
    finally:
        screen.close()
    assert "on-terminal" not in json.dumps(cluster.json("leases"))
