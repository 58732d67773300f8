"""Paths of the configuration files, for the Python client and every command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

CONFIG_VARIABLE: Final = "CORRAL_CONFIG"
MACHINE_FILE: Final = Path("/etc/corral/corral.toml")


def path() -> Path:
    """Path of the file that commands write to: `$CORRAL_CONFIG`, else the user's `corral/corral.toml`."""
    if named := os.environ.get(CONFIG_VARIABLE):
        return Path(named)
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(base) / "corral" / "corral.toml"


def paths() -> list[Path]:
    """Paths of all files to read, lowest precedence first."""
    return [path()] if os.environ.get(CONFIG_VARIABLE) else [MACHINE_FILE, path()]
