"""A misspelt field is refused with the name that was meant; whole numbers may be written as 1.0."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from corral.client import InvalidRequest
from corral.client.request import work_request
from corral.schemas import codec, operations
from corral.schemas.query import CancelRequest, QueryRequest, SnapshotRead
from corral.schemas.requests import LeaseAction, WorkRequest
from corral.schemas.values import units
from hypothesis import given
from hypothesis import strategies as st

MEANT = {
    "gpus": "num_gpus numGpus gpu gpu_count ngpus n_gpus accelerators count gpsu",
    "gpu_memory_bytes": "memory mem gpu_memory gpuMemoryBytes gpu_memory_gb memoryGiB vram gpu_memroy_bytes",
    "host_memory_bytes": "ram host_memory hostMemoryBytes",
    "cpus": "cpu num_cpus cores vcpus",
    "gpu_share": "share gpuShare gpu_fraction",
    "models": "model gpu_type gpu_model",
    "hosts": "host node nodes hostname",
    "ttl_seconds": "ttl timeToLive ttl_s lifetime time_limit walltime duration",
    "wait_seconds": "wait waitSeconds timeout",
    "expected_seconds": "expect expected estimate expected_runtime",
    "max_seconds": "max maxSeconds",
    "priority": "prio",
    "labels": "label tags",
    "distribution.items": "items",
}
OF_TOMORROW = "deadline quantum colour mig_mode exclusive nice"


@pytest.mark.parametrize("content_type", [codec.JSON, codec.MSGPACK])
def test_a_near_miss_is_refused_with_the_field_that_was_meant(content_type: str) -> None:
    for field, names in MEANT.items():
        for name in names.split():
            with pytest.raises(codec.DecodeError) as refused:
                codec.decode_request(codec.encode({"owner": "ada", name: 2}, content_type), WorkRequest, content_type)
            assert f"`{name}`: did you mean `{field}`?" in str(refused.value)
            assert refused.value.field == f"$.{name}"
    for name in OF_TOMORROW.split():
        body = codec.encode({"owner": "ada", name: 2}, content_type)
        request, warnings = codec.decode_request(body, WorkRequest, content_type)
        assert request == WorkRequest(owner="ada")
        assert [warning.split()[0] for warning in warnings] == [f"$.{name}"]


@pytest.mark.parametrize(
    ("type", "body", "path", "field"),
    [
        (LeaseAction, {"lease_id": "l", "owner": "ada", "ttl": 5}, "$.ttl", "ttl_seconds"),
        (LeaseAction, {"lease_id": "l", "owner": "ada", "extend_by": 5}, "$.extend_by", "ttl_seconds"),
        (operations.DrainAction, {"drain": True, "host": ["h"]}, "$.host", "hosts"),
        (operations.DeviceFilter, {"model": ["*"]}, "$.model", "models"),
        (operations.LeaseFilter, {"state": ["active"]}, "$.state", "states"),
        (operations.ExplainRequest, {"request": {"owner": "ada", "num_gpus": 2}}, "$.request.num_gpus", "gpus"),
        (operations.ExplainRequest, {"request": {"owner": "ada"}, "gpus": 2}, "$.gpus", "request.gpus"),
        (QueryRequest, {"sql": "SELECT 1", "timeout": 5}, "$.timeout", "timeout_seconds"),
        (QueryRequest, {"sql": "SELECT 1", "max_rows": 5}, "$.max_rows", "limit"),
        (CancelRequest, {"query_id": "q", "id": "q"}, "$.id", "query_id"),
        (SnapshotRead, {"snapshot_id": "s", "Offset": 5}, "$.Offset", "offset"),
        (
            WorkRequest,
            {"owner": "ada", "distribution": {"items": [{"id": "a", "memory": 5}]}},
            "$.distribution.items[0].memory",
            "memory_bytes",
        ),
    ],
)
def test_so_it_is_in_every_body(type: Any, body: dict[str, Any], path: str, field: str) -> None:
    with pytest.raises(codec.DecodeError, match=f"did you mean `{field}`") as refused:
        codec.decode_request(codec.encode(body, codec.JSON), type)
    assert refused.value.field == path


def test_so_it_is_in_python() -> None:
    for name, argument in (("num_gpus", "gpus"), ("gpu_memory", "memory"), ("time_to_live", "ttl"), ("node", "hosts")):
        wrong: Any = {name: 2}
        with pytest.raises(InvalidRequest, match=f"did you mean `{argument}`"):
            work_request("ada", wrong)


@given(st.integers(-(2**53), 2**53), st.sampled_from([codec.JSON, codec.MSGPACK]))
def test_a_whole_number_is_an_integer_however_it_is_written(number: int, content_type: str) -> None:
    class Counted(msgspec.Struct):
        count: int
        maybe: int | None = None
        several: list[int] = []

    body = {"count": float(number), "maybe": float(number), "several": [float(number), number]}
    read = codec.decode(codec.encode(body, content_type), Counted, content_type)
    assert read == Counted(number, number, [number, number])
    assert all(isinstance(one, int) for one in (read.count, read.maybe, *read.several))


def test_a_request_with_whole_floats_is_as_with_integers_and_half_a_gpu_is_none() -> None:
    body = b'{"owner": "ada", "gpus": 1e0, "gpu_memory_bytes": 2e10, "priority": -3.0, "distribution": {"items": 4.0}}'
    request, _ = codec.decode_request(body, WorkRequest)
    assert (request.gpus, request.gpu_memory_bytes, request.priority) == (1, 20_000_000_000, -3)
    assert request.distribution is not None
    assert request.distribution.items == 4
    for wrong in ("1.5", "1e300", "NaN", '"1"', "true"):
        with pytest.raises(codec.DecodeError):
            codec.decode_request(b'{"owner": "ada", "gpus": %b}' % wrong.encode(), WorkRequest)


def test_a_number_without_a_unit_is_no_amount_of_memory() -> None:
    for text in ("20", "20480", "0.5"):
        with pytest.raises(ValueError, match=f"say {text}GiB or {text}GB"):
            units.parse_bytes(text)
        with pytest.raises(InvalidRequest, match="GiB"):
            work_request("ada", {"memory": text})
    assert (units.parse_bytes("0"), units.parse_bytes("512B"), units.parse_bytes("21474836480")) == (0, 512, 20 * 2**30)
    with pytest.raises(InvalidRequest, match="memory='20GiB'"):
        work_request("ada", {"memory": 20})
    assert work_request("ada", {"memory": 20 * 2**30}).gpu_memory_bytes == 20 * 2**30
