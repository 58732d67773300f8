"""What is written about settings holds: documents, unit and manifest name only what `corral collect` takes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from corral.cli.main import load

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "systemd" / "corral-collector.service"
MANIFEST = ROOT / "deploy" / "kubernetes" / "collector-daemonset.yaml"
OUTSIDE = {"CORRAL_NATS_URL", "CORRAL_NATS_CREDS", "CORRAL_LEASE"}
"""Of the bus, and of the processes that are looked at."""


def options() -> dict[str, Any]:
    """The command's options by their environment variable."""
    found: dict[str, Any] = {}
    for parameter in load("collect").params:
        names = [parameter.envvar] if isinstance(parameter.envvar, str) else list(parameter.envvar or [])
        found |= dict.fromkeys(names, parameter)
    return found


def test_the_table_of_settings_is_the_command_s() -> None:
    table = re.findall(
        r"^\| `(CORRAL_\w+)` \| `(?:corral )?(--[\w-]+)` \| (.*?) \|",
        (ROOT / "docs/how-to/collectors.md").read_text(),
        re.M,
    )
    documented = {name: (option, default.strip("`")) for name, option, default in table}
    known = options()
    assert set(documented) - OUTSIDE == set(known)
    for name, parameter in known.items():
        option, default = documented[name]
        assert option in parameter.opts
        if isinstance(parameter.default, str) and not isinstance(parameter.default, bool):
            assert default == str(parameter.default)


@pytest.mark.parametrize("file", [UNIT, MANIFEST])
def test_unit_and_manifest_set_what_there_is(file: Path) -> None:
    named = set(re.findall(r"CORRAL_[A-Z_]+", file.read_text()))
    assert named
    assert named - OUTSIDE <= set(options())


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    program = Path(sys.executable).parent / "corral"
    unit.write_text(UNIT.read_text().replace("/opt/corral/bin/corral", str(program)))
    verified = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=30, check=False
    )
    assert verified.returncode == 0, verified.stderr
    assert UNIT.name not in verified.stderr
