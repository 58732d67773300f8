"""The short form of fuzzing: real inputs, and what is left of them after some bytes were changed. The long one is
`make fuzz`, guided by coverage; what it found is kept in `FOUND` and tried each time."""

from __future__ import annotations

import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from corral.planner.fleet.fleet import Fleet, apply
from corral.planner.placement.decide import Placed, Policies, decide
from corral.schemas import codec
from corral.schemas.requests import WorkRequest
from corral.schemas.telemetry import DeviceInfo, HostInfo, Inventory, Link
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fuzz.targets import TARGETS

MEMORY_BYTES = 4 * 2**30
"""Beyond what the process has mapped already."""

_MORE = {"request": {"owner": "a"}, "with_more": [{"model": "NVIDIA H100", "devices": 100_000}] * 9}
FOUND: list[tuple[str, bytes]] = [
    # An unknown field, close to no other, whose value can't be made a tree.
    ("questions", b"\x01" + b"\x82\xa5owner\xa1a\xa5zzzzz\x81\x80\x00"),
    # A filter that took minutes, and one that took many compilations.
    ("questions", b"\x0a" + codec.encode({"hosts": ["[" * 100_000]}, codec.JSON)),
    ("questions", b"\x0a" + codec.encode({"hosts": [f"[{at}]*" for at in range(20_000)]}, codec.JSON)),
    # Work items whose numbers fit into no answer, and more devices than anybody has.
    ("questions", b"\x00" + codec.encode({"owner": "a", "gpus": 2, "distribution": {"items": 10**7}}, codec.JSON)),
    ("questions", b"\x04" + codec.encode(_MORE, codec.JSON)),
    # A name that was another one when it was made a token again.
    ("names", b"x" * 127 + b"/y"),
    ("units", b"9" * 400 + b"TiB"),
    # More layers than there is memory to count them in.
    ("model_files", b'c{"hidden_size": 1, "num_hidden_layers": 99999999999, "num_attention_heads": 1}'),
]


@pytest.fixture(autouse=True, scope="module")
def bounded_memory() -> Iterator[None]:
    """An input that takes all memory fails its test, and not the machine (on Linux)."""
    if not Path("/proc/self/statm").exists():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", list(TARGETS))
@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=60)
@given(data=st.data())
def test_bytes_that_nobody_meant(name: str, data: st.DataObject) -> None:
    target = TARGETS[name]
    seed = data.draw(st.sampled_from(target.seeds))
    edits = data.draw(
        st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4), st.binary(max_size=8)), max_size=6), label="edits"
    )
    for place, cut, put in edits:
        at = int(place * len(seed))
        seed = seed[:at] + put + seed[at + cut :]
    target.run(seed)


@pytest.mark.parametrize(("name", "found"), FOUND)
def test_what_was_found_once(name: str, found: bytes) -> None:
    TARGETS[name].run(found)


def test_links_of_a_host_that_is_none_hold_nobody_up() -> None:
    """Hundreds of devices, each pair joined in another way: the best set of them took minutes to find."""
    count, some = 300, random.Random(1)
    kinds = list(Link)[:6]
    links = [[Link.SAME] * count for _ in range(count)]
    for i in range(count):
        for j in range(i):
            links[i][j] = links[j][i] = some.choice(kinds)
    devices = [DeviceInfo(uuid=f"G{at}", host="h1", index=at, memory_bytes=2**36) for at in range(count)]
    inventory = Inventory(host=HostInfo(name="h1"), agent="a", time_ns=1, devices=devices, links=links)
    fleet = apply(Fleet(float("inf")), inventory, 1.0)
    placed = decide(fleet, WorkRequest(owner="a", gpus=64), 2.0, Policies())
    assert isinstance(placed, Placed)
    assert len({grant.device for grant in placed.grants}) == 64
