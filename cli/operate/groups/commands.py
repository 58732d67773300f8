"""`corral group`: groups that share the fleet, with their guarantees, limits, weights and members."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer
from msgspec.structs import replace
from rich.markup import escape
from rich.table import Table

from ....client import Client, Conflict
from ....schemas.values.units import exact_seconds, format_bytes
from ....schemas.work.groups import Group, Groups, GroupStatus, GroupTree, Resources
from ....schemas.work.idle import IdleRule, format_rule, parse_rule
from ...exits import NOT_YOURS, USAGE, CommandError
from ...fitting import Heading, facts, fitted
from ...options import AsJson, NatsUrl, Timeout, connected, console, print_json, run, say
from .diff import ADDED, REMOVED, Difference, differences
from .file import GroupTextError, checked_weight, format_amounts, format_file, parse_amounts, parse_file, tree_of
from .members import AuthFolder, from_auth

T = TypeVar("T")

group = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", add_completion=False)

_ATTEMPTS: Final = 5
"""Times that a change of one group is decided anew if others change the tree meanwhile."""
_STYLES: Final = {ADDED: "green", REMOVED: "red"}

Name = Annotated[str, typer.Argument(metavar="GROUP", help="Name, with those of the groups around it: lab/vision.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask for confirmation.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")]
Amounts = Annotated[
    str | None,
    typer.Option(
        metavar="AMOUNTS",
        help="GPUs by model pattern, cores and RAM: 'H100=16,*=8,cpus=64,host_memory=512GiB'; '' for none.",
    ),
]


@group.callback()
def groups() -> None:
    """Manage the groups that share the fleet: guarantees, limits, weights, members, rules for idle GPUs.

    Everybody sees the groups; operators change them (docs/groups.md).

    Examples:
      corral group list
      corral group show lab/vision
      corral group set lab/vision --guarantee 'H100=16,*=8' --members ann,ben
      corral group apply groups.toml
    """


# Seeing


@group.command("list")
def list_groups(json: AsJson = False, nats: NatsUrl = None, timeout: Timeout = 10.0) -> None:
    """List the groups: guarantee, use, loans, usage against the fair part, queue.

    Examples:
      corral group list
      corral group list --json | jq '.groups[] | select(.gpus_owed > 0)'
    """
    found = _ask(nats, timeout, lambda client: client.groups())
    if json:
        print_json(found)
    else:
        console().print(_table(found.groups))


@group.command()
def show(
    name: Annotated[str | None, typer.Argument(metavar="GROUP", help="Name of the group. Default: all groups.")] = None,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Show a group with its quotas, members and state, and list the groups within it.

    Examples:
      corral group show
      corral group show lab/vision
    """
    found = _ask(nats, timeout, lambda client: client.groups(name=name))
    if json:
        print_json(found)
        return
    if name is None:
        console().print(_table(found.groups))
        console().print(f"[dim]usage halves in[/] {exact_seconds(found.half_life_seconds)}")
        return
    status, *within = found.groups
    console().print(_details(status))
    if within:
        console().print(_table(within))


_GROUPS: Final = (
    Heading(title="GROUP", text=True),
    Heading(title="WEIGHT", right=True, spare=5),
    Heading(title="GUARANTEED", right=True),
    Heading(title="USED", right=True),
    Heading(title="BORROWED", right=True, spare=3),
    Heading(title="OWED", right=True, spare=2),
    Heading(title="USAGE", right=True),
    Heading(title="FAIR", right=True),
    Heading(title="WAITING", right=True, spare=1),
    Heading(title="NEXT", text=True, spare=4),
)


def _table(found: Sequence[GroupStatus]) -> Table:
    rows = [
        (
            status.group.name,
            f"{status.group.weight:g}",
            *(
                _devices(amount)
                for amount in (
                    status.gpus_guaranteed,
                    sum(status.gpus_used.values()),
                    status.gpus_borrowed,
                    status.gpus_owed,
                )
            ),
            f"{status.usage:.1%}",
            f"{status.fair_usage:.1%}",
            str(status.waiting_requests),
            status.next_owner or "–",
        )
        for status in found
    ]
    return fitted(_GROUPS, rows, console().width)


def _details(status: GroupStatus) -> Table:
    config = status.group
    used = ", ".join(f"{_devices(amount)} × {model}" for model, amount in status.gpus_used.items())
    rows = {
        "group": config.name,
        "weight": f"{config.weight:g}",
        "guarantee": format_amounts(config.guarantee) or "–",
        "limit": format_amounts(config.limit) or "–",
        "borrowing limit": format_amounts(config.borrowing_limit) or "–",
        "members": ", ".join(config.members) or "–",
        "idle GPUs": "–" if config.idle is None else format_rule(config.idle),
        "uses": f"{used or 'no GPUs'}, {status.cpus_used:g} cores, {format_bytes(status.host_memory_used_bytes)} RAM",
        "GPUs": f"{_devices(status.gpus_guaranteed)} guaranteed, {_devices(status.gpus_borrowed)} borrowed, "
        f"{_devices(status.gpus_owed)} owed, {_devices(status.preemptible_gpus)} preemptible",
        "recent usage": f"{status.usage:.1%} of all, {status.fair_usage:.1%} would be fair",
        "waiting": f"{status.waiting_requests} requests for {_devices(status.waiting_gpus)} GPUs",
        "next in line": f"{status.next_request_id} of {status.next_owner}" if status.next_owner else "–",
    }
    return facts(rows)


def _devices(amount: float) -> str:
    return f"{round(amount, 3):g}"


# Changing


@group.command("set")
def set_group(
    name: Name,
    guarantee: Amounts = None,
    limit: Amounts = None,
    borrowing_limit: Amounts = None,
    weight: Annotated[
        float | None,
        typer.Option("--weight", metavar="NUMBER", help="Its part of what is shared."),
    ] = None,
    members: Annotated[
        str | None, typer.Option("--members", metavar="OWNERS", help="All members: ann,ben; '' for none.")
    ] = None,
    add_member: Annotated[
        list[str] | None, typer.Option("--add-member", metavar="OWNER", help="Add a member. Repeatable.")
    ] = None,
    remove_member: Annotated[
        list[str] | None, typer.Option("--remove-member", metavar="OWNER", help="Remove a member. Repeatable.")
    ] = None,
    idle: Annotated[
        str | None,
        typer.Option(
            "--idle",
            metavar="RULE",
            help="What happens to leases on idle GPUs: 'below 5% for 30m: end after 10m', 'no activity for 1h: warn', "
            "'no process for 2h: preemptible'; 'off' exempts from the rule of a group around it; '' for no rule.",
        ),
    ] = None,
    dry_run: DryRun = False,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Create a group, or change what is given of it. What runs goes on; quotas count from the next decision on.

    Examples:
      corral group set lab/vision --guarantee 'H100=16,*=8' --limit 'H100=32' --members ann,ben
      corral group set lab/vision --weight 2 --add-member cat --remove-member ben
      corral group set lab --guarantee 'H100=32,cpus=512,host_memory=4TiB'
      corral group set lab --idle 'below 5% for 30m: end after 10m'
    """
    amounts = {
        field: _amounts(text, f"--{field.replace('_', '-')}")
        for field, text in (("guarantee", guarantee), ("limit", limit), ("borrowing_limit", borrowing_limit))
        if text is not None
    }
    rule = _rule(idle)
    if weight is not None:
        _valid("--weight", lambda: checked_weight(weight))

    def edited(before: Group) -> Group:
        owners = before.members if members is None else [part.strip() for part in members.split(",") if part.strip()]
        for owner in remove_member or []:
            if owner not in owners:
                raise CommandError(f"{owner} is no member of {name}", NOT_YOURS)
        kept = [owner for owner in owners if owner not in (remove_member or [])]
        kept += [owner for owner in add_member or [] if owner not in kept]
        return replace(
            before,
            **amounts,
            weight=before.weight if weight is None else weight,
            members=kept,
            idle=before.idle if idle is None else rule,
        )

    async def work() -> tuple[GroupTree, Groups]:
        async with connected(nats, timeout=timeout) as client:
            for attempt in range(_ATTEMPTS):
                before = await client.groups()
                old = next((one.group for one in before.groups if one.group.name == name), Group(name=name))
                try:
                    after = await client.set_groups(edited(old), revision=before.revision, dry_run=dry_run)
                    return tree_of(before), after
                except Conflict:
                    if attempt == _ATTEMPTS - 1:
                        raise
        raise AssertionError("unreachable")

    before, after = run(work())
    found = differences(before, tree_of(after))
    _preview(found, after, json)
    _report(found, after, json, dry_run)


@group.command()
def delete(
    name: Name,
    yes: Yes = False,
    dry_run: DryRun = False,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Delete a group, with those within it. Its members share the group `default` from then on.

    Examples:
      corral group delete lab/vision
    """

    async def work() -> tuple[list[Difference], Groups]:
        async with connected(nats, timeout=timeout) as client:
            await client.groups(name=name)  # one that is not there is an error
            before = await client.groups()
            planned = await client.set_groups(delete=[name], revision=before.revision, dry_run=True)
            found = differences(tree_of(before), tree_of(planned))
            _preview(found, planned, json)
            if dry_run:
                return found, planned
            _confirm(f"Delete {name}?", yes or json)
            return found, await client.set_groups(delete=[name], revision=before.revision)

    found, after = run(work())
    _report(found, after, json, dry_run)


@group.command("apply")
def apply_file(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="TOML file with all groups; - for standard input.")
    ] = None,
    members_from_auth: Annotated[
        bool,
        typer.Option(
            "--members-from-auth",
            help="Also take members from the groups of users in `corral auth`. Without FILE, only that.",
        ),
    ] = False,
    folder: AuthFolder = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Make the groups those of a file: groups and settings that it leaves out are removed. The changes are shown first.

    [groups."lab/vision"]
    guarantee = { H100 = 16, "*" = 8, cpus = 256, host_memory = "2TiB" }
    limit = { H100 = 32 }          # also borrowing_limit
    weight = 2
    members = ["ann", "ben"]
    idle = { below = 5, after = "30m", action = "end", warn = "10m" }

    Examples:
      corral group apply groups.toml --dry-run
      corral group apply groups.toml --yes
      corral group apply --members-from-auth
    """
    if file is None and not members_from_auth:
        raise CommandError("name a FILE, or give --members-from-auth", USAGE)
    declared = None if file is None else _read(file)

    async def work() -> tuple[list[Difference], Groups]:
        async with connected(nats, timeout=timeout) as client:
            before = await client.groups()
            wanted = tree_of(before) if declared is None else declared
            if members_from_auth:
                wanted = from_auth(wanted, folder)
            found = differences(tree_of(before), wanted)
            if not found:
                return found, before
            planned = await client.set_groups(replace=wanted, revision=before.revision, dry_run=True)
            _preview(found, planned, json)
            if dry_run:
                return found, planned
            _confirm("Apply these changes?", yes or json)
            return found, await client.set_groups(replace=wanted, revision=before.revision)

    found, after = run(work())
    _report(found, after, json, dry_run)


@group.command()
def export(nats: NatsUrl = None, timeout: Timeout = 10.0) -> None:
    """Print the groups as the TOML file that `corral group apply` takes.

    Examples:
      corral group export > groups.toml
    """
    found = _ask(nats, timeout, lambda client: client.groups())
    typer.echo(format_file(tree_of(found)), nl=False)


# Both


def _ask(nats: str | None, timeout: float, question: Callable[[Client], Awaitable[Groups]]) -> Groups:
    async def work() -> Groups:
        async with connected(nats, timeout=timeout) as client:
            return await question(client)

    return run(work())


def _amounts(text: str, option: str) -> Resources:
    return _valid(option, lambda: parse_amounts(text))


def _valid(option: str, parse: Callable[[], T]) -> T:
    """The value of an option; an invalid one is an error that names the option."""
    try:
        return parse()
    except GroupTextError as error:
        raise CommandError(f"{option}: {error}", USAGE) from None


def _rule(text: str | None) -> IdleRule | None:
    try:
        return parse_rule(text) if text else None
    except ValueError as error:
        raise CommandError(f"--idle: {error}", USAGE) from None


def _read(file: Path) -> GroupTree:
    try:
        return parse_file(sys.stdin.read() if str(file) == "-" else file.read_text())
    except GroupTextError as error:
        raise CommandError(f"{file}: {error}", USAGE) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{file} can't be read: {error}", USAGE) from None


def _preview(found: Sequence[Difference], planned: Groups, json: bool) -> None:
    """Print what would change, and what the planner warns of."""
    if not json:
        _print_differences(found)
        for warning in planned.warnings:
            say(f"corral: warning: {warning}")


def _confirm(question: str, sure: bool) -> None:
    if not sure and sys.stdin.isatty():
        typer.confirm(question, abort=True)


def _report(found: Sequence[Difference], after: Groups, json: bool, dry_run: bool) -> None:
    """Print the result of a change that was shown before."""
    if json:
        print_json(after)
    elif not found:
        console().print("[dim]no changes[/]")
    elif not dry_run:
        console().print(f"[green]Applied[/]: revision {after.revision}")


def _print_differences(found: Sequence[Difference]) -> None:
    for one in found:
        style = _STYLES.get(one.sign, "yellow")
        console().print(f"[{style}]{one.sign} {escape(one.name)}[/]")
        for line in one.lines:
            console().print(f"    {escape(line)}")
