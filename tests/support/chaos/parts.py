"""The parts of a cluster as real processes, on loopback or each on a network host of its own, that can be broken.

A part runs on a `Place`: loopback, or a network namespace that hangs on a bridge like a host on a switch. Namespaces
need no privileges of this machine but `unshare`: everything is made inside a namespace of the run's own.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from corral.cli.local.server import die_with_parent, server_binary

CORRAL = (sys.executable, "-m", "corral.cli.main")
_NETWORK = "10.213.0"
_NOWHERE = "02:00:00:00:ff:ff"
"""A hardware address that no host has: what is sent to it is lost without a word."""


class Place:
    """Where a part runs: this machine's loopback."""

    address = "127.0.0.1"

    def enter(self, command: Sequence[str]) -> list[str]:
        """The command that runs another one there."""
        return list(command)


class Network:
    """A switch with hosts on it, inside the network namespace of this process (which `main` made for it)."""

    def __init__(self) -> None:
        self._places: list[Host] = []
        _ip("link", "set", "lo", "up")
        _ip("link", "add", "switch", "type", "bridge")
        _ip("addr", "add", f"{_NETWORK}.254/24", "dev", "switch")
        _ip("link", "set", "switch", "up")

    def host(self) -> Host:
        """One more host."""
        made = Host(len(self._places) + 1)
        self._places.append(made)
        return made

    def close(self) -> None:
        for place in self._places:
            place.close()


class Host(Place):
    """A network host of its own."""

    def __init__(self, number: int) -> None:
        self.address = f"{_NETWORK}.{number}"
        self.hardware = f"02:00:00:00:00:{number:02x}"
        # It holds the namespace, so that parts may come and go.
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sleep", "100000"], preexec_fn=functools.partial(die_with_parent, os.getpid(), 9)
        )
        self._namespace = f"--net=/proc/{self._holder.pid}/ns/net"
        own = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{self._holder.pid}/ns/net") == own:
            time.sleep(0.01)
        outer = f"port{number}"
        _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", str(self._holder.pid))
        _ip("link", "set", outer, "master", "switch", "up")
        for words in (
            ("link", "set", "lo", "up"),
            ("link", "set", "eth0", "address", self.hardware),
            ("addr", "add", f"{self.address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
        ):
            self.ip(*words)

    def enter(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", self._namespace, *command]

    def ip(self, *words: str) -> None:
        subprocess.run(self.enter(["ip", *words]), check=True, timeout=10)

    def silence(self, other: Host, on: bool) -> None:
        """Lose what this host sends to another one; half of a partition."""
        hardware = _NOWHERE if on else other.hardware
        self.ip("neigh", "replace", other.address, "lladdr", hardware, "dev", "eth0", "nud", "permanent")

    def vanish(self, on: bool) -> None:
        """Pull the cable, or plug it in."""
        self.ip("link", "set", "eth0", "down" if on else "up")

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()


def partition(some: Sequence[Host], others: Sequence[Host], on: bool) -> None:
    """Cut two groups of hosts off from each other without a word to anyone, or join them."""
    for one in some:
        for other in others:
            one.silence(other, on)
            other.silence(one, on)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=10)


class Part:
    """A process that is started, killed and started again."""

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, place: Place, environment: dict[str, str] | None = None
    ) -> None:
        self.name = name
        self.place = place
        self.log = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._command = list(command)
        self._environment = environment or {}

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")}
        with self.log.open("ab") as out:
            # nsenter becomes the command itself, so that signals reach it.
            self.process = subprocess.Popen(
                self.place.enter(self._command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**kept, "CORRAL_CONFIG": os.devnull, "PYTHONUNBUFFERED": "1", **self._environment},
                preexec_fn=functools.partial(die_with_parent, os.getpid(), signal.SIGKILL),
            )

    def kill(self) -> None:
        """As a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def pause(self, on: bool) -> None:
        os.kill(self.pid, signal.SIGSTOP if on else signal.SIGCONT)

    def stop(self, seconds: float = 30.0) -> int:
        """In order; its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not end within {seconds:g} s; its log: {self.tail()}") from None

    def tail(self, characters: int = 2000) -> str:
        return self.log.read_text(errors="replace")[-characters:] if self.log.exists() else ""


class Bus:
    """One NATS server, or three that form a cluster with JetStream."""

    def __init__(self, folder: Path, places: Sequence[Place], *, store: Sequence[Path] = (), options: str = "") -> None:
        self.folder = folder
        self.places = list(places)
        taken = _free_ports(2 * len(self.places))
        self.ports, self._routes = taken[: len(self.places)], taken[len(self.places) :]
        self.stores = list(store) or [folder / f"store{number}" for number in range(len(self.places))]
        self._options = options
        self.servers = [self._server(number) for number in range(len(self.places))]

    @property
    def urls(self) -> list[str]:
        return [f"nats://{place.address}:{port}" for place, port in zip(self.places, self.ports, strict=True)]

    @property
    def url(self) -> str:
        """All of them, as Corral takes them."""
        return ",".join(self.urls)

    def _server(self, number: int) -> Part:
        place = self.places[number]
        routes = ", ".join(
            json.dumps(f"nats://{other.address}:{port}") for other, port in zip(self.places, self._routes, strict=True)
        )
        cluster = (
            f"cluster {{ name: chaos, listen: {json.dumps(f'{place.address}:{self._routes[number]}')}, "
            f"routes: [{routes}] }}\n"
        )
        config = self.folder / f"server{number}.conf"
        config.write_text(
            f"server_name: server{number}\nlisten: {json.dumps(f'{place.address}:{self.ports[number]}')}\n"
            "max_payload: 1048576\n"
            f"jetstream {{ store_dir: {json.dumps(str(self.stores[number]))}\n{self._options}\n}}\n"
            + (cluster if len(self.places) > 1 else "")
        )
        return Part(f"server{number}", [server_binary(), "-c", str(config)], self.folder, place)

    def start(self) -> None:
        for server in self.servers:
            server.start()

    def forget(self, number: int) -> None:
        """A server's disk is gone."""
        shutil.rmtree(self.stores[number], ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    found: list[socket.socket] = []
    try:
        for _ in range(count):
            probe = socket.socket()
            probe.bind(("127.0.0.1", 0))
            found.append(probe)
        return [probe.getsockname()[1] for probe in found]
    finally:
        for probe in found:
            probe.close()


def faketime() -> Path | None:
    """The library that gives a process another clock; None where it is not installed."""
    folders: Iterator[Path] = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
    return next(folders, None)
