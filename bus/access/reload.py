"""Reload the configuration of a running server."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Final

LOG_NAME: Final = "nats-server.log"
"""Log file of an embedded server, next to its pid file."""
_SAYS_SO: Final = b"Reloaded server configuration"
_SECONDS: Final = 5.0


def reload(pid_file: Path) -> int | None:
    """Make the server whose process id is in a file reload its configuration, and wait until its log confirms it.

    The wait ends after 5 s. It is skipped if the server's log is not next to the pid file.

    Returns:
        Process id of the server; None if no server runs under it.
    """
    log = pid_file.with_name(LOG_NAME)
    try:
        pid = int(pid_file.read_text())
        # A process id from a stale file may belong to another process by now.
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
