"""Rules as text: the operator's TOML file, and values as people write them.

    [[rule]]
    name = "ann-away"
    on = ["preempted", "job-ended"]
    owner = "ann"
    to = ["ann-mail"]
    quiet = "22:00-07:00 Europe/Berlin"

Durations are like `15m`, percentages like `10%` or 10.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import msgspec

from ..schemas.values.choices import with_choices
from ..schemas.values.error_words import in_words
from ..schemas.values.misspelt import meant
from ..schemas.values.units import exact_seconds, parse_seconds
from ..schemas.work.notifications import NotifyRule
from .quiet import named_zone
from .rules import WrongRule, check

_LISTS: Final = {
    "on": "on",
    "to": "to",
    "owner": "owners",
    "owners": "owners",
    "group": "groups",
    "groups": "groups",
    "host": "hosts",
    "hosts": "hosts",
    "model": "models",
    "models": "models",
    "workload": "workloads",
    "workloads": "workloads",
    "quiet": "quiet",
    "urgent": "urgent",
}
"""Keys whose value is a text or a list of texts, with the fields of a rule."""


def seconds(value: Any) -> float:
    """A duration.

    Raises:
        ValueError: it is none.
    """
    return parse_seconds(value if isinstance(value, int | float) else str(value))


def percent(value: Any) -> float:
    """A percentage, `10%` or 10.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, int | float):
        return float(value)
    try:
        return float(str(value).strip().removesuffix("%"))
    except ValueError:
        raise ValueError(f"{value!r} is no percentage: write it like 10%") from None


VALUES: Final[dict[str, tuple[str, Callable[[Any], Any]]]] = {
    "name": ("name", lambda value: value),
    "zone": ("zone", lambda value: value),
    "waited": ("waited_seconds", seconds),
    "before": ("before_seconds", seconds),
    "idle_below": ("idle_below_percent", percent),
    "idle_for": ("idle_seconds", seconds),
    "queue_requests": ("queue_requests", lambda value: value),
    "queue_wait": ("queue_seconds", seconds),
    "share_excess": ("share_excess", lambda value: percent(value) / 100),
    "resolved": ("resolved", lambda value: value),
}
"""Keys with other values: the field, and what makes the field's value of the text."""
KEYS: Final = (*_LISTS, *VALUES)


def rule_of(table: Mapping[str, Any]) -> NotifyRule:
    """A rule from the keys of a file, checked.

    Raises:
        WrongRule: a key is unknown or has a wrong value; its field is the key.
    """
    found: dict[str, Any] = {}
    for key, value in table.items():
        if key in _LISTS:
            if (field := _LISTS[key]) in found:
                raise WrongRule(f"{key} comes twice: as {key!r} and {field!r}", key)
            found[field] = [value] if isinstance(value, str) else value
        elif key in VALUES:
            field, convert = VALUES[key]
            try:
                found[field] = convert(value)
            except ValueError as error:
                raise WrongRule(str(error), key) from None
        else:
            close = meant(key, KEYS)
            hint = f"did you mean {close!r}?" if close else f"there are {', '.join(KEYS)}"
            raise WrongRule(f"there is no key {key!r}: {hint}", key)
    if "zone" not in found and (zone := _zone_in(found.get("quiet"))):
        found["zone"] = zone
    for key in ("on", "to"):
        if key not in found:
            raise WrongRule(f"{key!r} is missing: {_MISSING[key]}", key)
    try:
        rule = msgspec.convert(found, NotifyRule)
    except msgspec.ValidationError as error:
        words, _, path = with_choices(in_words(str(error)), NotifyRule).partition(" - at `$.")
        field = path.rstrip("`").partition("[")[0]
        raise WrongRule(f"{key_of(field)}: {words}" if field else words, key_of(field)) from None
    try:
        check(rule)
    except WrongRule as error:
        raise WrongRule(str(error), key_of(error.field)) from None
    return rule


def _zone_in(quiet: Any) -> str:
    """The time zone that a quiet time names; empty if none does."""
    texts = cast("list[Any]", quiet) if isinstance(quiet, list) else []
    return next((zone for text in texts if isinstance(text, str) and (zone := named_zone(text))), "")


_MISSING: Final = {
    "on": "say which news it is about, as in on = ['preempted', 'job-ended']",
    "to": "name a target, as in to = ['ann-mail']",
}


def key_of(field: str) -> str:
    """The key of a field of a rule."""
    return next((key for key, (name, _) in VALUES.items() if name == field), field)


def parse_rules(text: str) -> list[NotifyRule]:
    """Parse the operator's file.

    Raises:
        WrongRule: it is no TOML, or a rule is wrong; the message says which.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise WrongRule(f"no TOML: {error}", "") from None
    for key in document:
        if key != "rule":
            raise WrongRule(f"there is no key {key!r} in the file: each rule begins with [[rule]]", key)
    tables = document.get("rule", [])
    if not isinstance(tables, list):
        raise WrongRule("each rule begins with [[rule]], in two brackets", "rule")
    found: dict[str, NotifyRule] = {}
    for number, table in enumerate(cast("list[Any]", tables), 1):
        if not isinstance(table, dict):
            raise WrongRule("each rule begins with [[rule]], in two brackets", "rule")
        given = {"name": f"rule-{number}", **cast("dict[str, Any]", table)}
        try:
            rule = rule_of(given)
        except WrongRule as error:
            raise WrongRule(f"rule {given['name']!r}: {error}", error.field) from None
        if rule.name in found:
            raise WrongRule(f"two rules have the name {rule.name!r}: give each a name of its own", "name")
        found[rule.name] = rule
    return list(found.values())


def in_text(rule: NotifyRule) -> str:
    """Settings of a rule beyond its kinds and targets, in one line: only those that differ from the defaults."""
    usual = NotifyRule(name="x", on=rule.on, to=rule.to)
    parts = [
        f"{field} {', '.join(patterns)}"
        for field in ("owners", "groups", "hosts", "models", "workloads")
        if (patterns := getattr(rule, field))
    ]
    for key, (field, _) in VALUES.items():
        value = getattr(rule, field)
        if key in ("name", "zone") or value == getattr(usual, field):
            continue
        if field.endswith("_seconds"):
            value = exact_seconds(value)
        elif key == "idle_below":
            value = f"{value:g}%"
        elif key == "share_excess":
            value = f"{value * 100:g}%"
        parts.append(key if value is True else f"{key.replace('_', ' ')} {value}")
    if rule.quiet:
        parts.append(f"quiet {', '.join(rule.quiet)}")
    if rule.zone != usual.zone:
        parts.append(rule.zone)
    if rule.urgent:
        parts.append(f"urgent: {', '.join(rule.urgent)}")
    return "; ".join(parts)
