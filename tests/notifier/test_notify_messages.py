"""Texts of messages: that the commands in them are commands, and that names in them are only names."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import click
import pytest
from corral.cli.loading import load
from corral.notifier.messages import MAX_TITLE, Message, digest, markdown, message_of, text, trial_message
from corral.notifier.news import (
    Excess,
    IdleLease,
    JobEnd,
    LongQueue,
    News,
    Trouble,
    expiring,
    of_condition,
    of_job_event,
    of_lease_event,
    of_report,
)
from corral.notifier.outgoing import due
from corral.notifier.sending import redacted, why_not
from corral.schemas.requests import IdleNotice, LeaseEventKind, LeaseState
from corral.schemas.work.jobs import JobState
from corral.schemas.work.notifications import NewsKind
from corral.schemas.work.reports import ReportFile, ReportWritten
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.notifier_examples import NOON, delivery, device, event, job_event, lease, owned, preempting


def written(owner: str | None = None) -> ReportWritten:
    files = [ReportFile(name="f.csv", size_bytes=3, data=b"a,b"), ReportFile(name="f.pdf", size_bytes=2**20)]
    return ReportWritten(
        report_id="1", name="fleet", period="2026-10", start=NOON, end=NOON, written_at=NOON, title="GPU usage",
        facts=[("GPU-hours granted", "12.0")], owner=owner, url="https://files.example/r", files=files,
    )  # fmt: skip


def everything(name: str = "train", owner: str = "ann") -> Iterator[News]:
    """News of every kind, in each of its forms."""
    more: dict[str, Any] = {"name": name, "owner": owner}
    warned = IdleNotice(group="lab", rule="below 5% for 30m: end after 10m", since=NOON, noticed_at=NOON, acts_at=NOON)
    events = [
        event(LeaseEventKind.GRANTED, lease(**more)),
        preempting(**more),
        event(LeaseEventKind.RELEASED, lease(state=LeaseState.RELEASED, ended_at=NOON, **more)),
        event(LeaseEventKind.EVICTED, lease(state=LeaseState.EVICTED, ended_at=NOON, reason=name, **more)),
        event(LeaseEventKind.EVICTED, lease(state=LeaseState.EVICTED, ended_at=NOON, idle=warned, **more)),
        event(LeaseEventKind.LOST, lease(state=LeaseState.LOST, ended_at=NOON, **more)),
    ]
    yield from filter(None, map(of_lease_event, events))
    soon = NOON + timedelta(minutes=59)
    yield from expiring(owned("expiring").rule, [lease(**more), lease(ends_at=NOON + timedelta(hours=1), **more)], soon)
    for state in (JobState.RUNNING, JobState.DONE, JobState.FAILED, JobState.CANCELLED):
        news = of_job_event(job_event(state=state))
        assert news is not None
        yield news
    job = job_event().job
    yield News(
        kind=NewsKind.JOB_ENDED,
        cause="j",
        at=NOON,
        subject=JobEnd(job, (), [("time", "3m"), ("would have done", "--gpus 1")]),
    )
    broken = device("GPU-1", "unhealthy", health=name, leases=["l-1"])
    for over in (False, True):
        for subject in (
            Trouble("node-7", [broken], over=over),
            Trouble("node-7", [broken] * 8, lost=True, over=over),
            LongQueue(20, 40, 7200.0, owner, over=over),
            Excess("lab/vision", 0.6, 0.3, 4, over=over),
        ):
            yield of_condition(subject, "x", NOON)
    yield of_condition(IdleLease(lease(**more), NOON, 1.5), "x", NOON)
    yield of_condition(IdleLease(lease(idle=warned, **more), NOON), "x", NOON)
    yield of_report(written(owner))
    yield of_report(written())


def test_every_kind_has_a_text_and_its_commands_are_commands() -> None:
    found = list(everything())
    assert {kind for news in found for kind in news.kinds} == set(NewsKind)
    commands: set[str] = {command for news in found for _, command in message_of(news, "UTC").commands}
    commands |= {command for _, command in trial_message("", "now").commands}
    assert len(commands) > 10
    for command in commands:
        program, name, *arguments = shlex.split(command)
        assert program == "corral"
        made = load(name)
        if isinstance(made, click.Group):
            made, arguments = made.commands[arguments[0]], arguments[1:]
        made.make_context(name, arguments)  # it parses: all options are there, and nothing is missing


def test_the_end_of_a_limit_is_told_as_such_whenever_the_lease_would_have_to_be_renewed() -> None:
    """A holder renews a short time to live again and again, up to the limit."""
    limited = lease(ttl=300.0, ends_at=NOON + timedelta(hours=1), expires_at=NOON + timedelta(minutes=54))
    (news,) = expiring(owned("expiring").rule, [limited], NOON + timedelta(minutes=50))
    message = message_of(news, "UTC")
    assert "13:00" in message.title
    assert "however often it is renewed" in message.summary
    assert message.commands == []
    (soft,) = expiring(owned("expiring").rule, [lease()], NOON + timedelta(minutes=55))
    assert [what for what, _ in message_of(soft, "UTC").commands] == ["Keep it", "Give it back"]


def test_a_report_goes_alone_with_the_files_that_fit() -> None:
    message = message_of(of_report(written()), "UTC")
    assert [(file.name, file.data) for file in message.files] == [("f.csv", b"a,b")]
    assert "too large to attach: f.pdf (1.0 MiB)" in text(message)
    assert "\nhttps://files.example/r\n" in markdown(message)
    others = [delivery(str(number)) for number in range(5)]
    report = replace(delivery("report", at=NOON - timedelta(seconds=1)), message=message)
    assert due([*others, report], NOON) == [report]
    assert due([*others, replace(report, made_at=NOON + timedelta(seconds=1))], NOON) == others


def test_times_are_those_of_the_readers_zone() -> None:
    news = of_lease_event(preempting())
    assert news is not None
    message = message_of(news, "Asia/Kathmandu")
    assert "17:47" in message.title
    assert "+0545" in message.title
    assert "12:02 UTC" in message_of(news, "UTC").title


HOSTILE = st.text(st.characters(blacklist_categories=("Cs",)), max_size=300) | st.sampled_from(
    ["<!channel>", "@everyone", "`</code><script>x</script>", "[a](http://evil.example)", "a\r\nBcc: x@y", "\u202eabc"]
)


@given(HOSTILE)
def test_names_make_no_markup_no_lines_and_wake_nobody(name: str) -> None:
    for news in everything(name, owner=name):
        message = message_of(news, "UTC")
        assert len(message.title) <= MAX_TITLE
        assert message.title == " ".join(message.title.split("\n"))
        for written in (message.title, text(message), markdown(message)):
            assert not set("<>\r\x00\u202e") & set(written)
            assert "@everyone" not in written
            assert "](http" not in written
        assert all("`" not in value and "\n" not in value for _, value in message.facts)


def test_a_digest_lists_all_that_is_in_it() -> None:
    many = [Message(title=f"title {n}", at="Mon 12:00", reference=str(n)) for n in range(40)]
    made = digest(many, waited=True)
    assert made.title.startswith("40 notifications")
    assert [title for _, title in made.facts] == [f"title {n}" for n in range(40)]
    assert digest(many[:2], waited=False).reference != digest(many[1:3], waited=False).reference


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("slak://a/b/c", "there is no service slak://: did you mean slack://?"),
        ("mailto://", "its mailto:// url lacks something"),
        ("hello", "write one such as mailtos://"),
        ("zzzzzzzz://x", "there is no service zzzzzzzz://"),
        ("json://127.0.0.1/hook", ""),
        ("ntfy://127.0.0.1/topic", ""),
        ("matrixs://user:pass@matrix.example/#room", ""),
    ],
)
def test_a_wrong_address_is_explained(url: str, words: str) -> None:
    found = why_not(url)
    assert words in found
    assert bool(found) == bool(words)


def test_what_a_service_says_is_told_without_the_secrets_of_the_address() -> None:
    url = "slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/#general"
    said = f"failed: {url} and https://hooks.example/T1JJ3T3L2/x, token TIiajkdnlazkcOXrIdevi7FQ is invalid"
    assert "TIiaj" not in redacted(said, url)
    assert "T1JJ3T3L2" not in redacted(said, url)
    assert "is invalid" in redacted(said, url)
    mail = "mailtos://ann:pw@smtp.example.org?to=ann@example.org"
    assert (
        redacted("login of ann with pw at smtp.example.org failed", mail)
        == "login of … with … at smtp.example.org failed"
    )
    escaped = "mailtos://ann:p%40ss+w%2Frd@smtp.example.org?to=ann@example.org"
    assert redacted("535 rejected: p@ss w/rd or p@ss+w/rd", escaped) == "535 rejected: … or …"
    assert redacted("bot-TIiajkdnlazkcOXrIdevi7FQx failed", url) == "bot-…x failed"
