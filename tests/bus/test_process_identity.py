"""A process is recognized by its start, and one that waits to be reaped has ended."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from corral.bus.process_identity import own_name, process_name, process_stat
from corral.client.leases.holder import is_running
from corral.collectors.agent.claim import Claim, HostClaim
from corral.planner.durable.election import _is_gone, _process_name


def test_a_killed_process_is_recognized_as_ended_before_it_is_reaped() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stat, name, identity = process_stat(child.pid), process_name(child.pid), _process_name(child.pid)
    assert stat is not None
    claim = HostClaim("node-1", "agent-1")
    holder = Claim(
        agent="agent-0",
        pid=child.pid,
        address="here",
        started_at_ns=0,
        machine=claim._mine.machine,
        process_started=stat.started_ticks,
    )
    assert (stat.ended, stat.parent, is_running(name)) == (False, os.getpid(), True)
    assert not _is_gone(identity)
    assert not claim._is_dead(holder)
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays unreaped
    left = process_stat(child.pid)
    assert left is not None
    assert (left.ended, left.started_ticks) == (True, stat.started_ticks)
    assert is_running(name) is not True
    assert _is_gone(identity)
    assert claim._is_dead(holder)
    child.communicate()
    assert process_stat(child.pid) is None
    assert process_name(child.pid) == ""


def test_the_name_of_an_executable_may_hold_brackets_and_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "7"
    folder.mkdir()
    (folder / "stat").write_text("7 (a) S 1 (b) R 4" + " 0" * 17 + " 99 0\n")
    stat = process_stat(7, tmp_path)
    assert stat is not None
    assert (stat.state, stat.parent, stat.started_ticks) == ("R", 4, 99)


def test_the_own_name_is_boot_process_id_and_start() -> None:
    boot, pid, started = own_name().split("/")
    stat = process_stat(os.getpid())
    assert stat is not None
    assert (len(boot), int(pid), int(started)) == (36, os.getpid(), stat.started_ticks)
