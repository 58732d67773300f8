"""Commands for the work under a lease: `saved` and `busy`, the answers to the notice of a preemption."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated

import typer
from msgspec import Struct
from rich.markup import escape

from ...client import Client
from ...schemas import requests
from ...schemas.limits import LEASE_VARIABLE
from ...schemas.values import units
from .. import exits, render
from ..options import AsJson, NatsUrl, Owner, Timeout, connected, console, print_json, run
from ..options_struct import takes


class AnswerOptions(Struct, kw_only=True):
    """Options of a command that answers for a lease."""

    lease: Annotated[
        str | None,
        typer.Option("--lease", metavar="ID", help="Id of the lease. Default: that of this process (CORRAL_LEASE)."),
    ] = None
    owner: Owner = None
    json: AsJson = False
    nats: NatsUrl = None
    timeout: Timeout = 10.0


class BusyOptions(AnswerOptions, kw_only=True):
    """Options of `corral busy`."""

    time: Annotated[str, typer.Argument(metavar="TIME", help="Time that the work still needs: 40s.")]


@takes(AnswerOptions)
def saved(options: AnswerOptions) -> None:
    """Say that the work of a lease is saved as of now; in a command of `corral run`, that of its lease.

    While the notice of a preemption is out, the lease ends at once, and the command is stopped. Exit code 5 if the
    lease has ended or isn't yours.

    Examples:
      corral saved
      corral saved --lease 01JD…
    """
    after = answer_for(options, lambda client, one: client.saved(one.lease_id, owner=one.owner))
    if options.json:
        print_json(after)
    elif after.state is requests.LeaseState.ACTIVE:
        console().print(f"[green]Saved[/] {escape(after.lease_id)}: the lease goes on")
    else:
        console().print(f"[green]Saved[/] {escape(after.lease_id)}: the lease has ended ({escape(after.reason)})")


@takes(BusyOptions)
def busy(options: BusyOptions) -> None:
    """Put the end of a preemption off, once, and at most by the grace of the lease again.

    Exit code 5 if no notice is out, the end was put off before, or the lease has ended or isn't yours.

    Examples:
      corral busy 40s
    """
    try:
        seconds = units.parse_seconds(options.time)
    except ValueError as error:
        raise exits.CommandError(str(error), exits.USAGE) from None
    after = answer_for(options, lambda client, one: client.busy(one.lease_id, seconds, owner=one.owner))
    if options.json:
        print_json(after)
    elif after.preemption is not None:
        left = render.duration((after.preemption.ends_at - datetime.now(UTC)).total_seconds())
        console().print(f"[green]Put off[/] the end of {escape(after.lease_id)}: it ends in {left}")


def answer_for(
    options: AnswerOptions, answer: Callable[[Client, requests.Lease], Awaitable[requests.Lease]]
) -> requests.Lease:
    """Answer for a lease, by default that of this process, on behalf of its owner."""
    named = options.lease or os.environ.get(LEASE_VARIABLE)
    if not named:
        raise exits.CommandError(f"{LEASE_VARIABLE} is not set: give the id of the lease with --lease", exits.USAGE)

    async def work() -> requests.Lease:
        async with connected(options.nats, owner=options.owner, timeout=options.timeout) as client:
            found = await client.leases(lease_id=named, states=tuple(requests.LeaseState))
            if not found:
                raise exits.CommandError(f"there is no lease {named!r}: see `corral leases --ended`", exits.NOT_YOURS)
            return await answer(client, found[0])

    return run(work())
