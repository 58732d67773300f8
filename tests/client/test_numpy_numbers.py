"""Numbers of NumPy arrays and pandas frames as arguments of a request."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from corral.client import InvalidRequest
from corral.client.request import work_request
from corral.schemas import codec
from corral.schemas.operations import Addition
from corral.schemas.requests import LeaseAction, WorkItem
from corral.schemas.values import plain
from hypothesis import given
from hypothesis import strategies as st

np = pytest.importorskip("numpy")

WHOLE = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@given(st.integers(1, 100), st.sampled_from(WHOLE), st.sampled_from(("float16", "float32", "float64")))
def test_a_request_takes_any_number_wherever_it_takes_one(n: int, whole: str, real: str) -> None:
    pd = pytest.importorskip("pandas")
    one: Any = np.dtype(whole).type(n)
    part: Any = np.dtype(real).type(0.5)
    own = work_request(
        "ann", {"gpus": 1, "memory": 2**30 * n, "share": 0.5, "cpus": float(n), "priority": n, "ttl": 60.0 * n,
                "wait": 0.5, "allow_in_use": True, "items": n, "memory_per_item": n * 2**20, "max_items_per_device": n},
    )  # fmt: skip
    others = work_request(
        "ann", {"gpus": np.array(1), "memory": np.uint64(2**30 * n), "share": part, "cpus": pd.Series([one])[0],
                "priority": one, "ttl": pd.Timedelta(minutes=n), "wait": np.timedelta64(500_000_000, "ns"),
                "allow_in_use": np.bool_(True), "items": one, "memory_per_item": np.int64(n * 2**20),
                "max_items_per_device": one},
    )  # fmt: skip
    assert msgspec.structs.replace(others, request_id=own.request_id) == own
    items: Any = [WorkItem(id="a", cost=part), WorkItem(id="b", memory_bytes=one)]
    found = work_request("ann", {"items": items}).distribution
    assert found is not None
    assert found.items == [WorkItem(id="a", cost=0.5), WorkItem(id="b", memory_bytes=n)]
    names: Any = pd.Series(["x", "y"])
    found = work_request("ann", {"items": names, "hosts": np.array(["h1"])}).distribution
    assert found is not None
    assert found.items == ["x", "y"]


@pytest.mark.parametrize("kind", [codec.JSON, codec.MSGPACK])
def test_so_does_each_other_message(kind: str) -> None:
    seconds: Any = np.float32(30)
    action = LeaseAction(lease_id="l", owner="ann", ttl_seconds=seconds)
    assert codec.decode(codec.encode(action, kind), LeaseAction, kind).ttl_seconds == 30.0
    count: Any = np.int64(3)
    added = Addition(model="H100", devices=count)
    assert codec.decode(codec.encode(added, kind), Addition, kind).devices == 3
    with pytest.raises(TypeError, match="object can't be sent"):
        codec.encode({"a": object()}, kind)


def test_what_is_no_number_stays_what_it_is() -> None:
    for value in (None, "1", b"1", True, 1, 1.5, [1], np.array([1, 2]), np.datetime64("2026-01-01")):
        assert plain.number(value) is value
    assert plain.number(timedelta(minutes=1)) == 60.0
    assert (plain.number(Decimal("0.5")), type(plain.number(np.bool_(True)))) == (0.5, bool)
    with pytest.raises(InvalidRequest, match="gpus"):
        work_request("ann", {"gpus": np.array([1, 2])})
    # A value that is missing from a frame is not one that was not given.
    with pytest.raises(InvalidRequest, match="share=nan"):
        work_request("ann", {"share": np.float64("nan")})
