"""NATS servers for a bench: one, or several that form a cluster, whose streams then have copies; and their CPU time."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from corral.cli.local.server import EmbeddedServer


def start(folder: Path, count: int) -> list[EmbeddedServer]:
    """Start them and wait until each takes connections; a cluster needs some seconds more to elect its leaders."""
    if count == 1:
        servers = [EmbeddedServer(folder / "nats")]
    else:
        ports = _free_ports(count)
        routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
        servers = []
        for number, port in enumerate(ports):
            include = folder / f"cluster{number}.conf"
            cluster = f'cluster {{ name: bench, listen: "127.0.0.1:{port}", routes: [{routes}] }}'
            include.write_text(f"server_name: server{number}\n{cluster}\n")
            servers.append(EmbeddedServer(folder / f"nats{number}", include=include))
    for server in servers:
        server.start()
    return servers


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
