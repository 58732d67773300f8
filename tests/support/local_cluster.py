"""A real cluster for tests: `corral up` as a process, and the `corral` command beside it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from corral.bus.access.folder import Authority
from corral.cli.local.access import account_name
from corral.cli.main import main
from support.empty_history import empty_history

SIMULATED = ("--source", "simulated", "--hosts", "2", "--devices", "4", "--interval", "400ms")
CORRAL = (sys.executable, "-m", "corral.cli.main")


def environment(**values: str) -> dict[str, str]:
    """This process's environment without what would lead a command to another cluster."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")}
    # See `conftest`: of a database of a few rows one core makes less work than two.
    return {**kept, "CORRAL_OWNER": "tester", "CORRAL_CONFIG": os.devnull, "CORRAL_THREADS": "1", **values}


def corral(*arguments: str, url: str | None = None, **values: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*CORRAL, *arguments],
        env=environment(**({"CORRAL_NATS_URL": url} if url else {}), **values),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def invoke(*arguments: str, url: str, **values: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in this process, from `main` on: all of it but the start of an interpreter."""
    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    code: Any = 0
    with (
        mock.patch.dict(os.environ, environment(**({"CORRAL_NATS_URL": url} | values)), clear=True),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main(list(arguments))
        except SystemExit as end:
            code = end.code or 0
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(arguments, code, *texts)


def wait_for(found: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The first truthy value; the test fails where none comes."""
    end = time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        if value := found():
            return value
        # An expensive question is asked less often: what answers it needs the time.
        time.sleep(max(0.05, min(2 * (time.monotonic() - began), 1.0)))
    raise AssertionError(f"nothing within {seconds} s")


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter where it ends between open and read
        return False


class LocalCluster:
    """`corral up` on simulated GPUs: 2 hosts of 4, a sample each 0.4 s, unless other options are given.

    Without authentication, so that a command needs no more than the URL; with it, `credentials` are of whoever runs the
    tests, in the variables that programs take them from.
    """

    def __init__(self, folder: Path, *options: str, authenticated: bool = False) -> None:
        self.folder = folder
        self.credentials: dict[str, str] = {}
        self.log = folder.with_suffix(".log")
        self._options = (*(options or SIMULATED), *(() if authenticated else ("--no-auth",)))
        self._authenticated = authenticated
        # Made once for all clusters: its views take half a second.
        folder.mkdir(parents=True, exist_ok=True)
        if not (file := folder / "history.duckdb").exists():
            shutil.copy(empty_history(), file)
        self.process: subprocess.Popen[bytes]
        self.url = ""
        self.start()

    def start(self) -> None:
        """Start it, where it does not run; on its old data if there are any."""
        if self.url and self.process.poll() is None:
            return
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [*CORRAL, "up", "--no-dashboard", "--data", str(self.folder), "--port", "0", *self._options],
                # A device is free once a list of its processes says so: of the usual ten seconds each test waits half.
                env=environment(CORRAL_PROCESSES="2s"),
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
        self.url = json.loads((self.folder / "cluster.json").read_text())["url"]
        if self._authenticated:
            self.credentials["CORRAL_NATS_CREDS"] = str(Authority(self.folder / "auth").credentials(account_name()))

    def output(self) -> str:
        return self.log.read_text()

    def corral(self, *arguments: str, **values: str) -> subprocess.CompletedProcess[str]:
        return invoke(*arguments, url=self.url, **(self.credentials | values))

    def json(self, *arguments: str, **values: str) -> Any:
        """What a command prints with `--json`; it must end well."""
        done = self.corral(*arguments, "--json", **values)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def rows(self, sql: str) -> list[list[Any]]:
        return self.json("query", sql)["rows"]

    def parts(self) -> dict[str, int]:
        """Process ids of the children of `corral up`, by what they are."""
        found: dict[str, int] = {}
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            try:
                words = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
            except FileNotFoundError:
                continue
            for word, name in (("process", "processor"), ("plan", "planner"), ("collect", "collector")):
                if word in words:
                    found[name] = int(child)
            if words[0].endswith("nats-server"):
                found["nats"] = int(child)
        return found

    def stop(self) -> int:
        """As Ctrl-C does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                return self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()
