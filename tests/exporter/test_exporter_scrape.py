"""`corral export` on a real cluster: scraped, linted by promtool, and stored by a real Prometheus with our rules."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote

import pytest
from corral.cli.loading import load
from corral.exporter.families import FAMILIES
from support.exporter_process import exporting, free_port, get, known, parse, running, types
from support.local_cluster import CORRAL, LocalCluster, corral, invoke, wait_for

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
# dcgm-exporter's etc/default-counters.csv, the lines that are not commented out: its names and types.
DCGM_DEFAULTS = {
    "DCGM_FI_DEV_SM_CLOCK": "gauge",
    "DCGM_FI_DEV_MEM_CLOCK": "gauge",
    "DCGM_FI_DEV_MEMORY_TEMP": "gauge",
    "DCGM_FI_DEV_GPU_TEMP": "gauge",
    "DCGM_FI_DEV_POWER_USAGE": "gauge",
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": "counter",
    "DCGM_FI_DEV_PCIE_REPLAY_COUNTER": "counter",
    "DCGM_FI_DEV_GPU_UTIL": "gauge",
    "DCGM_FI_DEV_MEM_COPY_UTIL": "gauge",
    "DCGM_FI_DEV_ENC_UTIL": "gauge",
    "DCGM_FI_DEV_DEC_UTIL": "gauge",
    "DCGM_FI_DEV_XID_ERRORS": "gauge",
    "DCGM_FI_DEV_FB_FREE": "gauge",
    "DCGM_FI_DEV_FB_USED": "gauge",
    "DCGM_FI_DEV_FB_RESERVED": "gauge",
    "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL": "counter",
    "DCGM_FI_DEV_VGPU_LICENSE_STATUS": "gauge",
    "DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS": "counter",
    "DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS": "counter",
    "DCGM_FI_DEV_ROW_REMAP_FAILURE": "gauge",
    "DCGM_FI_PROF_GR_ENGINE_ACTIVE": "gauge",
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": "gauge",
    "DCGM_FI_PROF_DRAM_ACTIVE": "gauge",
    "DCGM_FI_PROF_PCIE_TX_BYTES": "gauge",
    "DCGM_FI_PROF_PCIE_RX_BYTES": "gauge",
}
NOT_SIMULATED = {"DCGM_FI_DEV_VGPU_LICENSE_STATUS"}
LABELS = {"gpu", "UUID", "pci_bus_id", "device", "modelName", "Hostname", "hostname", "DCGM_FI_DRIVER_VERSION"}
XID_LABELS = {"err_code", "err_msg"}
BY_PART = "by (Hostname, gpu, GPU_I_ID, GPU_I_PROFILE)"
# The queries of dcgm-exporter's board (grafana.com 12239) and its variables: as it was made, and as it is now.
DCGM_BOARDS = {
    "instance": [
        'DCGM_FI_DEV_GPU_TEMP{instance=~"$host", gpu=~"$gpu"}',
        'DCGM_FI_DEV_POWER_USAGE{instance=~"$host", gpu=~"$gpu"}',
        'DCGM_FI_DEV_SM_CLOCK{instance=~"$host", gpu=~"$gpu"} * 1000000',
        'DCGM_FI_DEV_GPU_UTIL{instance=~"$host", gpu=~"$gpu"}',
        'DCGM_FI_DEV_FB_USED{instance=~"$host", gpu=~"$gpu"}',
        'DCGM_FI_PROF_PIPE_TENSOR_ACTIVE{instance=~"$host", gpu=~"$gpu"}',
    ],
    "Hostname": [
        'max(DCGM_FI_DEV_GPU_TEMP{Hostname=~"$host", gpu=~"$gpu"}) by (Hostname, gpu, uuid)',
        'max(DCGM_FI_DEV_POWER_USAGE{Hostname=~"$host", gpu=~"$gpu"}) by (Hostname, gpu, uuid)',
        'max(DCGM_FI_DEV_SM_CLOCK{Hostname=~"$host", gpu=~"$gpu"} * 1000000) by (Hostname, UUID, gpu)',
        f'max(DCGM_FI_PROF_GR_ENGINE_ACTIVE{{Hostname=~"$host", gpu=~"$gpu"}}) {BY_PART}',
        f'max(DCGM_FI_PROF_PIPE_TENSOR_ACTIVE{{Hostname=~"$host", gpu=~"$gpu"}}) {BY_PART}',
        f'max(DCGM_FI_DEV_FB_USED{{Hostname=~"$host", gpu=~"$gpu"}}) {BY_PART}',
    ],
    "hostname": [
        'DCGM_FI_DEV_GPU_TEMP{hostname=~"$host", gpu=~"$gpu"}',
        'max by (hostname, gpu) (DCGM_FI_DEV_FB_USED{hostname=~"$host", gpu=~"$gpu"})',
    ],
}
LINT = re.compile(
    r"""DCGM_FI_\w+ counter metrics should have "_total" suffix"""
    r"""|DCGM_FI_DEV_PCIE_REPLAY_COUNTER metric name should not include type 'counter'"""
    r"""|\w+ label names should be written in 'snake_case' not 'camelCase'"""
)
"""What promtool's taste has against dcgm-exporter's names, and nothing else: `modelName`, and those of counters."""


@pytest.fixture(scope="module")
def address(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with exporting(cluster.url, tmp_path_factory.mktemp("exporter") / "export.log") as found:
        wait_for(lambda: len(parse(get(found)).get("DCGM_FI_DEV_GPU_TEMP", ())) == 8)
        yield found


def test_names_labels_and_types_are_dcgm_exporters(address: str) -> None:
    page = get(address)
    series, kinds = parse(page), types(page)
    for name, kind in DCGM_DEFAULTS.items():
        if name not in NOT_SIMULATED:
            assert kinds[name] == kind, name
            labels = LABELS | (XID_LABELS if name == "DCGM_FI_DEV_XID_ERRORS" else set())
            assert all({label for label, _ in key} == labels for key in series[name])
        assert FAMILIES[name].kind == kind
    # Prometheus wants each family whole and once.
    assert len(re.findall(rb"^# TYPE ", page, re.M)) == len(kinds)


def test_values_are_the_planners(cluster: LocalCluster, address: str) -> None:
    devices = {device["uuid"]: device for device in cluster.json("devices")["devices"]}
    total = {
        dict(key)["UUID"]: dict(key) | {"v": value}
        for key, value in parse(get(address))["DCGM_FI_DEV_FB_TOTAL"].items()
    }
    assert set(total) == set(devices)
    for uuid, device in devices.items():
        assert total[uuid]["v"] == device["memory_total_bytes"] >> 20
        assert (total[uuid]["Hostname"], total[uuid]["gpu"]) == (device["host"], str(device["index"]))
        assert total[uuid]["modelName"] == device["model"]


def test_leases_queue_and_pipeline(cluster: LocalCluster, address: str) -> None:
    lease = cluster.json("request", "--gpus", "2", "--name", "train", "--owner", "prom")["lease"]
    waiting = subprocess.Popen(
        [
            *CORRAL,
            "request",
            "--nats",
            cluster.url,
            "--gpus",
            "4",
            "--host",
            lease["grants"][0]["host"],
            "--wait",
            "30s",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        # A history that is empty yet says so at first.
        wait_for(lambda: parse(get(address))["corral_history_samples_total"][frozenset()] > 0)
        series = wait_for(lambda: (s := parse(get(address)))["corral_queue_length"][frozenset()] == 1 and s)
    finally:
        waiting.kill()
        waiting.wait()
    owner = frozenset({("owner", "prom")})
    assert series["corral_leases"][owner] == 1
    assert series["corral_leased_devices"][owner] == 2
    held = {dict(key)["UUID"]: dict(key) for key in series["corral_device_lease_share"] if ("owner", "prom") in key}
    assert set(held) == {grant["device"] for grant in lease["grants"]}
    assert {label["name"] for label in held.values()} == {"train"}
    ((stored, lag),) = [(series["corral_history_samples_total"], series["corral_history_lag_messages"])]
    assert stored[frozenset()] > 0
    assert any(("stream", "CORRAL_TELEMETRY") in key for key in lag)
    assert series["corral_planner_up"][frozenset()] == series["corral_history_up"][frozenset()] == 1
    # One collector simulates both hosts.
    reports = wait_for(lambda: parse(get(address)).get("corral_agent_ticks_total"))
    assert [dict(key)["Hostname"] for key in reports] == ["sim"]
    assert all(value > 0 for value in reports.values())
    cluster.json("release", lease["lease_id"], "--owner", "prom")
    assert owner not in parse(get(address)).get("corral_leases", {})


def test_parts_of_the_page(address: str) -> None:
    only = parse(get(f"{address}?name[]=DCGM_FI_DEV_GPU_*&name[]=corral_fleet_*"))
    assert {"DCGM_FI_DEV_GPU_TEMP", "corral_fleet_devices"} <= set(only)
    assert all(name.startswith(("DCGM_FI_DEV_GPU_", "corral_fleet_")) for name in only)
    one = parse(get(f"{address}?host[]=sim-0001"))
    assert {dict(key)["Hostname"] for key in one["DCGM_FI_DEV_GPU_TEMP"]} == {"sim-0001"}
    packed = get(address, Accept_Encoding="gzip")
    assert "DCGM_FI_DEV_GPU_TEMP" in parse(gzip.decompress(packed))
    assert get(address.replace("/metrics", "/-/healthy")) == b"well\n"
    assert get(address.replace("/metrics", "/-/ready")) == b"ready\n"
    assert b"/metrics" in get(address.replace("/metrics", "/"))
    with pytest.raises(HTTPError, match="404"):
        get(address.replace("/metrics", "/nothing"))


def test_promtool_finds_nothing_but_what_dcgm_exporter_is_known_for(address: str) -> None:
    if not known("promtool"):
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=get(address), capture_output=True, timeout=30, check=False
    )
    said = (done.stdout + done.stderr).decode().strip().splitlines()
    # 3 is "there is something to lint", which is true of these names.
    assert done.returncode in (0, 3), said
    assert [line for line in said if not LINT.fullmatch(line)] == []


def board_queries() -> list[str]:
    board = json.loads((DEPLOY / "grafana" / "dashboards" / "corral-fleet.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    return [q.replace("$host", ".*").replace("$model", ".*").replace("$__rate_interval", "1m") for q in found]


def test_a_real_prometheus_scrapes_it_with_our_rules_and_board(address: str, tmp_path: Path) -> None:
    if not (known("prometheus") and known("promtool")):
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    shutil.copytree(DEPLOY / "prometheus", tmp_path / "etc")
    config = tmp_path / "etc" / "prometheus.yml"
    text = config.read_text()
    assert "exporter:9400" in text
    target = address.removeprefix("http://").removesuffix("/metrics")
    config.write_text(text.replace("exporter:9400", target).replace("15s", "1s"))
    for check in (["config", str(config)], ["rules", str(tmp_path / "etc" / "alerts.yml")]):
        done = subprocess.run(["promtool", "check", *check], capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]

    def api(path: str) -> Any:
        try:
            return json.loads(get(f"http://127.0.0.1:{port}/api/v1/{path}"))["data"]
        except (OSError, HTTPError):
            return None

    def ask(expression: str) -> list[Any]:
        found = api(f"query?query={quote(expression)}")
        assert found is not None, f"Prometheus refuses {expression}"
        return found["result"]

    log = tmp_path / "prometheus.log"
    with running(log, *command):
        try:
            wait_for(lambda: [t["health"] for t in (api("targets") or {}).get("activeTargets", ())] == ["up"], 40)
            wait_for(lambda: ask("count(DCGM_FI_DEV_GPU_UTIL)"))
        except AssertionError:
            pytest.fail(log.read_text()[-3000:])
        assert ask("count(DCGM_FI_DEV_GPU_UTIL)")[0]["value"][1] == "8"
        assert ask('count(up{job="corral"} == 1)')
        # honor_labels keeps the fleet's names.
        assert {found["metric"]["Hostname"] for found in ask("corral_host_silent_seconds")} == {"sim-0001", "sim-0002"}
        for query in board_queries():
            ask(query)
        # Boards that were made for dcgm-exporter see each host by itself, whichever label they know it by.
        (hopper,) = {found["metric"]["Hostname"] for found in ask("DCGM_FI_PROF_GR_ENGINE_ACTIVE")}
        for label, queries in DCGM_BOARDS.items():
            for metric in ("DCGM_FI_DEV_GPU_TEMP", "DCGM_FI_DEV_FB_FREE"):
                assert set(api(f"label/{label}/values?match[]={metric}")) == {"sim-0001", "sim-0002"}
            for query in queries:
                found = ask(query.replace("$host", hopper).replace("$gpu", ".*"))
                assert sorted(one["metric"]["gpu"] for one in found) == ["0", "1", "2", "3"], query

        def evaluated() -> Any:
            groups = api("rules")["groups"]
            rules = [rule for group in groups for rule in group["rules"]]
            return all(rule["health"] != "unknown" for rule in rules) and rules

        rules = wait_for(evaluated)
        assert [rule["name"] for rule in rules if rule["health"] == "err"] == []
        # Nothing that our rules and our board ask for by name is unknown to the exporter.
        asked = {
            name
            for query in [*board_queries(), *(rule["query"] for rule in rules)]
            for name in re.findall(r"\b(?:DCGM_FI_(?:DEV|PROF)_\w+|corral_\w+)", query)
        }
        seldom = {"corral_leased_devices", "corral_device_lease_share", "corral_queue_devices", "corral_device_missing"}
        seldom |= {"corral_exporter_otlp_success_timestamp_seconds"}
        # This cluster has no notifier; tests/cli/test_doctor_services.py has one.
        seldom |= {f"corral_notifier_{name}" for name in ("active", "failing_seconds")}
        seldom |= {f"corral_notifier_{name}_total" for name in ("given_up_messages", "lost_causes")}

        def unknown() -> set[str]:
            return asked - set(parse(get(address))) - set(FAMILIES) - {"up"} - seldom

        wait_for(lambda: not unknown())  # an agent first reports after some seconds
        assert unknown() == set()


def test_a_host_that_dies_vanishes_and_comes_back(server: Any, tmp_path: Path) -> None:
    """kill -9 of the collector; the planner and the processor are not there at all."""
    collect = (
        *CORRAL, "collect", "--nats", server.url, "--source", "simulated", "--hosts", "1", "--devices", "2",
        "--interval", "200ms", "--no-spill", "--state", str(tmp_path / "state"),
    )  # fmt: skip
    with exporting(server.url, tmp_path / "export.log", "--forget", "2s", "--metrics", "default") as address:

        def shown() -> int:
            return len(parse(get(address)).get("DCGM_FI_DEV_GPU_TEMP", ()))

        with running(tmp_path / "collect-1.log", *collect) as collector:
            wait_for(lambda: shown() == 2, 30)
            collector.kill()
            wait_for(lambda: shown() == 0)
        page = parse(get(address))
        assert page["corral_planner_up"][frozenset()] == page["corral_history_up"][frozenset()] == 0
        assert not any(name.startswith(("corral_fleet_", "corral_history_samples")) for name in page)
        with running(tmp_path / "collect-2.log", *collect):
            wait_for(lambda: shown() == 2, 30)


def test_wrong_usage_is_one_line(server: Any) -> None:
    for options, word in (
        (["--listen", "nowhere"], "HOST:PORT"),
        (["--metrics", "nonsense"], "nonsense"),
        (["--forget", "soon"], "soon"),
    ):
        done = invoke("export", *options, url=server.url)
        assert done.returncode == 2
        assert word in done.stderr
        assert done.stderr.count("\n") == 1
    taken = server.url.rpartition("//")[2]
    done = corral("export", "--nats", server.url, "--listen", taken)
    assert done.returncode == 1
    assert "can't listen" in done.stderr


def test_the_document_names_the_commands_options() -> None:
    text = "".join((ROOT / "docs" / "how-to" / f"{page}.md").read_text() for page in ("prometheus", "opentelemetry"))
    known_options = {option for parameter in load("export").params for option in parameter.opts}
    table = re.findall(r"^\| `(--[\w-]+)` \| `(CORRAL_\w+)` \| `([^`]+)`", text, re.M)
    variables = {
        p.envvar: (p.opts[0], str(p.default).replace("None", "none")) for p in load("export").params if p.envvar
    }
    assert {variable: (option, default) for option, variable, default in table} == variables
    assert {option for option, _, _ in table} <= known_options
    for name in re.findall(r"DCGM_FI_(?:DEV|PROF)_[A-Z0-9_]+\b(?!\*)", text):
        assert name in FAMILIES, name
