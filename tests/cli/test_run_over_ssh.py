"""`corral run --host any --via ssh` through a real sshd: the remote environment, and the end of remote processes."""

from __future__ import annotations

import getpass
import os
import pty
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.local_cluster import CORRAL, LocalCluster, alive, environment, wait_for

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(
    not SSHD or not shutil.which("ssh") or not shutil.which("ssh-keygen"), reason="OpenSSH's sshd is not installed"
)


@pytest.fixture(scope="module")
def path_to_ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PATH whose `ssh` reaches every simulated host at a server of our own, started for these tests."""
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        "StrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\nPermitRootLogin yes\nMaxStartups 100\n"
    )
    (folder / "ssh_config").write_text(
        f"Host sim-*\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n  IdentityFile {folder}/user\n"
        "  IdentitiesOnly yes\n  UserKnownHostsFile /dev/null\n  StrictHostKeyChecking no\n  LogLevel ERROR\n"
    )
    bin = folder / "bin"
    bin.mkdir()
    (bin / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    (bin / "ssh").chmod(0o755)
    if os.getuid() == 0:
        os.makedirs("/run/sshd", 0o755, exist_ok=True)  # where it confines itself to; Debian's init makes it
    assert SSHD
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    path = f"{bin}:{os.environ['PATH']}"

    def answers() -> bool:
        assert server.poll() is None, (folder / "log").read_text()
        done = subprocess.run(["ssh", "sim-0001", "true"], env={**os.environ, "PATH": path}, check=False)
        return done.returncode == 0

    try:
        wait_for(answers)
        yield path
    finally:
        server.terminate()
        server.wait(10)


def start(cluster: LocalCluster, path: str, *arguments: str, **streams: Any) -> subprocess.Popen[str]:
    given = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.Popen(
        [*CORRAL, "run", "--host", "any", "--via", "ssh", "--grace", "1s", *arguments],
        env=environment(CORRAL_NATS_URL=cluster.url, PATH=path),
        text=True,
        **given,
    )


def lease_of(cluster: LocalCluster, name: str) -> list[str]:
    return [one["lease_id"] for one in cluster.json("leases")["leases"] if one["name"] == name]


def written(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def test_the_command_there_gets_its_devices_its_input_its_words_and_gives_its_code(
    cluster: LocalCluster, path_to_ssh: str
) -> None:
    script = 'echo "$CUDA_VISIBLE_DEVICES$ROCR_VISIBLE_DEVICES"; echo "$CORRAL_LEASE"; cat; printf "%s|" "$@"; exit 41'
    words = ["sh", "-c", script, "name", "two words", "it's", '$HOME "quoted"', "*"]
    process = start(cluster, path_to_ssh, "--gpus", "2", "--", *words, stdin=subprocess.PIPE)
    out, err = process.communicate("through the line\n", timeout=40)
    assert process.returncode == 41, err
    devices, lease, line, said = out.splitlines()
    assert line == "through the line"
    assert said == 'two words|it\'s|$HOME "quoted"|*|'
    [ended] = cluster.json("leases", "--ended", "--lease", lease)["leases"]
    assert ended["state"] == "released"
    assert sorted(grant["device"] for grant in ended["grants"]) == sorted(devices.split(","))
    # One that a signal ends has the code that a shell would give it.
    assert start(cluster, path_to_ssh, "--", "sh", "-c", "kill -USR1 $$").wait(40) == 128 + signal.SIGUSR1
    missing = start(cluster, path_to_ssh, "--", "no-such-command-here")
    assert missing.wait(40) == 127


def test_signals_reach_the_command_there(cluster: LocalCluster, path_to_ssh: str, tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    # Not by a shell, which waits for what it runs before it looks.
    script = (
        "import signal, sys, time\n"
        "def tell(number, _):\n"
        f"    with open({str(heard)!r}, 'a') as file: print(signal.Signals(number).name, file=file)\n"
        "    number == signal.SIGTERM and sys.exit(42)\n"
        "for name in ('USR1', 'INT', 'TERM'): signal.signal(getattr(signal, 'SIG' + name), tell)\n"
        f"open({str(heard)!r}, 'w').close()\ntime.sleep(60)"
    )
    process = start(cluster, path_to_ssh, "--name", "ssh-signals", "--", "python3", "-c", script)
    wait_for(heard.exists)
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        wait_for(lambda number=number: number.name in written(heard))
    _, err = process.communicate(timeout=40)
    assert process.returncode == 42, err
    assert written(heard).split() == ["SIGUSR1", "SIGINT", "SIGTERM"]
    assert lease_of(cluster, "ssh-signals") == []


def stubborn(folder: Path) -> tuple[list[str], Path]:
    """A command that ignores SIGTERM, with a child in a session of its own that does so too; where their ids go."""
    pids = folder / "pids"
    child = f"trap '' TERM HUP; echo $$ >> {pids}; while :; do sleep 0.1; done"
    script = f'trap "" TERM HUP; echo $$ > {pids}; setsid sh -c "$1" & while :; do sleep 0.1; done'
    return ["sh", "-c", script, "stubborn", child], pids


def both(pids: Path) -> list[int]:
    found = [int(line) for line in written(pids).split()]
    return found if len(found) == 2 else []


def test_a_lease_that_is_lost_ends_all_that_works_under_it_there(
    cluster: LocalCluster, path_to_ssh: str, tmp_path: Path
) -> None:
    command, pids = stubborn(tmp_path)
    process = start(cluster, path_to_ssh, "--name", "ssh-lost", "--", *command)
    found = wait_for(lambda: both(pids))
    [lease] = lease_of(cluster, "ssh-lost")
    assert cluster.corral("evict", lease, "--reason", "host goes down").returncode == 0
    _, err = process.communicate(timeout=40)
    assert process.returncode == 9
    assert "host goes down" in err
    wait_for(lambda: not any(alive(pid) for pid in found))


def test_killed_outright_it_leaves_nothing_running_there(
    cluster: LocalCluster, path_to_ssh: str, tmp_path: Path
) -> None:
    command, pids = stubborn(tmp_path)
    process = start(cluster, path_to_ssh, "--ttl", "2s", "--name", "ssh-killed", "--", *command)
    found = wait_for(lambda: both(pids))
    process.kill()
    process.wait(10)
    wait_for(lambda: not any(alive(pid) for pid in found))
    wait_for(lambda: lease_of(cluster, "ssh-killed") == [])


def test_on_a_terminal_the_command_there_has_one_and_ctrl_c_is_its_own(
    cluster: LocalCluster, path_to_ssh: str, tmp_path: Path
) -> None:
    here, there = pty.openpty()
    ready = tmp_path / "ready"
    script = f"trap 'exit 43' INT; [ -t 0 ] && touch {ready}; while :; do sleep 0.1; done"
    process = start(
        cluster, path_to_ssh, "--", "sh", "-c", script,
        stdin=there, stdout=there, stderr=there, preexec_fn=_own_terminal,
    )  # fmt: skip
    os.close(there)
    try:
        wait_for(ready.exists)
        os.write(here, b"\x03")
        assert process.wait(20) == 43
    finally:
        process.kill()
        os.close(here)


def _own_terminal() -> None:
    os.setsid()
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
