"""Services as processes that share their imports: many start in the time of one interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support.local_cluster import environment

_CODE = """
import ctypes, importlib, json, os, sys
from corral.cli.main import main
for name in sys.argv[1:]:
    importlib.import_module(name)
ctypes.CDLL(None).prctl(1, 9)  # never outlive the test
for line in sys.stdin:
    asked = json.loads(line)
    if "pid" in asked:
        pid, status = os.waitpid(asked["pid"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    ctypes.CDLL(None).prctl(1, 9)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    out = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = 1
    try:
        main(asked["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
"""
_MODULES = (
    "planner.service",
    "processors.embedded",
    "processors.service",
    "collectors.service",
    "collectors.simulated.source",
    "runners.service",
    "exporter",
    "dashboard.server",
    "client",
)


class ForkedServices:
    """A process that has imported all services, and forks them."""

    def __init__(self) -> None:
        self._codes: dict[int, int | None] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, *(f"corral.{name}" for name in _MODULES)],
            env=environment(OPENBLAS_NUM_THREADS="1"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, *arguments: str, log: Path, folder: Path, **values: str) -> int:
        """Start a command, with its output in a file; its process id."""
        asked = {"arguments": arguments, "log": str(log), "folder": str(folder), "environment": environment(**values)}
        return int(self._ask(asked))

    def code(self, pid: int) -> int | None:
        """Exit code of a process; None while it runs."""
        if self._codes.get(pid) is None:
            self._codes[pid] = json.loads(self._ask({"pid": pid}))
        return self._codes[pid]

    def close(self) -> None:
        """End it, and what it has forked."""
        self._process.kill()
        self._process.wait()

    def _ask(self, asked: object) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + os.linesep)
        self._process.stdin.flush()
        return self._process.stdout.readline()
