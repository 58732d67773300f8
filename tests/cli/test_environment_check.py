"""Misspelled environment variables are errors, since they would otherwise be ignored silently."""

from __future__ import annotations

from pathlib import Path

import pytest
from corral.cli import environment_check
from corral.cli.exits import CommandError


@pytest.mark.parametrize(
    ("command", "name", "found"),
    [
        ("request", "CORRAL_REQUEST_NUM_GPUS", "CORRAL_REQUEST_GPUS"),
        ("devices", "CORRAL_URL", "CORRAL_NATS_URL"),
        ("devices", "CORRAL_NATS_CREDENTIALS", "CORRAL_NATS_CREDS"),
        ("process", "CORRAL_MEMROY", "CORRAL_MEMORY"),
        ("plan", "CORRAL_STREAM_SCALE", "CORRAL_STREAMS_SCALE"),
        ("devices", "CORRAL_OWNR", "CORRAL_OWNER"),
        ("devices", "CORRAL_NATS_ULR", "CORRAL_NATS_URL"),
        ("process", "CORRAL_PROCESS_MEMORY_MB", "CORRAL_PROCESS_MEMORY"),
        ("collect", "CORRAL_LOG_FORMATS", "CORRAL_LOG_FORMAT"),
    ],
)
def test_a_near_miss_is_refused_with_the_one_that_was_meant(
    monkeypatch: pytest.MonkeyPatch, command: str, name: str, found: str
) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(CommandError, match=f"{name} is set.*did you mean {found}?"):
        environment_check.check(command)


OWN = (
    *("CORRAL_DATA_DIR", "CORRAL_CONFIG_DIR", "CORRAL_STATE", "CORRAL_LEASE_ID", "CORRAL_PORT_4", "CORRAL_BUS_URL_2"),
    *("CORRAL_NATS_USER", "CORRAL_NATS_TOKEN", "CORRAL_TEST_CREDS", "CORRAL_AUTH", "CORRAL_MODEL", "CORRAL_DEVICE"),
    *("CORRAL_RUN_ID", "CORRAL_RUN_USER", "CORRAL_REQUEST_ID", "CORRAL_DASHBOARD_URL", "CORRAL_COLLECT_IMAGE"),
)
"""Near to a variable of Corral in their letters, or called like an option elsewhere, and yet a script's own."""


def test_what_is_somebody_else_s_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("CORRAL_REQUEST_GPUS", "CORRAL_DB", "CORRAL_MEMORY", "CORRAL_NATS_PORT_4222_TCP_ADDR", "CORRAL_TEAM")
    for name in (*names, "CORRAL_NATS_SERVICE_HOST", "CORRAL_BIN", "CORRAL_ROOT", *OWN):
        monkeypatch.setenv(name, "2")
    for command in ("request", "run", "devices", "process", "collect", "plan", "dashboard", "up", "auth", "nothing"):
        environment_check.check(command)


def test_every_variable_of_the_documentation_is_known() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "configuration.md"
    words = {word.strip("`,.") for word in page.read_text().split() if word.startswith("`CORRAL_")}
    named = {word for word in words if word.replace("_", "").isalnum() and word.isupper()}
    from corral.cli.loading import load
    from corral.cli.registry import COMMANDS

    known = set(environment_check.OTHERS).union(*(environment_check.known(load(name)) for name in COMMANDS))
    assert {"CORRAL_NATS_URL", "CORRAL_DB"} <= named
    assert named - known == set()
