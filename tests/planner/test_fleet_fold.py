"""The fold: the same knowledge gives the same fleet, in whatever order it came, and time does its part."""

from __future__ import annotations

import gc
import math

import corral.planner.fleet.fleet as fold
import msgspec
import pytest
from corral.planner.fleet import summary as view
from corral.planner.fleet.faults import to_keep
from corral.planner.fleet.state import ROUNDED_OFF_BYTES, UNHEALTHY, DeviceState, HostState
from corral.planner.placement.decide import Placed, Policies, decide
from corral.schemas import codec
from corral.schemas.operations import DeviceFilter, Drains
from corral.schemas.requests import Grant, Rejection, WorkRequest
from corral.schemas.telemetry import DeviceEvent, Inventory, Link, Severity
from hypothesis import given, settings
from hypothesis import strategies as st
from support.planner_world import GIB, MIB, NOW, ask, fleet_of, inventories, inventory, placed, processes, samples

H100 = "NVIDIA H100 80GB HBM3"


def picture(fleet: fold.Fleet) -> object:
    """Everything that a decision rests on, by value."""
    return (
        sorted((group.state.order, sorted(group.members)) for group in fleet.index.classes.values()),
        sorted((state.order, hosts) for state, hosts in fleet.idle.items()),
        view.devices(fleet, fleet.now),
        view.summary(fleet, fleet.now),
    )


def event(device: str | None, severity: Severity, at: float, host: str = "h0", message: str = "") -> DeviceEvent:
    return DeviceEvent(
        host=host,
        agent="a1",
        sequence=1,
        time_ns=int(at * 1e9),
        kind="xid",
        severity=severity,
        device=device,
        message=message,
    )


@settings(max_examples=60, deadline=None)
@given(st.data(), inventories(hosts=3, devices=3))
def test_the_order_of_messages_does_not_matter(data: st.DataObject, found: list[Inventory]) -> None:
    """Inventories come before, between or after leases, faults and drains; samples and processes after their host."""
    about: list[tuple[str, object]] = []
    for each in found:
        name = each.host.name
        for device in each.devices:
            severity = data.draw(st.sampled_from([None, None, Severity.WARNING, Severity.RESET, Severity.HARDWARE]))
            if severity is not None:
                about.append((name, event(device.uuid, severity, NOW - 5, name)))
                if data.draw(st.booleans()):
                    about.append((name, event(device.uuid, Severity.CLEARED, NOW - 4, name)))
    grants = [
        Grant(host=each.host.name, device=device.uuid, share=0.25, memory_bytes=GIB, cpus=1.5, host_memory_bytes=GIB)
        for each in found
        for device in each.devices
        if data.draw(st.booleans())
    ]
    drains = Drains(drains=data.draw(st.sampled_from([{}, {"host:h1": "a"}, {"device:GPU-h0-0": "b"}])))
    lost = data.draw(st.sampled_from([None, "h0", "h2"]))

    def build(order: list[object]) -> fold.Fleet:
        fleet = fold.Fleet()
        fold.advance(fleet, NOW)
        for step in order:
            if isinstance(step, tuple):
                fold.hold(fleet, "l1", grants)
            else:
                fold.apply(fleet, step)  # pyright: ignore[reportArgumentType]
        for each in found:
            uuids = [device.uuid for device in each.devices]
            if uuids:
                fold.apply(fleet, samples(each.host.name, uuids, NOW, used=[300 * MIB] * len(uuids)), NOW)
        return fleet

    facts: list[object] = [*found, *(one for _, one in about), drains, ("grants",)]
    if lost is not None:
        facts.append(fold.HostLost(lost))
    # Of one device the events keep their order: a later one may clear an earlier one of the same time.
    assert picture(build(facts)) == picture(build(data.draw(st.permutations(facts))))


@settings(max_examples=60, deadline=None)
@given(st.data(), inventories(hosts=3, devices=4))
def test_what_is_kept_is_what_would_be_worked_out_anew(data: st.DataObject, found: list[Inventory]) -> None:
    """After any run of samples, leases, faults and time each host stands in the class that its state says."""
    fleet = fold.Fleet()
    world = {each.host.name: each for each in found}
    for each in found:
        fold.apply(fleet, each, NOW)
    now = NOW
    policies = Policies()
    leases: list[str] = []
    for number in range(data.draw(st.integers(1, 25))):
        now += data.draw(st.sampled_from([0.0, 0.5, 1.0, 6.0, 4000.0]))
        name = data.draw(st.sampled_from(sorted(world)))
        uuids = [device.uuid for device in world[name].devices]
        kind = data.draw(st.integers(0, 6))
        if kind <= 2 and uuids:
            values = st.integers(0, 12 * GIB)
            fold.apply(
                fleet,
                samples(
                    name,
                    uuids,
                    now - data.draw(st.sampled_from([0.0, 0.0, 3.0, 60.0])),
                    used=[data.draw(values) for _ in uuids],
                    temperature=[data.draw(st.floats(20, 110)) for _ in uuids],
                    utilization=[data.draw(st.floats(0, 100)) for _ in uuids],
                ),
                now,
            )
        elif kind == 3 and uuids:
            holder = data.draw(st.sampled_from(["", "gone", *leases[-1:]]))
            fold.apply(fleet, processes(name, now, [(uuids[0], holder, data.draw(st.integers(0, 9 * GIB)))]), now)
        elif kind == 4 and uuids:
            severity = data.draw(st.sampled_from([Severity.RESET, Severity.WARNING, Severity.CLEARED]))
            fold.apply(fleet, event(data.draw(st.sampled_from([None, uuids[0]])), severity, now, name), now)
        elif kind == 5 and leases:
            fold.free(fleet, leases.pop(0))
        else:
            decision = decide(fleet, WorkRequest(owner="me", gpu_share=0.3, gpu_memory_bytes=GIB), now, policies)
            if isinstance(decision, Placed):
                fold.hold(fleet, f"l{number}", decision.grants)
                leases.append(f"l{number}")
    fold.advance(fleet, now)
    kept = picture(fleet)
    assert sum(len(group.members) for group in fleet.index.classes.values()) == len(fleet.hosts)
    for name, host in fleet.hosts.items():
        assert host.name in fleet.index.classes[host.state].members
        for device, state in zip(host.order, host.state.devices, strict=True):
            assert (state.blocked != 0) == (not view.status(fleet, host, device, now).usable)
            if not state.blocked and state.share_free:
                assert state.memory_free <= device.memory_free < state.memory_free + ROUNDED_OFF_BYTES
        fold.reblock(fleet, name)
    assert picture(fleet) == kept


def test_states_that_nothing_is_in_any_more_go_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planner sets aside what has outlived a second, and looks for cycles among it once an hour."""
    monkeypatch.setattr("corral.planner.fleet.known.STATES_SPARE", 8)
    monkeypatch.setattr("corral.planner.fleet.index.LOG_SPARE", 8)
    fleet = fleet_of(inventory("h1", ["NVIDIA H100 80GB HBM3"] * 4), live=True)
    uuids = list(fleet.devices)
    policies = Policies()
    gc.collect()
    gc.disable()
    try:
        seen: set[object] = set()
        for turn in range(300):
            used = [(turn * 7 + at) % 61 * GIB for at in range(4)]
            heat = [60.0 + turn % 40] * 4
            fold.apply(fleet, samples("h1", uuids, NOW + turn, used=used, temperature=heat), NOW + turn)
            decide(fleet, WorkRequest(owner="me", gpus=1 + turn % 3), NOW + turn, policies)
            seen.add(fleet.hosts["h1"].state.order)
        fleet.cache.clear()
        left = sum(isinstance(each, HostState) for each in gc.get_objects())
        assert left < 60 < len(seen)
        assert not any(isinstance(each, HostState | DeviceState) for each in _in_cycles())
    finally:
        gc.enable()


def _in_cycles() -> list[object]:
    """What only the garbage collector would have found."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return list(gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


def test_samples_make_devices_usable_and_their_absence_stale() -> None:
    fleet = fold.Fleet()
    fold.apply(fleet, inventory("h0", [H100, H100]), NOW)
    assert isinstance(ask(fleet), Rejection)
    fold.apply(fleet, samples("h0", ["GPU-h0-0"], NOW), NOW)
    assert placed(ask(fleet)).grants[0].device == "GPU-h0-0"
    refused = ask(fleet, gpus=2)
    assert isinstance(refused, Rejection)
    assert "1 without recent samples" in refused.message
    assert placed(ask(fleet, now=NOW + 10)).grants
    refused = ask(fleet, now=NOW + 10.1)
    assert isinstance(refused, Rejection)
    assert refused.message.startswith("0/2 devices: 2 without recent samples")
    assert refused.could_ever_fit
    fold.apply(fleet, samples("h0", ["GPU-h0-0", "GPU-h0-1"], NOW + 30), NOW + 30)
    assert len(placed(ask(fleet, now=NOW + 30, gpus=2)).grants) == 2


def test_a_clock_that_is_wrong_does_not_make_a_host_stale_but_an_old_backlog_does() -> None:
    fleet = fold.Fleet()
    fold.apply(fleet, inventory("h0", [H100]), NOW)
    for second in range(20):  # its clock is an hour behind the bus's
        fold.apply(fleet, samples("h0", ["GPU-h0-0"], NOW - 3600 + second), NOW + second)
    assert placed(ask(fleet, now=NOW + 19))
    # Away for a minute; on return the buffered samples come first, and say nothing of now.
    fold.apply(fleet, samples("h0", ["GPU-h0-0"], NOW - 3600 + 25), NOW + 85)
    assert isinstance(ask(fleet, now=NOW + 85), Rejection)
    fold.apply(fleet, samples("h0", ["GPU-h0-0"], NOW - 3600 + 85), NOW + 85)
    assert placed(ask(fleet, now=NOW + 85))


def test_a_clock_that_is_set_back_is_believed_and_an_old_message_is_not() -> None:
    fleet = fold.Fleet()
    fold.apply(fleet, inventory("h0", [H100]), NOW)
    fold.apply(fleet, samples("h0", ["GPU-h0-0"], NOW + 3600, used=[GIB]), NOW)  # an hour ahead
    fold.apply(fleet, samples("h0", ["GPU-h0-0"], NOW + 1, used=[2 * GIB]), NOW + 1)  # set right
    assert fleet.devices["GPU-h0-0"].memory_used == 2 * GIB
    assert placed(ask(fleet, now=NOW + 10.5, allow_in_use=True))
    fold.apply(fleet, samples("h0", ["GPU-h0-0"], NOW + 9, used=[3 * GIB]), NOW + 9)
    fold.apply(fleet, samples("h0", ["GPU-h0-0"], NOW + 5, used=[4 * GIB]), NOW + 5)  # read again from the stream
    assert fleet.devices["GPU-h0-0"].memory_used == 3 * GIB


def test_what_is_no_number_changes_nothing() -> None:
    fleet = fleet_of(inventory("h0", [H100]), live=True)
    state = fleet.hosts["h0"].state
    for n, strange in enumerate((math.nan, math.inf, -math.inf, 1e30), start=1):
        batch = samples("h0", ["GPU-h0-0"], NOW + n, used=[0], utilization=[strange], temperature=[strange])
        fold.apply(fleet, batch, NOW + n)
        assert fleet.hosts["h0"].state is state
    short = msgspec.structs.replace(samples("h0", ["GPU-h0-0"], NOW + 9, used=[5 * GIB]), times_ns=b"123")
    fold.apply(fleet, short, NOW + 9)
    cut = samples("h0", ["GPU-h0-0"], NOW + 9, used=[5 * GIB])
    fold.apply(fleet, msgspec.structs.replace(cut, columns={"memory_used_bytes": b"1234"}), NOW + 9)
    status = view.devices(fleet, NOW + 9)[0]
    assert (status.memory_used_bytes, status.utilization_percent, status.sample_age_seconds) == (0, None, 0.0)


def test_strangers_memory_counts_and_a_leases_own_does_not() -> None:
    fleet = fleet_of(inventory("h0", [H100]), live=True)
    device = fleet.devices["GPU-h0-0"]
    grants = placed(ask(fleet, gpu_share=0.5, gpu_memory_bytes=30 * GIB)).grants
    fold.hold(fleet, "l1", grants)
    assert device.memory_free == 50 * GIB
    # Nothing is known of processes: what is used beyond the granted is a stranger's.
    fold.apply(fleet, samples("h0", ["GPU-h0-0"], NOW + 1, used=[35 * GIB]), NOW + 1)
    assert device.memory_free == 45 * GIB
    lease, stranger, ended = ("GPU-h0-0", "l1", 28 * GIB), ("GPU-h0-0", "", 7 * GIB), ("GPU-h0-0", "l0", 2 * GIB)
    fold.apply(fleet, processes("h0", NOW + 1, [lease, stranger, ended]), NOW + 1)
    assert device.memory_free == 41 * GIB
    # A lease that takes more than it was granted takes it from what is free.
    fold.apply(fleet, processes("h0", NOW + 2, [("GPU-h0-0", "l1", 36 * GIB)]), NOW + 2)
    assert device.memory_free == 44 * GIB
    # Where the driver hides a stranger's memory, it is what the lease's processes do not explain of the sum.
    fold.apply(fleet, processes("h0", NOW + 3, [("GPU-h0-0", "l1", 28 * GIB), ("GPU-h0-0", "", None)]), NOW + 3)
    assert device.memory_free == 43 * GIB
    # What was sampled before a release does not count, but for what was a stranger's.
    fold.free(fleet, "l1")
    assert device.memory_free == 73 * GIB
    assert device.share_free == 1000
    fold.apply(fleet, samples("h0", ["GPU-h0-0"], NOW + 4, used=[35 * GIB]), NOW + 4)
    assert device.memory_free == 45 * GIB


@pytest.mark.parametrize(("wrong", "right"), [(3600.0, 0.0), (20.0, 0.0), (0.0, -3600.0), (-3600.0, 0.0), (1e9, -5.0)])
def test_a_host_is_heard_in_the_order_of_the_bus_whatever_its_clock_says(wrong: float, right: float) -> None:
    """Inventories, processes and faults, before and after its clock was set."""
    fleet = fold.Fleet()
    fold.apply(fleet, inventory("h0", [H100], time_ns=int((NOW + wrong) * 1e9)), NOW)
    fold.apply(fleet, processes("h0", NOW + wrong, [("GPU-h0-0", "", 9 * GIB)]), NOW)
    fold.apply(fleet, event("GPU-h0-0", Severity.RESET, NOW + wrong), NOW + 1)
    fold.apply(fleet, event("GPU-h0-0", Severity.WARNING, NOW + wrong), NOW + 1)
    fold.apply(fleet, inventory("h0", [H100, H100], time_ns=int((NOW + 2 + right) * 1e9)), NOW + 2)
    assert len(fleet.devices) == 2
    fold.apply(fleet, event("GPU-h0-0", Severity.CLEARED, NOW + 3 + right), NOW + 3)
    fault = fleet.faults["device:GPU-h0-0"]
    assert (fault.fatal, fault.warned_at) == (False, NOW + 1)
    assert not fleet.devices["GPU-h0-0"].blocked & UNHEALTHY
    fold.apply(fleet, processes("h0", NOW + 4 + right, []), NOW + 4)
    assert fleet.devices["GPU-h0-0"].memory_free == 80 * GIB
    # A stream that is read once more brings the fault again, as old as it is.
    fold.apply(fleet, event("GPU-h0-0", Severity.RESET, NOW + wrong), NOW + 1)
    assert not fleet.faults["device:GPU-h0-0"].fatal


@pytest.mark.parametrize("severity", [Severity.RESET, Severity.HARDWARE])
def test_a_fatal_fault_lasts_until_it_is_cleared(severity: Severity) -> None:
    fleet = fleet_of(inventory("h0", [H100, H100]), live=True)
    fold.apply(fleet, event("GPU-h0-0", severity, NOW, message="fell off the bus"))
    assert placed(ask(fleet)).grants[0].device == "GPU-h0-1"
    status = view.devices(fleet, NOW)[0]
    assert (status.usable, status.why_not, status.health) == (False, ["unhealthy"], "fell off the bus")
    fold.apply(fleet, event("GPU-h0-0", Severity.CLEARED, NOW - 1))  # older than the fault
    fold.apply(fleet, event("GPU-h0-0", Severity.APPLICATION, NOW + 1))
    fold.apply(fleet, inventory("h0", [H100, H100], time_ns=2))
    assert isinstance(ask(fleet, gpus=2), Rejection)
    fold.apply(fleet, event("GPU-h0-0", Severity.CLEARED, NOW + 2))
    assert placed(ask(fleet, gpus=2))
    fold.apply(fleet, event(None, severity, NOW + 3))
    refused = ask(fleet)
    assert isinstance(refused, Rejection)
    assert refused.message.startswith("0/2 devices: 2 unhealthy")


def test_drains_hold_for_devices_hosts_and_labels_and_leave_leases_alone() -> None:
    fleet = fleet_of(*(inventory(f"h{n}", [H100], labels={"rack": f"r{n}"}) for n in range(3)))
    fold.hold(fleet, "l1", placed(ask(fleet, hosts=["h0"])).grants)
    fold.apply(fleet, Drains(drains={"host:h0": "fan", "device:GPU-h1-0": "nvlink", "label:rack=r2": "move"}))
    refused = ask(fleet)
    assert isinstance(refused, Rejection)
    assert refused.message.startswith("0/3 devices: 3 drained")
    assert [status.drain_reason for status in view.devices(fleet, NOW)] == ["fan", "nvlink", "move"]
    assert view.devices(fleet, NOW)[0].leases == ["l1"]
    fold.apply(fleet, Drains(drains={"host:h0": "fan"}))
    assert len(placed(ask(fleet, gpus=2, placement="spread")).grants) == 2


def test_mig_parents_take_no_work_and_instances_do() -> None:
    plain = inventory("h0", [H100])
    parent = plain.devices[0]
    parts = [
        msgspec.structs.replace(
            parent, uuid=f"MIG-{n}", index=n, mig_parent=parent.uuid, mig_profile="1g.10gb", memory_bytes=10 * GIB
        )
        for n in (1, 2)
    ]
    fleet = fleet_of(msgspec.structs.replace(plain, devices=[parent, *parts]))
    assert placed(ask(fleet, mig=True)).grants[0].device == "MIG-1"
    refused = ask(fleet, mig="*g.10gb", gpu_memory_bytes=20 * GIB)
    assert isinstance(refused, Rejection)
    assert "1 split into MIG instances" in refused.message
    assert "largest 10.0 GiB" in refused.message
    assert not refused.could_ever_fit
    summary = view.summary(fleet, NOW)
    assert (summary.devices, summary.memory_total_bytes) == (2, 20 * GIB)


def test_hosts_are_lost_return_and_are_forgotten() -> None:
    fleet = fleet_of(inventory("h0", [H100]), inventory("h1", [H100]))
    fold.hold(fleet, "l1", placed(ask(fleet, hosts=["h0"])).grants)
    fold.apply(fleet, fold.HostLost("h1"))
    refused = ask(fleet)
    assert isinstance(refused, Rejection)
    assert {reason.code: reason.devices for reason in refused.reasons} == {"host_lost": 1, "leased": 1}
    fold.apply(fleet, fold.HostSeen("h1"))
    assert placed(ask(fleet)).grants[0].host == "h1"
    fold.apply(fleet, fold.HostForgotten("h0"))
    assert list(fleet.hosts) == ["h1"]
    assert list(fleet.devices) == ["GPU-h1-0"]
    # It comes back with its lease: nothing is given twice.
    fold.apply(fleet, inventory("h0", [H100], time_ns=9))
    assert fleet.devices["GPU-h0-0"].share_free == 0
    assert placed(ask(fleet)).grants[0].host == "h1"


def test_a_board_that_moves_takes_its_leases_along() -> None:
    fleet = fleet_of(inventory("h0", [H100, H100]), inventory("h1", []))
    fold.hold(fleet, "l1", placed(ask(fleet)).grants)
    moved = inventory("h1", [], time_ns=2)
    device = msgspec.structs.replace(fleet.devices["GPU-h0-0"].info, host="h1", index=0)
    fold.apply(fleet, msgspec.structs.replace(moved, devices=[device]))
    assert [d.uuid for d in fleet.hosts["h0"].devices] == ["GPU-h0-1"]
    assert fleet.devices["GPU-h0-0"].holders.keys() == {"l1"}
    assert placed(ask(fleet)).grants[0].device == "GPU-h0-1"


def claimed(fleet: fold.Fleet, by: str, time_ns: int) -> Inventory:
    """An inventory that lists a device of `h0` beside the host's own."""
    own = inventory(by, [H100], time_ns=time_ns)
    other = msgspec.structs.replace(fleet.devices["GPU-h0-0"].info, host=by, index=1)
    return msgspec.structs.replace(own, devices=[*own.devices, other])


def test_a_host_that_still_reports_keeps_its_boards() -> None:
    fleet = fleet_of(inventory("h0", [H100, H100]), inventory("h1", [H100]), live=True)
    links = [[Link.SAME, Link.NVLINK], [Link.NVLINK, Link.SAME]]
    claim = msgspec.structs.replace(claimed(fleet, "h1", 2), links=links)
    fold.apply(fleet, claim, NOW + 5)
    assert fleet.devices["GPU-h0-0"].host == "h0"
    assert [d.uuid for d in fleet.hosts["h0"].devices] == ["GPU-h0-0", "GPU-h0-1"]
    assert [d.uuid for d in fleet.hosts["h1"].devices] == ["GPU-h1-0"]
    assert len(placed(ask(fleet, now=NOW + 5, gpus=2)).grants) == 2
    # It says that the board is gone: from then on another host may have it.
    fold.apply(fleet, inventory("h0", [], time_ns=2), NOW + 6)
    fold.apply(fleet, claimed_again(claim, 3), NOW + 7)
    assert fleet.devices["GPU-h0-0"].host == "h1"


def claimed_again(claim: Inventory, time_ns: int) -> Inventory:
    return msgspec.structs.replace(claim, time_ns=time_ns)


def test_a_board_of_a_host_that_is_silent_moves() -> None:
    fleet = fleet_of(inventory("h0", [H100]), inventory("h1", [H100]), live=True)
    fold.hold(fleet, "l1", placed(ask(fleet, hosts=["h0"])).grants)
    claim = claimed(fleet, "h1", 2)
    fold.apply(fleet, claim, NOW + 60)
    assert fleet.devices["GPU-h0-0"].host == "h0"
    fold.apply(fleet, claimed_again(claim, 3), NOW + 120)
    assert fleet.devices["GPU-h0-0"].host == "h1"
    assert fleet.devices["GPU-h0-0"].holders.keys() == {"l1"}
    assert fleet.hosts["h0"].devices == []
    fold.apply(fleet, samples("h1", ["GPU-h1-0", "GPU-h0-0"], NOW + 121), NOW + 121)
    fold.free(fleet, "l1")
    assert len(placed(ask(fleet, now=NOW + 121, gpus=2, hosts=["h1"])).grants) == 2


def test_a_host_says_nothing_of_the_devices_of_another() -> None:
    fleet = fleet_of(inventory("h0", [H100]), inventory("h1", []), live=True)
    fold.apply(fleet, event("GPU-h0-0", Severity.HARDWARE, NOW + 1, host="h1"))
    assert placed(ask(fleet))
    fold.apply(fleet, event("GPU-h0-0", Severity.HARDWARE, NOW + 2, host="h0"))
    fold.apply(fleet, event("GPU-h0-0", Severity.CLEARED, NOW + 3, host="h1"))
    assert isinstance(ask(fleet), Rejection)
    # Also not before it is known whose they are.
    for early in ("GPU-h2-0", "GPU-h2-1"):
        fold.apply(fleet, event(early, Severity.RESET, NOW + 3, host="h1"))
    fold.apply(fleet, event("GPU-h2-1", Severity.RESET, NOW + 2, host="h2"))
    fold.apply(fleet, inventory("h2", [H100, H100]), NOW + 4)
    fold.apply(fleet, samples("h2", ["GPU-h2-0", "GPU-h2-1"], NOW + 4), NOW + 4)
    status = {entry.uuid: entry.why_not for entry in view.devices(fleet, NOW + 4) if entry.host == "h2"}
    assert status == {"GPU-h2-0": [], "GPU-h2-1": ["unhealthy"]}


def test_a_board_that_fell_off_comes_back_with_its_fault() -> None:
    fleet = fleet_of(inventory("h0", [H100, H100]), inventory("h1", []))
    fold.apply(fleet, event("GPU-h0-1", Severity.HARDWARE, NOW, message="fell off the bus"))
    fold.apply(fleet, inventory("h0", [H100], time_ns=2))
    assert "device:GPU-h0-1" in to_keep(fleet, NOW, 10**6)
    fold.apply(fleet, event("GPU-h0-1", Severity.CLEARED, NOW + 1, host="h1"))
    fold.apply(fleet, inventory("h0", [H100, H100], time_ns=3))
    assert isinstance(ask(fleet, gpus=2), Rejection)
    fold.apply(fleet, inventory("h0", [H100], time_ns=4))
    fold.apply(fleet, event("GPU-h0-1", Severity.CLEARED, NOW + 2))
    fold.apply(fleet, inventory("h0", [H100, H100], time_ns=5))
    assert placed(ask(fleet, gpus=2))


def test_the_faults_that_are_kept_are_those_that_matter_and_fit_in_a_message() -> None:
    fleet = fleet_of(*(inventory(f"h{n}", [H100] * 8) for n in range(800)))
    for at, uuid in enumerate(fleet.devices):
        host = fleet.devices[uuid].host
        fold.apply(fleet, event(uuid, Severity.WARNING, NOW - at, host=host, message="w" * 5000))
    for at, severity in enumerate((Severity.RESET, Severity.HARDWARE, Severity.HARDWARE)):
        fold.apply(fleet, event(f"GPU-h{at}-0", severity, NOW - 9000 + at, host=f"h{at}"))
    fold.apply(fleet, event("GPU-h1-0", Severity.CLEARED, NOW, host="h1"))
    fold.apply(fleet, event(None, Severity.HARDWARE, NOW, host="h3"))
    for uuid in range(10_000):  # whoever makes devices up takes no more room
        fold.apply(fleet, event(f"GPU-made-up-{uuid}", Severity.HARDWARE, NOW, host="h3"))
    assert len(fleet.early) < 5000
    kept = to_keep(fleet, NOW, 2**20)
    assert len(codec.encode(kept)) < 2**20
    assert len(kept) > 2000
    assert list(kept)[:3] == ["host:h3", "device:GPU-h2-0", "device:GPU-h0-0"]
    # The newest warnings, and none that is over.
    warned = [fault.warned_at for key, fault in kept.items() if not fault.fatal]
    assert warned == sorted(warned, reverse=True)
    assert len(to_keep(fleet, NOW + 3600, 2**20)) == 3


def test_a_device_that_is_listed_twice_is_there_once() -> None:
    one = inventory("h0", [H100])
    fleet = fleet_of(msgspec.structs.replace(one, devices=[*one.devices, *one.devices]))
    assert len(fleet.hosts["h0"].devices) == 1
    assert isinstance(ask(fleet, gpus=2), Rejection)


@pytest.mark.parametrize("address", ["-oProxyCommand=x", "a b", "$(reboot)", "h\n", "é"])
def test_an_address_that_is_none_is_dropped(address: str) -> None:
    plain = inventory("h0", [H100])
    fleet = fleet_of(msgspec.structs.replace(plain, host=msgspec.structs.replace(plain.host, address=address)))
    assert fleet.hosts["h0"].address == ""
    named = msgspec.structs.replace(plain, time_ns=2, host=msgspec.structs.replace(plain.host, address="h0.example"))
    fold.apply(fleet, named)
    assert fleet.hosts["h0"].address == "h0.example"


def test_a_board_leaves_its_host() -> None:
    fleet = fleet_of(inventory("h0", [H100, H100]))
    fold.apply(fleet, inventory("h0", [H100], time_ns=2))
    assert list(fleet.devices) == ["GPU-h0-0"]
    fold.apply(fleet, inventory("h0", [H100, H100, H100], time_ns=1))  # an old message, late
    assert list(fleet.devices) == ["GPU-h0-0"]


def test_the_summary_adds_up_over_what_the_filter_lets_through() -> None:
    fleet = fold.Fleet()
    for n in range(2):
        fold.apply(fleet, inventory(f"h{n}", [H100, "Tesla T4"]), NOW)
        uuids = [f"GPU-h{n}-0", f"GPU-h{n}-1"]
        fold.apply(
            fleet,
            samples(
                f"h{n}", uuids, NOW, used=[10 * GIB, 0], utilization=[50.0 + 10 * n, None], temperature=[40.0, 60.0]
            ),
            NOW,
        )
    fold.hold(fleet, "l1", placed(ask(fleet, gpu_share=0.5, models=["*h100*"], gpu_memory_bytes=20 * GIB)).grants)
    whole = view.summary(fleet, NOW)
    assert (whole.hosts, whole.devices, whole.usable_devices, whole.leased_devices, whole.active_leases) == (
        2,
        4,
        4,
        1,
        1,
    )
    assert whole.share_free == 3.5
    assert whole.utilization_percent_mean == pytest.approx(55.0)
    assert whole.temperature_celsius_mean == pytest.approx(50.0)
    assert whole.models == {H100: 2, "Tesla T4": 2}
    assert whole.memory_free_bytes == sum(device.memory_free for device in fleet.devices.values())
    part = view.summary(fleet, NOW, DeviceFilter(models=["*H100*"], hosts=["h1"]))
    assert (part.hosts, part.devices, part.memory_used_bytes) == (1, 1, 10 * GIB)
    assert math.isclose(part.utilization_percent_mean or 0, 60.0)


@pytest.mark.parametrize("by", [-3600.0, -30.0, 30.0, 3600.0])
@pytest.mark.parametrize("asked", [False, True])
def test_a_clock_that_is_set_neither_hides_devices_nor_keeps_the_dead(by: float, asked: bool) -> None:
    fleet = fold.Fleet()
    event = inventory("h0", [H100], time_ns=1)
    [uuid] = [device.uuid for device in event.devices]
    fold.apply(fleet, event, NOW)
    fold.apply(fleet, samples("h0", [uuid], NOW), NOW)
    wrong = DeviceEvent(
        host="h0", agent="a1", sequence=2, time_ns=1, kind="xid", severity=Severity.HARDWARE, device=uuid
    )
    fold.apply(fleet, wrong, NOW)
    if asked:  # a question comes first
        fold.advance(fleet, NOW + by)
    fold.apply(fleet, fold.ClockSet(by, NOW + by))
    fold.apply(fleet, msgspec.structs.replace(wrong, severity=Severity.CLEARED), NOW + by)
    last = 0
    for last in range(1, 20):
        fold.apply(fleet, samples("h0", [uuid], NOW + last), NOW + by + last)
        assert fleet.devices[uuid].blocked == 0
    fold.advance(fleet, NOW + by + last + 9)
    assert fleet.devices[uuid].blocked == 0
    fold.advance(fleet, NOW + by + last + 11)
    assert fleet.devices[uuid].blocked
