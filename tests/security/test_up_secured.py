"""`corral up` as it is without options: a bus with authentication that its owner need not think of."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from corral.bus.connect import connect
from corral.bus.layout import ensure_layout
from corral.cli.local.access import ensure_access, move_streams
from corral.cli.local.server import EmbeddedServer
from corral.cli.local.supervisor import Part
from corral.client import Refused, SyncClient, Unavailable
from corral.schemas import subjects
from support.local_cluster import CORRAL, SIMULATED, invoke, wait_for

NOBODY = {"CORRAL_OWNER": "", "CORRAL_NATS_URL": ""}


class Up:
    """`corral up` in a home of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.data = home / "gpus"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("CORRAL_", "XDG_"))}
        self.environment = {**kept, "HOME": str(home)}
        self.log = home / "up.log"
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [*CORRAL, "up", "--data", str(self.data), "--port", "0", *SIMULATED],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        try:
            wait_for(lambda: "Corral is up" in self.output() or self.process.poll() is not None, 60)
            assert self.process.poll() is None, self.output()
        except BaseException:
            self.process.kill()
            raise
        self.url: str = json.loads((self.data / "cluster.json").read_text())["url"]

    def output(self) -> str:
        return self.log.read_text()

    def corral(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command as another shell of the same account would, in this process."""
        configuration = str(self.home / ".config" / "corral" / "corral.toml")
        return invoke(*arguments, url="", **{"HOME": str(self.home), "CORRAL_CONFIG": configuration} | NOBODY | more)

    def json(self, *arguments: str, **more: str) -> Any:
        done = self.corral(*arguments, "--json", **more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    (tmp_path / "home").mkdir()
    made = Up(tmp_path / "home")
    yield made
    made.stop()


@pytest.mark.long
def test_its_owner_need_not_think_of_it_and_a_colleague_is_let_in(
    up: Up, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    another_shell_needs_to_know_nothing(up)
    what_is_printed_works_as_it_is_printed(up)
    with monkeypatch.context() as patched:
        a_program_needs_to_know_nothing_either(up, patched)
    a_colleague_joins_and_goes(up, tmp_path / "alice")
    the_folder_is_its_owners_alone_and_secrets_are_not_shown(up)
    configuration = up.home / ".config" / "corral" / "corral.toml"
    assert "gpus" in configuration.read_text()
    up.stop()
    assert "gpus" not in configuration.read_text(), "the context of a cluster that was only tried stays"


def another_shell_needs_to_know_nothing(up: Up) -> None:
    assert "--nats" not in up.output()
    lease = up.json("request", "--gpus", "1")["lease"]
    assert up.json("fleet")["leased_devices"] == 1
    # Its owner is alone on this machine, and may ask in any name.
    other = up.json("request", "--gpus", "1", "--owner", "somebody")["lease"]
    assert other["owner"] == "somebody"
    drained = up.corral("drain", "--host", "sim-0001", "--reason", "test")
    assert drained.returncode == 0, drained.stderr
    assert up.corral("evict", other["lease_id"], "--reason", "test").returncode == 0
    assert up.corral("release", lease["lease_id"]).returncode == 0
    assert up.corral("undrain", "--host", "sim-0001").returncode == 0


def what_is_printed_works_as_it_is_printed(up: Up) -> None:
    for line in re.findall(r"^  (corral .+?)   ", up.output(), re.M):
        words = shlex.split(line)[1:]
        if words != ["top"]:
            done = up.corral(*words)
            assert done.returncode == 0, (line, done.stderr)
            for hint in re.findall(r"corral (renew \S+|release \S+)", done.stdout):
                assert up.corral(*hint.split()).returncode == 0, hint
    # The one that was added finds its way by the line that is printed, from whichever folder the cluster has.
    added = up.corral("auth", "add", "requester", "carol")
    assert added.returncode == 0, added.stderr
    [line] = re.findall(r"corral (context add .+)", added.stderr)
    assert up.url in line
    assert up.corral(*shlex.split(line)).returncode == 0
    assert up.json("request", "--context", "carol")["lease"]["owner"] == "carol"
    assert up.json("release", "--all", "--context", "carol")["leases"]
    assert up.corral("context", "remove", "carol").returncode == 0
    # Options that lead to a bus stand in either place, or are refused.
    stranger = str(up.home / "nobody.creds")
    for command in (["--creds", stranger, "devices", "--nats", up.url], ["devices", "--creds", stranger]):
        refused = up.corral(*command)
        assert refused.returncode != 0, command
        assert "nobody.creds" in refused.stderr, command
    for command in (["--creds", stranger, "up"], ["up", "--context", "gpus"], ["--nats", up.url, "simulate"]):
        refused = up.corral(*command)
        assert (refused.returncode, "doesn't apply" in refused.stderr) == (2, True), command


def a_program_needs_to_know_nothing_either(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("CORRAL_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(up.home))
    with SyncClient() as client:
        assert client.fleet().devices == 8
    with SyncClient(up.url) as client:
        lease = client.request(gpus=1).lease
        client.release(lease.lease_id)
    with SyncClient(context="gpus", owner="program") as client:
        assert client.request(gpus=1).lease.owner == "program"
    with pytest.raises(Unavailable, match="no context 'lab': there are gpus"):
        SyncClient(context="lab")
    monkeypatch.setenv("HOME", str(up.home / "elsewhere"))
    with pytest.raises(Unavailable, match="wants credentials"):
        SyncClient(up.url)


def a_colleague_joins_and_goes(up: Up, tmp_path: Path) -> None:
    added = up.corral("auth", "add", "requester", "alice", "--dir", str(up.data / "auth"), "--out", str(tmp_path))
    assert added.returncode == 0, added.stderr
    assert "reloads its configuration" in added.stderr
    credentials = str(tmp_path / "corral.creds")
    assert os.stat(credentials).st_mode & 0o077 == 0
    with SyncClient(up.url, credentials=credentials) as alice:
        lease = alice.request(gpus=1).lease
        assert lease.owner == "alice"
        with pytest.raises(Refused):
            alice.drain(reason="mine", hosts=["sim-0001"])
        alice.release(lease.lease_id)
    shown = up.corral("auth", "show", "alice", "--dir", str(up.data / "auth"))
    assert "corral.v1.plan.request.alice" in shown.stdout
    assert up.corral("auth", "revoke", "alice", "--dir", str(up.data / "auth")).returncode == 0
    with pytest.raises(Unavailable, match="does not take the credentials"):
        SyncClient(up.url, credentials=credentials)


def the_folder_is_its_owners_alone_and_secrets_are_not_shown(up: Up) -> None:
    authority = up.data / "auth"
    seeds = set()
    for file in authority.rglob("*"):
        if file.is_file() and file.name not in (".lock", "ca.crt"):
            assert file.stat().st_mode & 0o077 == 0, file
            seeds |= set(re.findall(r"SU[A-Z2-7]{56}", file.read_text(errors="replace")))
    assert len(seeds) >= 4
    said = up.output() + "".join(file.read_text(errors="replace") for file in (up.data / "logs").glob("*.log"))
    said += up.corral("auth", "show", "--dir", str(authority)).stdout
    said += up.corral("config", "show").stdout + up.corral("context", "list").stdout
    said += (up.data / "nats" / "nats-server.log").read_text() + (authority / "nats-auth.conf").read_text()
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            said += process.read_bytes().decode(errors="replace")
        except OSError:
            continue
    assert [seed for seed in seeds if seed in said] == []
    # Nor in what is stored: streams, the history, the snapshot of either.
    kept = [file for file in up.data.rglob("*") if file.is_file() and authority not in file.parents]
    assert any(file.name == "history.duckdb" for file in kept)
    assert [file for file in kept for seed in seeds if seed.encode() in file.read_bytes()] == []


def test_nobody_opens_a_bus_without_credentials_to_the_network(tmp_path: Path) -> None:
    done = invoke("up", "--no-auth", "--listen", "0.0.0.0", "--port", "0", "--data", str(tmp_path / "x"), url="")
    assert done.returncode == 2
    assert "--no-auth" in done.stderr


async def test_streams_outlive_the_change_to_authentication_and_back(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "nats")
    credentials: str | None = None
    for turn, secured in enumerate((False, True, False)):
        move_streams(server.data, secured)
        if secured:
            local = ensure_access(tmp_path, server.pid_file)
            environment = local.part(Part(name="planner", arguments=[])).environment
            credentials, server.include = environment["CORRAL_NATS_CREDS"], local.authority.config
        else:
            credentials = server.include = None
        server.start()
        try:
            nc = await connect(server.url, credentials=credentials)
            await ensure_layout(nc.jetstream())
            subject = f"$KV.{subjects.PLANNER_BUCKET}.lease.l-1"
            found = await nc.jetstream().get_last_msg(f"KV_{subjects.PLANNER_BUCKET}", subject) if turn else None
            assert (found and found.data) == (str(turn - 1).encode() if turn else None)
            await nc.jetstream().publish(subject, str(turn).encode())
            await nc.close()
        finally:
            server.stop()
