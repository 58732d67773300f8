"""The command line's interface for scripts: exit codes, JSON, one-line errors, fast help."""

import itertools
import json
import re
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from corral.cli.clock_times import parse_last_day, parse_time, zone_of
from corral.cli.exits import MEANINGS, CommandError, code_and_message
from corral.cli.loading import load
from corral.cli.local import up
from corral.cli.local.server import EmbeddedServer
from corral.cli.local.up import work_hints
from corral.cli.registry import COMMANDS
from corral.client import TooManyRequests
from corral.schemas.operations import DeviceStatus
from support.local_cluster import LocalCluster, corral, environment, invoke

GIB = 2**30
NOWHERE = "nats://127.0.0.1:9"  # the discard port: nobody listens


def test_without_a_server_each_command_says_so_in_one_line() -> None:
    commands = [
        ["request", "--json"],
        ["run", "--", "true"],
        ["query", "SELECT 1"],
        ["top", "--once"],
    ]
    for command in commands:
        done = invoke(*command, url=NOWHERE)
        assert done.returncode == 3, command
        assert done.stdout == "", command
        [line] = done.stderr.splitlines()
        assert line.startswith("corral: no NATS server answers")
        assert "corral up" in line


def test_a_greeting_names_commands_that_this_fleet_grants() -> None:
    def device(uuid: str, **values: Any) -> DeviceStatus:
        return DeviceStatus(uuid=uuid, host="h", index=0, memory_free_bytes=10 * GIB, **values)

    def asked(*devices: DeviceStatus) -> list[str]:
        return [command for command, _ in work_hints(devices, simulated=False)]

    whole, used, part = device("a"), device("b", in_use=True), device("c", mig_parent="d")
    assert asked(whole, used, part)[1] == "request --gpus 1 --memory 10GiB"
    assert asked(whole, device("e"), used)[1] == "request --gpus 2 --memory 10GiB"
    assert asked(used) == []
    assert asked(part, device("f", mig_parent="d")) == [
        "run --gpus 1 --mig -- printenv CUDA_VISIBLE_DEVICES",
        "request --gpus 1 --mig --memory 10GiB",
    ]
    # Simulated GPUs are on no host whose variables could name them, and what is printed is not an empty line.
    simulated = [command for command, _ in work_hints([whole], simulated=True)]
    assert simulated[0] == "run --host any --gpus 1 -- printenv CORRAL_LEASE"


def test_a_cluster_names_the_extras_that_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"duckdb", "nicegui", "amdsmi"}
    monkeypatch.setattr(up, "find_spec", lambda name: None if name in absent else name)
    assert up.missing_extras("auto", dashboard=True) == ["processor", "dashboard"]
    assert up.missing_extras("amd", dashboard=False) == ["processor", "amd"]
    with pytest.raises(CommandError, match=r"pip install 'corral\[processor\]'"):
        up.up(source="simulated")


@pytest.mark.parametrize(
    ("command", "part"),
    [(["request"], "planner"), (["query", "SELECT 1"], "processor"), (["health", "planner"], "planner")],
)
def test_without_a_part_the_missing_one_is_named(server: EmbeddedServer, command: list[str], part: str) -> None:
    done = invoke(*command, url=server.url)
    assert done.returncode == 6
    assert f"no {part} answers" in done.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["request", "--gpus", "none"], "'--gpus'"),
        (["request", "--memory", "20 bananas"], "20 bananas"),
        (["request", "--gpus", "-1"], "--gpus: Expected"),
        (["request", "--share", "2"], "--share"),
        (["request", "--placement", "everywhere"], "'everywhere' is none of same_host, fewest_hosts, spread"),
        (["request", "--label", "novalue"], "--label"),
        (["request", "--method", "capacity"], "`items`"),
        (["drain", "--reason", "x"], "--device"),
        (["drain", "--host", "x"], "--reason"),
        (["release"], "--all"),
        (["reqest"], "Did you mean"),
        (["up", "--source", "guesswork"], "guesswork"),
        (["plan", "--order", "longest"], "'longest'"),
    ],
)
def test_wrong_usage_is_code_2_and_says_what(cluster: LocalCluster, command: list[str], said: str) -> None:
    done = cluster.corral(*command)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("corral: ")
    assert said in line


def test_a_setting_that_is_not_possible_is_wrong_usage(server: EmbeddedServer) -> None:
    done = corral("plan", url=server.url, CORRAL_STREAMS_SCALE="four")
    assert (done.returncode, "CORRAL_STREAMS_SCALE='four'" in done.stderr) == (2, True)


def test_a_rejection_is_code_4_with_its_reasons(cluster: LocalCluster) -> None:
    done = cluster.corral("request", "--gpus", "500", "--json")
    assert done.returncode == 4
    rejection = json.loads(done.stdout)
    assert rejection["type"] == "rejection"
    assert rejection["could_ever_fit"] is False
    assert sum(reason["devices"] for reason in rejection["reasons"]) == 8
    assert cluster.corral("explain", "--gpus", "500").returncode == 4
    # A part of a model's name is enough, and a model that is not there is answered with those that are.
    models = cluster.json("fleet")["models"]
    part = next(iter(models)).split()[-1][:4]
    assert cluster.json("fleet", "--model", part)["devices"] > 0
    assert cluster.corral("explain", "--model", part).returncode == 0
    listed = ", ".join(f"{count} × {name}" for name, count in models.items())
    for command in ("explain", "request", "devices"):
        assert f"the fleet has {listed}" in cluster.corral(command, "--model", "Q9000").stderr


def test_what_is_not_there_or_not_yours_is_code_5(cluster: LocalCluster) -> None:
    lease = cluster.json("request")["lease"]["lease_id"]
    for command in (["renew", "nothing"], ["release", "nothing"], ["evict", "nothing", "--reason", "x"]):
        assert cluster.corral(*command).returncode == 5
    other = cluster.corral("release", lease, CORRAL_OWNER="someone-else")
    assert other.returncode == 5
    assert "Traceback" not in other.stderr
    # One that fails does not keep the others from their release.
    assert cluster.corral("release", "nothing", lease).returncode == 5
    # A request id that stands for another request.
    lease = cluster.json("request", "--request-id", "code-5")["lease"]["lease_id"]
    conflict = cluster.corral("request", "--request-id", "code-5", "--gpus", "2")
    assert (conflict.returncode, "code-5" in conflict.stderr) == (5, True), conflict.stderr
    assert cluster.corral("release", lease).returncode == 0
    assert code_and_message(TooManyRequests("slower, please"))[0] == 4
    assert cluster.json("leases", "--lease", lease)["leases"] == []


def test_every_list_is_json_with_every_field(cluster: LocalCluster) -> None:
    lease = cluster.json("request", "--name", "listed", "--label", "team=a", "--items", "3")["lease"]
    assert lease["labels"] == {"team": "a"}
    assert lease["grants"][0]["items"] == [0, 1, 2]
    assert cluster.json("renew", lease["lease_id"], "--ttl", "1h")["state"] == "active"
    [device] = [device for device in cluster.json("devices")["devices"] if device["leases"]]
    assert device["usable"] is True
    assert device["leases"] == [lease["lease_id"]]
    table = cluster.corral("devices").stdout.splitlines()
    assert table[0].split()[:5] == ["HOST", "GPU", "MODEL", "STATE", "HELD"]
    assert [f"{lease['owner']}: listed" in line for line in table].count(True) == 1
    assert "7 free, 1 leased" in cluster.corral("fleet").stdout
    summary = cluster.json("fleet")
    assert (summary["devices"], summary["hosts"], summary["waiting_requests"]) == (8, 2, 0)
    assert cluster.json("queue") == {"type": "queue", "entries": [], "total": 0, "warnings": []}
    assert cluster.json("explain", "--gpus", "2")["granted"] is True
    assert cluster.json("health", "planner")["well"] is True
    assert cluster.json("release", "--all")["leases"][0]["state"] == "released"
    ended = cluster.json("leases", "--ended", "--lease", lease["lease_id"])["leases"]
    assert [one["state"] for one in ended] == ["released"]


def test_drains_hold_until_they_are_lifted(cluster: LocalCluster) -> None:
    host = cluster.json("devices")["devices"][0]["host"]
    try:
        drains = cluster.json("drain", "--host", host, "--reason", "new driver")["drains"]
        assert list(drains) == [f"host:{host}"]
        assert "new driver" in drains[f"host:{host}"]
        assert cluster.json("drain")["drains"] == drains
        listed = cluster.corral("devices", "--host", host).stdout
        assert listed.count("new driver") == 4
        assert cluster.corral("request", "--host", host).returncode == 4
    finally:
        assert cluster.json("undrain", host)["drains"] == {}
    assert cluster.json("explain", "--host", host)["granted"] is True


def test_windows_are_booked_listed_and_canceled(cluster: LocalCluster) -> None:
    book = ("reserve", "--gpus", "2", "--from", "+2h", "--for", "30m", "--owner", "nobody", "--reason", "course")
    host = cluster.json("devices")["devices"][0]["host"]
    [status] = cluster.json(*book)["windows"]
    window = status["window"]
    try:
        assert len(window["devices"]) == 2
        lasts = datetime.fromisoformat(window["ends_at"]) - datetime.fromisoformat(window["starts_at"])
        assert lasts == timedelta(minutes=30)
        # Texts of the planner have times in the reader's zone, with its name; in UTC with an option.
        for flags, zone, name in (((), ZoneInfo("Asia/Kolkata"), "IST"), (("--utc",), UTC, "UTC")):
            begins = datetime.fromisoformat(window["starts_at"]).astimezone(zone)
            shown = cluster.corral(*flags, "devices", TZ="Asia/Kolkata").stdout
            assert shown.count(f"from {begins:%Y-%m-%d %H:%M:%S} {name}") == 2, shown
        maintenance = cluster.json("drain", host, "--from", "+3h", "--until", "+1h", "--reason", "fans")["windows"][0]
        listed = cluster.corral("reserve", "list", "--zone", "Asia/Tokyo").stdout
        assert "maintenance" in listed
        assert " JST " in listed
        assert listed.count("course") == 1
        assert [
            one["window"]["window_id"] for one in cluster.json("reserve", "list", "--owner", "nobody")["windows"]
        ] == [window["window_id"]]
        assert maintenance["hosts"] == [host]
        # One of its GPUs is drained: another takes its place.
        drained = window["devices"][0]
        assert cluster.corral("drain", "--device", drained, "--reason", "heat").returncode == 0
        while not cluster.json("reserve", "list", "--owner", "nobody")["windows"][0]["replaced"]:
            time.sleep(0.1)
        listed = " ".join(cluster.corral("reserve", "list").stdout.split())
        assert f"in place of {drained} on " in listed
        assert "drained: heat" in listed
    finally:
        assert cluster.json("undrain", "--device", window["devices"][0])["drains"] == {}
        for one in cluster.json("reserve", "list")["windows"]:
            assert cluster.corral("reserve", "cancel", one["window"]["window_id"]).returncode == 0
    assert cluster.json("reserve", "list")["windows"] == []
    assert cluster.corral("reserve", "cancel", "none").returncode == 5
    refused = cluster.corral(*book[:2], "999", *book[3:])
    assert refused.returncode == 4
    assert "the window needs 999" in refused.stderr


def test_times_are_read_by_the_clocks_of_a_zone() -> None:
    zone = zone_of("Europe/Berlin")
    now = datetime(2026, 3, 25, 9, 30, tzinfo=UTC)  # Wednesday, 10:30 in Berlin; on Sunday clocks skip 2:00 to 3:00

    def read(text: str) -> str:
        return zone.words(parse_time(text, zone, now, "--from"))

    assert read("now") == "Wed 2026-03-25 10:30 CET"
    assert read("+90m") == "Wed 2026-03-25 12:00 CET"
    assert read("8:00") == "Thu 2026-03-26 08:00 CET"
    assert read("wed 11:00") == "Wed 2026-03-25 11:00 CET"
    assert read("Wed  08:00") == "Wed 2026-04-01 08:00 CEST"
    assert read("monday 08:00") == "Mon 2026-03-30 08:00 CEST"
    assert read("2026-12-01T08:00:30") == "Tue 2026-12-01 08:00:30 CET"
    assert read("2026-12-01 08:00z") == "Tue 2026-12-01 09:00 CET"
    assert zone.words(parse_last_day("2027-01-31", zone, now, "--until")) == "Sun 2027-01-31 23:59:59 CET"
    for text, why in (
        ("today 08:00", "is past"),
        ("2026-03-24 08:00", "is past"),
        ("2026-12-01", "time of day"),
        ("sun 02:30", "skip"),
        ("2026-10-25 02:30", "twice"),
        ("25:00", "no 25:00"),
        ("next week", "is no time: write"),
        ("+5x", "--from"),
    ):
        with pytest.raises(CommandError, match=why):
            read(text)


def test_samples_are_watched_line_by_line(cluster: LocalCluster) -> None:
    done = cluster.corral("watch", "--count", "3")
    samples = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(samples) == 3
    assert all(sample["device"] and sample["time_ns"] for sample in samples)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name: str) -> None:
    shown = invoke(name, "--help", url=NOWHERE)
    assert shown.returncode == 0, shown.stderr
    assert "Example" in shown.stdout
    assert f"corral {name} [OPTIONS]" in shown.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_paragraphs_of_help_fill_the_lines_of_a_narrow_terminal(name: str) -> None:
    shown = invoke(name, "--help", url=NOWHERE, COLUMNS="80")
    prose = shown.stdout.partition("╭")[0].rstrip().partition("Example")[0].splitlines()
    for line, following in itertools.pairwise(prose):
        if line.strip() and following.strip() and not following.startswith("  "):
            assert len(line.rstrip()) + 1 + len(following.split()[0]) >= 80, line


NO_JSON = {
    "up", "demo", "run", "shell", "collect", "runner", "process", "plan", "export",  # run until something ends
    "logs", "attach",  # print what jobs print
    "login", "logout", "login-service", "notifier",
    "dashboard", "serve-http",
    "context add", "context use", "context remove", "context export",  # a line, or a file
    "config set", "config unset", "config check", "config path", "dashboard user", "dashboard link",
    "auth init", "auth add", "auth apply", "auth group", "auth revoke", "auth rotate", "auth print", "auth token",
    "group export", "notify remove",
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_prints_data_prints_it_as_json(name: str) -> None:
    command = load(name)
    for full, one in [(f"{name} {part}", inner) for part, inner in getattr(command, "commands", {}).items()] or [
        (name, command)
    ]:
        options = {option for parameter in one.params for option in parameter.opts}
        assert ("--json" in options) != (full in NO_JSON), full


def test_every_exit_code_is_in_the_help() -> None:
    shown = " ".join(invoke("--help", url=NOWHERE).stdout.replace("│", " ").split())
    for code in MEANINGS:
        assert re.search(rf"\b{code}\b", shown.partition("Exit codes:")[2]), code


def test_help_imports_no_part() -> None:
    code = (
        "import sys\nfrom corral.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'duckdb', 'numpy', 'pyarrow', 'pynvml', 'nats', 'uvloop', 'textual'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f" {name} " in done.stdout
