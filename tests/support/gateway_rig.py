"""A gateway for tests: beside a bus with its parts as processes, or in this process with limits of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
from corral.bus.access.roles import Role
from corral.bus.access.tokens import token_of
from corral.bus.credentials import identify
from corral.client import SyncClient
from corral.gateway.settings import Settings
from support.empty_history import empty_history
from support.local_cluster import wait_for
from support.secured_bus import SecuredBus

SIMULATED = ("collect", "--source", "simulated", "--hosts", "2", "--devices", "4", "--interval", "300ms")
PEOPLE = {"alice": Role.REQUESTER, "bob": Role.REQUESTER, "vera": Role.VIEWER, "olga": Role.OPERATOR}


def bus_of(folder: Path, **options: Any) -> SecuredBus:
    """A bus with the users of these tests; it is not started."""
    folder.mkdir(parents=True, exist_ok=True)
    made = SecuredBus(folder, **options)
    made.add(Role.PLANNER, "planner")
    made.add(Role.PROCESSOR, "processor")
    made.add(Role.COLLECTOR, "collector", hosts=["*"], follows_leases=True)
    made.add(Role.RUNNER, "runner", hosts=["*"])
    made.add(Role.GATEWAY, "http")
    made.add(Role.REQUESTER, "portal", owner="*")
    for name, role in PEOPLE.items():
        made.add(role, name)
    return made


def token(bus: SecuredBus, name: str, owner: str = "") -> str:
    return token_of(identify(bus.credentials(name)), owner)


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


class GatewayRig:
    """A bus with all parts, and the gateway as a process."""

    def __init__(self, bus: SecuredBus, url: str) -> None:
        self.bus = bus
        self.url = url

    def person(self, name: str, **options: Any) -> httpx.Client:
        """An HTTP client with the token of a user."""
        return httpx.Client(base_url=self.url, headers=bearer(token(self.bus, name)), timeout=30, **options)

    @property
    def log(self) -> str:
        return (self.bus.folder / "http.log").read_text()


@contextlib.contextmanager
def running_rig(folder: Path) -> Iterator[GatewayRig]:
    """A rig whose fleet is there."""
    bus = bus_of(folder)
    bus.server.start()
    shutil.copy(empty_history(), folder / "history.duckdb")
    with contextlib.ExitStack() as parts:
        parts.callback(bus.server.kill)
        parts.enter_context(bus.part("http", "serve-http", "--listen", "127.0.0.1:0"))
        parts.enter_context(bus.part("planner", "plan"))
        parts.enter_context(bus.part("collector", *SIMULATED, "--state", str(folder / "state")))
        processor = ("process", "--db", str(folder / "history.duckdb"))
        parts.enter_context(bus.part("processor", *processor, CORRAL_THREADS="1"))
        log = folder / "http.log"
        url = wait_for(lambda: re.search(r"served at (\S+)", log.read_text()))[1]
        with SyncClient(bus.server.url, credentials=bus.credentials("vera"), patience=60) as client:
            wait_for(lambda: client.fleet().usable_devices == 8)
            client.history()
        yield GatewayRig(bus, url)
        # What the gateway or a part needs, it may.
        assert bus.violations(ignoring=tuple(PEOPLE)) == []


@contextlib.asynccontextmanager
async def in_process(url: str, credentials: str = "", **limits: Any) -> AsyncIterator[str]:
    """A gateway in this process; its URL."""
    from corral.bus.credentials import Identity
    from corral.gateway import server

    stop, started = asyncio.Event(), asyncio.get_running_loop().create_future()
    settings = Settings(**{"port": 0, "url": url, "answer_seconds": 5.0, "patience_seconds": 0.1, **limits})
    identity = identify(credentials) if credentials else Identity()
    serving = asyncio.ensure_future(server.serve(settings, started.set_result, stop, identity=identity))
    try:
        await asyncio.wait({serving, started}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        yield started.result()
    finally:
        stop.set()
        await serving
