"""Groups page: what each group holds, borrows and is owed now and over time, and who was preempted for whom."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from msgspec import Struct
from nicegui import ui
from starlette.requests import Request

from ...client import CorralError
from ...schemas.groups import DEFAULT_GROUP, Group, Groups, GroupStatus, Resources
from ...schemas.units import format_bytes
from .. import group_history
from ..components.results import Chart
from ..fleet import Problem, problem_of
from ..group_history import Lending
from ..history import RANGES, Window
from ..html import Segments, remember, table, tag, url
from ..page_frame import Frame, Notice

_EVERY_SECONDS = 15.0
_ANY = "*"
NO_GROUPS: Final = Problem(
    kind="groups",
    title="No groups",
    detail="All owners share the fleet by the order of the queue. Groups give teams guarantees, limits and weights.",
    commands=("corral group set vision --guarantee '*=16' --members ann,ben",),
)


def register(frame: Callable[[Request, str], Frame]) -> None:
    """Register the page."""

    @ui.page("/groups")
    async def page(request: Request, range: str = "", to: str = "", group: str = "") -> None:
        around = frame(request, "Groups")
        await around.fleet.ready()
        window = Window.of(range, request.query_params.get("from", ""), to, "24h")
        with around.show("/groups"):
            GroupsPage(around, window, group[:128])


class GroupsPage:
    """The groups page in one browser.

    Args:
        frame: frame of the page.
        window: of the charts and the preemptions.
        inside: name of the group whose inner groups the charts compare; empty for the outermost groups.
    """

    def __init__(self, frame: Frame, window: Window, inside: str) -> None:
        self.frame = frame
        self.window = window
        self.inside = inside
        self._asking = False
        self._drawn_at = 0.0
        self._found: Groups | None = None
        self._shown: Any = None
        with tag("div", "head"), tag("div"):
            tag("h1", text="Groups")
            self._sub = tag("div", "sub", "")
        self._notice = Notice()
        with tag("div") as self._content:
            self._content.classes("main").style("padding:0;max-width:none")
            with tag("section", "panel"):
                with tag("div", "panel-head"):
                    tag("h2", text="What each group holds")
                    _legend()
                self._now = tag("div")
            self._over_time()
            with tag("section", "panel"):
                with tag("div", "panel-head"):
                    tag("h2", text="Who was preempted, for whom and why")
                    self._preempted = tag("span", "note", "")
                self._preemptions = tag("div")
        self._content.set_visibility(False)
        ui.timer(0, self._ask, once=True)
        frame.on_refresh(self._refresh)

    def _over_time(self) -> None:
        with tag("section", "panel"):
            with tag("div", "panel-head"):
                with tag("div", "bar"):
                    tag("h2", text="Lent and borrowed")
                    self._charts_note = tag("span", "note", "")
                    if self.inside:
                        tag("a", "note link", "All groups", href="/groups")
                self._ranges = Segments(RANGES[1:], self.window.name, self._choose, "Time")
            self._history_notice = Notice()
            with tag("div") as self._charts:
                tag("div", "note", "GPUs beyond the guarantee; below zero, guaranteed GPUs that the group did not hold")
                self._beyond = Chart()
                self._owed_note = tag("div", "note", "").style("margin-top:14px")
                self._owed = Chart()

    def _choose(self, name: str) -> Any:
        self.window = Window.of(name, "", "", "24h")
        remember("/groups", **({} if self.window.name == "24h" else self.window.query), group=self.inside)
        return self._draw()

    # Groups as they are now

    def _refresh(self) -> None:
        if not self._asking:
            ui.timer(0, self._ask, once=True)

    async def _ask(self) -> None:
        self._asking = True
        try:
            found = await self.frame.fleet.groups()
        except CorralError as error:
            self._notice.tell(problem_of(error, self.frame.fleet.url), whole=self._found is None)
            return
        finally:
            self._asking = False
        configured = any(status.group != Group(name=DEFAULT_GROUP) for status in found.groups)
        self._content.set_visibility(configured)
        self._notice.tell(self.frame.fleet.problem if configured else NO_GROUPS, whole=not configured)
        self._found = found if configured else None
        if not configured:
            self._sub.set_text("")
            return
        self._show(found)
        if not self._drawn_at or (self.window.end is None and self._drawn_at < time.monotonic() - _EVERY_SECONDS):
            await self._draw()

    def _show(self, found: Groups) -> None:
        groups = sorted(found.groups, key=lambda status: status.group.name.split("/"))
        if groups == self._shown:
            return
        self._shown = groups
        held = sum(used_of(status) for status in group_history.inside(groups, ""))
        waiting = sum(status.waiting_requests for status in group_history.inside(groups, ""))
        days = found.half_life_seconds / 86400
        self._sub.set_text(
            f"{len(groups):,} groups hold {held:,.6g} GPUs, {waiting:,} requests wait; usage halves in {days:.3g} d"
        )
        scale = max((extent(status) for status in groups), default=0.0) or 1.0
        parents = {status.group.name.rpartition("/")[0] for status in groups}
        heads = (
            "Group",
            "GPUs",
            "Used",
            "Guaranteed",
            "Borrowed",
            "Owed",
            "Limit",
            "Usage",
            "Waiting",
            "Next",
        )
        self._now.clear()
        with self._now:
            table(heads, [_row(status, scale, status.group.name in parents) for status in groups], numeric=range(2, 6))

    # Over time

    async def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        window, fleet = self.window, self.frame.fleet
        try:
            use = await self.frame.ask(lambda client: group_history.use(client, window, fleet.queue))
            preempted = await self.frame.ask(lambda client: group_history.preemptions(client, window))
        except CorralError as error:
            self._charts.set_visibility(False)
            self._history_notice.tell(problem_of(error, fleet.url), whole=True)
            return
        if self._found is None or window != self.window:
            return
        self._history_notice.tell(None)
        self._charts.set_visibility(True)
        self._ranges.show(window.name)
        within = f"within {self.inside}, " if self.inside else ""
        self._charts_note.set_text(f"{within}means of {_length(group_history.bucket_seconds(window.seconds))}, "
                                   "by today's guarantees")  # fmt: skip
        self._show_charts(group_history.lending(use, group_history.inside(self._found.groups, self.inside)))
        self._show_preemptions(preempted)

    def _show_charts(self, found: Lending) -> None:
        times = [1000 * at for at in found.times]
        owed = any(any(values) for values in found.owed.values())
        self._owed_note.set_text("GPUs owed: guaranteed, asked for and not held" if owed else "No group was owed GPUs")
        self._owed.set_visibility(owed)
        self._beyond.show("stack", times, _series(found.beyond), "")
        if owed:
            self._owed.show("stack", times, _series(found.owed), "")

    def _show_preemptions(self, found: Sequence[dict[str, Any]]) -> None:
        more = f", the newest {group_history.PREEMPTIONS}" if len(found) == group_history.PREEMPTIONS else ""
        self._preempted.set_text(f"{len(found):,} in this time{more}" if found else "nobody in this time")
        self._preemptions.clear()
        if not found:
            return
        heads = ("When, UTC", "Who", "Name", "GPUs", "For", "Why", "What came of it", "Lost GPU h")
        with self._preemptions:
            table(heads, [_preemption(one) for one in found], numeric=(3, 7))


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


def parts(status: GroupStatus) -> Parts:
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
    """Devices that the bar of a group has to show. A limit far beyond them is no reason to make it shorter."""
    one = parts(status)
    most = max(one.within + one.borrowed + one.owed, one.guaranteed)
    return max(most, one.limit) if one.limit is not None and one.limit <= 2 * most else most


def _legend() -> None:
    with tag("div", "bar note quota-keys"):
        for kind, words in (
            ("within", "used within the guarantee"), ("borrowed", "borrowed"), ("owed", "owed"),
            ("idle", "guaranteed, not asked for"), ("limit", "limit"),
        ):  # fmt: skip
            with tag("span"):
                tag("i", f"quota-{kind}")
                tag("span", text=words)


def _row(status: GroupStatus, scale: float, has_groups: bool) -> tuple[Any, ...]:
    config, one = status.group, parts(status)
    depth = config.name.count("/")

    def name() -> None:
        words = config.name.rpartition("/")[2]
        members = f"{len(config.members)} member{'' if len(config.members) == 1 else 's'}, weight {config.weight:g}"
        with tag("div", title=f"{config.name}: {members}").style(f"padding-left:{16 * depth}px"):
            tag("a", "", words, href=url("/groups", group=config.name) if has_groups else None)

    def waiting() -> None:
        tag("span", text=f"{status.waiting_requests:,} for {_number(status.waiting_gpus)} GPUs"
            if status.waiting_requests else "–")  # fmt: skip

    return (
        name,
        lambda: _bar(config.name, one, scale),
        _number(one.within + one.borrowed),
        _number(one.guaranteed),
        _number(one.borrowed),
        _number(one.owed),
        _limits(config) or "–",
        lambda: _fairness(status),
        waiting,
        status.next_owner or "–",
    )


def _bar(name: str, one: Parts, scale: float) -> None:
    limit = "no limit" if one.limit is None else f"limit {_number(one.limit)}"
    words = (
        f"{name}: {_number(one.within)} within its guarantee of {_number(one.guaranteed)}, "
        f"{_number(one.borrowed)} borrowed, {_number(one.owed)} owed, {limit}"
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


def _piece(classes: str, at: float, amount: float, scale: float) -> None:
    if amount > 0:
        tag("i", classes).style(f"left:{100 * at / scale:.2f}%;width:{100 * amount / scale:.2f}%")


def _mark(classes: str, at: float, scale: float) -> None:
    if at > 0:
        tag("i", classes).style(f"left:calc({100 * at / scale:.2f}% - 1px)")


def _fairness(status: GroupStatus) -> None:
    words = f"{status.usage:.1%}, fair {status.fair_usage:.1%}"
    with tag("div", "fairness", title="Its part of all recent use, and the part that its weight gives it"):
        with tag("div", "quota slim", aria_hidden="true"):
            _piece(
                "quota-over" if status.usage > status.fair_usage else "quota-within", 0.0, min(1.0, status.usage), 1.0
            )
            _mark("quota-limit", min(1.0, status.fair_usage), 1.0)
        tag("span", text=words)


def _limits(config: Group) -> str:
    found = [_amounts(config.limit)] if config.limit != Resources() else []
    if config.borrowing_limit != Resources():
        found.append(f"borrows {_amounts(config.borrowing_limit)}")
    return ", ".join(found)


def _amounts(amounts: Resources) -> str:
    found = [_number(amount) if pattern == _ANY else f"{_number(amount)} × {pattern}"
             for pattern, amount in amounts.gpus.items()]  # fmt: skip
    if amounts.cpus is not None:
        found.append(f"{_number(amounts.cpus)} cores")
    if amounts.host_memory_bytes is not None:
        found.append(format_bytes(amounts.host_memory_bytes))
    return ", ".join(found)


def _series(values: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [{"name": name, "values": numbers} for name, numbers in values.items()]


def _preemption(one: dict[str, Any]) -> tuple[Any, ...]:
    lost = one["lost_gpu_seconds"]
    after = "" if one["notice_seconds"] is None else f" after {one['notice_seconds']:,.0f} s"
    return (
        datetime.fromtimestamp(one["at"], UTC).strftime("%d %b %H:%M:%S"),
        _person(one["owner"], one["group_name"]),
        one["name"] or one["lease_id"],
        _number(one["gpus"]),
        _person(one["claimant_owner"], one["claimant_group"]) if one["claimant_owner"] else "an operator",
        one["reason"] or "–",
        f"{one['outcome']}{after}",
        "–" if lost is None else f"{lost / 3600:,.2f}",
    )


def _person(owner: str, group: str | None) -> str:
    return f"{owner} ({group})" if group else owner


def _number(amount: float) -> str:
    return f"{round(amount, 2):,g}"


def _length(seconds: int) -> str:
    if seconds < 3600:
        return f"{seconds // 60} min"
    return f"{seconds // 3600} h" if seconds < 86400 else "1 d"
