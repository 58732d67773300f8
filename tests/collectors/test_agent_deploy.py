"""Unit and manifest name only settings that `corral collect` takes."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from corral.bus.access.roles import Role
from corral.bus.layout import ensure_layout
from corral.cli.loading import load
from corral.collectors.agent.outbox import Outbox
from corral.collectors.replay.source import ReplaySource
from corral.collectors.service import collect, state_folder
from corral.schemas import subjects
from support.secured_bus import SecuredBus

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "systemd" / "corral-collector.service"
RUNNER_UNIT = ROOT / "deploy" / "systemd" / "corral-runner.service"
RUNNER_MANIFEST = ROOT / "deploy" / "kubernetes" / "runner-daemonset.yaml"
MANIFEST = ROOT / "deploy" / "kubernetes" / "collector-daemonset.yaml"
OUTSIDE = {"CORRAL_NATS_URL", "CORRAL_NATS_CREDS", "CORRAL_LEASE"}
"""Settings of the bus, and of the processes that are watched."""


def options(command: str = "collect") -> dict[str, Any]:
    """The command's options by their environment variable."""
    found: dict[str, Any] = {}
    for parameter in load(command).params:
        names = [parameter.envvar] if isinstance(parameter.envvar, str) else list(parameter.envvar or [])
        found |= dict.fromkeys(names, parameter)
    return found


@pytest.mark.parametrize(
    ("file", "command"),
    [(UNIT, "collect"), (MANIFEST, "collect"), (RUNNER_UNIT, "runner"), (RUNNER_MANIFEST, "runner")],
)
def test_unit_and_manifest_set_what_there_is(file: Path, command: str) -> None:
    named = set(re.findall(r"CORRAL_[A-Z_]+", file.read_text()))
    assert named
    assert named - OUTSIDE <= set(options(command))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
@pytest.mark.parametrize("file", [UNIT, RUNNER_UNIT])
def test_systemd_takes_the_unit(file: Path, tmp_path: Path) -> None:
    unit = tmp_path / file.name
    program = Path(sys.executable).parent / "corral"
    unit.write_text(file.read_text().replace("/opt/corral/bin/corral", str(program)))
    verified = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=30, check=False
    )
    assert verified.returncode == 0, verified.stderr
    assert file.name not in verified.stderr


@pytest.fixture
def guarded_bus(tmp_path: Path) -> Iterator[SecuredBus]:
    """A server where node-7 has the credentials that `corral auth add collector node-7` makes."""
    made = SecuredBus(tmp_path / "bus")
    made.add(Role.ADMIN, "admin")
    made.add(Role.COLLECTOR, "node-7")
    made.server.start()
    yield made
    made.server.kill()


async def test_a_collectors_credentials_are_enough(
    guarded_bus: SecuredBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin = await guarded_bus.connect("admin")
    await ensure_layout(admin.jetstream())
    messages = await admin.subscribe("corral.v1.>")
    # An earlier run has left messages, so that the streams are asked what they have of them.
    before = Outbox(2**20, state_folder("node-7", tmp_path))
    before.spill()
    before.put(subjects.samples_subject("node-7"), "earlier-1", b"x")
    before.put(subjects.events_subject("node-7"), "earlier-2", b"x")
    before.close()
    file = tmp_path / "samples.csv"
    file.write_text("epoch_s,device,host,power_watts\n0,a,node-7,5\n")
    monkeypatch.setenv("CORRAL_NATS_CREDS", guarded_bus.credentials("node-7"))
    async with asyncio.timeout(15):
        await collect(
            ReplaySource(file), name="node-7", nats_url=guarded_bus.server.url, state=tmp_path, interval_seconds=0.02
        )
    assert guarded_bus.violations() == []
    ids = [(await messages.next_msg(timeout=5)).headers["Nats-Msg-Id"] for _ in range(2)]
    assert ids == ["earlier-1", "earlier-2"]
    kinds: set[str] = set()
    while not kinds >= {"samples", "agents", "inventory", "events"}:
        kinds.add((await messages.next_msg(timeout=5)).subject.split(".")[2])
    await admin.close()
