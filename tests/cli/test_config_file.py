"""The configuration file: its precedence below environment and flags, and the errors for invalid settings."""

import json
from pathlib import Path
from typing import Any

import pytest
from corral.cli import config as files
from support.local_cluster import LocalCluster, invoke

NOWHERE = "nats://127.0.0.1:9"


def run(file: Path, *arguments: str, **values: str) -> Any:
    return invoke(*arguments, url="", **{"CORRAL_CONFIG": str(file), "CORRAL_OWNER": ""} | values)


def shown(file: Path, *arguments: str, **values: str) -> dict[str, tuple[Any, str]]:
    done = run(file, "config", "show", *arguments, "--json", **values)
    assert done.returncode == 0, done.stderr
    return {row["key"]: (row["value"], row["source"]) for row in json.loads(done.stdout)["settings"]}


def test_a_value_is_from_the_flag_else_the_environment_else_the_file(tmp_path: Path) -> None:
    file = tmp_path / "corral.toml"
    file.write_text('[export]\nlisten = "nowhere"\n')
    from_file = run(file, "export")
    assert from_file.returncode == 2
    assert f"'nowhere' (export.listen in {file})" in from_file.stderr
    from_variable = run(file, "export", CORRAL_LISTEN="elsewhere")
    assert "'elsewhere'" in from_variable.stderr
    assert str(file) not in from_variable.stderr
    assert "'anywhere'" in run(file, "export", "--listen", "anywhere", CORRAL_LISTEN="elsewhere").stderr
    # An option without a variable of its own has one of the command and its name.
    assert "'guess'" in run(file, "up", CORRAL_UP_SOURCE="guess").stderr
    assert "'no'" in run(file, "up", "--source", "no", CORRAL_UP_SOURCE="guess").stderr
    # As Kubernetes tells of a service that is called corral-up.
    assert "'no'" in run(file, "up", "--source", "no", CORRAL_UP_PORT="tcp://10.0.0.1:80").stderr
    assert "--role" in run(file, "dashboard", CORRAL_DASHBOARD_ROLE="king").stderr


def test_each_value_is_shown_with_its_source(tmp_path: Path) -> None:
    file = tmp_path / "corral.toml"
    file.write_text(
        'nats = "nats://bus:1"\n[collect]\nlabel = { rack = "r1" }\nspill = false\n[process]\nkeep_raw = 7\n'
    )
    found = shown(file, CORRAL_INTERVAL="5s", CORRAL_COLLECT_SEED="7", CORRAL_DASHBOARD_PORT="9000")
    assert found["dashboard.port"] == ("9000", "CORRAL_DASHBOARD_PORT")
    assert found["nats"] == ("nats://bus:1", str(file))
    assert found["collect.label"] == (["rack=r1"], str(file))
    assert found["collect.spill"] == (False, str(file))
    assert found["collect.interval"] == ("5s", "CORRAL_INTERVAL")
    assert found["collect.seed"] == ("7", "CORRAL_COLLECT_SEED")
    assert found["collect.batch"] == ("250ms", "default")
    assert found["process.keep-raw"] == ("7", str(file))
    assert set(shown(file, "--changed")) >= {"collect.label", "process.keep-raw"}
    assert "collect.batch" not in shown(file, "--changed")
    assert set(shown(file, "process")) >= {"process.db", "process.keep-raw"}
    assert "collect.label   " in run(file, "config", "show").stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[colect]\n", "did you mean collect?"),
        ('[collect]\nintervall = "1s"\n', "did you mean interval?"),
        ('[collect]\nnats = "nats://x:1"\n', "top of the file"),
        ('[collect]\nsource = "guess"\n', "collect.source"),
        ("[collect]\nspill = 3\n", "true or false"),
        ("[collect]\nhosts = true\n", "takes a value"),
        ('[collect]\ninterval = ["1s", "2s"]\n', "one value"),
        ("collect = 3\n", "[collect]"),
        ('[contexts.lab]\nnats = "nats://x:1"\nowmer = "me"\n', "did you mean owner?"),
        ('current = "lab"\n', "no context 'lab'"),
    ],
)
def test_what_is_wrong_in_the_file_is_named_with_what_would_be_right(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "corral.toml"
    file.write_text(text)
    done = run(file, "collect")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert said in line
    if "current" not in text:
        assert str(file) in line
        checked = run(file, "config", "check")
        assert checked.returncode == 2
        assert said in checked.stderr


def test_the_bus_at_the_top_of_the_file_is_used_where_no_context_is(cluster: LocalCluster, tmp_path: Path) -> None:
    file = tmp_path / "corral.toml"
    file.write_text(f'nats = "{cluster.url}"\n[fleet]\njson = true\n')
    assert json.loads(run(file, "fleet").stdout)["devices"] == 8
    assert run(file, "fleet", CORRAL_NATS_URL=NOWHERE).returncode == 3
    assert run(file, "context", "add", "far", NOWHERE).returncode == 0
    assert run(file, "fleet").returncode == 3
    assert run(Path("/dev/null"), "--config", str(file), "fleet").returncode == 3
    assert run(file, "fleet", "--nats", cluster.url).returncode == 0
    missing = run(Path("/dev/null"), "--config", str(tmp_path / "none.toml"), "fleet")
    assert missing.returncode == 2
    assert "none.toml" in missing.stderr


def test_commands_that_write_the_file_keep_what_people_wrote(tmp_path: Path) -> None:
    file = tmp_path / "new" / "corral.toml"
    assert run(file, "config", "set", "collect.interval", "100ms").returncode == 0
    file.write_text("# mine\n" + file.read_text().replace('"100ms"', '"100ms"  # fast'))
    for arguments in (
        ["config", "set", "collect.label", "rack=r1", "zone=a"],
        ["config", "set", "collect.spill", "false"],
        ["config", "set", "nats", "nats://x:1"],
        ["context", "add", "lab", "nats://lab:1", "--owner", "rat", "--ca", "ca.crt"],
        ["context", "add", "far", NOWHERE],
        ["context", "remove", "far"],
        ["config", "unset", "collect.spill"],
    ):
        done = run(file, *arguments)
        assert done.returncode == 0, done.stderr
    text = file.read_text()
    assert text.startswith("# mine\n")
    assert "# fast" in text
    assert file.stat().st_mode & 0o077 == 0
    found = files.read([file])
    assert found.tables == {"collect": {"interval": "100ms", "label": ["rack=r1", "zone=a"]}}
    assert Path(found.contexts["lab"].ca).is_absolute()
    assert (found.top.nats, found.current, set(found.contexts)) == ("nats://x:1", "lab", {"lab"})
    for arguments, code in (
        (["config", "set", "collect.intervall", "1s"], 2),
        (["config", "set", "collect.source", "guess"], 2),
        (["config", "set", "collect.spill", "maybe"], 2),
        (["config", "unset", "plan.policy"], 5),
    ):
        assert run(file, *arguments).returncode == code, arguments
    assert file.read_text() == text


def test_a_user_goes_before_the_machine_key_by_key(tmp_path: Path) -> None:
    machine, user = tmp_path / "machine.toml", tmp_path / "user.toml"
    machine.write_text('nats = "nats://machine:1"\nowner = "all"\n[collect]\ninterval = "1s"\nbatch = "1s"\n')
    user.write_text('nats = "nats://user:1"\n[collect]\ninterval = "2s"\n')
    found = files.read([machine, user])
    assert (found.top.nats, found.top.owner) == ("nats://user:1", "all")
    assert found.tables["collect"] == {"interval": "2s", "batch": "1s"}
    assert (found.origins["collect.interval"], found.origins["collect.batch"]) == (user, machine)
    assert files.read([tmp_path / "none.toml"]) == files.Config()
