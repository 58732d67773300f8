"""Match of rules with news: targets and times of messages. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Final

from msgspec import Struct

from ..schemas.values import globs
from ..schemas.work.notifications import NewsKind, NotifyRule, OwnedRule
from .messages import Message, message_of
from .news import News
from .quiet import QuietTime, parse_quiet, quiet_until, zone_of

FLEET_WIDE: Final = frozenset({NewsKind.QUEUE_LONG, NewsKind.OVER_SHARE})
"""Kinds that belong to no owner, and that everyone may see."""


class Delivery(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message to a target, as it is kept on the bus until it is sent.

    Attributes:
        cause: see `News`.
        kind: kind of the news.
        target: name of the target.
        rule: id of the rule.
        message: the message.
        made_at: when it was made.
        not_before: end of the quiet time that it waits for; null if it needn't wait.
    """

    cause: str
    kind: NewsKind
    target: str
    rule: str
    message: Message
    made_at: datetime
    not_before: datetime | None = None

    @property
    def key(self) -> str:
        """Name of the cause and the target together, for the bucket."""
        return hashlib.sha256(f"{self.target}\n{self.cause}".encode()).hexdigest()[:32]


class WrongRule(ValueError):
    """A rule can't work. The message says why, and what to do.

    Attributes:
        field: of the rule that is at fault.
    """

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


def check(rule: NotifyRule) -> None:
    """Check what the types of a rule don't.

    Raises:
        WrongRule: there is no such time zone or quiet time, or a limit is missing.
    """
    try:
        zone_of(rule.zone)
    except ValueError as error:
        raise WrongRule(str(error), "zone") from None
    for text in rule.quiet:
        try:
            parse_quiet(text, rule.zone)
        except ValueError as error:
            raise WrongRule(str(error), "quiet") from None
    if NewsKind.QUEUE_LONG in rule.on and rule.queue_requests is None and rule.queue_seconds is None:
        raise WrongRule(
            "a rule about queue-long needs a limit: a number of requests that wait, or the time that one has waited",
            "queue_requests",
        )
    if useless := set(rule.urgent) - set(rule.on):
        raise WrongRule(f"{', '.join(sorted(useless))} can't be urgent: the rule is not about it", "urgent")
    for field in ("owners", "groups", "hosts", "models", "workloads"):
        try:
            globs.check(getattr(rule, field), f"$.{field}")
        except ValueError as error:
            raise WrongRule(str(error), field) from None


def concerns(owned: OwnedRule, news: News) -> bool:
    """True if a rule is about news."""
    rule = owned.rule
    if not news.kinds & set(rule.on):
        return False
    if owned.owner and news.kind not in FLEET_WIDE and owned.owner not in news.owners:
        return False
    if news.kind is NewsKind.GRANTED and news.waited_seconds < rule.waited_seconds:
        return False
    lower = [model.lower() for model in news.models]
    return (
        _any(news.owners, rule.owners)
        and _any_group(news.groups, rule.groups)
        and _any(news.hosts, rule.hosts)
        and (not rule.models or any(globs.matches_any(model, map(_containing, rule.models)) for model in lower))
        and (not rule.workloads or globs.matches_any(news.workload, rule.workloads))
    )


def _any(values: Iterable[str], patterns: Sequence[str]) -> bool:
    return not patterns or any(globs.matches_any(value, patterns) for value in values)


def _any_group(values: Iterable[str], patterns: Sequence[str]) -> bool:
    """True if a group matches, or one that it is in."""
    around = {
        "/".join(parts[:at]) for value in values for parts in [value.split("/")] for at in range(1, len(parts) + 1)
    }
    return _any(around, patterns)


def _containing(pattern: str) -> str:
    return pattern.lower() if set(pattern) & set("*?[") else f"*{pattern.lower()}*"


def quiet_times(rule: NotifyRule) -> list[QuietTime]:
    """Quiet times of a rule that was checked."""
    return [parse_quiet(text, rule.zone) for text in rule.quiet]


def deliveries(
    news: News, rules: Iterable[OwnedRule], meant: Callable[[OwnedRule, str], str | None], now: datetime
) -> list[Delivery]:
    """Messages about news: one to each target, at the earliest time that one of the rules allows.

    Args:
        news: what has happened.
        rules: all rules; those that are not about it do nothing.
        meant: name of the target that a rule means, among all; None if it is not there, or the rule may not name it.
        now: the time.
    """
    found: dict[str, Delivery] = {}
    for owned in rules:
        if not concerns(owned, news):
            continue
        rule = owned.rule
        until = None if news.kinds & set(rule.urgent) else quiet_until(quiet_times(rule), now)
        message: Message | None = None
        for name in rule.to:
            if (target := meant(owned, name)) is None:
                continue
            before = found.get(target)
            if before is not None and _earlier(before.not_before, until):
                continue
            message = message or message_of(news, rule.zone)
            found[target] = Delivery(
                cause=news.cause,
                kind=news.kind,
                target=target,
                rule=f"{owned.owner}/{rule.name}",
                message=message,
                made_at=now,
                not_before=until,
            )
    return list(found.values())


def _earlier(one: datetime | None, other: datetime | None) -> bool:
    """True if the first time is not after the second; none is at once."""
    return one is None or (other is not None and one <= other)
