"""Telling a running server that its configuration has changed."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def reload(pid_file: Path) -> int | None:
    """Let the server whose process id is in a file read its configuration anew.

    Returns:
        Its process id; None where no server runs under it.
    """
    try:
        pid = int(pid_file.read_text())
        # A number that was left behind may be another process's by now.
        if Path("/proc/self").exists() and Path(f"/proc/{pid}/comm").read_text().strip() != "nats-server":
            return None
        os.kill(pid, signal.SIGHUP)
    except (OSError, ValueError):
        return None
    return pid
