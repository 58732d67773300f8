"""Generated documents are up to date, and every setting is documented."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_generated_documents_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_variable_that_the_code_reads_is_documented() -> None:
    parts = (
        *[
            "schemas",
            "bus",
            "collectors",
            "processors",
            "planner",
            "client",
            "exporter",
            "notifier",
            "cli",
            "dashboard",
            "gateway",
        ],
        "compose.yaml",
    )
    found: set[str] = set()
    for part in parts:
        for file in (ROOT / part).rglob("*.py") if (ROOT / part).is_dir() else [ROOT / part]:
            found.update(re.findall(r"[\"'{](CORRAL_[A-Z0-9_]*[A-Z0-9])[\"':]", file.read_text()))
    # Streams, and accounts of the server.
    # What every option has (`CORRAL_<COMMAND>_<OPTION>`) is documented as such.
    streams = {
        "CORRAL_REQUEST_EXPORT",
        "CORRAL_TELEMETRY",
        "CORRAL_FACTS",
        "CORRAL_REQUESTS",
        "CORRAL_INVENTORY",
        "CORRAL_DEAD",
        "CORRAL_JOBS",
        "CORRAL_LOGS",
        "CORRAL_REPORTS",
        "CORRAL_HOSTS",
        "CORRAL_PEOPLE",
    }
    assert len(found) > 30
    documented = (ROOT / "docs" / "reference" / "configuration.md").read_text()
    assert sorted(name for name in found - streams if f"`{name}`" not in documented) == []
