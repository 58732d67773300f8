"""The shipped alerts, checked with promtool: each fires for its cause and for nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.exporter_process import known

PROMETHEUS = Path(__file__).parents[2] / "deploy" / "prometheus"


@pytest.fixture(autouse=True)
def _promtool() -> None:
    if not known("promtool"):
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")


def judged(cases: Path) -> str:
    done = subprocess.run(
        ["promtool", "test", "rules", str(cases)], capture_output=True, text=True, timeout=300, check=False
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_every_alert_fires_on_what_it_is_for_and_on_nothing_else() -> None:
    assert judged(PROMETHEUS / "tests" / "alerts.yml") == ""


def test_every_alert_has_cases_of_both_kinds_that_can_fail(tmp_path: Path) -> None:
    """An alert that is taken out fails the cases: there is one that it fires on, and one that it does not."""
    rules = (PROMETHEUS / "alerts.yml").read_text()
    cases = (PROMETHEUS / "tests" / "alerts.yml").read_text()
    (tmp_path / "tests").mkdir()
    shutil.copy(PROMETHEUS / "tests" / "alerts.yml", tmp_path / "tests" / "alerts.yml")
    names = re.findall(r"- alert: (\w+)", rules)
    assert len(names) == len(set(names)) > 20
    quiet = set(re.findall(r"alertname: (\w+), exp_alerts: \[\]", cases))
    assert quiet == set(names)
    (tmp_path / "alerts.yml").write_text(re.sub(r"- alert: (\w+)", r"- alert: No\1", rules))
    failed = judged(tmp_path / "tests" / "alerts.yml")
    assert set(re.findall(r"alertname: (\w+), time", failed)) == set(names)
