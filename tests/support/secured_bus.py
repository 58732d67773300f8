"""A bus with authentication for tests: an authority, its server, and the parts as processes, each with its own key."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from corral.bus.access.folder import Authority
from corral.bus.access.roles import Role
from corral.bus.connect import connect as bus_connect
from corral.cli.local.server import EmbeddedServer
from nats.aio.client import Client

HOST = "127.0.0.1"


class SecuredBus:
    """A server of `corral auth` on a free loopback port."""

    def __init__(self, folder: Path, *, tls: bool = False, mutual: bool = False) -> None:
        self.folder = folder
        server = EmbeddedServer(folder / "nats")
        self.authority = Authority.create(
            folder / "auth", hosts=[HOST] if tls else [], mutual=mutual, pid_file=str(server.pid_file)
        )
        server.include = self.authority.config
        self.server = server

    def add(self, role: Role, name: str, **fields: object) -> None:
        self.authority.add(role, name, **fields)  # type: ignore[arg-type]

    def credentials(self, name: str) -> str:
        return str(self.authority.credentials(name))

    async def connect(self, name: str, **options: object) -> Client:
        """As a user, by name."""
        return await bus_connect(self.server.url, credentials=self.credentials(name), name=f"test-{name}", **options)

    def environment(self, name: str = "", **more: str) -> dict[str, str]:
        """Of a command that a user runs."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("CORRAL_")}
        proof = {"CORRAL_NATS_CREDS": self.credentials(name)} if name else {}
        return {**kept, "CORRAL_CONFIG": os.devnull, "CORRAL_NATS_URL": self.server.url, **proof, **more}

    def corral(self, name: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command as a user, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "corral.cli.main", *arguments],
            env=self.environment(name, **more),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    @contextmanager
    def part(self, name: str, *arguments: str, **more: str) -> Iterator[subprocess.Popen[bytes]]:
        """A part as a process, stopped at the end; its log is `<name>.log`."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "corral.cli.main", *arguments],
                env=self.environment(name, **more),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def violations(self, ignoring: Sequence[str] = ()) -> list[str]:
        """What the server has refused so far, but for some users' by name: `user: subject`."""
        names = {user.key: user.name for user in self.authority.registry.users.values()}
        found: list[str] = []
        for line in (self.folder / "nats" / "nats-server.log").read_text().splitlines():
            if "Violation" in line and (key := re.search(r"nkey:(U\w+)", line)):
                name = names.get(key[1], key[1])
                if name not in ignoring:
                    found.append(f"{name}: {line.rpartition('Violation - ')[2]}")
        return found
