"""What is written about settings holds: unit and manifest name only what `corral collect` takes."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from corral.cli.main import load
from corral.cli.server import server_binary
from corral.collectors.outbox import Outbox
from corral.collectors.replay import ReplaySource
from corral.collectors.service import collect, state_folder
from corral.schemas import bus

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "how-to" / "collectors.md"
UNIT = ROOT / "deploy" / "systemd" / "corral-collector.service"
MANIFEST = ROOT / "deploy" / "kubernetes" / "collector-daemonset.yaml"
OUTSIDE = {"CORRAL_NATS_URL", "CORRAL_NATS_CREDS", "CORRAL_LEASE"}
"""Of the bus, and of the processes that are looked at."""


def options() -> dict[str, Any]:
    """The command's options by their environment variable."""
    found: dict[str, Any] = {}
    for parameter in load("collect").params:
        names = [parameter.envvar] if isinstance(parameter.envvar, str) else list(parameter.envvar or [])
        found |= dict.fromkeys(names, parameter)
    return found


@pytest.mark.parametrize("file", [UNIT, MANIFEST])
def test_unit_and_manifest_set_what_there_is(file: Path) -> None:
    named = set(re.findall(r"CORRAL_[A-Z_]+", file.read_text()))
    assert named
    assert named - OUTSIDE <= set(options())


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    program = Path(sys.executable).parent / "corral"
    unit.write_text(UNIT.read_text().replace("/opt/corral/bin/corral", str(program)))
    verified = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=30, check=False
    )
    assert verified.returncode == 0, verified.stderr
    assert UNIT.name not in verified.stderr


@pytest.fixture
def guarded_server(tmp_path: Path) -> Iterator[str]:
    """A server with an account for everything and one with the permissions that the document gives; its address."""
    documented = re.search(r"^permissions: .*?^}", DOCUMENT.read_text(), re.M | re.S)
    assert documented
    config = tmp_path / "nats.conf"
    config.write_text(
        f"listen: '127.0.0.1:-1'\nports_file_dir: '{tmp_path}'\njetstream {{ store_dir: '{tmp_path}/data' }}\n"
        "authorization { users: [\n  { user: admin, password: secret }\n"
        f"  {{ user: node, password: secret\n{documented[0]} }}\n] }}\n"
    )
    process = subprocess.Popen([server_binary(), "-c", str(config)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not (ports := [file for file in tmp_path.glob("*.ports") if file.stat().st_size]):
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.02)
        yield "127.0.0.1:" + json.loads(ports[0].read_text())["nats"][0].rpartition(":")[2]
    finally:
        process.kill()
        process.wait()


async def test_the_documented_permissions_are_enough(
    guarded_server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    admin = await bus.connect(f"nats://admin:secret@{guarded_server}")
    await bus.ensure_layout(admin.jetstream())
    messages = await admin.subscribe("corral.v1.>")
    # An earlier run has left messages, so that the streams are asked what they have of them.
    before = Outbox(2**20, state_folder("node-7", tmp_path))
    before.spill()
    before.put(bus.samples_subject("node-7"), "earlier-1", b"x")
    before.put(bus.events_subject("node-7"), "earlier-2", b"x")
    before.close()
    file = tmp_path / "samples.csv"
    file.write_text("epoch_s,device,host,power_watts\n0,a,node-7,5\n")
    url = f"nats://node:secret@{guarded_server}"
    async with asyncio.timeout(15):
        await collect(ReplaySource(file), name="node-7", nats_url=url, state=tmp_path, interval_seconds=0.02)
    assert "Violation" not in caplog.text
    ids = [(await messages.next_msg(timeout=5)).headers["Nats-Msg-Id"] for _ in range(2)]
    assert ids == ["earlier-1", "earlier-2"]
    kinds: set[str] = set()
    while not kinds >= {"samples", "agents", "inventory", "events"}:
        kinds.add((await messages.next_msg(timeout=5)).subject.split(".")[2])
    await admin.close()
