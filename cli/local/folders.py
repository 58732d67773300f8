"""Folders of a local cluster."""

from __future__ import annotations

import os
from pathlib import Path


def default_data() -> Path:
    """Default data folder of a local cluster: `$XDG_DATA_HOME/corral`, else `~/.local/share/corral`."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "corral"


def dashboard_state(data: Path) -> Path:
    """The state folder of a local cluster's dashboard."""
    return data / "dashboard"
