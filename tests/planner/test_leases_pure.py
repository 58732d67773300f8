"""The life of a lease as pure functions, over any sequence of what may happen to it."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from corral.planner.leases import lifecycle
from corral.planner.leases.lifecycle import LeaseRecord, LeaseTable, Refused
from corral.schemas import codec
from corral.schemas.requests import Error, LeaseState
from hypothesis import given
from hypothesis import strategies as st
from support.lease_examples import START, granted

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["renew", "warn", "release", "expire", "lose", "evict", "tell", "store"]),
        st.floats(0.1, 500.0),
    ),
    max_size=12,
)


@given(STEPS)
def test_no_event_is_lost_and_none_is_told_twice(steps: list[tuple[str, float]]) -> None:
    """Whatever happens, told events and those that the record carries make up the whole history, in order."""
    ends = {
        "release": LeaseState.RELEASED,
        "expire": LeaseState.EXPIRED,
        "lose": LeaseState.LOST,
        "evict": LeaseState.EVICTED,
    }
    table = LeaseTable([granted()])
    now = START
    history = [("granted", START)]
    told: list[int] = []
    for name, seconds in steps:
        now += timedelta(seconds=seconds)
        record = table.get("l1")
        assert record is not None
        if name == "tell":
            version = (told[-1] if told else 0) + 1
            if version <= record.version:
                told.append(version)
                table.note_published("l1", version)
            continue
        if name == "store":  # a planner starts anew from what the bucket holds
            table = LeaseTable([codec.decode(codec.encode(record, codec.JSON), LeaseRecord, codec.JSON)])
            continue
        if record.lease.state is not LeaseState.ACTIVE:
            with pytest.raises(Refused, match="request again"):
                lifecycle.check_holder(record, "l1", "me")
            continue
        if name == "renew":
            after = lifecycle.renew(lifecycle.check_holder(record, "l1", "me"), None, now, "p")
            assert after.lease.expires_at == now + timedelta(seconds=100)
        elif name == "warn":
            after = lifecycle.warn(record, now, "p")
        else:
            after = lifecycle.end(record, ends[name], "why", now, "p")
        history.append((after.kind.value, now))
        table.put(after)
        carried = [(a.version, a.event.kind.value, a.event.time) for a in after.announcements()]
        whole = [(at, kind, when) for at, (kind, when) in enumerate(history, 1)]
        assert carried == whole[len(told) :]
    record = table.get("l1")
    assert record is not None
    again = lifecycle.repeat_answer(record)
    if record.lease.state is LeaseState.ACTIVE:
        assert again == lifecycle.repeat_answer(granted())
    else:
        assert isinstance(again, Error)
        assert again.code == "ended"
    assert table.active == (record.lease.state is LeaseState.ACTIVE)
    assert list(table.hosts) == (["a"] if table.active else [])


def test_a_warning_is_not_told_as_of_before_the_change_that_it_follows() -> None:
    """A renewal may be written between the moment in which the warning is due and its own write."""
    renewed = lifecycle.renew(granted(), None, START + timedelta(seconds=2), "p")
    warned = lifecycle.warn(renewed, START + timedelta(seconds=1), "p")
    assert [announced.event.time for announced in warned.announcements()] == sorted(
        announced.event.time for announced in warned.announcements()
    )
    assert warned.version == renewed.version + 1


@given(st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=30))
def test_due_leases_come_once_each_and_never_late(lives: list[tuple[int, bool]]) -> None:
    table = LeaseTable()
    for number, (ttl, renewed) in enumerate(lives):
        record = granted(f"l{number}", ttl)
        table.put(record)
        if renewed:
            table.put(lifecycle.renew(record, None, START + timedelta(seconds=ttl / 2), "p", ttl / 2))
    warned: dict[str, datetime] = {}
    ended: dict[str, datetime] = {}
    for second in range(80):
        now = START + timedelta(seconds=second)
        due = table.next_due()
        if due is None or due > second:
            assert table.due(second) == []
        for record in table.due(second):
            if not record.warned:
                warned[record.lease.lease_id] = now
                table.put(lifecycle.warn(record, now, "p"))
            else:
                ended[record.lease.lease_id] = now
                table.put(lifecycle.end(record, LeaseState.EXPIRED, "", now, "p"))
    assert table.active == 0
    for number, (ttl, renewed) in enumerate(lives):
        expires = START + timedelta(seconds=ttl * (1.5 if renewed else 1.0))
        assert expires <= ended[f"l{number}"] <= expires + timedelta(seconds=2)
        assert warned[f"l{number}"] <= ended[f"l{number}"]
        assert warned[f"l{number}"] >= expires - timedelta(seconds=ttl * lifecycle.WARN_FRACTION)


def test_only_the_holder_may_touch_a_lease() -> None:
    record = granted()
    with pytest.raises(Refused, match="no lease 'x'"):
        lifecycle.check_holder(None, "x", "me")
    with pytest.raises(Refused, match="only its owner") as refused:
        lifecycle.check_holder(record, "l1", "you")
    assert refused.value.error.code == "not_owner"
