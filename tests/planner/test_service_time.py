"""The rule by which leases end, as a function of times and outages: whatever was away, and whatever clocks say."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from corral.planner.durable.store import Entry
from corral.planner.leases import lifecycle
from corral.planner.leases.lifecycle import LeaseRecord, LeaseTable
from corral.planner.leases.recovery import outage_seconds, recover_service_time
from corral.planner.leases.service_time import (
    UNKNOWN_SECONDS,
    Outage,
    Service,
    ServiceTime,
    ends_at,
    long_for,
    with_outage,
)
from corral.schemas.requests import Grant, WorkRequest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

START = datetime(2026, 1, 1, tzinfo=UTC)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("serve"), st.floats(0.1, 200.0)),
        st.tuples(st.sampled_from(["bus away", "paused", "jump ahead", "set back", "takeover"]), st.floats(0.1, 1e5)),
    ),
    max_size=12,
)


def record(ttl: float, service_seconds: float | None, lease_id: str = "l") -> LeaseRecord:
    return lifecycle.grant(
        WorkRequest(owner="me", ttl_seconds=ttl),
        [Grant(host="a", device="GPU-1")],
        lease_id=lease_id,
        now=START,
        digest="",
        planner="p",
        environment={},
        service_seconds=service_seconds,
    )


class World:
    """A planner, then the next one, with clocks that do what they like."""

    def __init__(self, service: Service) -> None:
        self.elapsed, self.wall = 1000.0, 1e9
        self.time = ServiceTime(service.seconds, service.outages, elapsed=self.elapsed, wall=self.wall)

    def now(self) -> float:
        return self.time.now(self.elapsed)

    def tick(self, seconds: float, serves: bool = True, wall: float | None = None) -> None:
        self.elapsed += seconds
        self.wall += seconds if wall is None else wall
        self.time.tick(self.elapsed, self.wall, serves)

    def serve(self, seconds: float) -> None:
        for _ in range(int(seconds / 0.25)):
            self.tick(0.25)
        self.tick(seconds % 0.25)

    def go_through(self, what: str, seconds: float) -> None:
        if what == "bus away":
            for _ in range(3):
                self.tick(seconds / 3, serves=False)
            self.tick(0.0)
        elif what == "paused":
            self.tick(max(seconds, 1.1))
        elif what == "jump ahead":
            self.tick(0.1, wall=seconds)
        elif what == "set back":
            self.tick(0.1, wall=-seconds)
        else:  # some seconds of service time may not have been written down
            kept = self.time.kept
            kept = replace(kept, seconds=max([0.0, kept.seconds - 5.0, *(one.at for one in kept.outages)]))
            service, _ = recover_service_time(kept, [], 0.0, seconds)
            self.__init__(service)


@settings(max_examples=60)
@given(STEPS, st.floats(1.0, 5000.0))
def test_a_lease_has_a_whole_life_after_each_outage_and_ends_when_nobody_renews_it(
    steps: list[tuple[str, float]], ttl: float
) -> None:
    world = World(Service(seconds=50.0))
    granted_at, served, since_outage = world.now(), 0.0, float("inf")
    for what, seconds in steps:
        if what == "serve":
            world.serve(min(seconds, ttl))
            served += min(seconds, ttl)
            since_outage += min(seconds, ttl)
        else:
            world.go_through(what, seconds)
            if what != "set back" and seconds >= max(long_for(ttl), 1.2):
                since_outage = 0.0
        if world.now() >= ends_at(granted_at, ttl, world.time.outages):
            assert served >= ttl - 1e-6, "it ended before its time in which it could be renewed was over"
            assert since_outage >= ttl - 1e-6, "it had no whole life after an outage"
            return
    if ttl <= 100:
        world.serve(ttl + 10.0 + 5.0 * len(steps))
        assert world.now() >= ends_at(granted_at, ttl, world.time.outages), "nobody renews it, and it does not end"


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(0.0, 300.0), st.floats(0.01, 1e5)), max_size=20), st.data())
def test_outages_that_are_left_out_make_no_difference(gaps: list[tuple[float, float]], data: st.DataObject) -> None:
    at, whole, kept = 0.0, list[Outage](), list[Outage]()
    for gap, seconds in gaps:
        at += gap
        whole.append(Outage(at, seconds))
        kept = with_outage(kept, whole[-1])
    assert [one.seconds for one in kept] == sorted((one.seconds for one in kept), reverse=True)
    extended, life = data.draw(st.floats(0.0, at + 1.0)), data.draw(st.floats(1.0, 2e6))
    ends = extended + life
    for outage in whole:
        if outage.at >= extended and outage.at >= ends:
            return  # it has ended before
        if outage.at >= extended and outage.seconds >= long_for(life):
            ends = outage.at + life
    assert ends_at(extended, life, kept) == ends_at(extended, life, whole) == ends


def test_a_takeover_is_one_outage_up_to_the_moment_when_holders_can_renew() -> None:
    """The time until the bucket was read, and that until the endpoints were there, are a tenth of a life together."""
    service, _ = recover_service_time(Service(seconds=50.0), [], 0.0, 0.8)
    world = World(service)
    world.tick(0.4, serves=False)
    world.tick(0.1)
    assert ends_at(45.0, 10.0, world.time.outages) == 60.0
    world.serve(1.0)
    world.tick(0.4, serves=False)
    world.tick(0.1)
    assert ends_at(55.0, 10.0, world.time.outages) == 65.0, "another outage is short"


def test_what_is_due_waits_for_an_outage_that_came_after() -> None:
    table = LeaseTable([record(10.0, 0.0, "unrenewed"), record(1000.0, 0.0, "long")])
    assert [one.lease.lease_id for one in table.due(8.0)] == ["unrenewed"]
    table.put(lifecycle.warn(record(10.0, 0.0, "unrenewed"), START, "p"))
    outages = [Outage(9.0, 5.0)]
    assert table.due(10.5, outages) == []
    assert table.due(18.9, outages) == []
    assert [one.lease.lease_id for one in table.due(19.0, outages)] == ["unrenewed"]
    assert table.next_due() == 800.0, "five seconds are no outage to one that lives for a quarter of an hour"


def test_a_takeover_compares_no_clocks_of_planners() -> None:
    beat = Entry("heartbeat", b"0", 7, stored_at=100.0)
    assert outage_seconds(beat, 103.0, 2.0, 0.5) == 3.5
    assert outage_seconds(beat, 101.0, 20.0, 0.0) == 20.0, "a standby has waited for longer"
    for unknown in (None, Entry("heartbeat", b"0", 7)):
        assert outage_seconds(unknown, 103.0, 0.0, 0.0) == UNKNOWN_SECONDS
    assert outage_seconds(beat, 50.0, 0.0, 0.0) == UNKNOWN_SECONDS, "the server's clock was set back"


def test_repeated_takeovers_give_a_whole_life_each_and_remember_those_before() -> None:
    held = record(60.0, 100.0)
    service, [held] = recover_service_time(Service(seconds=155.0), [held], 0.0, 75.0)
    assert held.ends_at(service.outages) == 155.0 + 60.0
    # The next one is killed soon after, and the third takes over at once.
    service, [held] = recover_service_time(replace(service, seconds=163.0), [held], 0.0, 0.5)
    assert held.ends_at(service.outages) == 155.0 + 60.0
    # What was not written down is no more than what records say.
    service, _ = recover_service_time(None, [held, record(60.0, 170.0)], 0.0, 1.0)
    assert service.seconds == 170.0


def test_records_of_an_earlier_version_keep_what_they_had_left() -> None:
    old = record(60.0, None)
    began = START.timestamp()
    service, [now] = recover_service_time(None, [old], began + 20.0, 1.0)
    assert now.ends_at(service.outages) - service.seconds == 40.0
    # A clock that was set, a heartbeat that can't be read, a time without any planner: a whole life.
    for heartbeat_at, outage in ((began - 3600.0, 1.0), (0.0, 1.0), (began + 20.0, 30.0)):
        service, [now] = recover_service_time(None, [old], heartbeat_at, outage)
        assert now.ends_at(service.outages) - service.seconds == 60.0


def test_a_lease_outlives_the_silence_of_its_host_while_it_is_renewed() -> None:
    fresh, renewed = (
        record(3600.0, 0.0),
        lifecycle.renew(record(3600.0, 0.0), None, START + timedelta(seconds=1), "p", 1.0),
    )
    assert not lifecycle.outlives_silence(fresh, 121.0, 120.0)
    assert lifecycle.outlives_silence(fresh, 119.0, 120.0)
    assert lifecycle.outlives_silence(renewed, 1300.0, 120.0), "it is renewed each third of its life"
    assert not lifecycle.outlives_silence(renewed, 1900.0, 120.0)
    assert lifecycle.outlives_silence(record(300.0, 0.0), 140.0, 120.0), "it ends by itself soon"
