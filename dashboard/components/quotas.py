"""Rows of a table of groups: a bar of what each holds, borrows, is owed and may hold at most, and numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from msgspec import Struct

from ...schemas.values.units import format_bytes
from ...schemas.work.groups import Group, GroupStatus, Resources
from ..html import tag, url

HEADS: Final = ("Group", "GPUs", "Used", "Guaranteed", "Borrowed", "Owed", "Limit", "Usage", "Waiting", "Next")
NUMERIC: Final = (2, 3, 4, 5)
"""Columns of numbers."""
_ANY: Final = "*"
_INDENT_PIXELS: Final = 16


class Parts(Struct, frozen=True):
    """Numbers of devices in the bar of a group.

    Attributes:
        within: held within the guarantee.
        borrowed: held beyond it.
        owed: guaranteed, asked for and waited for.
        guaranteed: all that is guaranteed.
        limit: what must not be exceeded; None for no limit on all devices together.
    """

    within: float
    borrowed: float
    owed: float
    guaranteed: float
    limit: float | None


def parts_of(status: GroupStatus) -> Parts:
    """Numbers of devices in the bar of a group."""
    config = status.group
    limits = [config.limit.gpus[_ANY]] if _ANY in config.limit.gpus else []
    if _ANY in config.borrowing_limit.gpus:
        limits.append(status.gpus_guaranteed + config.borrowing_limit.gpus[_ANY])
    used = used_of(status)
    return Parts(
        within=max(0.0, used - status.gpus_borrowed),
        borrowed=min(used, status.gpus_borrowed),
        owed=status.gpus_owed,
        guaranteed=status.gpus_guaranteed,
        limit=min(limits, default=None),
    )


def used_of(status: GroupStatus) -> float:
    """Devices that a group holds."""
    return sum(status.gpus_used.values())


def extent(status: GroupStatus) -> float:
    """Devices that the bar of a group has to show. A limit far beyond them does not make the bar shorter."""
    one = parts_of(status)
    most = max(one.within + one.borrowed + one.owed, one.guaranteed)
    return max(most, one.limit) if one.limit is not None and one.limit <= 2 * most else most


def legend() -> None:
    """Create the legend of the bars."""
    with tag("div", "bar note quota-keys"):
        for kind, words in (
            ("within", "used within the guarantee"), ("borrowed", "borrowed"), ("owed", "owed"),
            ("idle", "guaranteed, not asked for"), ("limit", "limit"),
        ):  # fmt: skip
            with tag("span"):
                tag("i", f"quota-{kind}")
                tag("span", text=words)


class GroupRow:
    """A row of the table. Only what changes is sent to the browser.

    Args:
        config: the group.
        has_groups: true if there are groups within it, which a link leads to.
    """

    def __init__(self, config: Group, has_groups: bool) -> None:
        self._config = config
        self._has_groups = has_groups
        self._places: dict[str, Any] = {}
        self._shown: dict[str, Any] = {}

    @property
    def cells(self) -> tuple[Callable[[], None], ...]:
        """Functions that create the cells, in the order of `HEADS`."""
        return (self._name, *(lambda head=head: self._place(head) for head in HEADS[1:]))

    def _name(self) -> None:
        config = self._config
        name = config.name.rpartition("/")[2]
        depth = config.name.count("/")
        members = f"{len(config.members)} member{'' if len(config.members) == 1 else 's'}, weight {config.weight:g}"
        with tag("div", title=f"{config.name}: {members}").style(f"padding-left:{_INDENT_PIXELS * depth}px"):
            tag("a", "", name, href=url("/groups", group=config.name) if self._has_groups else None)

    def _place(self, head: str) -> None:
        self._places[head] = tag("div") if head in ("GPUs", "Usage") else tag("span", text="")

    def show(self, status: GroupStatus, scale: float) -> None:
        """Show the state of the group; `scale` is the number of devices of a full bar."""
        one = parts_of(status)
        if self._changed("GPUs", (one, scale)):
            with self._cleared("GPUs"):
                _bar(status.group.name, one, scale)
        if self._changed("Usage", (round(status.usage, 3), round(status.fair_usage, 3))):
            with self._cleared("Usage"):
                _fairness(status.usage, status.fair_usage)
        waiting = f"{status.waiting_requests:,} for {number(status.waiting_gpus)} GPUs"
        for head, text in (
            ("Used", number(one.within + one.borrowed)), ("Guaranteed", number(one.guaranteed)),
            ("Borrowed", number(one.borrowed)), ("Owed", number(one.owed)), ("Limit", _limits(status.group) or "–"),
            ("Waiting", waiting if status.waiting_requests else "–"), ("Next", status.next_owner or "–"),
        ):  # fmt: skip
            if self._changed(head, text):
                self._places[head].set_text(text)

    def _changed(self, head: str, value: Any) -> bool:
        if self._shown.get(head) == value:
            return False
        self._shown[head] = value
        return True

    def _cleared(self, head: str) -> Any:
        self._places[head].clear()
        return self._places[head]


def _bar(name: str, one: Parts, scale: float) -> None:
    limit = "no limit" if one.limit is None else f"limit {number(one.limit)}"
    words = (
        f"{name}: {number(one.within)} within its guarantee of {number(one.guaranteed)}, "
        f"{number(one.borrowed)} borrowed, {number(one.owed)} owed, {limit}"
    )
    with tag("div", "quota", role="img", aria_label=words, title=words):
        at = 0.0
        for kind, amount in (("within", one.within), ("borrowed", one.borrowed), ("owed", one.owed)):
            _piece(f"quota-{kind}", at, amount, scale)
            at += amount
        _piece("quota-idle", at, one.guaranteed - at, scale)
        _mark("quota-guarantee", one.guaranteed, scale)
        if one.limit is not None and one.limit <= scale:
            _mark("quota-limit", one.limit, scale)


def _fairness(usage: float, fair: float) -> None:
    with tag("div", "fairness", title="Its part of all recent use, and the part that its weight gives it"):
        with tag("div", "quota slim", aria_hidden="true"):
            _piece("quota-borrowed" if usage > fair else "quota-within", 0.0, min(1.0, usage), 1.0)
            _mark("quota-limit", min(1.0, fair), 1.0)
        tag("span", text=f"{usage:.1%}, fair {fair:.1%}")


def _piece(classes: str, at: float, amount: float, scale: float) -> None:
    if amount > 0:
        tag("i", classes).style(f"left:{100 * at / scale:.2f}%;width:{100 * amount / scale:.2f}%")


def _mark(classes: str, at: float, scale: float) -> None:
    if at > 0:
        tag("i", classes).style(f"left:calc({100 * at / scale:.2f}% - 1px)")


def _limits(config: Group) -> str:
    found = [_amounts(config.limit)] if config.limit != Resources() else []
    if config.borrowing_limit != Resources():
        found.append(f"borrows {_amounts(config.borrowing_limit)}")
    return ", ".join(found)


def _amounts(amounts: Resources) -> str:
    found = [
        number(amount) if pattern == _ANY else f"{number(amount)} × {pattern}"
        for pattern, amount in amounts.gpus.items()
    ]
    if amounts.cpus is not None:
        found.append(f"{number(amounts.cpus)} cores")
    if amounts.host_memory_bytes is not None:
        found.append(format_bytes(amounts.host_memory_bytes))
    return ", ".join(found)


def number(amount: float) -> str:
    """Format a number of devices, a share as a part."""
    return f"{round(amount, 2):,g}"
