"""Rules for GPUs that are leased and idle: what counts as idle, for how long, and what happens then.

A rule is written as `below 5% for 30m: end after 10m`: its condition, the time for which it holds without a break, the
action, and the time between the warning of the holder and the action.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Final

from msgspec import Meta, Struct
from msgspec.structs import replace

from ..values.units import exact_seconds, parse_seconds

SHORTEST_SECONDS: Final = 60.0
"""Shortest `after_seconds` of a rule as text. In messages it may be shorter, which is for tests: work pauses."""
_LONGEST_SECONDS: Final = 30 * 86400


class IdleAction(StrEnum):
    """Action on a lease whose devices are idle."""

    WARN = "warn"
    """Its holder is warned, and nothing else."""
    PREEMPTIBLE = "preemptible"
    """It becomes preemptible, and stays so."""
    END = "end"
    """It ends as an eviction."""
    OFF = "off"
    """Nothing: the group is exempt from the rule of a group around it."""


class IdleRule(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Condition under which leased devices count as idle, and the action on their lease.

    A lease is idle while all its devices are. Time in which that is not known does not count.

    Attributes:
        below_percent: a device is idle while each sample of its GPU utilization is below this, or is 0.
        after_seconds: the lease must have been idle for so long without a break before its holder is warned. Use 60 or
            more; the limit of 1 is for tests.
        no_process: instead of `below_percent`, a device is idle while no process of the lease is on it.
        action: what happens.
        warn_seconds: the lease must have been idle for so much longer, after the warning, before the action.
    """

    below_percent: Annotated[float, Meta(ge=0, le=100)] = 0.0
    after_seconds: Annotated[float, Meta(ge=1, le=_LONGEST_SECONDS)] = 1800.0
    no_process: bool = False
    action: IdleAction = IdleAction.WARN
    warn_seconds: Annotated[float, Meta(ge=0, le=_LONGEST_SECONDS)] = 600.0


# Text

_OFF: Final = "off"
_RULE: Final = re.compile(
    r"(?:below\s+(?P<percent>[0-9.e+-]+)\s*%|(?P<activity>no\s+activity)|(?P<process>no\s+process))"
    r"\s+for\s+(?P<after>[^:]+?)(?:\s*:\s*(?P<action>\w+)(?:\s+after\s+(?P<warn>.+?))?)?",
    re.IGNORECASE,
)
_FORM: Final = "write it like 'below 5% for 30m: end after 10m', 'no activity for 1h: warn' or 'no process for 2h: end'"


def parse_rule(text: str) -> IdleRule:
    """Parse a rule: `below 5% for 30m: end after 10m`, `no activity for 1h`, `no process for 2h: preemptible`, `off`.

    Raises:
        ValueError: it is no rule, or its time is shorter than a minute; the message says what to write.
    """
    if text.strip().lower() == _OFF:
        return IdleRule(action=IdleAction.OFF)
    match = _RULE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no rule for idle GPUs: {_FORM}")
    rule = IdleRule(no_process=match["process"] is not None, after_seconds=_duration(match["after"]))
    if match["percent"] is not None:
        try:
            percent = float(match["percent"])
        except ValueError:
            raise ValueError(f"{match['percent']!r} is no number: {_FORM}") from None
        if not 0 <= percent <= 100:
            raise ValueError(f"{percent:g}% is no part of the time: {_FORM}")
        rule = replace(rule, below_percent=percent)
    if match["action"] is not None:
        try:
            rule = replace(rule, action=IdleAction(match["action"].lower()))
        except ValueError:
            raise ValueError(f"there is no action {match['action']!r}: use warn, preemptible or end") from None
    if match["warn"] is not None:
        rule = replace(rule, warn_seconds=_duration(match["warn"]))
    if rule.after_seconds < SHORTEST_SECONDS:
        raise ValueError(f"{match['after']!r} is too short: work pauses for less than a minute now and then")
    return rule


def _duration(text: str) -> float:
    seconds = parse_seconds(text)
    if seconds > _LONGEST_SECONDS:
        raise ValueError(f"{text!r} is longer than 30 days")
    return seconds


def format_rule(rule: IdleRule) -> str:
    """Write a rule as `parse_rule` reads it."""
    if rule.action is IdleAction.OFF:
        return _OFF
    after = "" if rule.action is IdleAction.WARN else f" after {exact_seconds(rule.warn_seconds)}"
    return f"{_condition(rule)}: {rule.action.value}{after}"


def _condition(rule: IdleRule) -> str:
    """Condition of a rule: `below 5% for 30m`."""
    if rule.no_process:
        what = "no process"
    else:
        what = f"below {rule.below_percent:g}%" if rule.below_percent else "no activity"
    return f"{what} for {exact_seconds(rule.after_seconds)}"
