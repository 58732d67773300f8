"""What strangers do on a device: it is in use, its memory is theirs, and nobody is given it as a whole unasked."""

from __future__ import annotations

from datetime import UTC, datetime

import corral.planner.fleet.fleet as fold
import corral.planner.fleet.summary as view
import msgspec
import pytest
from corral.planner.fleet.occupancy import IDLE_MEMORY_BYTES, Occupancy
from corral.planner.placement.decide import Policies, explain
from corral.schemas.requests import Lease, LeaseState, Rejection, RejectionCode, WorkRequest
from corral.schemas.telemetry import ProcessBatch
from hypothesis import given
from hypothesis import strategies as st
from support.planner_world import GIB, MIB, NOW, ask, fleet_of, inventory, placed, processes, samples

H100 = "NVIDIA H100 80GB HBM3"
GPU = "GPU-h0-0"


def one() -> fold.Fleet:
    return fleet_of(inventory("h0", [H100]), live=True)


def sample(fleet: fold.Fleet, at: float, used: int | None, utilization: float | None = None) -> None:
    load = None if utilization is None else [utilization]
    fold.apply(fleet, samples("h0", [GPU], NOW + at, used=[used], utilization=load), NOW + at)


def listed(fleet: fold.Fleet, at: float, *found: tuple[str, int | None], **fields: object) -> None:
    batch = processes("h0", NOW + at, [(GPU, lease, memory) for lease, memory in found])
    fold.apply(fleet, msgspec.structs.replace(batch, **fields), NOW + at)


def hold(fleet: fold.Fleet, lease: str, **fields: object) -> None:
    fold.hold(fleet, lease, placed(ask(fleet, **fields)).grants)


def ended(fleet: fold.Fleet, lease: str, state: LeaseState, at: float) -> None:
    when = datetime.fromtimestamp(NOW + at, UTC)
    fold.apply(
        fleet,
        Lease(
            lease_id=lease,
            owner="me",
            state=state,
            granted_at=when,
            expires_at=when,
            ended_at=when,
            ttl_seconds=1,
            grants=[],
        ),
        NOW + at,
    )


@pytest.mark.parametrize(
    "how", ["memory", "process", "hidden process", "unreadable list", "load", "hidden load", "orphan", "unidentified"]
)
def test_a_device_that_strangers_use_is_no_whole_device(how: str) -> None:
    fleet = one()
    if how == "memory":
        sample(fleet, 1, 20 * GIB)
    elif how == "process":
        listed(fleet, 1, ("", 300 * MIB))
    elif how == "hidden process":
        listed(fleet, 1, ("", None))
    elif how == "unreadable list":
        sample(fleet, 1, 20 * GIB)
        listed(fleet, 1.5, unreadable=[GPU])
    elif how == "load":
        sample(fleet, 3, 0, 90.0)
        sample(fleet, 4, 0, 90.0)
    elif how == "hidden load":
        listed(fleet, 3)
        sample(fleet, 3, 200 * MIB, 90.0)
        sample(fleet, 4, 200 * MIB, 90.0)
    elif how == "orphan":
        listed(fleet, 1, ("ended-long-ago", 2 * GIB))
    else:
        listed(fleet, 1, ("", 2 * GIB), identified=False)
    status = view.devices(fleet, NOW + 4)[0]
    assert status.in_use
    assert status.in_use_reason
    assert status.usable
    assert view.summary(fleet, NOW + 4).in_use_devices == 1
    refused = ask(fleet, NOW + 4)
    assert isinstance(refused, Rejection)
    assert (refused.code, refused.reasons[0].code) == (RejectionCode.NO_CAPACITY, "in_use")
    assert "allow_in_use" in refused.nearest
    told = explain(fleet, WorkRequest(owner="me"), NOW + 4, Policies())
    assert told.verdicts[0].reason == "in use by others without a lease"
    assert placed(ask(fleet, NOW + 4, gpu_share=0.25, gpu_memory_bytes=10 * GIB)).grants[0].in_use
    granted = placed(ask(fleet, NOW + 4, allow_in_use=True)).grants[0]
    assert granted.in_use
    assert granted.memory_bytes == status.memory_free_bytes


@pytest.mark.parametrize("kind", ["graphics", "compute"])
def test_what_serves_whoever_uses_a_device_does_not_use_it(kind: str) -> None:
    fleet = one()
    sample(fleet, 1, 700 * MIB)
    batch = processes("h0", NOW + 1, [(GPU, "", 400 * MIB)])
    service = msgspec.structs.replace(
        batch.processes[0], kind=kind, name="Xorg" if kind == "graphics" else "nvidia-cuda-mps-server"
    )
    fold.apply(fleet, msgspec.structs.replace(batch, processes=[service]), NOW + 1)
    assert placed(ask(fleet, NOW + 1)).grants[0].memory_bytes == 80 * GIB - 700 * MIB
    sample(fleet, 2, 2 * GIB)
    assert isinstance(ask(fleet, NOW + 2), Rejection)


def test_idle_devices_are_taken_first_and_the_driver_may_use_a_little() -> None:
    fleet = fleet_of(inventory("h0", [H100] * 3), live=True)
    uuids = [f"GPU-h0-{n}" for n in range(3)]
    used = [60 * GIB, IDLE_MEMORY_BYTES, 0]
    fold.apply(fleet, samples("h0", uuids, NOW + 1, used=used), NOW + 1)
    assert {grant.device for grant in placed(ask(fleet, NOW + 1, gpus=2)).grants} == set(uuids[1:])
    three = placed(ask(fleet, NOW + 1, gpus=3, allow_in_use=True)).grants
    assert [grant.in_use for grant in three] == [True, False, False]


def test_load_of_nobody_is_the_drivers_own() -> None:
    fleet = one()
    listed(fleet, 2)
    for at in (3, 4, 5):
        sample(fleet, at, 0, 87.0)
    assert placed(ask(fleet, NOW + 5))


def test_a_release_is_idle_at_once_and_what_is_left_behind_is_seen_soon_after() -> None:
    fleet = one()
    hold(fleet, "l1")
    sample(fleet, 5, 60 * GIB, 99.0)
    listed(fleet, 5, ("l1", 59 * GIB))
    fold.apply(fleet, samples("h0", [GPU], NOW + 6, used=[60 * GIB]), NOW + 6)
    fold.free(fleet, "l1", LeaseState.RELEASED, NOW + 6.5)
    assert placed(ask(fleet, NOW + 6.5)).grants[0].memory_bytes == 80 * GIB
    # What was read before comes late, and does not count, nor what the driver is just freeing; what is read later does.
    listed(fleet, 6.2, ("l1", 59 * GIB))
    assert placed(ask(fleet, NOW + 6.6))
    sample(fleet, 6.8, 60 * GIB, 99.0)
    listed(fleet, 6.8, ("l1", 59 * GIB))
    assert placed(ask(fleet, NOW + 6.9))
    sample(fleet, 7.2, 60 * GIB, 99.0)
    refused = ask(fleet, NOW + 7.2)
    assert isinstance(refused, Rejection)
    assert view.devices(fleet, NOW + 7.2)[0].memory_free_bytes == 20 * GIB
    sample(fleet, 8, 0, 0.0)
    listed(fleet, 8)
    assert placed(ask(fleet, NOW + 8)).grants[0].memory_bytes == 80 * GIB


@pytest.mark.parametrize("state", [LeaseState.EXPIRED, LeaseState.LOST, LeaseState.EVICTED])
@pytest.mark.parametrize("lists", [False, True])
def test_a_lease_that_nobody_released_leaves_its_device_in_use_until_it_is_seen_idle(
    state: LeaseState, lists: bool
) -> None:
    fleet = one()
    hold(fleet, "l1")
    sample(fleet, 5, 0, 0.0)
    if lists:
        listed(fleet, 5, ("l1", 0))
    ended(fleet, "l1", state, 6)
    assert isinstance(ask(fleet, NOW + 6), Rejection)
    assert lists or state.value in view.devices(fleet, NOW + 6)[0].in_use_reason
    sample(fleet, 7, 0, 0.0)
    if lists:
        # The list is older than the end: what it names may still be there.
        assert isinstance(ask(fleet, NOW + 7), Rejection)
        listed(fleet, 8)
    assert placed(ask(fleet, NOW + 8))


def test_memory_of_strangers_stays_theirs_while_a_lease_comes_uses_it_and_goes() -> None:
    fleet = one()
    device = fleet.devices[GPU]
    sample(fleet, 1, 60 * GIB)
    hold(fleet, "l1", gpu_share=0.5, gpu_memory_bytes=10 * GIB)
    assert device.memory_free == 10 * GIB
    for at, used, free in ((2, 60, 10), (3, 68, 10), (4, 75, 5), (5, 12, 58)):
        sample(fleet, at, used * GIB)
        assert device.memory_free == free * GIB
    listed(fleet, 5, ("l1", 9 * GIB), ("", 3 * GIB))
    assert device.memory_free == 67 * GIB
    # A lease may grow up to its grant between two lists without anybody else's memory being less.
    sample(fleet, 6, 13 * GIB)
    assert device.memory_free == 67 * GIB
    fold.free(fleet, "l1", LeaseState.RELEASED, NOW + 6.5)
    assert device.memory_free == 77 * GIB


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("sample"), st.integers(0, 80), st.just(0)),
            st.tuples(st.just("hold"), st.integers(0, 3), st.integers(0, 40)),
            st.tuples(st.just("end"), st.integers(0, 3), st.integers(0, 1)),
            st.tuples(st.just("list"), st.integers(0, 3), st.integers(0, 60)),
        ),
        max_size=25,
    )
)
def test_what_is_free_is_never_more_than_the_driver_says(steps: list[tuple[str, int, int]]) -> None:
    occupancy = Occupancy()
    held: dict[str, int] = {}
    used = 0
    for at, (what, number, amount) in enumerate(steps):
        lease = f"l{number}"
        if what == "hold" and lease not in held:
            held[lease] = amount
            occupancy.hold(dict(held))
        elif what == "end" and held.pop(lease, None) is not None:
            occupancy.end(lease, dict(held), at, "expired" if amount else "")
        elif what == "list":
            occupancy.processes([], at, readable=bool(amount % 2))
        # A sample after each step, since what came before a release does not count.
        used = number if what == "sample" else used
        occupancy.sample(used, None, at + 0.75, True)
        assert occupancy.granted + occupancy.foreign >= used
        if not held:
            assert occupancy.foreign == used


def test_nobody_is_told_of_processes_by_an_old_collector() -> None:
    batch = msgspec.msgpack.decode(
        msgspec.msgpack.encode({"host": "h0", "agent": "a", "sequence": 1, "time_ns": 1}), type=ProcessBatch
    )
    assert batch.unreadable == []
