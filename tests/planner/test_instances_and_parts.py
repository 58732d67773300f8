"""MIG instances are for who asks, and are their board's hardware; shares are exact, with their part of the memory."""

from __future__ import annotations

from collections.abc import Sequence

import corral.planner.fleet.fleet as fold
import corral.planner.fleet.summary as view
import msgspec
import pytest
from corral.planner.fleet.state import WHOLE_SHARE, share_of
from corral.planner.placement.decide import InvalidRequest, Policies
from corral.planner.queue.durations import given as lasting
from corral.planner.queue.line import Line
from corral.schemas.inventory import board_part
from corral.schemas.requests import Rejection, WorkRequest
from corral.schemas.telemetry import DeviceInfo, Inventory
from hypothesis import given
from hypothesis import strategies as st
from support.planner_world import GIB, NOW, ask, fleet_of, inventory, placed, samples

H100 = "NVIDIA H100 80GB HBM3"
BOARD = "GPU-h0-0"


def instance(board: DeviceInfo, number: int, profile: str, gib: int, gpu_instance: int | None = None) -> DeviceInfo:
    return msgspec.structs.replace(
        board,
        uuid=f"MIG-{number}",
        name=f"{board.name} MIG {profile}",
        mig_parent=board.uuid,
        mig_profile=profile,
        mig_instance=number if gpu_instance is None else gpu_instance,
        memory_bytes=gib * GIB,
        sm_count=16,
        mig_enabled=False,
    )


def layout(parts: Sequence[tuple[int, str, int]], boards: int = 1, time_ns: int = 1) -> Inventory:
    """The first of some boards split into (number, profile, GiB) each; whole without any."""
    plain = inventory("h0", [H100] * boards, time_ns=time_ns)
    first, *others = plain.devices
    split = msgspec.structs.replace(first, mig_enabled=bool(parts))
    return msgspec.structs.replace(plain, devices=[split, *(instance(first, *part) for part in parts), *others])


SEVEN = [(n, "1g.10gb", 10) for n in range(7)]


@pytest.mark.parametrize(
    ("fields", "devices"),
    [
        ({}, ["GPU-h0-1"]),
        ({"gpus": 2}, ["GPU-h0-1", "GPU-h0-2"]),
        ({"gpu_share": 0.5}, ["GPU-h0-1"]),
        ({"models": ["*H100*"]}, ["GPU-h0-1"]),
        ({"mig": True}, ["MIG-0"]),
        ({"mig": "1G.*"}, ["MIG-0"]),
        ({"mig": "*g.10gb", "gpu_share": 0.5}, ["MIG-0"]),
        ({"models": ["*H100*1g.10gb"]}, ["MIG-0"]),
        ({"models": ["*a100*", "*MIG*"]}, ["MIG-0"]),
    ],
)
def test_instances_are_granted_to_who_asks_for_one(fields: dict[str, object], devices: list[str]) -> None:
    fleet = fleet_of(layout(SEVEN, boards=3))
    grants = placed(ask(fleet, **fields)).grants
    assert [grant.device for grant in grants] == devices
    assert [grant.mig_parent for grant in grants] == [BOARD if "MIG" in uuid else "" for uuid in devices]


def test_who_waits_for_any_device_of_a_fleet_of_instances_has_one_kept() -> None:
    fleet = fleet_of(layout(SEVEN))
    request = WorkRequest(owner="me")
    for number in range(7):
        fold.hold(fleet, f"lease-{number}", placed(ask(fleet)).grants)
    line = Line(fleet, Policies())
    for number in range(7):
        line.adopt(f"lease-{number}", "other", 1.0, lasting(100.0 + number), NOW)
    entry = line.arrive(request, lasting(60.0), NOW)
    assert line.next(NOW) is None
    [held] = line.held
    assert held.entry is entry
    assert [uuid for uuid, _, _ in held.reservation.devices] == ["MIG-0"]


def test_a_refusal_says_how_to_ask_for_an_instance() -> None:
    fleet = fleet_of(layout(SEVEN))
    for fields in ({"gpus": 2}, {"models": ["*H100*"]}, {"gpu_share": 0.5}):
        refused = ask(fleet, **fields)
        assert isinstance(refused, Rejection)
        assert refused.message.startswith("0/8 devices: 7 MIG instances, 1 split into MIG instances")
        assert "--mig" in refused.nearest
    # Whoever takes any one device gets one of what there is.
    assert placed(ask(fleet)).grants[0].device == "MIG-0"
    refused = ask(fleet, mig="3g.*")
    assert isinstance(refused, Rejection)
    assert "7 MIG instances of another profile" in refused.message
    for several in ({"mig": True}, {"models": ["*1g.10gb"]}):
        with pytest.raises(InvalidRequest, match="one MIG instance only"):
            ask(fleet, gpus=2, **several)


LAYOUTS = [[], SEVEN, [(10, "3g.40gb", 40), (11, "3g.40gb", 40)], [(0, "1g.10gb", 10), (12, "4g.40gb", 40)]]


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["ask", "end", "split", "planner"])), max_size=12))
def test_a_board_and_its_instances_are_never_promised_to_two(steps: list[tuple[int, str]]) -> None:
    fleet = fleet_of(layout([]))
    parts: dict[str, str] = {}
    leases: dict[str, list[object]] = {}
    for number, (which, what) in enumerate(steps):
        if what == "split":
            fold.apply(fleet, layout(LAYOUTS[which], time_ns=number + 2), NOW + number)
        elif what == "end" and leases:
            gone = sorted(leases)[which % len(leases)]
            fold.free(fleet, gone)
            del leases[gone], parts[gone]
        elif what == "planner":  # another one, which knows the leases alone, and then the inventory
            now = layout([p for p in LAYOUTS[1] + LAYOUTS[2] + LAYOUTS[3][1:] if f"MIG-{p[0]}" in fleet.devices])
            fleet = fold.Fleet(stale_after=float("inf"))
            for lease, grants in leases.items():
                fold.hold(fleet, lease, grants)  # pyright: ignore[reportArgumentType]
            fold.apply(fleet, msgspec.structs.replace(now, time_ns=number + 2), NOW + number)
        else:
            decision = ask(fleet, NOW + number, mig=bool(which % 2))
            if not isinstance(decision, Rejection):
                lease = f"l{number}"
                mine = decision.grants[0].device
                for other in parts.values():
                    assert BOARD not in (mine, other)
                    assert mine != other
                    assert other in fleet.devices  # whoever holds what is there no more holds the board
                parts[lease], leases[lease] = mine, list(decision.grants)
                fold.hold(fleet, lease, decision.grants)


def test_an_instance_holds_its_board_though_its_host_has_another_name_since() -> None:
    fleet = fleet_of(layout(SEVEN))
    grants = placed(ask(fleet, NOW, mig=True)).grants
    fold.hold(fleet, "l", [msgspec.structs.replace(grant, host="old-name") for grant in grants])
    fold.apply(fleet, layout([], time_ns=2), NOW + 1)
    assert isinstance(ask(fleet, NOW + 1), Rejection)
    fold.free(fleet, "l")
    assert [grant.device for grant in placed(ask(fleet, NOW + 2)).grants] == [BOARD]


def test_compute_instances_of_one_gpu_instance_share_its_memory_once() -> None:
    fleet = fleet_of(layout([]))
    first = fleet.devices[BOARD].info
    split = layout(SEVEN[:1], time_ns=2)
    parts = [instance(first, n, "1c.3g.40gb", 40, gpu_instance=2) for n in range(3)]
    fold.apply(fleet, msgspec.structs.replace(split, devices=[split.devices[0], *parts]), NOW)
    uuids = [part.uuid for part in parts]
    summary = view.summary(fleet, NOW)
    assert (summary.memory_total_bytes, summary.memory_free_bytes) == (40 * GIB, 40 * GIB)
    assert summary.share_free == pytest.approx(3 / 7)
    fold.apply(fleet, samples("h0", uuids, NOW + 1, used=[30 * GIB] * 3), NOW + 1)
    assert [status.memory_free_bytes for status in view.devices(fleet, NOW + 1)][1:] == [10 * GIB] * 3
    fold.apply(fleet, samples("h0", uuids, NOW + 2, used=[0] * 3), NOW + 2)
    for number in range(3):
        granted = placed(ask(fleet, NOW + 2, mig=True)).grants[0]
        assert granted.memory_bytes == 40 * GIB // 3
        fold.hold(fleet, f"l{number}", [granted])
    # What one of them uses, it was granted.
    fold.apply(fleet, samples("h0", uuids, NOW + 3, used=[13 * GIB] * 3), NOW + 3)
    assert view.summary(fleet, NOW + 3).memory_free_bytes < GIB
    assert not any(status.memory_free_bytes > 2 for status in view.devices(fleet, NOW + 3)[1:])


@pytest.mark.parametrize(
    ("profile", "multiprocessors", "board", "part"),
    [("1g.10gb", 16, 132, 1 / 7), ("3g.40gb", 60, 132, 3 / 7), ("7g.80gb", 132, 132, 1), ("1c.3g.40gb", 16, 132, 1 / 7),
     ("1g.20gb+me", 26, 132, 1 / 7), ("1g.6gb", 14, 56, 1 / 4), ("2g.12gb", 28, 56, 1 / 2), ("4g.24gb", 56, 56, 1)],
)  # fmt: skip
def test_an_instance_is_its_slices_of_the_board(profile: str, multiprocessors: int, board: int, part: float) -> None:
    whole = DeviceInfo(uuid="b", host="h", index=0, sm_count=board)
    mine = DeviceInfo(uuid="i", host="h", index=0, sm_count=multiprocessors, mig_parent="b", mig_profile=profile)
    assert board_part(mine, whole) == pytest.approx(part)
    assert board_part(whole, None) == 1


@given(st.integers(1, 10**6 - 1))
def test_n_parts_are_no_more_than_the_whole(n: int) -> None:
    assert n * share_of(1 / n) <= WHOLE_SHARE < (n + 1) * (share_of(1 / n) + 1)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 9, 13, 49, 64])
def test_a_part_of_a_device_fits_so_many_times_with_its_part_of_the_memory(n: int) -> None:
    fleet = fleet_of(inventory("h0", [H100]), live=True)
    for number in range(n):
        grant = placed(ask(fleet, gpu_share=1 / n)).grants[0]
        assert (grant.share, grant.memory_bytes) == (1 / n, 80 * GIB * share_of(1 / n) // WHOLE_SHARE)
        assert abs(grant.memory_bytes - 80 * GIB / n) < 100
        fold.hold(fleet, f"l{number}", [msgspec.json.decode(msgspec.json.encode(grant), type=type(grant))])
    assert isinstance(ask(fleet, gpu_share=1 / n), Rejection)
    status = view.devices(fleet, NOW)[0]
    assert (status.share_free, status.memory_free_bytes) == (0, 0)
    for number in range(n):
        fold.free(fleet, f"l{number}")
    assert view.devices(fleet, NOW)[0].share_free == 1
    assert placed(ask(fleet))


@pytest.mark.parametrize(
    ("share", "times"), [(0.334, 2), (0.3333334, 2), (0.333, 3), (0.3, 3), (0.1 + 0.2, 3), (0.1, 10)]
)
def test_what_is_more_than_the_whole_does_not_fit(share: float, times: int) -> None:
    fleet = fleet_of(inventory("h0", [H100]))
    for number in range(times):
        fold.hold(fleet, f"l{number}", placed(ask(fleet, gpu_share=share)).grants)
    refused = ask(fleet, gpu_share=share)
    assert isinstance(refused, Rejection)
    assert refused.reasons[0].code in ("share", "leased")


def test_a_share_without_memory_is_not_given_what_others_have() -> None:
    fleet = fleet_of(inventory("h0", [H100]))
    fold.hold(fleet, "l1", placed(ask(fleet, gpu_share=0.5, gpu_memory_bytes=78 * GIB)).grants)
    refused = ask(fleet, gpu_share=0.5)
    assert isinstance(refused, Rejection)
    assert refused.reasons[0].code == "memory"
    assert placed(ask(fleet, gpu_share=0.5, gpu_memory_bytes=2 * GIB))
