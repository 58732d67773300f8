"""Rules for notifications, and the messages of the notifier, which sends them. JSON by default.

A rule says which kinds of news go to which targets, and when not. Targets are addresses such as an e-mail account or a
chat room. Only their names are in messages: addresses and passwords stay in a file of the notifier.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

from msgspec import Meta, Struct

from ..requests import Count, OwnerName, ShortText, Time
from ..values import names

MAX_RULES: Final = 32
"""Rules of an owner."""
MAX_TARGETS: Final = 16
"""Targets of a rule."""
MAX_BEFORE_SECONDS: Final = 7 * 86400
_LONGEST_SECONDS: Final = 30 * 86400

RuleName = Annotated[str, Meta(min_length=1, max_length=64, pattern=names.IDENTIFIER)]
TargetName = Annotated[str, Meta(min_length=1, max_length=192, pattern=names.TARGET)]
_Glob = Annotated[str, Meta(min_length=1, max_length=128)]
Globs = Annotated[list[_Glob], Meta(max_length=32)]
_Seconds = Annotated[float, Meta(ge=0, le=_LONGEST_SECONDS)]


class NewsKind(StrEnum):
    """Kind of news that a rule may be about."""

    GRANTED = "granted"
    """A request that waited in the queue has its devices."""
    EXPIRING = "expiring"
    """A lease ends soon."""
    PREEMPTED = "preempted"
    """A lease will be preempted; its holder is asked to save its work."""
    CUT_SHORT = "cut-short"
    """A lease ended without being released: it expired, was evicted or preempted, or its host was lost."""
    ENDED = "ended"
    """A lease ended, for whatever reason."""
    IDLE = "idle"
    """The devices of a lease have been idle for some time."""
    JOB_STARTED = "job-started"
    """The first task of a job runs."""
    JOB_ENDED = "job-ended"
    """All tasks of a job have ended."""
    JOB_FAILED = "job-failed"
    """All tasks of a job have ended, and not all are done."""
    UNHEALTHY = "unhealthy"
    """A device reports an error after which it takes no new work, or its host is lost."""
    QUEUE_LONG = "queue-long"
    """Many requests wait, or one waits for long."""
    OVER_SHARE = "over-share"
    """A group uses more than its fair share while others wait."""
    REPORT = "report"
    """A scheduled report was written."""


class NotifyRule(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Rule that sends kinds of news to targets.

    Patterns are globs, and an empty list matches anything. A rule with `owners` matches no news about anything that has
    no owner. Leases of jobs count only for `preempted` and `idle`: jobs have kinds of their own. An owner's rule about
    `report` is about reports on that owner.

    Attributes:
        name: name of the rule; its owner has one rule of a name.
        on: kinds of news.
        to: names of the targets.
        owners: owners of the lease or the job, or of a lease on the device. For the rules of an owner it is that owner.
        groups: group of the owner, or the group that is over its share; `lab` includes the groups within.
        hosts: hosts of the lease, the device or the job.
        models: names of GPU models, case-insensitive; of the lease or the device.
        workloads: name of the lease, the job or the report.
        quiet: times in which news wait: `22:00-07:00`, `Sat-Sun 00:00-24:00`, with a time zone at the end if it is not
            `zone`. At the end of such a time everything that has waited goes out as one message.
        urgent: kinds that do not wait.
        zone: time zone of `quiet` and of the times in messages, such as `Europe/Berlin`.
        waited_seconds: for `granted`: only requests that waited so long.
        before_seconds: for `expiring`: time before the end. For a time to live that is renewed, at most a fifth of it.
        idle_below_percent: for `idle`: a minute is idle if no sample of GPU utilization reaches this.
        idle_seconds: for `idle`: the lease must have been idle for so long without a break.
        queue_requests: for `queue-long`: at least so many requests wait; null for any number.
        queue_seconds: for `queue-long`: a request has waited for so long; null for any time.
        share_excess: for `over-share`: the part by which recent use exceeds the fair share: 0.1 means 10% more.
        resolved: of `unhealthy`, `queue-long` and `over-share`: also say when it is over.
    """

    name: RuleName
    on: Annotated[list[NewsKind], Meta(min_length=1, max_length=len(NewsKind))]
    to: Annotated[list[TargetName], Meta(min_length=1, max_length=MAX_TARGETS)]
    owners: Globs = []
    groups: Globs = []
    hosts: Globs = []
    models: Globs = []
    workloads: Globs = []
    quiet: Annotated[list[ShortText], Meta(max_length=8)] = []
    urgent: Annotated[list[NewsKind], Meta(max_length=len(NewsKind))] = []
    zone: ShortText = "UTC"
    waited_seconds: _Seconds = 10.0
    before_seconds: Annotated[float, Meta(ge=1, le=MAX_BEFORE_SECONDS)] = 900.0
    idle_below_percent: Annotated[float, Meta(ge=0, le=100)] = 5.0
    idle_seconds: Annotated[float, Meta(ge=60, le=_LONGEST_SECONDS)] = 1800.0
    queue_requests: Annotated[int, Meta(ge=1, le=2**53)] | None = None
    queue_seconds: Annotated[float, Meta(ge=1, le=_LONGEST_SECONDS)] | None = None
    share_excess: Annotated[float, Meta(ge=0, le=1000)] = 0.1
    resolved: bool = False


class NotifyVerb(StrEnum):
    """Command to the notifier."""

    LIST = "list"
    """Change nothing, and answer with rules and targets."""
    SET = "set"
    """Add a rule, or replace that of the same name."""
    REMOVE = "remove"
    """Remove a rule."""
    TEST = "test"
    """Send a test message, and answer with the results."""


class NotifyAction(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A command about the rules of an owner.

    Attributes:
        owner: owner of the rules. For an operator's command, whoever it is; null then stands for all owners, and for
            the rules in the notifier's file.
        verb: what to do.
        rule: for `set`: the rule.
        name: for `remove` and `test`: name of the rule.
        target: for `test`: name of a target, instead of a rule.
    """

    owner: OwnerName | None = None
    verb: NotifyVerb = NotifyVerb.LIST
    rule: NotifyRule | None = None
    name: RuleName | None = None
    target: TargetName | None = None


class NotifyOverride(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """An operator's command about the rules of anybody.

    Attributes:
        operator: who gives it.
        action: the command.
    """

    operator: OwnerName
    action: NotifyAction = NotifyAction()


class OwnedRule(Struct, frozen=True, kw_only=True):
    """A rule and whose it is.

    Attributes:
        rule: the rule.
        owner: its owner; empty for one in the notifier's file.
        problem: why it does not work, in words: a target that is gone, for example. Empty if it works.
    """

    rule: NotifyRule
    owner: str = ""
    problem: str = ""


class TargetStatus(Struct, frozen=True, kw_only=True):
    """A target that a rule may name, without its address.

    Attributes:
        name: name of the target.
        service: service that it belongs to, such as `E-Mail` or `Slack`.
        waiting: messages that wait for it, including those of quiet times.
        failing_since: since when nothing could be sent to it; null if the last message could, or none was sent.
        problem: what the last attempt that failed said, without secrets.
    """

    name: str
    service: str = ""
    waiting: Count = 0
    failing_since: Time | None = None
    problem: str = ""


class SendResult(Struct, frozen=True, kw_only=True):
    """Result of a test message.

    Attributes:
        target: name of the target.
        sent: true if its service took the message.
        seconds: time that it took.
        problem: what went wrong, without secrets.
    """

    target: str
    sent: bool
    seconds: float = 0.0
    problem: str = ""


class Notifications(Struct, frozen=True, kw_only=True, tag="notifications", tag_field="type"):
    """Answer of the notifier: the rules after the command, and the targets.

    Attributes:
        rules: rules of the owner; for an operator those of all.
        targets: targets that the owner may name; for an operator all.
        results: of a test.
        warnings: fields of the message that this notifier does not know and has ignored.
    """

    rules: list[OwnedRule] = []
    targets: list[TargetStatus] = []
    results: list[SendResult] = []
    warnings: list[str] = []
