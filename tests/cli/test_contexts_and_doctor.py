"""Contexts, and the findings of `corral doctor`."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from corral.cli.config import apply
from corral.cli.local.server import EmbeddedServer
from corral.client.request import OWNER_VARIABLE
from support.local_cluster import LocalCluster, invoke

NOWHERE = "nats://127.0.0.1:9"


def run(config: Path, *arguments: str, **values: str) -> Any:
    return invoke(*arguments, url="", CORRAL_CONFIG=str(config), **{OWNER_VARIABLE: ""} | values)


def test_a_context_leads_commands_to_its_bus(cluster: LocalCluster, tmp_path: Path) -> None:
    config = tmp_path / "corral" / "config.toml"
    assert run(config, "context", "add", "lab", cluster.url, "--owner", "lab-rat").returncode == 0
    assert run(config, "context", "add", "far", NOWHERE).returncode == 0
    assert config.stat().st_mode & 0o077 == 0

    granted = run(config, "request", "--json")
    lease = json.loads(granted.stdout)["lease"]
    assert lease["owner"] == "lab-rat"
    assert run(config, "release", lease["lease_id"]).returncode == 0

    # The flag goes before the environment, the environment before the context in use.
    assert run(config, "--context", "far", "fleet", CORRAL_NATS_URL=cluster.url).returncode == 3
    assert run(config, "fleet", CORRAL_NATS_URL=NOWHERE).returncode == 3
    assert run(config, "--nats", cluster.url, "fleet", CORRAL_CONTEXT="far").returncode == 0
    assert run(config, "fleet", CORRAL_CONTEXT="far").returncode == 3
    assert run(config, "context", "use", "far").returncode == 0
    assert run(config, "fleet").returncode == 3
    assert json.loads(run(config, "context", "list", "--json").stdout)["current"] == "far"
    assert run(config, "context", "remove", "far").returncode == 0
    unknown = run(config, "--context", "far", "fleet")
    assert unknown.returncode == 2
    assert "lab" in unknown.stderr


def test_a_wrong_configuration_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    for text in ("contexts = 5", "[contexts.lab]\nurl = 'nats://x:1'", "not toml at all"):
        config.write_text(text)
        done = run(config, "fleet")
        assert done.returncode == 2
        [line] = done.stderr.splitlines()
        assert str(config) in line


@pytest.mark.parametrize("creds", [True, False])
def test_credentials_of_one_bus_are_not_shown_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, creds: bool
) -> None:
    config = tmp_path / "config.toml"
    run(config, "context", "add", "lab", NOWHERE, *(["--creds", str(tmp_path / "lab.creds")] if creds else []))
    monkeypatch.setenv("CORRAL_CONFIG", str(config))
    monkeypatch.setenv("CORRAL_NATS_URL", "nats://elsewhere:4222")
    monkeypatch.setenv("CORRAL_NATS_CREDS", "/elsewhere/other.creds")
    apply("lab")
    assert os.environ["CORRAL_NATS_URL"] == NOWHERE
    assert os.environ.get("CORRAL_NATS_CREDS") == (str(tmp_path / "lab.creds") if creds else None)
    # The environment goes before the context in use, and its bus is not shown the context's credentials.
    monkeypatch.setenv("CORRAL_NATS_URL", "nats://elsewhere:4222")
    monkeypatch.delenv("CORRAL_NATS_CREDS", raising=False)
    apply(None)
    assert os.environ["CORRAL_NATS_URL"] == "nats://elsewhere:4222"
    assert "CORRAL_NATS_CREDS" not in os.environ


@pytest.mark.parametrize(
    ("of_the_file", "of_the_context", "said", "expected"),
    [
        ("alice", "", "", "alice"),
        ("*", "", "", "account"),  # who may ask in any name asks in their own
        (None, "", "", "account"),
        ("alice", "lab-rat", "", "lab-rat"),
        ("alice", "lab-rat", "said", "said"),
    ],
)
def test_export_says_who_asks(
    tmp_path: Path, of_the_file: str | None, of_the_context: str, said: str, expected: str
) -> None:
    config, credentials = tmp_path / "corral.toml", tmp_path / "lab.creds"
    credentials.write_text(f"# user: alice\n# owner: {of_the_file}\n# inbox: _INBOX.alice\nSU{'A' * 56}\n")
    creds = ["--creds", str(credentials)] if of_the_file else []
    run(config, "context", "add", "lab", NOWHERE, "--owner", of_the_context, *creds)
    done = run(config, "context", "export", CORRAL_OWNER=said, LOGNAME="account")
    assert done.returncode == 0, done.stderr
    told = dict(line.removeprefix("export ").split("=", 1) for line in done.stdout.splitlines())
    assert told["CORRAL_NATS_URL"] == NOWHERE
    assert told["CORRAL_OWNER"] == expected
    assert told.get("CORRAL_INBOX_PREFIX") == ("_INBOX.alice" if of_the_file else None)


def findings(url: str) -> tuple[int, dict[str, str]]:
    done = invoke("doctor", "--json", url=url)
    return done.returncode, {one["what"]: one["level"] for one in json.loads(done.stdout)["findings"]}


def test_the_doctor_finds_what_is_wrong(cluster: LocalCluster, server: EmbeddedServer, tmp_path: Path) -> None:
    code, levels = findings(cluster.url)
    assert code == 0
    for what in ("bus", "clock", "planner", "history", "stream CORRAL_TELEMETRY"):
        assert levels[what] == "ok", what
    code, levels = findings(server.url)  # a bus with nothing on it
    assert code == 1
    for what in ("stream CORRAL_TELEMETRY", "planner", "history"):
        assert levels[what] == "problem", what
    config = tmp_path / "corral.toml"
    config.write_text("[collect]\nintervall = 3\n")
    done = run(config, "doctor", "--json", CORRAL_NATS_URL=cluster.url)
    assert done.returncode == 1
    found = {one["what"]: one for one in json.loads(done.stdout)["findings"]}
    assert "did you mean interval?" in found["configuration"]["detail"]
    assert [one["what"] for one in found.values() if one["level"] != "ok" and not one["fix"]] == []
    code, levels = findings(NOWHERE)
    assert (code, levels["bus"]) == (1, "problem")
    assert "planner" not in levels
