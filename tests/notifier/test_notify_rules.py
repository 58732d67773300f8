"""Who is told of what, and when: pure decisions of the notifier."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from corral.notifier import outgoing
from corral.notifier.conditions import HOLD_SECONDS, Condition, Episode, Source, fold, long_queues, troubles
from corral.notifier.news import (
    LongQueue,
    ends_soon,
    expiring,
    of_job_event,
    of_lease_event,
)
from corral.notifier.quiet import parse_quiet, quiet_until
from corral.notifier.rule_text import parse_rules
from corral.notifier.rules import WrongRule, concerns, deliveries
from corral.schemas.operations import QueueEntry
from corral.schemas.requests import LeaseEventKind, LeaseState
from corral.schemas.work.jobs import JobState
from corral.schemas.work.notifications import NewsKind, OwnedRule
from hypothesis import given
from hypothesis import strategies as st
from support.notifier_examples import NOON, delivery, device, event, job_event, lease, owned, preempting

ZONES = st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"])
TIMES = st.datetimes(datetime(2024, 1, 1), datetime(2028, 1, 1), timezones=st.just(UTC))
CLOCKS = st.integers(0, 24 * 60 - 1)


def at(minutes: int) -> str:
    return f"{minutes // 60:02}:{minutes % 60:02}"


@given(CLOCKS, CLOCKS.filter(bool), ZONES, TIMES)
def test_quiet_times_end_where_they_say_and_only_there(start: int, end: int, zone: str, now: datetime) -> None:
    if start == end:
        return
    quiet = parse_quiet(f"{at(start)}-{at(end)}", zone)
    until = quiet_until([quiet], now)
    local = now.astimezone(ZoneInfo(zone))
    minute = local.hour * 60 + local.minute
    shift = local.utcoffset() != (local - timedelta(days=1)).utcoffset() or (
        local.utcoffset() != (local + timedelta(days=1)).utcoffset()
    )
    if not shift:  # on other days what the clock on the wall says decides
        assert (until is not None) == (start <= minute < end if start < end else minute >= start or minute < end)
    if until is not None:
        assert now < until <= now + timedelta(hours=26)
        assert quiet_until([quiet], until) is None
        clock = until.astimezone(ZoneInfo(zone))
        assert shift or (clock.hour * 60 + clock.minute, clock.second) == (end, 0)


def test_quiet_days_follow_each_other_without_a_break() -> None:
    weekend = [parse_quiet("Sat-Sun 00:00-24:00", "Europe/Berlin"), parse_quiet("22:00-07:00 Europe/Berlin", "UTC")]
    friday_night = datetime(2026, 11, 27, 23, tzinfo=ZoneInfo("Europe/Berlin"))
    assert quiet_until(weekend, friday_night) == datetime(2026, 11, 30, 7, tzinfo=ZoneInfo("Europe/Berlin"))
    assert quiet_until(weekend, datetime(2026, 11, 27, 12, tzinfo=UTC)) is None
    # In the night of the change the hour from 2 to 3 is skipped, and 02:30 is an hour later.
    spring = parse_quiet("Sun 00:00-02:30", "Europe/Berlin")
    assert quiet_until([spring], datetime(2026, 3, 29, 0, 30, tzinfo=UTC)) == datetime(2026, 3, 29, 1, 30, tzinfo=UTC)
    assert quiet_until([parse_quiet("mon-sun 00:00-24:00", "UTC")], NOON) is not None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('on = "premted"\nto = "x"', "'premted' is none of granted, expiring"),
        ('on = "idle"', "'to' is missing: name a target"),
        ('on = "idle"\nto = "x"\nqiet = "x"', "no key 'qiet': did you mean 'quiet'?"),
        ('on = "idle"\nto = "x"\nquiet = "22-7"', "'22-7' is no quiet time: write it like 22:00-07:00"),
        ('on = "idle"\nto = "x"\nquiet = "Funday 22:00-07:00"', "'funday' is no day: use Mon, Tue"),
        ('on = "idle"\nto = "x"\nquiet = "25:00-07:00"', "there is no 25:00 o'clock"),
        ('on = "idle"\nto = "x"\nquiet = "22:00-07:00 Mars/Base"', "no time zone 'Mars/Base': write a name such as"),
        ('on = "idle"\nto = "x"\nzone = "../../etc/passwd"', "there is no time zone"),
        ('on = "queue-long"\nto = "x"', "queue-long needs a limit"),
        ('on = "idle"\nto = "x"\nidle_for = "3s"', "idle_for: Expected a duration of at least 1m"),
        ('on = "expiring"\nto = "x"\nbefore = "soon"', "'soon' is no duration: write it like"),
        ('on = "over-share"\nto = "x"\nshare_excess = "lots"', "'lots' is no percentage: write it like 10%"),
        ('on = "idle"\nto = "x"\nurgent = ["preempted"]', "preempted can't be urgent: the rule is not about it"),
        ('on = "idle"\nto = "a mail"', "to: Expected the name of a target"),
        ('on = "idle"\nto = "x"\n[[rule]]\nname = "rule-1"\non = "idle"\nto = "x"', "two rules have the name 'rule-1'"),
    ],
)
def test_a_wrong_rule_is_refused_with_what_to_write(text: str, words: str) -> None:
    with pytest.raises(WrongRule) as wrong:
        parse_rules(f"[[rule]]\n{text}\n")
    assert words in str(wrong.value)
    assert "rule-1" in str(wrong.value)


def test_rules_are_read_as_operators_write_them() -> None:
    (rule,) = parse_rules(
        '[[rule]]\non = ["preempted", "job-ended"]\nowner = "ann"\nto = ["ann-mail"]\n'
        'quiet = "22:00-07:00 Europe/Berlin"\nurgent = "preempted"\nshare_excess = "25%"\nidle_for = "1h30m"'
    )
    assert rule.owners == ["ann"]
    assert rule.zone == "Europe/Berlin"  # of the quiet time, where none is named
    assert (rule.share_excess, rule.idle_seconds) == (0.25, 5400.0)


def meant(owned: OwnedRule, name: str) -> str | None:
    return None if name == "gone" else name


def test_a_target_is_told_once_at_the_earliest_time_that_a_rule_allows() -> None:
    news = of_lease_event(preempting())
    assert news is not None
    rules = [
        owned("preempted", name="quiet", quiet=["00:00-23:59"], to=("mail", "chat", "gone")),
        owned("preempted", name="now", to=("mail", "mail")),
        owned("preempted", name="urgent", quiet=["00:00-23:59"], urgent=[NewsKind.PREEMPTED], to=("pager",)),
        owned("ended", name="other", to=("other",)),
    ]
    found = {each.target: each for each in deliveries(news, rules, meant, NOON)}
    assert found.keys() == {"mail", "chat", "pager"}
    assert (found["mail"].rule, found["mail"].not_before) == ("/now", None)
    assert found["chat"].not_before == datetime(2026, 11, 30, 23, 59, tzinfo=UTC)
    assert found["pager"].not_before is None
    assert len({each.key for each in found.values()}) == 3


def test_an_owner_hears_of_nobody_elses_leases() -> None:
    news = of_lease_event(preempting())
    assert news is not None
    assert concerns(owned("preempted", owner="ann"), news)
    assert not concerns(owned("preempted", owner="bob"), news)
    assert not concerns(owned("preempted", owner="bob", owners=["ann"]), news)
    assert concerns(owned("preempted", owners=["a*"], hosts=["node-*"], models=["h100"], workloads=["train"]), news)
    assert not concerns(owned("preempted", models=["A100"]), news)
    assert not concerns(owned("preempted", groups=["lab"]), news)
    of_group = of_lease_event(preempting(group="lab/vision"))
    assert of_group is not None
    assert concerns(owned("preempted", groups=["lab"]), of_group)
    assert not concerns(owned("preempted", groups=["la"]), of_group)


def test_events_become_news_of_their_kinds() -> None:
    waited = of_lease_event(event(LeaseEventKind.GRANTED, lease()))
    assert waited is not None
    assert waited.waited_seconds == 300
    assert concerns(owned("granted"), waited)
    assert not concerns(owned("granted", waited_seconds=600), waited)
    gone = of_lease_event(event(LeaseEventKind.LOST, lease(state=LeaseState.LOST, ended_at=NOON)))
    released = of_lease_event(event(LeaseEventKind.RELEASED, lease(state=LeaseState.RELEASED, ended_at=NOON)))
    assert gone is not None
    assert released is not None
    assert gone.kinds == {NewsKind.ENDED, NewsKind.CUT_SHORT}
    assert released.kinds == {NewsKind.ENDED}
    # The end of a preemption is put off: the same notice.
    first, put_off = of_lease_event(preempting()), of_lease_event(preempting(expires_at=NOON))
    assert first is not None
    assert put_off is not None
    assert first.cause == put_off.cause
    # A job's tasks have leases, and news of their own.
    assert of_lease_event(event(LeaseEventKind.GRANTED, lease(request_id="job-12_0-1"))) is None
    assert of_lease_event(preempting(request_id="job-12_0-1")) is not None
    done, failed = of_job_event(job_event()), of_job_event(job_event(state=JobState.FAILED))
    assert done is not None
    assert failed is not None
    assert done.kinds == {NewsKind.JOB_ENDED}
    assert failed.kinds == {NewsKind.JOB_ENDED, NewsKind.JOB_FAILED}
    assert of_job_event(job_event(state=JobState.PENDING)) is None


@given(st.floats(1, 86400), st.floats(1, 7 * 86400), st.floats(0, 86400), st.none() | st.floats(1, 86400))
def test_a_lease_that_is_renewed_in_time_never_expires_soon(
    ttl: float, before: float, age: float, limit: float | None
) -> None:
    ends_at = None if limit is None else NOON + timedelta(seconds=limit)
    found = lease(ttl=ttl, ends_at=ends_at)
    now = NOON + timedelta(seconds=age)
    end = ends_soon(found, before, now)
    if end == found.expires_at != ends_at:
        assert (end - now).total_seconds() <= min(before, ttl / 5) + 1e-3
    elif end is not None:
        assert limit is not None
        assert (end - now).total_seconds() <= min(before, limit / 2) + 1e-3
    elif age >= ttl:
        pytest.fail("a lease whose time is over ends soon")
    # Clients renew after a third of the time to live.
    if limit is None and age <= ttl / 3 * 2:
        assert end is None


def test_a_renewed_lease_that_expires_again_is_news_again() -> None:
    rule = owned("expiring").rule
    soon = NOON + timedelta(minutes=55)
    (first,) = expiring(rule, [lease()], soon)
    assert [each.cause for each in expiring(rule, [lease()], soon + timedelta(minutes=1))] == [first.cause]
    renewed = lease(expires_at=NOON + timedelta(hours=2))
    assert expiring(rule, [renewed], soon) == []
    (again,) = expiring(rule, [renewed], soon + timedelta(hours=1))
    assert again.cause != first.cause


STEPS = st.lists(st.tuples(st.sampled_from(["seen", "gone", "unknown"]), st.floats(1, 400)), min_size=1, max_size=40)


@given(STEPS)
def test_an_episode_ends_only_after_it_was_gone_for_long(steps: list[tuple[str, float]]) -> None:
    """Whatever the planner answers or not: one episode, and so one message, until it was seen to be gone for long."""
    condition = {"queue:/rule": Condition(LongQueue(3, 3, 60.0, "bob"), "/rule")}
    now, episodes, begun = NOON, dict[str, Episode](), 0
    gone_since: datetime | None = None
    for what, seconds in steps:
        now += timedelta(seconds=seconds)
        seen = condition if what == "seen" else {}
        before = episodes
        episodes, over = fold(episodes, seen, set() if what == "unknown" else {Source.QUEUE}, now)
        assert not set(episodes) & set(over)
        if what == "seen":
            begun += not before
            gone_since = None
            assert set(episodes) == set(condition)
        elif what == "unknown":
            assert episodes == before
        elif before:
            gone_since = gone_since or now
            assert bool(over) == ((now - gone_since).total_seconds() >= HOLD_SECONDS)
            gone_since = None if over else gone_since
        if before and episodes:
            assert episodes["queue:/rule"].since == before["queue:/rule"].since


def test_a_lost_host_is_one_trouble_and_a_broken_device_another() -> None:
    devices = [
        *(device(f"GPU-{n}", "host_lost", "stale", host="node-1") for n in range(8)),
        device("GPU-x", "unhealthy", host="node-2"),
        device("GPU-y", "drained", host="node-2"),
        device("GPU-z", host="node-2"),
    ]
    assert troubles(devices).keys() == {"devices:node-1", "devices:node-2:GPU-x"}


def test_a_broken_device_is_not_well_again_since_its_host_is_lost() -> None:
    broken, lost = troubles([device("GPU-x", "unhealthy")]), troubles([device("GPU-x", "host_lost", "stale")])
    episodes, _ = fold({}, broken, {Source.DEVICES}, NOON)
    for minutes in range(1, 20):
        episodes, over = fold(episodes, lost, {Source.DEVICES}, NOON + timedelta(minutes=minutes))
        assert over == {}
    for minutes in range(20, 30):
        episodes, over = fold(episodes, {}, {Source.DEVICES}, NOON + timedelta(minutes=minutes))
        if over:
            break
    assert over.keys() == {*broken, *lost}


def test_a_queue_is_long_by_number_or_by_time() -> None:
    queue = [
        QueueEntry(request_id=str(n), owner="bob", position=n + 1, waiting_seconds=60.0 * n, message="", gpus=2)
        for n in range(4)
    ]
    by_number, by_time = (
        owned("queue-long", name="a", queue_requests=4),
        owned("queue-long", name="b", queue_seconds=180),
    )
    neither = owned("queue-long", name="c", queue_requests=5, queue_seconds=181)
    assert long_queues([by_number, by_time, neither], queue).keys() == {"queue:/a", "queue:/b"}
    assert long_queues([by_number], []) == {}


@given(st.lists(st.tuples(st.integers(0, 100), st.none() | st.integers(0, 100)), max_size=12), st.integers(0, 100))
def test_everything_goes_out_once_and_nothing_before_its_time(made: list[tuple[int, int | None]], now: int) -> None:
    waiting = {
        f"c{n}": delivery(
            f"c{n}", at=NOON + timedelta(seconds=at), until=None if until is None else NOON + timedelta(seconds=until)
        )
        for n, (at, until) in enumerate(made)
    }
    moment = NOON + timedelta(seconds=now)
    sent: list[str] = []
    while batch := outgoing.due(waiting.values(), moment):
        assert all(each.not_before is None or each.not_before <= moment for each in batch)
        message = outgoing.message_for(batch)
        assert len(batch) == 1 or f"{len(batch)} notifications" in message.title
        for each in batch:
            sent.append(each.cause)
            del waiting[each.cause]
    assert len(sent) == len(set(sent))
    assert sorted([*sent, *waiting]) == sorted(f"c{n}" for n in range(len(made)))
    assert all(each.not_before is not None and each.not_before > moment for each in waiting.values())


def test_a_quiet_night_is_one_message_in_the_morning() -> None:
    morning = NOON + timedelta(hours=10)
    night = [delivery(f"c{n}", at=NOON + timedelta(hours=n), until=morning) for n in range(3)]
    assert outgoing.due(night, morning - timedelta(seconds=1)) == []
    message = outgoing.message_for(outgoing.due(night, morning))
    assert message.title == "3 notifications from your quiet hours"
    assert [fact[1] for fact in message.facts] == ["about c0", "about c1", "about c2"]


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_retries_back_off_to_a_limit(failures: int, random: float) -> None:
    seconds = outgoing.retry_seconds(failures, random)
    assert 1 <= seconds <= outgoing.LAST_RETRY_SECONDS
