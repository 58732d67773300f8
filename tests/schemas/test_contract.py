"""The contract: the catalog is consistent, batches survive the wire, refusals name the field."""

from typing import Any

import msgspec
import pytest
from corral.bus.connect import WrongSetting, connect
from corral.bus.layout import REPLICAS_VARIABLE, SCALE_VARIABLE, default_replicas, default_scale, ensure_layout
from corral.cli.local.server import EmbeddedServer
from corral.schemas import codec, columns, subjects
from corral.schemas.inventory import check
from corral.schemas.metrics import METRICS, DeviceSample
from corral.schemas.operations import ExplainRequest
from corral.schemas.requests import WorkRequest
from corral.schemas.telemetry import DeviceInfo, HostInfo, Inventory, SampleBatch
from corral.schemas.values import units
from corral.schemas.work.jobs import JobSpec, SubmittedSpec, submitted
from corral.schemas.work.runs import Run, RunOrders, RunVerb
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.aio.client import Client


def test_every_metric_carries_its_unit_in_its_name_and_its_type() -> None:
    for name, metric in METRICS.items():
        unit = metric.row.unit
        assert name.endswith(unit.suffix), f"{name} is in {unit.name}"
        assert metric.integer == (unit.dtype != "<f4"), f"{name}: Python type and wire type differ"
        assert metric.row.help.endswith("."), name


_values = {
    "<f4": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "<i4": st.integers(-(2**31), 2**31 - 1),
    "<i8": st.integers(-(2**63), 2**63 - 1),
}


@settings(max_examples=20, deadline=None)
@given(data=st.data(), devices=st.integers(1, 3), ticks=st.integers(1, 2))
def test_a_batch_comes_back_from_the_wire_as_it_was(data: st.DataObject, devices: int, ticks: int) -> None:
    size = devices * ticks
    expected: dict[str, list[float | int | None]] = {}
    packed: dict[str, bytes] = {}
    nulls: dict[str, bytes] = {}
    for name, metric in METRICS.items():
        values = data.draw(st.lists(st.none() | _values[metric.row.unit.dtype], min_size=size, max_size=size))
        expected[name] = values
        column = columns.pack(metric, values)
        if column is None:
            continue
        packed[name] = column[0]
        if column[1] is not None:
            nulls[name] = column[1]
    sent = SampleBatch(
        host="h",
        agent="a",
        sequence=1,
        source="test",
        devices=[f"GPU-{i}" for i in range(devices)],
        times_ns=columns.pack_times(range(size)),
        columns=packed,
        nulls=nulls,
    )
    got = codec.decode(codec.encode(sent), SampleBatch)
    columns.check(got)
    for at, row in enumerate(columns.rows(got)):
        assert (row.device, row.time_ns) == (f"GPU-{at % devices}", at)
        for name, values in expected.items():
            assert getattr(row, name) == values[at], name


def test_a_reader_takes_columns_it_does_not_know_and_refuses_wrong_sizes() -> None:
    batch = SampleBatch(
        host="h",
        agent="a",
        sequence=1,
        source="test",
        devices=["GPU-0"],
        times_ns=columns.pack_times([1]),
        columns={"power_watts": b"\0\0\0\0", "metric_of_tomorrow": b"\0"},
    )
    columns.check(batch)
    assert list(columns.rows(batch)) == [DeviceSample(host="h", device="GPU-0", time_ns=1, power_watts=0.0)]
    for change, field in (
        ({"columns": {"power_watts": b"\0"}}, "$.columns.power_watts"),
        ({"nulls": {"power_watts": b""}}, "$.nulls.power_watts"),
        ({"devices": []}, "$.devices"),
        ({"times_ns": b"123"}, "$.times_ns"),
    ):
        with pytest.raises(codec.DecodeError) as refused:
            columns.check(msgspec.structs.replace(batch, **change))
        assert refused.value.field == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"owner": "ada", "gpus": "two"}', "$.gpus"),
        (b'{"owner": "ada", "gpus": -1}', "$.gpus"),
        (b'{"owner": "ada", "gpu_share": 0}', "$.gpu_share"),
        (b'{"owner": "ada", "distribution": {"items": [{"id": 1}]}}', "$.distribution.items"),
        (b'{"owner": "", "gpus": 1}', "$.owner"),
    ],
)
def test_a_refusal_names_the_path_of_the_field(body: bytes, field: str) -> None:
    with pytest.raises(codec.DecodeError) as refused:
        codec.decode(body, WorkRequest, codec.JSON)
    assert refused.value.field.startswith(field)


def test_a_refusal_of_what_is_missing_or_no_name_has_a_path_too_and_the_same_words_in_both_forms() -> None:
    def refused(body: Any, type: Any = ExplainRequest) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for form in (codec.JSON, codec.MSGPACK):
            with pytest.raises(codec.DecodeError) as error:
                codec.decode(codec.encode(body, form), type, form)
            found.append((error.value.field, str(error.value)))
        return found

    for body, field in (
        ({}, "$.request"),
        ({"request": {"owner": "ann"}, "with_more": [{"devices": 1}]}, "$.with_more[0].model"),
        ({"request": None}, "$.request"),
        (None, ""),
    ):
        as_json, as_msgpack = refused(body)
        assert as_json == as_msgpack
        assert as_json[0] == field
    with pytest.raises(codec.DecodeError) as error:
        codec.decode(msgspec.msgpack.encode({"request": {1: 2}}), ExplainRequest)
    assert error.value.field == "$.request"


def test_fields_of_tomorrow_are_ignored_aloud_and_misspelt_ones_refused() -> None:
    request, warnings = codec.decode_request(
        b'{"owner": "ada", "gpus": 2, "quantum": {"qubits": 3}, "labels": {"quantum": "yes"},'
        b' "distribution": {"items": [{"id": "a", "colour": "red"}, "b"]}}',
        WorkRequest,
    )
    assert request.labels == {"quantum": "yes"}
    assert request.distribution is not None
    assert len(request.distribution.items) == 2  # pyright: ignore[reportArgumentType]
    assert [warning.split()[0] for warning in warnings] == ["$.quantum", "$.distribution.items[0].colour"]
    with pytest.raises(codec.DecodeError, match="did you mean `gpu_memory_bytes`") as refused:
        codec.decode_request(b'{"owner": "ada", "gpu_memroy_bytes": 5}', WorkRequest)
    assert refused.value.field == "$.gpu_memroy_bytes"


def test_what_is_unknown_is_dropped_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen unknown names cost no more readings of a message than one, however long they are."""
    readings = 0
    decode = codec.decode

    def counted(*arguments: Any) -> Any:
        nonlocal readings
        readings += 1
        return decode(*arguments)

    monkeypatch.setattr(codec, "decode", counted)
    counts: list[int] = []
    for names in (1, 16):
        readings = 0
        body: dict[str, Any] = {
            "owner": "ada",
            "labels": {"tomorrow": "yes"},
            **{f"zz{'q' * 999}{n}": 1 for n in range(names)},
        }
        request, warnings = codec.decode_request(codec.encode(body, codec.JSON), WorkRequest)
        assert (request.owner, request.labels, len(warnings)) == ("ada", {"tomorrow": "yes"}, names)
        assert all(len(warning) < 200 for warning in warnings)
        counts.append(readings)
    assert counts[0] == counts[1]
    body = {"owner": "ada", **{f"zzq{n}": 1 for n in range(17)}}
    with pytest.raises(codec.DecodeError, match="unknown field"):
        codec.decode_request(codec.encode(body, codec.JSON), WorkRequest)


def test_host_names_become_subject_tokens() -> None:
    assert subjects.host_token("gpu-1.lab.example") == "gpu-1-lab-example"
    assert subjects.host_token("a b*c>d") == "a-b-c-d"
    with pytest.raises(ValueError, match="no host name"):
        subjects.host_token(" .*> ")


def test_people_write_units() -> None:
    assert units.parse_bytes("20GiB") == 20 * 2**30
    assert units.parse_bytes("1.5 TB") == 1_500_000_000_000
    assert units.parse_seconds("1h30m") == 5400
    assert units.parse_seconds("250ms") == 0.25
    for wrong in ("20 parsecs", "", "GiB", "-1GiB"):
        with pytest.raises(ValueError, match="write it like"):
            units.parse_bytes(wrong)
        with pytest.raises(ValueError, match="duration"):
            units.parse_seconds(wrong)


async def test_streams_are_as_large_as_the_setting_says(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SCALE_VARIABLE, "0.5")
    nc = await connect(server.url)
    await ensure_layout(nc.jetstream())
    telemetry = next(stream for stream in subjects.STREAMS if stream.name == subjects.TELEMETRY_STREAM)
    info = await nc.jetstream().stream_info(subjects.TELEMETRY_STREAM)
    await nc.close()
    assert info.config.max_bytes == telemetry.max_bytes // 2
    for wrong in ("four", "0", "nan", "-1"):
        monkeypatch.setenv(SCALE_VARIABLE, wrong)
        with pytest.raises(WrongSetting, match="factor from"):
            default_scale()


def test_an_impossible_numa_node_is_refused_with_its_field() -> None:
    device = DeviceInfo(uuid="GPU-1", host="h", index=0, numa_node=2**31)
    with pytest.raises(codec.DecodeError, match="no NUMA node") as refused:
        check(Inventory(host=HostInfo(name="h"), agent="a", time_ns=1, devices=[device]))
    assert (refused.value.code, refused.value.field) == ("out_of_range", "$.devices[...].numa_node")


@pytest.mark.parametrize("replicas", ["2", "4", "0", "6", "three"])
async def test_replicas_without_a_majority_of_their_own_are_refused(
    nc: Client, monkeypatch: pytest.MonkeyPatch, replicas: str
) -> None:
    monkeypatch.setenv(REPLICAS_VARIABLE, replicas)
    with pytest.raises(WrongSetting, match="write 1, 3 or 5"):
        default_replicas(nc.jetstream())


def test_an_older_runner_takes_the_orders_of_a_newer_planner() -> None:
    spec = JobSpec(request=WorkRequest(owner="ann", gpus=2), command=["true"])
    run = Run(run_id="1_0.1", verb=RunVerb.START, owner="ann", job_id="1", lease_id="l", spec=submitted(spec))
    newer = msgspec.to_builtins(RunOrders(planner="p", term=1, runs=[run]))
    newer["later"] = newer["runs"][0]["later"] = 1
    newer["runs"][0]["spec"]["later"] = newer["runs"][0]["spec"]["request"]["later"] = 1
    assert msgspec.convert(newer, RunOrders).runs[0].spec == msgspec.convert(spec, SubmittedSpec, from_attributes=True)
    with pytest.raises(msgspec.ValidationError, match="later"):
        msgspec.convert(newer["runs"][0]["spec"], JobSpec)
