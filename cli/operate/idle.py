"""`corral idle`: who holds idle GPUs now, and what a rule for idle GPUs would have done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer
from msgspec import Struct
from rich.markup import escape
from rich.table import Table

from ...client import Client, CorralError
from ...client.reports.idle_query import FIRST_LIST, FIRST_MINUTE, held_and_known, held_and_listed, idle_now, what_if
from ...schemas.requests import Lease
from ...schemas.values.units import parse_seconds
from ...schemas.work.groups import DEFAULT_GROUP, Groups
from ...schemas.work.idle import IdleAction, IdleRule, format_rule, parse_rule
from .. import render
from ..exits import NOT_YOURS, USAGE, CommandError
from ..fitting import Heading, fitted
from ..options import AsJson, NatsUrl, Timeout, connected, console, print_json, run, say

_NOW: IdleRule = IdleRule(below_percent=5.0, after_seconds=600.0)
"""Threshold of idleness if no rule is given."""
_SHOWN = 20
_NO_LISTS = (
    "the history holds no lists of processes, so it can't say what a rule about them would have done: collectors "
    "publish them unless they run with `--processes 0`"
)
_BACK_SECONDS = 86400.0
"""Limit on the age of the begin of an idle time."""


class Idle(Struct, frozen=True, kw_only=True):
    """An active lease whose devices are idle.

    Attributes:
        lease_id: id of the lease.
        owner: owner of the lease.
        group: group of the owner; empty if it is unknown.
        name: name of the workload.
        gpus: devices, in whole boards.
        since: time from which on they are idle, up to a day ago.
        mean_percent: mean GPU utilization since then; null if unknown.
        rule: rule that the planner has applied, with the warning of its holder; empty without one.
        acts_at: time of the rule's action; null if it does not act, or has not warned yet.
        acted_at: time at which the lease became preemptible by the rule; null if it did not.
    """

    lease_id: str
    owner: str
    group: str
    name: str
    gpus: float
    since: datetime
    mean_percent: float | None
    rule: str = ""
    acts_at: datetime | None = None
    acted_at: datetime | None = None


class Hit(Struct, frozen=True, kw_only=True):
    """A lease that a rule would have touched.

    Attributes:
        lease_id: id of the lease.
        owner: owner of the lease.
        group: group of the owner at present; empty if it is unknown.
        name: name of the workload.
        gpus: devices, in whole boards.
        warned_at: time of the first warning.
        warnings: how often its holder would have been warned, if nothing else had happened.
        acted_at: time of the action; null if the lease was active again before.
        active_again_at: time at which it was active again after the action: a false alarm. Null if it never was.
        freed_gpu_hours: from the action until it was active again, or ended.
        lost_gpu_hours: from then until it ended: it would have lost that.
    """

    lease_id: str
    owner: str
    group: str
    name: str
    gpus: float
    warned_at: datetime
    warnings: int
    acted_at: datetime | None
    active_again_at: datetime | None
    freed_gpu_hours: float
    lost_gpu_hours: float


class WhatIf(Struct, frozen=True, kw_only=True):
    """Effect that a rule would have had.

    Attributes:
        rule: the rule.
        since: from then on.
        leases: leases that held GPUs since then.
        held_gpu_hours: GPU-hours that they held.
        known_gpu_hours: the part of them with samples, or for `no_process` with lists of processes.
        warned: leases whose holders would have been warned.
        acted: leases on which the rule would have acted.
        false_alarms: those of them that were active again afterwards.
        freed_gpu_hours: sum over the leases.
        lost_gpu_hours: likewise.
        hits: the leases, the most freed GPU-hours first.
        no_process: true for a rule about processes, not about GPU activity.
    """

    rule: str
    since: datetime
    leases: int
    held_gpu_hours: float
    known_gpu_hours: float
    warned: int
    acted: int
    false_alarms: int
    freed_gpu_hours: float
    lost_gpu_hours: float
    hits: list[Hit]
    no_process: bool = False


def idle(
    rule: Annotated[
        str | None,
        typer.Option(
            "--what-if", metavar="RULE", help="Say what a rule would have done: 'below 5% for 30m: end after 10m'."
        ),
    ] = None,
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="With --what-if: from so long ago on (default: 30d).")
    ] = None,
    group: Annotated[
        str | None, typer.Option("--group", metavar="GROUP", help="Only members of this group, and of those within.")
    ] = None,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 120.0,
) -> None:
    """List the leases whose GPUs are idle now: below 5% for 10 minutes, or as the rule of their group says.

    With --what-if, say from the history which leases a rule would have touched, what it would have freed, and how often
    the work was active again afterwards. Groups count as they are at present. Both need a processor; without one, only
    leases that the planner has warned are listed.

    Examples:
      corral idle
      corral idle --group lab
      corral idle --what-if 'below 5% for 30m: end after 10m' --since 30d
      corral idle --what-if 'no activity for 2h: preemptible' --group lab/vision --json
      corral idle --what-if 'no process for 1h: end after 10m'
    """
    if rule is None:
        if since is not None:
            raise CommandError("--since needs --what-if", USAGE)
        _show_now(run(_idle_now(nats, timeout, group)), json)
        return
    parsed, seconds = _parsed(rule), _seconds(since or "30d")
    _show_what_if(run(_what_if(nats, timeout, group, parsed, time.time() - seconds)), json)


def _parsed(text: str) -> IdleRule:
    try:
        rule = parse_rule(text)
    except ValueError as error:
        raise CommandError(f"--what-if: {error}", USAGE) from None
    if rule.action is IdleAction.OFF:
        raise CommandError("--what-if: the rule 'off' does nothing", USAGE)
    return rule


def _seconds(text: str) -> float:
    try:
        return parse_seconds(text)
    except ValueError as error:
        raise CommandError(f"--since: {error}", USAGE) from None


# Now


async def _idle_now(nats: str | None, timeout: float, group: str | None) -> list[Idle]:
    async with connected(nats, timeout=timeout) as client:
        groups = await client.groups()
        rows: list[dict[str, Any]] = []
        try:
            rows = await _rows(client, idle_now(_NOW, time.time() - _BACK_SECONDS), timeout)
        except CorralError as error:
            say(f"corral: warning: the history does not answer, only leases with a warning are listed: {error}")
        leases = {lease.lease_id: lease for lease in await client.leases()}
    group_of = _groups_by_owner(groups)
    found = [_from_history(row, group_of, leases.get(row["lease_id"])) for row in rows if row["lease_id"] in leases]
    named = {one.lease_id for one in found}
    warned = [lease for lease in leases.values() if lease.idle is not None and lease.lease_id not in named]
    found += [_from_lease(lease, group_of) for lease in warned]
    return [one for one in found if _is_within(one.group, group)]


def _from_history(row: dict[str, Any], group_of: Callable[[str], str], lease: Lease | None) -> Idle:
    since = _time(row["since"])
    assert since is not None
    notice = None if lease is None else lease.idle
    return Idle(
        lease_id=row["lease_id"],
        owner=row["owner"],
        group=group_of(row["owner"]),
        name=row["name"] or "",
        gpus=row["gpus"],
        since=since,
        mean_percent=row["mean_percent"],
        rule="" if notice is None else notice.rule,
        acts_at=None if notice is None else notice.acts_at,
        acted_at=None if notice is None else notice.acted_at,
    )


def _from_lease(lease: Lease, group_of: Callable[[str], str]) -> Idle:
    assert lease.idle is not None
    return Idle(
        lease_id=lease.lease_id,
        owner=lease.owner,
        group=group_of(lease.owner),
        name=lease.name,
        gpus=sum(grant.share for grant in lease.grants if grant.device),
        since=lease.idle.since,
        mean_percent=lease.idle.mean_percent,
        rule=lease.idle.rule,
        acts_at=lease.idle.acts_at,
        acted_at=lease.idle.acted_at,
    )


def _show_now(found: list[Idle], json: bool) -> None:
    if json:
        print_json({"idle": found})
        return
    if not found:
        console().print("[dim]no idle leases[/]")
        return
    now = datetime.now(UTC)
    rows = (
        (
            one.owner,
            one.group,
            one.name,
            f"{one.gpus:g}",
            render.duration((now - one.since).total_seconds()),
            render.number(one.mean_percent),
            one.rule or "–",
            one.lease_id,
        )
        for one in found
    )
    console().print(fitted(_IDLE, rows, console().width))


_IDLE: Final = (
    Heading(title="OWNER", text=True),
    Heading(title="GROUP", text=True, spare=1),
    Heading(title="NAME", text=True),
    Heading(title="GPUS", right=True),
    Heading(title="IDLE", right=True),
    Heading(title="ACTIVITY %", right=True, spare=2),
    Heading(title="RULE", text=True, last=1),
    Heading(title="LEASE"),
)


# What if


async def _what_if(nats: str | None, timeout: float, group: str | None, rule: IdleRule, since: float) -> WhatIf:
    async with connected(nats, timeout=timeout) as client:
        try:
            groups = await client.groups()
        except CorralError:
            if group is not None:
                raise
            groups = Groups(groups=[])
        (kept,) = await _rows(client, FIRST_LIST if rule.no_process else FIRST_MINUTE, timeout)
        if kept["first"] is None and rule.no_process:
            raise CommandError(_NO_LISTS, NOT_YOURS)
        if kept["first"] is not None and kept["first"] > since:
            since = kept["first"]
        rows = await _rows(client, what_if(rule, since), timeout)
        held = await _rows(client, held_and_listed(since) if rule.no_process else held_and_known(since), timeout)
    group_of = _groups_by_owner(groups)
    hits = [hit for hit in (_hit(row, group_of) for row in rows) if _is_within(hit.group, group)]
    held = [row for row in held if _is_within(group_of(row["owner"]), group)]
    acted = [hit for hit in hits if hit.acted_at is not None]
    return WhatIf(
        rule=format_rule(rule),
        since=datetime.fromtimestamp(since, UTC),
        leases=sum(row["leases"] for row in held),
        held_gpu_hours=sum(row["held_gpu_hours"] for row in held),
        known_gpu_hours=sum(row["known_gpu_hours"] for row in held),
        warned=len(hits),
        acted=len(acted),
        false_alarms=sum(hit.active_again_at is not None for hit in acted),
        freed_gpu_hours=sum(hit.freed_gpu_hours for hit in hits),
        lost_gpu_hours=sum(hit.lost_gpu_hours for hit in hits),
        hits=hits,
        no_process=rule.no_process,
    )


def _hit(row: dict[str, Any], group_of: Callable[[str], str]) -> Hit:
    warned_at = _time(row["warned_at"])
    assert warned_at is not None
    return Hit(
        lease_id=row["lease_id"],
        owner=row["owner"],
        group=group_of(row["owner"]),
        name=row["name"] or "",
        gpus=row["gpus"],
        warned_at=warned_at,
        warnings=row["warnings"],
        acted_at=_time(row["acted_at"]),
        active_again_at=_time(row["active_again_at"]),
        freed_gpu_hours=row["freed_gpu_hours"] or 0.0,
        lost_gpu_hours=row["lost_gpu_hours"] or 0.0,
    )


def _show_what_if(found: WhatIf, json: bool) -> None:
    if json:
        print_json(found)
        return
    known = found.known_gpu_hours / found.held_gpu_hours if found.held_gpu_hours else 0.0
    acts = not found.rule.endswith(IdleAction.WARN.value)
    console().print(
        f"{escape(found.rule)}, since {render.local_time(found.since, '%Y-%m-%d %H:%M %Z')}: "
        f"{found.leases} leases held {found.held_gpu_hours:.1f} GPU-hours",
        highlight=False,
    )
    rows = [
        ("warned", f"{found.warned} leases"),
        ("acted on", f"{found.acted} leases" if acts else "none: the rule only warns"),
        ("freed" if acts else "idle after the warning", f"{found.freed_gpu_hours:.1f} GPU-hours"),
        (
            "false alarms",
            f"{found.false_alarms} leases were active again afterwards, for {found.lost_gpu_hours:.1f} GPU-hours "
            "until they ended",
        ),
        (
            "known",
            f"{known:.1%} of the GPU-hours have {'lists of processes' if found.no_process else 'samples'}"
            + ("; the rest counts as not idle" if known < 1 else ""),
        ),
    ]
    made = render.table("", "")
    made.show_header = False
    for name, value in rows:
        made.add_row(f"[dim]{name}[/]", value)
    console().print(made)
    if found.hits:
        console().print(_by_owner(found.hits))
        console().print(_by_lease(found.hits[:_SHOWN]))
    if len(found.hits) > _SHOWN:
        console().print(f"[dim]and {len(found.hits) - _SHOWN} more: --json has all[/]")


def _by_owner(hits: Sequence[Hit]) -> Table:
    made = render.table("OWNER", "GROUP", "LEASES", "FREED", "FALSE ALARMS", right=("LEASES", "FREED", "FALSE ALARMS"))
    owners: dict[tuple[str, str], list[Hit]] = {}
    for hit in hits:
        owners.setdefault((hit.owner, hit.group), []).append(hit)
    freed = {key: sum(hit.freed_gpu_hours for hit in mine) for key, mine in owners.items()}
    for (owner, group), mine in sorted(owners.items(), key=lambda item: -freed[item[0]])[:_SHOWN]:
        again = sum(hit.active_again_at is not None for hit in mine)
        made.add_row(escape(owner), escape(group), str(len(mine)), f"{freed[owner, group]:.1f} h", str(again))
    return made


def _by_lease(hits: Sequence[Hit]) -> Table:
    made = render.table(
        "LEASE", "OWNER", "NAME", "GPUS", "WARNED", "ACTED", "ACTIVE AGAIN", "FREED", right=("GPUS", "FREED")
    )
    for hit in hits:
        made.add_row(
            escape(hit.lease_id),
            escape(hit.owner),
            escape(hit.name),
            f"{hit.gpus:g}",
            *("–" if at is None else f"{at:%m-%d %H:%M}" for at in (hit.warned_at, hit.acted_at, hit.active_again_at)),
            f"{hit.freed_gpu_hours:.1f} h",
        )
    return made


# Both


async def _rows(client: Client, sql: str, timeout: float) -> list[dict[str, Any]]:
    return (await client.query(sql, limit=100_000, timeout=timeout, format="json")).dicts()


def _groups_by_owner(groups: Groups) -> Callable[[str], str]:
    if not groups.groups:
        return lambda _: ""
    found = {owner: status.group.name for status in groups.groups for owner in status.group.members}
    return lambda owner: found.get(owner, DEFAULT_GROUP)


def _is_within(name: str, group: str | None) -> bool:
    return group is None or name == group or name.startswith(f"{group}/")


def _time(value: Any) -> datetime | None:
    return value if value is None or isinstance(value, datetime) else datetime.fromisoformat(value)
