"""Booked windows without a bus: a random fleet in virtual time, audited by the intervals of leases and windows."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest
from corral.planner.broker.windows import in_window, lease_limit
from corral.planner.fleet.bookings import Booking, Party
from corral.planner.fleet.fleet import Booked, Fleet, advance, apply, free, hold
from corral.planner.placement.decide import Placed, Policies, decide, explain, placed
from corral.planner.queue.durations import given
from corral.planner.queue.forecast import forecast
from corral.planner.queue.line import Line
from corral.planner.windows.choice import Candidate, Wish, choose, soonest
from corral.planner.windows.occurrences import InvalidWindow, bookings_of, occurrences, party_of
from corral.planner.windows.replacement import missing, passing, substitutes
from corral.schemas.operations import Drains
from corral.schemas.requests import Grant, Placement, Rejection, WorkRequest
from corral.schemas.work.windows import Repeat, Window
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st
from support.planner_world import NOW, fleet_of, inventory

H100 = "NVIDIA H100 80GB HBM3"
OWNERS = ("ann", "ben", "eve")


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(NOW + seconds, UTC)


def window(starts: float, lasts: float, window_id: str = "w", **fields: object) -> Window:
    return Window(starts_at=at(starts), ends_at=at(starts + lasts), window_id=window_id, **fields)  # pyright: ignore[reportArgumentType]


@examples(st.integers(0, 10**6), st.integers(1, 10**10), st.floats(0, 3600))
def test_times_of_a_booking_are_those_of_leases_that_end_with_it(starts: int, lasts: int, lead: float) -> None:
    begin = at(0) + timedelta(microseconds=starts)
    wanted = Window(
        starts_at=begin, ends_at=begin + timedelta(microseconds=lasts), window_id="w", gpus=1, lead_seconds=lead
    )
    [booking] = occurrences(wanted)
    for time in booking[:3]:
        assert datetime.fromtimestamp(time, UTC).timestamp() == time
    assert datetime.fromtimestamp(booking.ends_at, UTC) == wanted.ends_at


class Held:
    def __init__(self, owner: str, uuids: set[str], begin: float, limit: float) -> None:
        self.owner, self.uuids, self.begin, self.limit = owner, uuids, begin, limit
        self.end = math.inf


class World:
    """A fleet with a line and windows, as the broker has them; times are seconds after `NOW`."""

    def __init__(self, hosts: int = 2, devices: int = 3) -> None:
        self.fleet: Fleet = fleet_of(*(inventory(f"h{n}", [H100] * devices) for n in range(hosts)))
        self.line = Line(self.fleet, Policies("best-fit"))
        self.now = 0.0
        self.leases: dict[str, Held] = {}
        self.done: list[Held] = []
        self.windows: dict[str, Window] = {}
        self.canceled: dict[str, float] = {}
        self.made = 0

    def next_id(self) -> str:
        self.made += 1
        return f"n{self.made}"

    def grant(self, request: WorkRequest, grants: list[Grant]) -> str:
        lease_id = self.next_id()
        decided_inside = in_window(self.fleet, request.owner, grants)
        until, inside = lease_limit(self.fleet, request, grants, at(self.now), decided_inside=decided_inside)
        limits = [math.inf if until is None else until.timestamp() - NOW, self.now + (request.max_seconds or math.inf)]
        # What was decided by its limit is not cut: it ends before the devices are booked.
        assert inside or request.max_seconds is None or min(limits) == pytest.approx(limits[1], abs=1e-3)
        hold(self.fleet, lease_id, grants)
        uuids = {grant.device for grant in grants if grant.device}
        self.leases[lease_id] = Held(request.owner, uuids, self.now, min(limits))
        return lease_id

    def request(self, owner: str, gpus: int, max_seconds: float | None, wait: bool, share: float | None = None) -> bool:
        where = Placement.FEWEST_HOSTS
        gpus = 1 if share else gpus
        request = WorkRequest(owner=owner, gpus=gpus, gpu_share=share, max_seconds=max_seconds, placement=where)
        decision = decide(self.fleet, request, NOW + self.now, Policies("best-fit"))
        assert explain(self.fleet, request, NOW + self.now, Policies("best-fit")).granted == isinstance(
            decision, Placed
        )
        if isinstance(decision, Placed):
            lease = self.grant(request, decision.grants)
            self.line.adopt(lease, owner, gpus, given(max_seconds or 50.0, self.leases[lease].limit), NOW + self.now)
            return True
        if wait:
            self.line.arrive(request, given(max_seconds or 50.0, max_seconds or math.inf), NOW + self.now)
        return False

    def book(self, wanted: Window) -> list[str] | None:
        candidates = [
            Candidate(device.uuid, device.host, device.index, self.free_at(device.holders), device.bookings)
            for device in self.fleet.devices.values()
        ]
        wish = Wish(wanted.gpus, occurrences(wanted), party_of(wanted))
        chosen = choose(candidates, wish, self.fleet.bookings.parties)
        if chosen is None:
            return None
        uuids = [candidate.uuid for candidate in chosen]
        self.windows[wanted.window_id or ""] = Window(
            **{f: getattr(wanted, f) for f in wanted.__struct_fields__} | {"devices": uuids}
        )
        self.apply()
        return uuids

    def maintain(self, wanted: Window) -> None:
        self.windows[wanted.window_id or ""] = wanted
        self.apply()

    def free_at(self, holders: object) -> float:
        return max((NOW + self.leases[lease].limit for lease in holders), default=-math.inf)  # pyright: ignore[reportGeneralTypeIssues, reportUnknownVariableType, reportUnknownArgumentType, reportArgumentType, reportCallIssue]

    def apply(self) -> None:
        live = [window for window_id, window in self.windows.items() if window_id not in self.canceled]
        times = {window.window_id or "": occurrences(window) for window in live}
        advance(self.fleet, NOW + self.now)
        apply(self.fleet, Booked(bookings_of(live, times, NOW + self.now)))

    def cancel(self, window_id: str) -> None:
        self.canceled[window_id] = self.now
        self.apply()

    def end(self, lease_id: str) -> None:
        self.line.ended(lease_id, NOW + self.now)
        free(self.fleet, lease_id)
        held = self.leases.pop(lease_id)
        held.end = self.now
        self.done.append(held)

    def serve(self) -> None:
        for start in self.line.serve(NOW + self.now):
            request = start.entry.request
            grants = placed(request, start.entry.ask, start.policy, start.picks).grants
            self.line.started(self.grant(request, grants), start.entry, NOW + self.now)

    def until(self, when: float) -> None:
        """Let time pass, from one end of a lease or change of a window to the next, and serve the line each time."""
        while self.now < when:
            due = self.fleet.bookings.due - NOW
            self.now = min([when, max(due, self.now + 1e-3), *(held.limit for held in self.leases.values())])
            for lease_id in [key for key, held in self.leases.items() if held.limit <= self.now]:
                self.end(lease_id)
            advance(self.fleet, NOW + self.now)
            self.serve()

    def audit(self) -> None:
        """No lease of others overlaps a window on one of its devices, and no two windows of others share one."""
        taken: list[tuple[str, str, float, float]] = []
        for window_id, booked in self.windows.items():
            until = self.canceled.get(window_id, math.inf)
            for time in occurrences(booked):
                begin, end = time.starts_at - NOW, min(time.ends_at - NOW, until)
                if begin >= end:
                    continue
                for held in [*self.done, *self.leases.values()]:
                    if held.begin < end and begin < min(held.end, self.now) and held.uuids & set(booked.devices):
                        assert held.owner in booked.owners, (vars(held), window_id, begin, end)
                        assert held.limit <= self.chain_end(booked, end), (vars(held), window_id)
                for uuid in booked.devices:
                    for other, who, since, to in taken:
                        assert not (other == uuid and since < end and begin < to), (window_id, who)
                taken += [(uuid, window_id, begin, end) for uuid in booked.devices]

    def chain_end(self, booked: Window, end: float) -> float:
        """End of the windows in a row of the same owners."""
        times = sorted(
            (time.starts_at - NOW, time.ends_at - NOW)
            for other in self.windows.values()
            if other.owners == booked.owners
            for time in occurrences(other)
        )
        for since, to in times:
            if since <= end < to:
                end = to
        return end + 1e-3


OPS = st.one_of(
    st.tuples(st.just("pass"), st.integers(1, 40)),
    st.tuples(
        st.just("request"),
        st.sampled_from(OWNERS),
        st.integers(1, 4),
        st.sampled_from([None, 5.0, 20.0, 60.0]),
        st.booleans(),
        st.sampled_from([None, None, 0.5]),
    ),
    st.tuples(
        st.just("book"),
        st.sampled_from(OWNERS),
        st.integers(1, 4),
        st.integers(2, 60),
        st.integers(1, 40),
        st.integers(1, 5),
    ),
    st.tuples(st.just("cancel"), st.integers(0, 5)),
    st.tuples(st.just("release"), st.integers(0, 5)),
)


@settings(max_examples=60)
@examples(st.lists(OPS, min_size=5, max_size=40))
def test_a_window_is_never_late(ops: list[tuple[object, ...]]) -> None:
    world = World()
    for kind, *args in ops:
        if kind == "pass":
            world.until(world.now + args[0])  # pyright: ignore[reportOperatorIssue]
        elif kind == "request":
            world.request(*args)  # pyright: ignore[reportArgumentType]
        elif kind == "book":
            owner, gpus, wait, lasts, lead = args
            begin = world.now + wait  # pyright: ignore[reportOperatorIssue]
            world.book(window(begin, lasts, world.next_id(), gpus=gpus, owners=[owner], lead_seconds=lead, reason="r"))  # pyright: ignore[reportArgumentType]
        elif kind == "cancel" and world.windows:
            ids = [key for key in world.windows if key not in world.canceled]
            if ids:
                world.cancel(ids[args[0] % len(ids)])  # pyright: ignore[reportOperatorIssue]
        elif kind == "release" and world.leases:
            world.end(list(world.leases)[args[0] % len(world.leases)])  # pyright: ignore[reportOperatorIssue]
        world.serve()
        world.audit()
    # Once the windows are over, and leases without a limit are given back, nobody waits.
    for _ in range(100):
        world.until(world.now + 50)
        world.audit()
        if not len(world.line):
            break
        for lease in [key for key, held in world.leases.items() if held.limit == math.inf]:
            world.end(lease)
    assert not len(world.line)


def test_before_during_and_after_a_window() -> None:
    world = World(hosts=1, devices=2)
    chosen = world.book(window(100, 50, gpus=2, owners=["ann"], lead_seconds=10, reason="course"))
    assert chosen is not None
    # Before: only what surely ends when the devices close; the rejection says how long that is.
    unlimited = decide(world.fleet, WorkRequest(owner="ben"), NOW, Policies())
    assert isinstance(unlimited, Rejection)
    assert unlimited.reasons[0].code == "booked"
    assert "booked for ann from 2023-11-14T22:15:00Z" in unlimited.message
    assert "a time limit of at most 90s (--max)" in unlimited.nearest
    assert unlimited.could_ever_fit
    assert isinstance(decide(world.fleet, WorkRequest(owner="ben", max_seconds=91), NOW, Policies()), Rejection)
    brief = decide(world.fleet, WorkRequest(owner="ben", max_seconds=90), NOW, Policies())
    assert isinstance(brief, Placed)
    # Who waits starts when the window is over, which the forecast and the reservation know; a lease of ann's ends then.
    world.request("ben", 1, None, True)
    world.request("ann", 2, None, True)
    assert [found.expected - NOW for found in forecast(world.line, NOW).values()] == [150, 100]
    world.until(99.9)
    assert not world.leases
    world.until(100)
    assert [held.limit for held in world.leases.values()] == [150]
    assert not world.request("ben", 1, 5, False)
    assert world.line.held[0].starts_at == NOW + 150
    world.until(149.9)
    assert len(world.line) == 1
    world.until(150.1)
    assert [(held.owner, held.begin) for held in world.leases.values()] == [("ben", 150)]
    world.audit()


def test_a_window_that_ends_between_a_decision_and_its_lease_leaves_the_device_to_the_next() -> None:
    world = World(hosts=1, devices=1)
    assert world.book(window(0.0, 10.0, "ann", gpus=1, owners=["ann"], lead_seconds=0))
    assert world.book(window(20.0, 10.0, "ben", gpus=1, owners=["ben"], lead_seconds=5))
    world.until(9.99)
    request = WorkRequest(owner="ann", gpus=1)
    decision = decide(world.fleet, request, NOW + world.now, Policies("best-fit"))
    assert isinstance(decision, Placed)
    inside = in_window(world.fleet, "ann", decision.grants)
    world.until(10.01)
    until, in_it = lease_limit(world.fleet, request, decision.grants, at(world.now), decided_inside=inside)
    assert (until, in_it) == (at(15.0), "")


def test_windows_in_a_row_of_the_same_owner_do_not_cut_a_lease() -> None:
    world = World(hosts=1, devices=1)
    assert world.book(window(10, 10, "a", gpus=1, owners=["ann"], lead_seconds=5, reason="r"))
    assert world.book(window(20, 10, "b", gpus=1, owners=["ann"], lead_seconds=5, reason="r"))
    late = window(30, 10, "c", gpus=1, owners=["ben"], lead_seconds=5, reason="r")
    assert world.book(late) is None  # ann's would have to end 5 s ahead
    assert world.book(window(35, 10, "c", gpus=1, owners=["ben"], lead_seconds=5, reason="r"))
    world.until(11)
    assert world.request("ann", 1, None, False)
    assert [held.limit for held in world.leases.values()] == [30]


def test_those_who_may_get_booked_devices_first_unless_they_outlast_them() -> None:
    world = World(hosts=2, devices=1)
    chosen = world.book(window(10, 50, gpus=1, owners=["ann"], lead_seconds=1, reason="r"))
    assert chosen is not None
    world.until(10)
    for seconds, inside in ((None, True), (20.0, True), (500.0, False)):
        request = WorkRequest(owner="ann", expected_seconds=seconds)
        decision = decide(world.fleet, request, NOW + world.now, Policies())
        assert isinstance(decision, Placed)
        assert (decision.grants[0].device in chosen) == inside


def test_maintenance_is_for_no_one_and_ends_by_itself() -> None:
    world = World(hosts=2, devices=1)
    world.maintain(window(50, 20, maintenance=True, hosts=["h0"], lead_seconds=10, reason="fans"))
    cores = WorkRequest(owner="ann", gpus=0, cpus=1, hosts=["h0"])
    whole = WorkRequest(owner="ann", hosts=["h0"])
    for request in (cores, whole):
        refused = decide(world.fleet, request, NOW, Policies())
        assert isinstance(refused, Rejection)
        assert "maintenance (fans)" in refused.message
    brief = WorkRequest(owner="ann", gpus=0, cpus=1, hosts=["h0"], max_seconds=40)
    assert isinstance(decide(world.fleet, brief, NOW, Policies()), Placed)
    assert isinstance(decide(world.fleet, brief, NOW + 1, Policies()), Rejection)
    assert isinstance(decide(world.fleet, WorkRequest(owner="ann"), NOW + 1, Policies()), Placed)
    assert isinstance(decide(world.fleet, brief, NOW + 50, Policies()), Rejection)
    for request in (cores, whole):
        assert isinstance(decide(world.fleet, request, NOW + 70, Policies()), Placed)


def test_devices_are_on_few_hosts_and_a_refusal_says_when_there_are_enough() -> None:
    me = Party(frozenset({"ann"}))
    parties = {"w": Party(frozenset({"ben"})), "": me}
    wish = Wish(3, [Booking(90, 100, 200, "")], me)
    hosts = {"a": 2, "b": 4, "c": 3}
    devices = [Candidate(f"{host}{n}", host, n) for host, count in hosts.items() for n in range(count)]
    chosen = choose(devices, wish, parties)
    assert chosen is not None
    assert {device.host for device in chosen} == {"c"}
    chosen = choose(devices, wish._replace(gpus=6), parties)
    assert chosen is not None
    assert sorted(device.host for device in chosen) == ["a", "a", "b", "b", "b", "b"]
    # One is free too late, another is booked; a third is booked, but at another time, and is taken first.
    busy = [
        Candidate("x", "d", 0, free_at=300.0),
        Candidate("y", "d", 1, bookings=(Booking(140, 150, 250, "w"),)),
        Candidate("z", "d", 2, bookings=(Booking(440, 450, 500, "w"),)),
        Candidate("v", "d", 3),
    ]
    chosen = choose(busy, wish._replace(gpus=1), parties)
    assert chosen is not None
    assert [device.uuid for device in chosen] == ["z"]
    assert choose(busy, wish, parties) is None
    assert soonest(busy, wish, parties) == 260  # y's window is over, and its devices close 10 s ahead
    assert soonest(busy, wish._replace(gpus=5), parties) is None


def test_a_window_repeats_by_the_clock_on_the_wall() -> None:
    pytest.importorskip("zoneinfo").ZoneInfo("Europe/Berlin")
    start = datetime(2026, 3, 27, 7, tzinfo=UTC)  # 8:00 in Berlin; on the 29th it is summer there
    weekly = Window(
        starts_at=start,
        ends_at=start + timedelta(hours=4),
        repeat=Repeat.WEEKLY,
        repeat_until=start + timedelta(days=14),
        zone="Europe/Berlin",
    )
    begins = [datetime.fromtimestamp(time.starts_at, UTC) for time in occurrences(weekly)]
    assert begins == [start, start + timedelta(days=7, hours=-1), start + timedelta(days=14, hours=-1)]
    for wrong, field in (
        ({"ends_at": start}, "$.book.ends_at"),
        ({"repeat_until": None}, "$.book.repeat_until"),
        ({"zone": "Mars/Olympus"}, "$.book.zone"),
        ({"repeat": Repeat.DAILY, "repeat_until": start + timedelta(days=500)}, "$.book.repeat_until"),
        ({"repeat": Repeat.DAILY, "ends_at": start + timedelta(hours=25)}, "$.book.ends_at"),
    ):
        fields = {name: getattr(weekly, name) for name in weekly.__struct_fields__} | wrong
        with pytest.raises(InvalidWindow) as error:
            occurrences(Window(**fields))
        assert error.value.field == field


def test_a_request_that_waits_can_come_to_last_into_a_window() -> None:
    """It may start while it surely ends before; once it no longer does, it waits for the end of the window."""
    world = World(hosts=1, devices=1)
    assert world.request("ben", 1, 60, False)
    assert world.book(window(100, 50, gpus=1, owners=["ann"], lead_seconds=10, reason="r"))
    world.request("eve", 1, 50, True)
    world.until(90)
    assert len(world.line) == 1
    world.until(150.1)
    assert [(held.owner, held.begin) for held in world.leases.values()] == [("eve", 150)]


def test_why_a_device_of_a_window_is_missing_and_which_may_come_back() -> None:
    fleet = fleet_of(inventory("h0", [H100] * 2), inventory("h1", [H100] * 2), live=True)
    asked = window(3600, 600, owners=["ann"], devices=["GPU-h0-0", "GPU-h1-0", "GPU-gone"])
    fans = window(4000, 100, "m", maintenance=True, devices=["GPU-h1-0"], reason="fans")
    times = {one.window_id or "": occurrences(one) for one in (asked, fans)}
    apply(fleet, Booked(bookings_of([asked, fans], times, NOW)), NOW)
    parties = fleet.bookings.parties

    def reasons() -> dict[str, str]:
        return missing(fleet, asked.devices, times["w"], parties)

    assert {uuid: reason.partition(" from ")[0] for uuid, reason in reasons().items()} == {
        "GPU-h1-0": "maintenance (fans)",
        "GPU-gone": "no host lists it",
    }
    advance(fleet, NOW + 60)
    assert reasons()["GPU-h0-0"] == "no samples"
    assert passing(fleet, "GPU-h0-0")
    assert passing(fleet, "GPU-gone")
    apply(fleet, Drains(drains={"device:GPU-h0-0": "new fans"}), NOW + 60)
    assert reasons()["GPU-h0-0"] == "drained: new fans"
    assert not passing(fleet, "GPU-h0-0")


def test_what_takes_the_place_of_missing_devices_is_on_the_same_hosts_if_it_can_be() -> None:
    wish = Wish(2, [Booking(90, 100, 200, "w")], Party(frozenset({"ann"})))
    far = [Candidate(f"a{n}", "a", n) for n in range(2)]
    near = [Candidate("b0", "b", 0), Candidate("b1", "b", 1, free_at=50.0), Candidate("b2", "b", 2, free_at=150.0)]

    def chosen(candidates: list[Candidate], by: float = 90.0, wanted: Wish = wish) -> list[str]:
        return sorted(one.uuid for one in substitutes(candidates, wanted, {}, {"b"}, by))

    assert chosen([*far, *near]) == ["b0", "b1"]
    assert chosen([*far, *near[1:]]) == ["a0", "a1"]
    # As many as there are, and once the window has closed also such that are free later.
    assert chosen(near[1:]) == ["b1"]
    assert chosen(near[1:], by=200.0) == ["b1", "b2"]
    assert chosen([]) == []
