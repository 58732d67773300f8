"""Idle leases as a pure fold: none is touched that was active in the time of its rule, nor one of which too little is
known."""

from __future__ import annotations

import struct
from datetime import UTC, datetime

import pytest
from corral.planner.broker.quotas.idle_watch import notice_of, rules_of
from corral.planner.fleet.device import Device, last_tick
from corral.planner.groups.idle import (
    GAP_SECONDS,
    READ_SECONDS,
    IdleCount,
    Reading,
    Step,
    advance,
    next_step,
    read,
)
from corral.planner.groups.tree import Tree
from corral.schemas.requests import IdleNotice
from corral.schemas.telemetry import SampleBatch
from corral.schemas.work.groups import Group, GroupTree
from corral.schemas.work.idle import IdleAction, IdleRule, format_rule, parse_rule
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

RULE = IdleRule(below_percent=5, after_seconds=100.0, action=IdleAction.END, warn_seconds=50.0)
READINGS = st.lists(
    st.tuples(st.sampled_from([1.0, 5.0, 10.0, 20.0]), st.sampled_from([True] * 12 + [None] * 2 + [False])),
    max_size=120,
)
RULES = st.builds(
    IdleRule,
    below_percent=st.floats(0, 100),
    after_seconds=st.floats(60, 1e6).map(lambda seconds: float(int(seconds))),
    no_process=st.just(False),
    action=st.sampled_from(list(IdleAction)),
    warn_seconds=st.floats(0, 1e6).map(lambda seconds: float(int(seconds))),
)


@given(READINGS)
def test_only_what_was_idle_for_the_whole_time_is_warned_and_acted_on(
    readings: list[tuple[float, bool | None]],
) -> None:
    count: IdleCount | None = None
    notice: IdleNotice | None = None
    now = 0.0
    past: list[tuple[float, float, bool | None]] = []
    for passed, idle in readings:
        now += passed
        past.append((now, passed, idle))
        count = advance(count, RULE, Reading(idle), now, now)
        step = next_step(count, notice)
        observed = _observed_idle(past)
        assert step is not Step.ACT or observed >= RULE.after_seconds + RULE.warn_seconds
        assert step is not Step.WARN or observed >= RULE.after_seconds
        # Nothing is put off without a reason: what was observed long enough is due.
        if observed >= RULE.after_seconds + passed:
            assert notice is not None or step is Step.WARN
        if idle is False:
            assert step is (Step.NOTHING if notice is None else Step.WITHDRAW)
        if step is Step.WARN:
            assert count is not None
            notice = notice_of(count, "lab", now)
        elif step is Step.WITHDRAW:
            notice = None
        elif step is Step.ACT:
            return


def _observed_idle(past: list[tuple[float, float, bool | None]]) -> float:
    """Idle seconds up to now without activity between, and without a gap that is too long; by a walk backwards."""
    total = gap = 0.0
    for number, (_, passed, idle) in reversed(list(enumerate(past))):
        if idle is False:
            break
        starts = number == 0 or past[number - 1][2] is False
        if idle and passed <= READ_SECONDS:
            gap = 0.0
            total += 0.0 if starts else passed
        else:
            gap += passed
            if gap > GAP_SECONDS:
                break
    return total


def test_a_new_leader_withdraws_the_warning_and_counts_anew() -> None:
    count = IdleCount(RULE, 0.0, 0.0)
    count.seconds = RULE.after_seconds
    notice = notice_of(count, "lab", 1000.0)
    assert notice.acts_at == datetime.fromtimestamp(1050.0, UTC)
    begun = advance(None, RULE, Reading(True), 2000.0, 2000.0)
    assert next_step(begun, notice) is Step.WITHDRAW
    assert next_step(None, notice) is Step.WITHDRAW
    # So does one whose rule was changed.
    assert advance(count, replace(RULE, below_percent=4), Reading(True), 5.0, 5.0) is None
    # What was done stays.
    acted = replace(notice, acted_at=notice.noticed_at)
    assert next_step(None, acted) is Step.NOTHING


def test_a_device_is_idle_only_while_every_fresh_sample_says_so() -> None:
    def reading(rule: IdleRule, *devices: Device | None, now: float = 10.0) -> bool | None:
        return read(list(devices), "l1", rule, now, 15.0, {}).idle

    idle, busy = Device("a", "h"), Device("b", "h")
    for device, percent in ((idle, 3.0), (busy, 80.0)):
        device.utilization, device.load_seen_at, device.seen_at = percent, 5.0, 5.0
    none = replace(RULE, below_percent=0)
    assert [reading(RULE, idle), reading(RULE, idle, busy), reading(none, idle)] == [True, False, False]
    # Stale, unknown and missing devices are not idle; activity of another is known all the same.
    assert [reading(RULE, idle, now=21.0), reading(RULE, idle, None), reading(RULE)] == [None, None, None]
    assert reading(RULE, None, busy) is False
    # A peak between two readings counts, once, for each lease on the device.
    idle.peak_percent, idle.holders = 60.0, {"l1": (1, 1), "l2": (1, 1)}
    peaks: dict[Device, float] = {}
    assert [read([idle], lease, RULE, 10.0, 15.0, peaks).idle for lease in ("l1", "l2")] == [False, False]
    assert reading(RULE, idle) is True
    # One that was active and is unknown now was active all the same.
    idle.peak_percent, idle.utilization = 60.0, None
    assert [reading(RULE, idle), reading(RULE, idle)] == [False, None]
    # Without a list of processes nothing is known of them.
    assert reading(replace(RULE, no_process=True), idle) is None


def test_the_peak_of_a_batch_of_several_ticks_counts() -> None:
    values = [0.0, 1.0, 90.0, 2.0, float("nan"), 300.0, 0.0, 3.0]
    batch = SampleBatch(
        host="h",
        agent="a",
        sequence=1,
        source="simulated",
        devices=["g0", "g1"],
        times_ns=struct.pack("<8q", *range(8)),
        columns={"gpu_utilization_percent": struct.pack("<8f", *values)},
    )
    tick = last_tick(batch)
    assert tick is not None
    assert (tick.utilization, tick.utilization_peaks) == ((0.0, 3.0), (90.0, 3.0))


def test_groups_within_inherit_a_rule_unless_they_have_one() -> None:
    off = IdleRule(action=IdleAction.OFF)
    tree = Tree(
        GroupTree(
            groups=[
                Group(name="lab", idle=RULE),
                Group(name="lab/a/b"),
                Group(name="lab/c", idle=off),
                Group(name="other"),
            ]
        )
    )
    found = {node.name: group for node, (_, group) in rules_of(tree).items()}
    assert found == {"lab": "lab", "lab/a": "lab", "lab/a/b": "lab"}


@given(RULES)
def test_a_rule_is_read_as_it_is_written(rule: IdleRule) -> None:
    rule = replace(rule, below_percent=float(f"{rule.below_percent:g}"))
    if rule.action is IdleAction.OFF:
        rule = IdleRule(action=IdleAction.OFF)
    text = format_rule(rule)
    again = parse_rule(text)
    assert format_rule(again) == text
    assert (again.below_percent, again.action, again.after_seconds) == (
        rule.below_percent,
        rule.action,
        rule.after_seconds,
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no rule"),
        ("below 5", "is no rule"),
        ("below 5% for ever", "is no duration"),
        ("below 5% for 30s", "too short"),
        ("below 500% for 1h", "500%"),
        ("no activity for 1h: kill", "no action 'kill'"),
    ],
)
def test_a_text_that_is_no_rule_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_rule(text)
