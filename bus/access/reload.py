"""Telling a running server that its configuration has changed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Final

LOG_NAME: Final = "nats-server.log"
"""Of an embedded server, beside its process id."""
_SAYS_SO: Final = b"Reloaded server configuration"
_SECONDS: Final = 5.0


def reload(pid_file: Path) -> int | None:
    """Let the server whose process id is in a file read its configuration anew, and wait until it says that it has.

    A server whose log is not beside the file is not waited for.

    Returns:
        Its process id; None where no server runs under it.
    """
    log = pid_file.with_name(LOG_NAME)
    try:
        pid = int(pid_file.read_text())
        # A number that was left behind may be another process's by now.
        if Path("/proc/self").exists() and Path(f"/proc/{pid}/comm").read_text().strip() != "nats-server":
            return None
        before = log.stat().st_size if log.exists() else None
        os.kill(pid, signal.SIGHUP)
    except (OSError, ValueError):
        return None
    if before is not None:
        _wait(log, before)
    return pid


def _wait(log: Path, before: int) -> None:
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), log.open("rb") as lines:
            lines.seek(before)
            if _SAYS_SO in lines.read():
                return
        time.sleep(0.02)
