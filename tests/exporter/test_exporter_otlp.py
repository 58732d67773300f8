"""`corral export --otlp` on a real cluster, to receivers by OpenTelemetry's own service definition."""

from __future__ import annotations

import logging
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from corral.exporter.live import LiveFleet
from corral.exporter.otlp import push, services
from corral.exporter.otlp.names import DEVICE_METRICS, STATUS, Instrument, choose
from corral.exporter.otlp.services import metric_name
from corral.exporter.otlp.settings import Protocol, read
from corral.exporter.otlp.starts import Starts
from corral.exporter.pipeline import ServiceAnswers, ServiceSeries
from corral.schemas.metrics import METRICS
from corral.schemas.work.groups import Group, Groups, GroupStatus
from opentelemetry.sdk import metrics as sdk
from opentelemetry.semconv._incubating.metrics import hw_metrics
from support.exporter_process import exporting, free_port, get, parse, running
from support.local_cluster import LocalCluster, invoke, wait_for
from support.otlp_receiver import Received, over_grpc, over_http

SECOND = 10**9


@pytest.fixture(scope="module", params=["grpc", "http/protobuf"])
def received(
    request: pytest.FixtureRequest, cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Received]:
    with ExitStack() as stack:
        url, found = stack.enter_context(over_grpc() if request.param == "grpc" else over_http())
        stack.callback(cluster.corral, "release", _lease(cluster)["lease_id"], "--owner", "otlp")
        log = tmp_path_factory.mktemp("otlp") / "export.log"
        options = ("--otlp-protocol", request.param, "--otlp-interval", "1s", "--otlp-metrics", "all")
        more = ("--otlp-header", "Authorization=Bearer abc", "--otlp-lease-ids")
        stack.enter_context(exporting(cluster.url, log, "--otlp", url, *options, *more))
        wait_for(lambda: len({p.time_ns for p in found.points("hw.energy")}) > 1)
        wait_for(lambda: found.points("corral.device.lease.share"))
        yield found


def _lease(cluster: LocalCluster) -> Any:
    return cluster.json("request", "--gpus", "2", "--name", "train", "--owner", "otlp", "--ttl", "5m")["lease"]


def test_the_fleet_arrives_by_the_conventions(cluster: LocalCluster, received: Received) -> None:
    devices = {device["uuid"]: device for device in cluster.json("devices")["devices"]}
    limits = {p.attributes["hw.id"]: p for p in received.points("hw.gpu.memory.limit")}
    assert set(limits) == set(devices)
    for uuid, device in devices.items():
        point = limits[uuid]
        assert point.value == device["memory_total_bytes"]
        assert point.resource["host.name"] == point.resource["service.instance.id"] == device["host"]
        assert point.resource["service.name"] == "corral"
        assert point.attributes["hw.type"] == "gpu"
        assert (point.attributes["hw.model"], point.attributes["hw.vendor"]) == (device["model"], "nvidia")
        assert point.attributes["hw.name"] == f"nvidia{device['index']}"
    # Sensors are components of their own, whose parent is the device.
    for point in received.points("hw.temperature"):
        assert point.attributes["hw.parent"] in devices
        assert point.attributes["hw.type"] == "temperature"
    tasks = {p.attributes["hw.gpu.task"] for p in received.points("hw.gpu.utilization")}
    assert tasks == {"general", "encoder", "decoder"}
    assert all(0 <= p.value <= 1 for p in received.points("hw.gpu.utilization"))
    states = Counter((p.attributes["hw.id"], p.time_ns) for p in received.points(STATUS) if p.value == 1)
    assert {uuid for uuid, _ in states} == set(devices)
    assert set(states.values()) == {1}
    # What the conventions have no name for.
    assert received.points("corral.gpu.sm_clock")
    assert all(headers.get("authorization") == "Bearer abc" for headers in received.headers)


def test_counters_have_a_start_and_the_time_of_reading(received: Received) -> None:
    energy = received.points("hw.energy")
    assert received.kinds()["hw.energy"] == ("sum", "J", True)
    by_device: dict[str, list[Any]] = {}
    for point in energy:
        by_device.setdefault(point.attributes["hw.id"], []).append(point)
    for points in by_device.values():
        assert {point.start_ns for point in points} == {points[0].time_ns}
        values = [(point.time_ns, point.value) for point in points]
        assert values == sorted(set(values))  # a sample is sent once
    assert abs(time.time_ns() - energy[-1].time_ns) < 60 * SECOND


def test_leases_queue_and_services_arrive(cluster: LocalCluster, received: Received) -> None:
    (lease,) = (found for found in cluster.json("leases")["leases"] if found["owner"] == "otlp")
    shares = [p for p in received.points("corral.device.lease.share") if p.attributes.get("corral.owner") == "otlp"]
    assert {p.attributes["hw.id"] for p in shares} == {grant["device"] for grant in lease["grants"]}
    for point in shares:
        assert point.value == 1
        assert point.attributes["corral.workload"] == "train"
        assert point.attributes["corral.lease.id"] == lease["lease_id"]
        assert point.resource["host.name"] in {grant["host"] for grant in lease["grants"]}
    kinds = received.kinds()
    assert kinds["corral.queue.length"] == ("gauge", "", False)
    assert kinds["corral.queue.longest_wait"] == ("gauge", "s", False)
    assert kinds["corral.planner.grant"] == ("histogram", "s", False)
    assert any(p.count for p in received.points("corral.planner.grant"))
    assert all(p.value == 1 for p in received.points("corral.planner.up"))
    assert {p.resource["host.name"] for p in received.points("corral.host.silent")} == {"sim-0001", "sim-0002"}
    # By the data model a scope has each metric once, and no two points of it have the same attributes.
    for resource, scope in received.scopes():
        names = Counter(metric.name for metric in scope.metrics)
        assert max(names.values()) == 1, (resource, names.most_common(1))
        for metric in scope.metrics:
            points = getattr(metric, metric.WhichOneof("data")).data_points
            keys = Counter(tuple(sorted((a.key, str(a.value)) for a in point.attributes)) for point in points)
            assert max(keys.values()) == 1, (metric.name, keys.most_common(1))


def test_a_receiver_that_is_away_or_hangs_costs_prometheus_nothing(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    port = free_port()

    def points(address: str) -> dict[str, float]:
        found = parse(get(address)).get("corral_exporter_otlp_points_total", {})
        return {dict(key)["outcome"]: value for key, value in found.items()}

    log = tmp_path / "export.log"
    with exporting(
        cluster.url, log, "--otlp", f"http://127.0.0.1:{port}", "--otlp-protocol", "grpc", "--otlp-interval", "1s"
    ) as address:
        wait_for(lambda: "DCGM_FI_DEV_GPU_TEMP" in parse(get(address)))
        wait_for(lambda: points(address).get("failed"))
        assert points(address)["sent"] == 0
        assert len(re.findall("can't be sent", log.read_text())) == 1
        with over_grpc(port) as (_, received):
            wait_for(lambda: received.points("hw.gpu.utilization"))
            wait_for(lambda: "again" in log.read_text())
            assert wait_for(lambda: points(address)["sent"])
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections, and never answers
        monkeypatch.delenv("OTEL_EXPORTER_OTLP_TIMEOUT")
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with exporting(cluster.url, tmp_path / "hangs.log", "--otlp", url, "--otlp-interval", "1s") as address:
            silent.accept()
            wait_for(lambda: "DCGM_FI_DEV_GPU_TEMP" in parse(get(address)))
            assert points(address) == {"sent": 0, "failed": 0}


def test_why_nothing_can_be_sent_is_said_without_the_url() -> None:
    """Its path and its parameters may have a key in them; these are the library's words."""
    reason = push._Reason()
    said = (
        "Transient error HTTPConnectionPool(host='otlp.example', port=443): Max retries exceeded with url: "
        "/in/k3y?api_key=k3y (Caused by NewConnectionError('refused')) encountered while exporting metrics batch"
    )
    for text in (said, "Failed to export to https://otlp.example/in/k3y?api_key=k3y, retrying"):
        reason.text = ""
        reason.emit(logging.makeLogRecord({"msg": text}))
        assert "k3y" not in reason.text
        assert "xport" in reason.text


def test_wrong_options_are_one_line(server: Any) -> None:
    for options, word in (
        (["--otlp", "collector:4317"], "http://collector:4317"),
        (["--otlp", "http://c:4317", "--otlp-protocol", "udp"], "http/protobuf"),
        (["--otlp", "http://c:4317/v1/metrics"], "no paths"),
        (["--otlp", "http://c:4318", "--otlp-header", "nothing"], "KEY=VALUE"),
        (["--otlp", "http://c:4318", "--otlp-interval", "1ms"], "at least a second"),
        (["--otlp", "http://c:4318", "--otlp-metrics", "hw.cpu.*"], "hw.gpu.*"),
    ):
        done = invoke("export", *options, url=server.url)
        assert done.returncode == 2
        assert word in done.stderr
        assert done.stderr.count("\n") == 1


def test_names_units_and_instruments_are_those_of_the_conventions() -> None:
    meter = sdk.MeterProvider().get_meter("test")
    kinds = {Instrument.GAUGE: "Gauge", Instrument.COUNTER: "Counter", Instrument.UP_DOWN_COUNTER: "UpDownCounter"}
    conventional = [found for found in DEVICE_METRICS if found.name.startswith("hw.")]
    assert conventional
    for found in conventional:
        create = getattr(hw_metrics, f"create_{found.name.replace('.', '_')}")
        gauge = found.instrument is Instrument.GAUGE
        instrument = create(meter, []) if gauge else create(meter)
        assert (instrument.name, instrument.unit) == (found.name, found.unit)
        assert type(instrument).__name__ == f"{'_Observable' if gauge else '_'}{kinds[found.instrument]}"
    assert {found.metric for found in DEVICE_METRICS} - {"memory_share"} == set(METRICS)
    assert len({(found.name, *found.attributes.items()) for found in DEVICE_METRICS}) == len(DEVICE_METRICS)
    assert choose(["hw.*"]) == conventional
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "opentelemetry.md").read_text()
    table = set(re.findall(r"^\| `(hw\.[\w.]+)` \| (\S+) \|", page, re.M))
    assert table == {(found.name, found.unit) for found in conventional} | {(STATUS, "1")}
    assert len(choose(["hw.*"])) < len(choose(["default"])) < len(choose(["all"]))


def test_starts_of_counters() -> None:
    starts = Starts()
    assert [starts.start_ns("a", value, at) for value, at in ((5, 10), (5, 20), (9, 30))] == [10, 10, 10]
    # Reset: it has counted since the point before.
    assert [starts.start_ns("a", value, at) for value, at in ((1, 40), (2, 50))] == [30, 30]
    # The clock was set back: a start is never later than its point.
    assert starts.start_ns("a", 3, 20) == 20
    assert starts.start_ns("b", 7, 60) == 60
    for _ in range(250):
        starts.start_ns("b", 8, 70)
        starts.end_round()
    assert len(starts) == 1


def test_settings_take_opentelemetrys_variables() -> None:
    def settings(url: str | None = None, interval: str | None = None, **environment: str) -> Any:
        return read(url, None, (), interval, "default", environment, lease_ids=False)

    assert settings() is None
    assert settings(OTEL_EXPORTER_OTLP_ENDPOINT="http://c:4317").protocol is Protocol.GRPC
    assert settings(OTEL_EXPORTER_OTLP_ENDPOINT="http://c:4318").protocol is Protocol.HTTP
    assert settings(OTEL_EXPORTER_OTLP_METRICS_ENDPOINT="http://c:4318/v1/metrics").endpoint is None
    assert settings(OTEL_EXPORTER_OTLP_ENDPOINT="http://c:4317", OTEL_METRICS_EXPORTER="none") is None
    assert settings(OTEL_EXPORTER_OTLP_ENDPOINT="http://c:4317", OTEL_SDK_DISABLED="true") is None
    assert settings("http://c:4318").endpoint == "http://c:4318/v1/metrics"
    assert settings("https://user:secret@c/otlp/v1/metrics").endpoint == "https://user:secret@c/otlp/v1/metrics"
    assert "secret" not in settings("https://user:secret@c/otlp/v1/metrics").shown
    assert settings("http://c:1", OTEL_EXPORTER_OTLP_PROTOCOL="grpc").protocol is Protocol.GRPC
    assert settings("http://c:1", OTEL_METRIC_EXPORT_INTERVAL="15000").interval_seconds == 15
    assert settings("http://c:1", "5s", OTEL_METRIC_EXPORT_INTERVAL="15000").interval_seconds == 5
    assert settings("http://c:1").interval_seconds == 60
    for wrong in (
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"},
        {"OTEL_METRIC_EXPORT_INTERVAL": "soon"},
        {"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            settings("http://c:1", **wrong)


def test_groups_have_the_same_values_for_prometheus_and_otlp() -> None:
    vision = GroupStatus(group=Group(name="vision"), gpus_used={"H100": 2.5, "A100": 1.0}, gpus_owed=3.0)
    answers = ServiceAnswers(groups=Groups(groups=[GroupStatus(group=Group(name="default")), vision]))
    series = list(ServiceSeries(answers, [], [], LiveFleet(None)).collect())  # type: ignore[arg-type]
    page = {family.name: {s.labels.get("group"): s.value for s in family.samples} for family in series}
    assert page["corral_group_leased_devices"] == {"default": 0, "vision": 3.5}
    (owed,) = (m for m in services.metrics(series, Starts(), 7)[""] if m.name == "corral.group.owed_devices")
    assert [(p.attributes, p.value) for p in owed.data.data_points][1] == ({"corral.group": "vision"}, 3)
    # Nobody has set up groups.
    answers = ServiceAnswers(groups=Groups(groups=[GroupStatus(group=Group(name="default"))]))
    series = list(ServiceSeries(answers, [], [], LiveFleet(None)).collect())  # type: ignore[arg-type]
    assert not [family for family in series if family.name.startswith("corral_group")]


def test_names_of_services_series() -> None:
    assert metric_name("corral_queue_longest_wait_seconds") == ("corral.queue.longest_wait", "s")
    assert metric_name("corral_fleet_memory_free_bytes") == ("corral.fleet.memory_free", "By")
    assert metric_name("corral_leases") == ("corral.leases", "")


@pytest.mark.long
@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_through_a_real_collector(cluster: LocalCluster, tmp_path: Path, protocol: str) -> None:
    """Rotel, a collector in Rust, takes everything and sends it on as it came."""
    found = find_spec("rotel")
    if found is None or found.origin is None:
        pytest.skip("rotel is not installed on this platform")
    binary = Path(found.origin).parent / "rotel-agent"
    with over_http() as (target, received):
        grpc_port, http_port = free_port(), free_port()
        command = (
            str(binary), "start", "--otlp-grpc-endpoint", f"127.0.0.1:{grpc_port}",
            "--otlp-http-endpoint", f"127.0.0.1:{http_port}", "--exporter", "otlp",
            "--otlp-exporter-endpoint", target, "--otlp-exporter-protocol", "http",
        )  # fmt: skip
        port = grpc_port if protocol == "grpc" else http_port
        with running(tmp_path / "rotel.log", *command) as collector:
            url = f"http://127.0.0.1:{port}"
            options = ("--otlp-protocol", protocol, "--otlp-interval", "1s")
            with exporting(cluster.url, tmp_path / "export.log", "--otlp", url, *options):
                try:
                    wait_for(lambda: len({p.attributes["hw.id"] for p in received.points("hw.gpu.utilization")}) == 8)
                    wait_for(lambda: received.points("corral.planner.grant"))
                except AssertionError:
                    pytest.fail((tmp_path / "rotel.log").read_text() + (tmp_path / "export.log").read_text())
            assert collector.poll() is None
    assert {p.resource["host.name"] for p in received.points("hw.energy")} == {"sim-0001", "sim-0002"}
    assert received.kinds()["hw.gpu.memory.usage"] == ("sum", "By", False)
