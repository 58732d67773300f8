"""`corral plan-moves`: leases to preempt, or to shrink, so that hosts become free, or a waiting request can start."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Final

import typer
from rich.markup import escape
from rich.table import Table

from ...client import Client, CorralError, Ended
from ...schemas.requests import Lease, LeaseState
from ...schemas.work.moves import Moves
from .. import exits, render
from ..fitting import Heading, fitted
from ..options import AsJson, NatsUrl, Timeout, connected, console, model_globs, print_json, run


def plan_moves(
    free_hosts: Annotated[
        int | None,
        typer.Option(
            "--free-hosts", metavar="N", min=1, help="Hosts that shall be free of leases, with those that are already."
        ),
    ] = None,
    host: Annotated[
        list[str] | None, typer.Option("--host", metavar="GLOB", help="With --free-hosts: hosts. Repeatable.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="With --free-hosts: models of all their GPUs, or parts of their names. Repeatable.",
            callback=model_globs,
        ),
    ] = None,
    request: Annotated[
        str | None,
        typer.Option("--request", metavar="ID", help="Waiting request. Default: the one that is next in the queue."),
    ] = None,
    owner: Annotated[
        str | None, typer.Option("--owner", help="With --request: its owner, where several use the id.")
    ] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Preempt the leases, or ask for their devices, each with its notice.")
    ] = False,
    reason: Annotated[
        str | None, typer.Option("--reason", "-r", help="With --apply: reason, which the leases' holders get.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With --apply: don't ask for confirmation.")] = False,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 30.0,
) -> None:
    """Find the fewest leases to preempt so that hosts become free, or a waiting request can start.

    An elastic lease is asked to give GPUs back rather than preempted, if that is enough; it keeps them if its holder
    declines. Of equally few leases it chooses those that lose the least: GPUs times the time since their work was last
    saved, or since their start. Quotas must let the request take what comes free. Nothing is changed without --apply,
    which needs the rights of an operator. Exit code 4 if it isn't possible.

    Examples:
      corral plan-moves
      corral plan-moves --request train-7
      corral plan-moves --free-hosts 2 --model '*H100*' --apply --reason 'a large run'
    """
    if apply and not reason:
        raise exits.CommandError("--apply needs a --reason, which the holders get", exits.USAGE)

    async def work() -> tuple[Moves, list[Lease | CorralError]]:
        async with connected(nats, timeout=timeout) as client:
            found = await client.moves(
                free_hosts=free_hosts, hosts=host or (), models=model or (), request_id=request, owner=owner
            )
            if not json:
                _show(found)
            if not apply or not found.moves:
                return found, []
            if not (yes or json) and sys.stdin.isatty():
                typer.confirm("Carry it out?", abort=True)
            return found, await _preempt(client, found, reason or "")

    found, done = run(work())
    if json:
        print_json(found)
    for answer in done:
        if isinstance(answer, Lease) and not json:
            asked = answer.preemption is None and answer.state is LeaseState.ACTIVE
            done_to = "Asked" if asked else "Preempted"
            rest = " for its GPUs" if asked else ""
            console().print(f"[green]{done_to}[/] {escape(answer.lease_id)} of {escape(answer.owner)}{rest}")
    failed = [answer for answer in done if not isinstance(answer, Lease)]
    if failed:
        raise exits.CommandError("; ".join(map(str, failed)), exits.NOT_YOURS)
    if found.moves and not apply and not json:
        console().print("[dim]Nothing is changed. Add --apply and a --reason to carry it out.[/]")
    if not found.possible:
        raise typer.Exit(exits.REJECTED)


async def _preempt(client: Client, found: Moves, reason: str) -> list[Lease | CorralError]:
    """Preempt each lease, or ask for its devices; one that has ended meanwhile needs neither."""
    done: list[Lease | CorralError] = []
    for move in found.moves:
        try:
            done.append(await client.preempt(move.lease_id, reason=reason, devices=move.gives_back))
        except Ended:
            continue
        except CorralError as error:
            done.append(error)
    return done


def _show(found: Moves) -> None:
    console().print(escape(f"{found.message[:1].upper()}{found.message[1:]}."), highlight=False)
    if found.moves:
        console().print(_table(found))


def _table(found: Moves) -> Table:
    rows: list[Sequence[str]] = []
    for move in found.moves:
        hosts = ", ".join(move.hosts[:3]) + (f" and {len(move.hosts) - 3} more" if len(move.hosts) > 3 else "")
        loses = f"{move.devices:g} × {render.duration(move.price_gpu_seconds / (move.devices or 1))}"
        rows.append(
            (
                move.owner,
                move.name,
                f"{move.devices:g}",
                hosts,
                f"gives back {len(move.gives_back)}" if move.gives_back else "ends",
                "–" if move.gives_back else loses,
                render.duration(move.grace_seconds),
                move.lease_id,
            )
        )
    return fitted(_MOVES, rows, console().width)


_MOVES: Final = (
    Heading(title="OWNER", text=True),
    Heading(title="NAME", text=True),
    Heading(title="GPUS", right=True),
    Heading(title="HOSTS", text=True, last=1),
    Heading(title="MOVE"),
    Heading(title="LOSES", spare=1),
    Heading(title="GRACE", right=True, spare=2),
    Heading(title="LEASE"),
)
