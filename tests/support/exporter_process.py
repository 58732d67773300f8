"""Help for the exporter's tests: a page as numbers, and real processes on free ports."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

from prometheus_client.parser import text_string_to_metric_families
from support.local_cluster import CORRAL, environment, wait_for

Series = dict[str, dict[frozenset[tuple[str, str]], float]]


def get(url: str, **headers: str) -> bytes:
    with urlopen(
        Request(url, headers={name.replace("_", "-"): value for name, value in headers.items()}), timeout=20
    ) as r:
        return r.read()


def parse(page: bytes) -> Series:
    """Every series of a page by name and labels; the official parser must accept each line."""
    found: Series = {}
    kinds = types(page)
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            # The parser gives every counter the suffix that dcgm-exporter's lack.
            bare = sample.name.removesuffix("_total")
            name = bare if bare in kinds else sample.name
            key = frozenset(sample.labels.items())
            assert key not in found.setdefault(name, {}), f"{name} twice"
            found[name][key] = sample.value
    return found


def types(page: bytes) -> dict[str, str]:
    return dict(re.findall(r"^# TYPE (\S+) (\S+)$", page.decode(), re.M))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def running(log: Path, *command: str, **values: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with its output in a file; ended with the block."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=environment(**values), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def exporting(url: str, log: Path, *options: str) -> Iterator[str]:
    """`corral export` on a free port; gives the address of its page."""
    command = (*CORRAL, "export", "--nats", url, "--listen", "127.0.0.1:0", *options)
    with running(log, *command) as process:
        wait_for(lambda: "metrics are at" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield re.findall(r"http://\S+", log.read_text())[0]


def known(name: str) -> bool:
    """Whether a binary is on this machine."""
    return any(os.access(Path(folder) / name, os.X_OK) for folder in os.get_exec_path())
