"""Every service ends within a bound of SIGTERM, whatever has become of the bus."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from corral.bus.connect import connect
from corral.cli.local.server import EmbeddedServer
from corral.cli.services import run_service
from corral.client.health import ask_health
from corral.schemas.instruments import ServiceKind
from support.forked_services import ForkedServices
from support.local_cluster import wait_for

SERVICES = {
    "plan": ("plan",),
    "process": ("process", "--db", "history.duckdb"),
    "collect": ("collect", "--source", "simulated", "--interval", "100ms", "--batch", "0", "--hosts", "4"),
    "runner": ("runner", "--host", "sim-0001", "--executor", "process", "--own-account"),
    "export": ("export", "--listen", "127.0.0.1:0"),
    "dashboard": ("dashboard", "--port", "0", "--state", "dashboard"),
    "notifier": ("notifier", "--targets", "targets.toml"),
}
"""Commands of the services, by the names of their modules."""
WITHOUT_BUS = {"login", "serve_http"}
"""Services that have no connection while they wait for work; a gateway has one of its own on a bus with keys alone
(`test_gateway_limits.py`)."""
BOUND_SECONDS = 60.0
"""Longer than `--stop-within`, by which a service ends itself with code 1."""
NO_SERVER = 3


@pytest.fixture(scope="module")
def forked() -> Iterator[ForkedServices]:
    made = ForkedServices()
    yield made
    made.close()


def test_all_services_are_stopped_here() -> None:
    folder = Path(run_service.__file__).parent
    found = {path.stem for path in folder.glob("*.py") if re.search(r"^ +run_service\(", path.read_text(), re.M)}
    assert found == SERVICES.keys() | WITHOUT_BUS


@pytest.mark.long
@pytest.mark.parametrize("state", ["up", "killed", "stopped", "mute", "absent"])
async def test_services_end_in_order_whatever_the_bus_does(
    forked: ForkedServices, server: EmbeddedServer, tmp_path: Path, state: str
) -> None:
    """Up, killed, stopped, replaced by what accepts connections and says nothing, or not there from the start."""
    assert server.process is not None
    held = contextlib.ExitStack()
    if state == "absent":
        server.kill()
    values = {"CORRAL_NATS_URL": server.url, "CORRAL_STATE_DIR": str(tmp_path / "state")}
    logs = {name: tmp_path / f"{name}.log" for name in SERVICES}
    targets = tmp_path / "targets.toml"
    targets.touch(0o600)
    targets.write_text('[targets]\nnobody = "json://127.0.0.1:9"\n')
    pids = {
        name: forked.start(*arguments, "--stop-within", "30s", log=logs[name], folder=tmp_path, **values)
        for name, arguments in SERVICES.items()
    }
    if state == "absent":
        # They wait for a server to begin with, or end since there is none.
        ended = {"plan", "export"}
        wait_for(lambda: all(forked.code(pids[name]) == NO_SERVER for name in ended))
        pids = {name: pid for name, pid in pids.items() if name not in ended}
        wait_for(lambda: all("bus" in logs[name].read_text() for name in pids))
    else:
        nc = await connect(server.url)
        elsewhere = {ServiceKind.GATEWAY, ServiceKind.LOGIN}
        while {health.service for health in await ask_health(nc, None) if health.ready} != set(ServiceKind) - elsewhere:
            pass
        await nc.close()
    if state == "killed":
        server.kill()
    elif state == "stopped":
        os.kill(server.process.pid, signal.SIGSTOP)
    elif state == "mute":
        server.kill()
        listening = socket.create_server(("127.0.0.1", server.port))
        held.callback(listening.close)
        listening.settimeout(60)
        for _ in range(len(pids) + 1):  # the planner has two
            held.callback(listening.accept()[0].close)
    for pid in pids.values():
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: all(forked.code(pid) is not None for pid in pids.values()), BOUND_SECONDS)
    held.close()
    if state == "stopped":
        os.kill(server.process.pid, signal.SIGCONT)
    codes = {name: forked.code(pid) for name, pid in pids.items()}
    assert codes == dict.fromkeys(pids, 0), {name: log.read_text()[-2000:] for name, log in logs.items()}
