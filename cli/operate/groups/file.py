"""Groups as text: amounts on the command line, and the whole tree as a TOML file.

    half_life = "7d"

    [prices]
    H100 = 4

    [groups."lab/vision"]
    guarantee = { H100 = 16, "*" = 8, cpus = 256, host_memory = "2TiB" }
    limit = { H100 = 32 }
    weight = 2
    members = ["ann", "ben"]
    idle = { below = 5, after = "30m", action = "end", warn = "10m" }

In amounts, `cpus` and `host_memory` are cores and RAM; every other key is a model pattern.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, TypeVar, cast

import msgspec

from ....schemas.values.error_words import in_words
from ....schemas.values.misspelt import meant, slip
from ....schemas.values.units import exact_bytes, exact_seconds, parse_bytes, parse_seconds
from ....schemas.work.groups import DEFAULT_GROUP, Devices, Group, Groups, GroupTree, Resources, Weight
from ....schemas.work.idle import IdleAction, IdleRule

T = TypeVar("T", int, float)

CPUS: Final = "cpus"
MEMORY: Final = "host_memory"
_QUOTAS: Final = ("guarantee", "limit", "borrowing_limit")
_GROUP_KEYS: Final = (*_QUOTAS, "weight", "members", "idle")
_IDLE_KEYS: Final = ("below", "no_process", "after", "action", "warn")
_FILE_KEYS: Final = ("half_life", "prices", "groups")


class GroupTextError(ValueError):
    """A text or file about groups that is wrong; the message says where and what to do."""


# Amounts


def parse_amounts(text: str) -> Resources:
    """Parse `H100=16,*=8,cpus=64,host_memory=512GiB`; an empty text is no amount at all.

    Raises:
        GroupTextError: a part is no `PATTERN=NUMBER`, or comes twice.
    """
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, sign, value = (word.strip() for word in part.rpartition("="))
        if not sign or not key:
            raise GroupTextError(f"{part!r} is no amount: write it like 'H100=16,*=8,cpus=64,host_memory=512GiB'")
        if key in found:
            raise GroupTextError(f"{key!r} comes twice in {text!r}")
        found[key] = value if key == MEMORY else _number(value, key)
    return _resources(found, "amounts")


def format_amounts(amounts: Resources) -> str:
    """Write amounts as `parse_amounts` reads them; empty for none."""
    return ",".join(f"{key}={value}" for key, value in _amounts(amounts).items())


def _number(text: str, key: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise GroupTextError(f"{text!r} is no number of {key!r}") from None


def _amounts(amounts: Resources) -> dict[str, Any]:
    """Amounts by pattern, cores and RAM under their own keys. A pattern that is such a key gets stars around it."""
    found: dict[str, Any] = {
        f"*{pattern}*" if pattern in (CPUS, MEMORY) or _no_model(pattern) else pattern: _short(amount)
        for pattern, amount in amounts.gpus.items()
    }
    if amounts.cpus is not None:
        found[CPUS] = _short(amounts.cpus)
    if amounts.host_memory_bytes is not None:
        found[MEMORY] = exact_bytes(amounts.host_memory_bytes)
    return found


def _short(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _resources(table: Mapping[str, Any], where: str) -> Resources:
    found: dict[str, Any] = {"gpus": {key: value for key, value in table.items() if key not in (CPUS, MEMORY)}}
    for key in table:
        if key not in (CPUS, MEMORY) and (hint := _no_model(key)):
            raise GroupTextError(f"{where}: {key!r} is no model of a device: {hint}")
    if CPUS in table:
        found[CPUS] = table[CPUS]
    if MEMORY in table:
        try:
            found["host_memory_bytes"] = parse_bytes(_text_or(table[MEMORY], int))
        except ValueError as error:
            raise GroupTextError(f"{where}: {MEMORY}: {error}") from None
    for pattern, amount in found["gpus"].items():
        _converted(amount, Devices, f"{where}: {pattern}")
    return _converted(found, Resources, where)


def _no_model(pattern: str) -> str:
    """Hint for a pattern that is surely not meant for models: what to write instead; empty for a pattern of models.

    With a star the pattern is one of models all the same: `*memory*`.
    """
    key = pattern.lower().replace("-", "_")
    if key in ("gpu", "gpus", "any", "all"):
        return 'for GPUs of any model use "*"'
    if key in ("cpu", "cores", "memory", "ram", "host_memory_bytes"):
        return f"use `{CPUS}` or `{MEMORY}`"
    close = "" if any(mark in key for mark in "*?[") else slip(key, (CPUS, MEMORY))
    return f"did you mean `{close}`?" if close else ""


def checked_weight(weight: float) -> float:
    """The weight of a group.

    Raises:
        GroupTextError: it is out of range.
    """
    return _converted(weight, Weight, f"{weight:g}")


def _text_or(value: object, kind: type[T]) -> str | T:
    """A value that is text or a number; an int counts as a float, and a bool as neither.

    Raises:
        ValueError: it is neither.
    """
    try:
        return msgspec.convert(value, str | kind)
    except msgspec.ValidationError:
        raise ValueError(f"expected text with a unit, not {value!r}") from None


def _converted(value: Any, type: Any, where: str) -> Any:
    try:
        return msgspec.convert(value, type)
    except msgspec.ValidationError as error:
        raise GroupTextError(f"{where}: {in_words(str(error))}") from None


# Files


def parse_file(text: str) -> GroupTree:
    """Parse a TOML file of groups. What it does not name has its default.

    Raises:
        GroupTextError: it is no TOML, has an unknown key, or a value of the wrong type.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise GroupTextError(f"no TOML: {error}") from None
    _refuse_unknown(document, _FILE_KEYS, "the file")
    prices = _table(document.get("prices", {}), "prices")
    for pattern, price in prices.items():
        _converted(price, Weight, f"prices: {pattern}")
    tree: dict[str, Any] = {"prices": prices}
    if "half_life" in document:
        try:
            tree["half_life_seconds"] = parse_seconds(_text_or(document["half_life"], float))
        except ValueError as error:
            raise GroupTextError(f"half_life: {error}") from None
    groups = [_group(name, table) for name, table in _table(document.get("groups", {}), "groups").items()]
    return msgspec.structs.replace(_converted(tree, GroupTree, "the file"), groups=configured(groups))


def _group(name: str, value: object) -> Group:
    where = f"group {name!r}"
    table = _table(value, where)
    for key, inner in table.items():
        if key not in _GROUP_KEYS and isinstance(inner, dict) and not meant(key, _GROUP_KEYS):
            raise GroupTextError(f'{where} has a table {key!r}: a group within it is [groups."{name}/{key}"]')
    _refuse_unknown(table, _GROUP_KEYS, where)
    quotas = {
        quota: _resources(_table(table[quota], f"{quota} of {where}"), f"{quota} of {where}")
        for quota in _QUOTAS
        if quota in table
    }
    plain = {key: table[key] for key in ("weight", "members") if key in table}
    idle = _idle(_table(table["idle"], f"idle of {where}"), f"idle of {where}") if "idle" in table else None
    return msgspec.structs.replace(_converted({"name": name, **plain}, Group, where), **quotas, idle=idle)


def _idle(table: dict[str, Any], where: str) -> IdleRule:
    _refuse_unknown(table, _IDLE_KEYS, where)
    found: dict[str, Any] = {}
    for key, field in (("below", "below_percent"), ("no_process", "no_process"), ("action", "action")):
        if key in table:
            found[field] = table[key]
    for key, field in (("after", "after_seconds"), ("warn", "warn_seconds")):
        if key in table:
            try:
                found[field] = parse_seconds(_text_or(table[key], float))
            except ValueError as error:
                raise GroupTextError(f"{where}: {key}: {error}") from None
    return _converted(found, IdleRule, where)


def _idle_table(rule: IdleRule) -> dict[str, Any]:
    """A rule as `_idle` reads it."""
    if rule.action is IdleAction.OFF:
        return {"action": rule.action.value}
    condition = {"no_process": True} if rule.no_process else {"below": _short(rule.below_percent)}
    after, warn = exact_seconds(rule.after_seconds), exact_seconds(rule.warn_seconds)
    return {**condition, "after": after, "action": rule.action.value, "warn": warn}


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise GroupTextError(f"{where}: expected a table")
    return cast("dict[str, Any]", value)


def _refuse_unknown(table: Mapping[str, Any], known: Collection[str], where: str) -> None:
    for key in table:
        if key not in known:
            close = meant(key, known)
            hint = f"did you mean `{close}`?" if close else f"there are {', '.join(known)}"
            raise GroupTextError(f"there is no key {key!r} in {where}: {hint}")


def format_file(tree: GroupTree) -> str:
    """Write a tree as a TOML file, which `parse_file` reads back to the same tree."""
    import tomlkit

    document = tomlkit.document()
    document["half_life"] = exact_seconds(tree.half_life_seconds)
    if tree.prices:
        document["prices"] = {pattern: _short(price) for pattern, price in tree.prices.items()}
    groups = tomlkit.table(is_super_table=True)
    for group in tree.groups:
        table = groups[group.name] = tomlkit.table()
        for quota in _QUOTAS:
            amounts = _amounts(getattr(group, quota))
            if amounts:
                inline = table[quota] = tomlkit.inline_table()
                inline.update(amounts)
        if group.weight != 1:
            table["weight"] = _short(group.weight)
        if group.members:
            table["members"] = group.members
        if group.idle is not None:
            idle = table["idle"] = tomlkit.inline_table()
            idle.update(_idle_table(group.idle))
    if tree.groups:
        document["groups"] = groups
    return tomlkit.dumps(document)


def tree_of(groups: Groups) -> GroupTree:
    """The configured tree behind a listing."""
    return GroupTree(
        groups=configured([status.group for status in groups.groups]),
        prices=groups.prices,
        half_life_seconds=groups.half_life_seconds,
    )


def configured(groups: Sequence[Group]) -> list[Group]:
    """Groups without those that are there anyway: `default` and groups around others, as they are by default."""
    implied = {DEFAULT_GROUP}
    for group in groups:
        parts = group.name.split("/")
        implied.update("/".join(parts[:at]) for at in range(1, len(parts)))
    return [group for group in groups if group.name not in implied or group != Group(name=group.name)]
