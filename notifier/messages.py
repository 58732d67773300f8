"""Texts of messages: short and plain, with the command that helps. Pure.

Names that people choose may hold anything. They stand in code spans in Markdown, without characters that make markup
or mention everyone in a chat.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Final

from msgspec import Struct

from ..schemas.requests import Grant, Lease, LeaseState
from ..schemas.values.units import format_bytes, format_seconds
from ..schemas.work.jobs import JobState
from ..schemas.work.notifications import NewsKind
from ..schemas.work.reports import ReportWritten
from .news import Excess, IdleLease, JobEnd, LongQueue, News, Trouble
from .quiet import zone_of

MAX_TITLE: Final = 140
_MAX_VALUE: Final = 300
_SOME: Final = 4
_REPORT_FACTS: Final = 16
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")
_EVERYONE: Final = re.compile(r"@(?=(?:everyone|here|channel|all|room)\b)", re.IGNORECASE)
_MARKUP: Final = str.maketrans({"<": "‹", ">": "›", "`": "'", "[": "(", "]": ")"})
_BREAK: Final = "  \n"
"""Line break of Markdown. Lists become much longer where a mail program shows plain text."""
_ENDINGS: Final = {
    LeaseState.RELEASED: "was released",
    LeaseState.EXPIRED: "expired",
    LeaseState.LOST: "ended, since its host is lost",
    LeaseState.EVICTED: "was evicted",
}


class Attachment(Struct, frozen=True, kw_only=True):
    """File that goes with a message.

    Attributes:
        name: name of the file.
        data: its content.
    """

    name: str
    data: bytes


class Message(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message, from which plain text and Markdown are written.

    Attributes:
        title: one line.
        at: when it happened, as a time of day of the reader's zone.
        summary: sentences, without markup.
        facts: names and values.
        commands: what helps, each with what it does.
        reference: the cause, shortened: the same in a message that is sent twice.
        link: where more is on the web; empty for nowhere.
        files: files that go with it, to services that take any.
    """

    title: str
    at: str = ""
    summary: str = ""
    facts: list[tuple[str, str]] = []
    commands: list[tuple[str, str]] = []
    reference: str = ""
    link: str = ""
    files: list[Attachment] = []


def text(message: Message) -> str:
    """Body of a message as plain text."""
    lines = [message.summary] if message.summary else []
    if message.facts:
        lines += ["", *(f"{name}: {value}" for name, value in message.facts)]
    if message.commands:
        lines += ["", *(f"{what}: {command}" for what, command in message.commands)]
    if message.link:
        lines += ["", message.link]
    if message.reference:
        lines += ["", f"ref {message.reference}"]
    return "\n".join(lines).strip()


def markdown(message: Message) -> str:
    """Body of a message as Markdown."""
    blocks = [message.summary] if message.summary else []
    if message.facts:
        blocks.append(_BREAK.join(f"{name}: `{value}`" for name, value in message.facts))
    if message.commands:
        blocks.append(_BREAK.join(f"{what}: `{command}`" for what, command in message.commands))
    if message.link:
        blocks.append(message.link)
    if message.reference:
        blocks.append(f"ref {message.reference}")
    return "\n\n".join(blocks)


def digest(messages: Sequence[Message], *, waited: bool) -> Message:
    """One message in place of several.

    Args:
        messages: in the order in which they were made.
        waited: true if they waited for the end of a quiet time.
    """
    return Message(
        title=f"{len(messages)} notifications" + (" from your quiet hours" if waited else ""),
        summary="What happened meanwhile:" if waited else "What happened at about the same time:",
        facts=[(each.at or "–", each.title) for each in messages],
        reference=reference(" ".join(each.reference for each in messages)),
    )


def trial_message(rule: str, at: str) -> Message:
    """Message of `corral notify test`."""
    facts = [("rule", rule)] if rule else []
    return Message(
        title="Test of Corral's notifications",
        at=at,
        summary=f"This is a test, sent at {at}. If you can read it, notifications reach you here.",
        facts=facts,
        commands=[("See the rules", "corral notify list")],
    )


def reference(cause: str) -> str:
    """Short name of a cause."""
    return hashlib.sha256(cause.encode()).hexdigest()[:10]


def plain(value: str, limit: int = _MAX_VALUE) -> str:
    """A text without control characters, markup and mentions of everyone, in one line."""
    words = _EVERYONE.sub("@\u200b", _CONTROL.sub(" ", value).translate(_MARKUP)).strip()
    return words if len(words) <= limit else f"{words[: limit - 1]}…"


def clock(at: datetime, zone: str) -> str:
    """A time by the clocks of a zone: `Mon 30 Nov 14:32 CET`."""
    return at.astimezone(zone_of(zone)).strftime("%a %d %b %H:%M %Z")


def message_of(news: News, zone: str) -> Message:
    """Message about news, with times of a zone."""

    def when(at: datetime) -> str:
        return clock(at, zone)

    message = _written(news, when)
    return Message(
        title=plain(message.title, MAX_TITLE),
        at=when(news.at),
        summary=message.summary,
        facts=[(name, plain(value)) for name, value in message.facts if value],
        commands=message.commands,
        reference=reference(news.cause),
        link=message.link,
        files=message.files,
    )


When = Callable[[datetime], str]


def _written(news: News, when: When) -> Message:
    subject = news.subject
    match subject:
        case Lease():
            return _LEASES[news.kind](subject, news, when)
        case JobEnd():
            return _job(subject, news, when)
        case IdleLease():
            return _idle(subject, when)
        case Trouble():
            return _trouble(subject)
        case LongQueue():
            return _queue(subject)
        case Excess():
            return _excess(subject)
        case ReportWritten():
            return _report(subject)


# Leases


def gpus(grants: Sequence[Grant]) -> str:
    """Devices of a lease in words: `2 × NVIDIA H100 on node-7`."""
    if not grants:
        return ""
    models = list(dict.fromkeys(grant.model or "GPU" for grant in grants))
    share = len({grant.device for grant in grants})
    return f"{share} × {_some(models)} on {_some(dict.fromkeys(grant.host for grant in grants))}"


def _some(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:_SOME]) + (f" and {len(every) - _SOME} more" if len(every) > _SOME else "")


def _named(lease: Lease) -> str:
    return lease.name or f"Lease {lease.lease_id}"


def _facts(lease: Lease, *more: tuple[str, str]) -> list[tuple[str, str]]:
    return [
        ("lease", lease.lease_id),
        ("owner", lease.owner),
        ("workload", lease.name),
        ("GPUs", gpus(lease.grants)),
        *more,
    ]


def _granted(lease: Lease, news: News, when: When) -> Message:
    return Message(
        title=f"{_named(lease)}: your turn, {gpus(lease.grants) or 'the lease is granted'}",
        summary=f"The request waited {format_seconds(news.waited_seconds)} in the queue and has its GPUs now, "
        f"until {when(lease.expires_at)} unless the lease is renewed.",
        facts=_facts(lease),
        commands=[
            ("Keep it", f"corral renew {lease.lease_id}"),
            ("Give it back", f"corral release {lease.lease_id}"),
        ],
    )


def _expiring(lease: Lease, news: News, when: When) -> Message:
    end = news.end or lease.expires_at
    hard = end == lease.ends_at
    return Message(
        title=f"{_named(lease)} ends at {when(end)}",
        summary="Its time limit ends then, however often it is renewed: save your work."
        if hard
        else "It ends unless it is renewed before.",
        facts=_facts(lease, ("ends", f"{when(end)}, in {format_seconds((end - news.at).total_seconds())}")),
        commands=[]
        if hard
        else [("Keep it", f"corral renew {lease.lease_id}"), ("Give it back", f"corral release {lease.lease_id}")],
    )


def _preempted(lease: Lease, news: News, when: When) -> Message:
    notice = lease.preemption
    assert notice is not None
    why = notice.reason or (f"a request of {notice.claimant_owner} needs the GPUs" if notice.claimant_owner else "")
    return Message(
        title=f"{_named(lease)} will be preempted at {when(notice.ends_at)}: save your work",
        summary=f"Its GPUs go to others at {when(notice.ends_at)}. Save a checkpoint before, and say so.",
        facts=_facts(
            lease,
            (
                "ends",
                f"{when(notice.ends_at)}, {format_seconds((notice.ends_at - news.at).total_seconds())} after"
                " the notice",
            ),
            ("why", why),
        ),
        commands=[
            ("When it is saved", f"corral saved --lease {lease.lease_id}"),
            ("To put the end off once", f"corral busy 2m --lease {lease.lease_id}"),
        ],
    )


def _ended(lease: Lease, news: News, when: When) -> Message:
    how = _ENDINGS.get(lease.state, "ended")
    if lease.state is LeaseState.EVICTED:
        how = "was preempted" if lease.preemption else "ended, since its GPUs were idle" if lease.idle else how
    held = (news.at - lease.granted_at).total_seconds()
    return Message(
        title=f"{_named(lease)} {how}",
        summary=f"It ended at {when(news.at)}, after {format_seconds(held)}.",
        facts=_facts(lease, ("why", lease.reason)),
    )


def _idle(idle: IdleLease, when: When) -> Message:
    lease, notice = idle.lease, idle.lease.idle
    acts = notice.acts_at if notice is not None else None
    mean = "" if idle.mean_percent is None else f"{idle.mean_percent:.0f}% on average"
    return Message(
        title=f"{_named(lease)}: its GPUs are idle since {when(idle.since)}",
        summary=f"Unless they are used, a rule of the group acts on the lease at {when(acts)}."
        if acts
        else "Give them back if you don't need them.",
        facts=_facts(lease, ("activity", mean), ("rule", "" if notice is None else notice.rule)),
        commands=[("Give it back", f"corral release {lease.lease_id}")],
    )


_LEASES: Final[dict[NewsKind, Callable[[Lease, News, When], Message]]] = {
    NewsKind.GRANTED: _granted,
    NewsKind.EXPIRING: _expiring,
    NewsKind.PREEMPTED: _preempted,
    NewsKind.ENDED: _ended,
}


# Jobs


def _job(end: JobEnd, news: News, when: When) -> Message:
    job = end.job
    named = f"Job {job.job_id}" + (f" ({job.name})" if job.name else "")
    facts = [("job", job.job_id), ("owner", job.owner), ("workload", job.name), ("group", job.group)]
    if news.kind is NewsKind.JOB_STARTED:
        return Message(
            title=f"{named} has started",
            summary=f"It waited {format_seconds((news.at - job.submitted_at).total_seconds())}.",
            facts=facts,
            commands=[("Follow it", f"corral logs -f {job.job_id}")],
        )
    tasks = ", ".join(f"{count} {state}" for state, count in sorted(job.counts.items()) if count)
    alone = len(end.tasks) == 1 and not job.array
    code = end.tasks[0].exit_code if alone else None
    signal = end.tasks[0].signal if alone else None
    why = job.message or (end.tasks[0].message if alone else "")
    facts += [
        ("tasks", tasks if job.array or sum(job.counts.values()) > 1 else ""),
        ("exit code", str(code) if code and not why else ""),
        ("signal", str(signal) if signal and not why else ""),
        ("why", why),
        *(pair for pair in end.summary if pair[0] != "tasks"),
    ]
    state = job.state
    again = state in (JobState.FAILED, JobState.LOST, JobState.PREEMPTED)
    return Message(
        title=f"{named} is done" if state is JobState.DONE else f"{named}: {state.value}",
        summary=f"It ended at {when(news.at)}, "
        f"{format_seconds((news.at - job.submitted_at).total_seconds())} after it was submitted.",
        facts=facts,
        commands=[
            ("See it", f"corral job {job.job_id}"),
            ("What it printed", f"corral logs {job.job_id}"),
            *([("Run it again", f"corral resubmit {job.job_id}")] if again else []),
        ],
    )


# The fleet


def _trouble(trouble: Trouble) -> Message:
    devices = trouble.devices
    first = devices[0] if devices else None
    model = _some(dict.fromkeys(device.model for device in devices if device.model)) or "GPU"
    what = f"{len(devices)} × {model}" if trouble.lost or first is None else f"{model} {first.index}"
    if trouble.over:
        return Message(
            title=f"{trouble.host} is back" if trouble.lost else f"{trouble.host}: {what} is healthy again",
            facts=_device_facts(trouble),
        )
    return Message(
        title=f"{trouble.host} is lost" if trouble.lost else f"{trouble.host}: {what} is unhealthy",
        summary="Its collector is silent, and it takes no new work."
        if trouble.lost
        else "It takes no new work until it is well again.",
        facts=_device_facts(trouble),
        commands=[
            ("See it", f"corral devices --host {trouble.host}"),
            ("Keep work off the host", f"corral drain --host {trouble.host} --reason 'under repair'"),
        ],
    )


def _device_facts(trouble: Trouble) -> list[tuple[str, str]]:
    devices = trouble.devices
    return [
        ("host", trouble.host),
        ("device", devices[0].uuid if devices and not trouble.lost else f"{len(devices)} devices"),
        ("why", "" if trouble.over else _some(dict.fromkeys(device.health for device in devices if device.health))),
        ("leases", _some(dict.fromkeys(name for device in devices for name in device.leases))),
    ]


def _queue(queue: LongQueue) -> Message:
    facts = [
        ("requests", str(queue.requests)),
        ("GPUs asked for", str(queue.gpus)),
        ("longest wait", f"{format_seconds(queue.longest_seconds)} ({queue.longest_owner})"),
    ]
    if queue.over:
        return Message(title="The queue is short again", facts=facts if queue.requests else [])
    return Message(
        title=f"The queue is long: {queue.requests} request{'s' if queue.requests != 1 else ''} waiting, "
        f"one for {format_seconds(queue.longest_seconds)}",
        facts=facts,
        commands=[("See it", "corral queue"), ("Who holds what", "corral leases"), ("Idle GPUs", "corral idle")],
    )


def _excess(excess: Excess) -> Message:
    name = excess.group
    facts = [
        ("group", name),
        ("recent use", f"{excess.usage:.0%} of all"),
        ("fair share", f"{excess.fair_usage:.0%}"),
        ("others wait", f"{excess.waiting} requests"),
    ]
    if excess.over:
        return Message(title=f"Group {name} is within its share again", facts=facts[:1])
    return Message(
        title=f"Group {name} is over its share: {excess.usage:.0%} of recent use, {excess.fair_usage:.0%} is fair",
        summary="Requests of other groups wait.",
        facts=facts,
        commands=[("See the groups", "corral group list"), ("See the queue", "corral queue")],
    )


# Reports


def _report(report: ReportWritten) -> Message:
    left = [file for file in report.files if file.data is None]
    facts = [*report.facts[:_REPORT_FACTS], ("files", ", ".join(file.name for file in report.files))]
    whole = report.owner is None and report.group is None  # names that people choose are in no command
    facts += [("too large to attach", ", ".join(f"{file.name} ({format_bytes(file.size_bytes)})" for file in left))]
    return Message(
        title=f"{report.title or f'Report of {report.period}'} ({report.name})",
        summary="It was made by its schedule.",
        facts=facts,
        commands=[("See it anew", f"corral report usage --period {report.period} --zone {report.zone}")]
        if whole
        else [],
        link=plain(report.url),
        files=[Attachment(name=file.name, data=file.data) for file in report.files if file.data is not None],
    )
