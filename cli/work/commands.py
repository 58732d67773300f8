"""Commands for requests and leases: `request`, `renew`, `release`, `leases`, `explain`, `queue`, `withdraw`."""

from __future__ import annotations

import shlex
from contextlib import AsyncExitStack
from typing import Annotated

import typer
from rich.markup import escape

from ...client import Client, Ended, InvalidRequest, Rejected, errors
from ...client.leases.environment import restricted_to_host
from ...client.request import RequestFields
from ...schemas import operations, requests
from ...schemas.values import units
from .. import exits, global_options, render
from ..options import AsJson, NatsUrl, Owner, Timeout, connected, console, print_json, run, say
from .host_messages import explain_missing, print_device_hosts
from .jobs.control import Interrupted, Signals
from .models.model_options import addition
from .request_options import with_request_options
from .shell_exports import chosen, exported
from .wait_display import wait_display


@with_request_options
def request(
    context: typer.Context,
    fields: RequestFields,
    export: Annotated[bool, typer.Option("--export", help="Print `export` commands for `eval`.")] = False,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Request GPUs; print the assignment, or the reasons for a rejection (exit code 4).

    The lease ends after --ttl unless it is renewed; `corral run` and the Python client renew it for you. Exit code 5 if
    --request-id stands for another request, or for a lease that has ended.
    --export requests GPUs of this host, unless --host is given ('--host any' for all hosts). Without a grant, its
    output makes `eval` fail and hides all GPUs.

    Examples:
      corral request --gpus 2 --memory 20GiB
      corral request --share 0.25 --memory 8GiB --ttl 1h --name notebook
      corral request --gpus 8 --model H100 --wait 10m
      corral request --gpus 4 --items 1000 --method capacity --json
      eval "$(corral request --gpus 1 --export)"
    """

    export, json = chosen(context, export=export, json=json)
    asked = restricted_to_host(fields) if export else fields

    async def ask(client: Client) -> requests.Assignment:
        with wait_display() as on_wait:
            try:
                return await client.request(on_wait=on_wait, **asked)
            except Rejected:
                await explain_missing(client, asked)
                raise

    async def work() -> requests.Assignment:
        with Signals() as signals:
            async with AsyncExitStack() as stack:
                opening = connected(nats, owner=fields.get("owner"), timeout=timeout)
                client = await signals.unless_interrupted(stack.enter_async_context(opening))
                assignment = await signals.unless_interrupted(ask(client))
                try:
                    signals.check()
                except Interrupted:
                    # It was granted in the same moment.
                    await client.release(assignment.lease.lease_id, owner=assignment.lease.owner)
                    raise
                return assignment

    try:
        assignment = run(work())
    except Interrupted as interrupted:
        raise typer.Exit(interrupted.code) from None
    except Rejected as rejected:
        if json:
            print_json(rejected.rejection)
        else:
            for line in render.rejection_lines(rejected.rejection):
                console(stderr=export).print(line)
        raise typer.Exit(exits.REJECTED) from None
    except Ended as ended:  # an answer to the request, as a rejection is one
        if json or export:
            raise
        console().print(f"[red]Ended[/]: {escape(str(ended))}")
        raise typer.Exit(exits.NOT_YOURS) from None
    for warning in assignment.warnings:
        say(f"corral: {warning}")
    if json:
        print_json(assignment)
    elif export:
        print_device_hosts(assignment.lease)
        typer.echo(exported(assignment.lease), nl=False)
    else:
        print_assignment(assignment.lease, fields.get("owner"))


def print_assignment(lease: requests.Lease, owner: str | None = None) -> None:
    """Print an assignment: the lease, its devices, and commands to renew and release it (with `owner`, if given)."""
    out = console()
    out.print(
        f"[bold green]Granted[/] lease [bold]{escape(lease.lease_id)}[/] to {escape(lease.owner)}, "
        f"ends in {render.left(lease)} unless it is renewed"
    )
    out.print(render.grants_table(lease.grants))
    for item in lease.unassigned[:5]:
        out.print(f"[yellow]item {escape(str(item.id))} is unassigned: {escape(item.reason)}[/]")
    if len(lease.unassigned) > 5:
        out.print(f"[yellow]… and {len(lease.unassigned) - 5} more items unassigned[/]")
    for host, environment in lease.environment.items():
        out.print(
            f"[dim]{escape(host)}: {escape(' '.join(f'{k}={shlex.quote(v)}' for k, v in environment.items()))}[/]"
        )
    rest = lease.lease_id + (f" --owner {shlex.quote(owner)}" if owner else "")
    here = global_options.connection_flags()
    out.print(
        f"[dim]renew: {escape(f'corral{here} renew {rest}')} · release: {escape(f'corral{here} release {rest}')}[/]"
    )


@with_request_options
def explain(
    fields: RequestFields,
    more: Annotated[
        list[str] | None,
        typer.Option("--with-more", metavar="N×MODEL", help="Assume additional devices: 8xH100. Repeatable."),
    ] = None,
    most: Annotated[int, typer.Option("--most", help="Maximum number of devices to show.")] = 20,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Predict the outcome of a request, device by device, without granting it (exit code 4 if it would be rejected).

    Examples:
      corral explain --gpus 2 --memory 60GiB
      corral explain --gpus 16 --model H100 --with-more '8xNVIDIA H100 80GB HBM3'
    """
    additions = [addition(text) for text in more or []]

    async def work() -> operations.Explanation:
        async with connected(nats, owner=fields.get("owner"), timeout=timeout) as client:
            explanation = await client.explain(with_more=additions, **fields)
            if not (explanation.granted or additions):
                await explain_missing(client, fields)
            return explanation

    explanation = run(work())
    if json:
        print_json(explanation)
    else:
        out = console()
        color = "green" if explanation.granted else "red"
        out.print(f"[bold {color}]{'Would be granted' if explanation.granted else 'Would be rejected'}[/]: "
                  f"{escape(render.local_times(explanation.message))}")  # fmt: skip
        if explanation.policy:
            out.print(f"[dim]ranked by {escape(explanation.policy)}[/]")
        if explanation.rejection is not None:
            for line in render.rejection_lines(explanation.rejection)[1:]:
                out.print(line)
        made = render.table("", "HOST", "DEVICE", "SCORE", "WHY", right=("SCORE",))
        for verdict in explanation.verdicts[:most]:
            parts = render.score_parts(verdict.score_parts)
            made.add_row(
                "[green]▶[/]" if verdict.selected else "[dim]·[/]" if verdict.feasible else "[red]✗[/]",
                escape(verdict.host),
                escape(verdict.device),
                render.number(None if verdict.score is None else round(verdict.score, 3) + 0.0, digits=3),
                escape(parts if verdict.feasible else verdict.reason),
            )
        out.print(made)
        if len(explanation.verdicts) > most:
            out.print(f"[dim]… and {len(explanation.verdicts) - most} more devices (--most)[/]")
        for host, why in list(explanation.hosts.items())[:most]:
            out.print(f"[red]✗[/] {escape(host)}: {escape(why)}")
    if not explanation.granted:
        raise typer.Exit(exits.REJECTED)


def renew(
    lease_id: Annotated[str, typer.Argument(metavar="LEASE", help="Id of the lease.")],
    ttl: Annotated[
        str | None, typer.Option("--ttl", metavar="TIME", help="New time to live, from now. Default: the lease's.")
    ] = None,
    owner: Owner = None,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Renew a lease (exit code 5 if it has ended or isn't yours).

    Examples:
      corral renew 01JD…
      corral renew 01JD… --ttl 2h
    """
    try:
        seconds = None if ttl is None else units.parse_seconds(ttl)
    except ValueError as error:
        raise InvalidRequest(str(error), "invalid", "$.ttl_seconds") from None

    async def work() -> requests.Lease:
        async with connected(nats, owner=owner, timeout=timeout) as client:
            return await client.renew(lease_id, ttl=seconds)

    lease = run(work())
    if json:
        print_json(lease)
    else:
        console().print(f"[green]Renewed[/] {escape(lease.lease_id)}: ends in {render.left(lease)}")


def release(
    lease_ids: Annotated[list[str] | None, typer.Argument(metavar="[LEASE]...", help="Ids of leases.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All leases of the owner.")] = False,
    owner: Owner = None,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Release leases (exit code 5 if one has ended or isn't yours; the others are released nevertheless).

    Examples:
      corral release 01JD…
      corral release --all
    """
    if bool(lease_ids) == every:
        raise exits.CommandError("give the ids of leases, or --all", exits.USAGE)

    async def work() -> tuple[list[requests.Lease], list[errors.CorralError]]:
        done: list[requests.Lease] = []
        failed: list[errors.CorralError] = []
        async with connected(nats, owner=owner, timeout=timeout) as client:
            ids = lease_ids or [lease.lease_id for lease in await client.leases(owner=client.owner)]
            for lease_id in ids:
                try:
                    done.append(await client.release(lease_id))
                except errors.ServiceError as error:
                    failed.append(error)
        return done, failed

    done, failed = run(work())
    if json:
        print_json(operations.Leases(leases=done))
    else:
        for lease in done:
            console().print(f"[green]Released[/] {escape(lease.lease_id)}")
        if not done and not failed:
            console().print("[dim]no leases[/]")
    for error in failed[1:]:
        say(f"corral: {error}")
    if failed:
        raise failed[0]


def leases(
    owner: Owner = None,
    mine: Annotated[bool, typer.Option("--mine", help="Only your own leases.")] = False,
    ended: Annotated[bool, typer.Option("--ended", help="Include leases that have ended.")] = False,
    lease_id: Annotated[str | None, typer.Option("--lease", metavar="ID", help="Only this lease.")] = None,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """List leases, oldest first.

    Examples:
      corral leases
      corral leases --mine
      corral leases --owner alice --ended --json
    """

    async def work() -> list[requests.Lease]:
        async with connected(nats, owner=owner, timeout=timeout) as client:
            states = tuple(requests.LeaseState) if ended else (requests.LeaseState.ACTIVE,)
            return await client.leases(owner=client.owner if mine else owner, states=states, lease_id=lease_id)

    found = run(work())
    if json:
        print_json(operations.Leases(leases=found))
    elif found:
        console().print(render.leases_table(found, console().width))
    else:
        console().print("[dim]no leases[/]")


def queue(json: AsJson = False, nats: NatsUrl = None, timeout: Timeout = 10.0) -> None:
    """List queued requests in queue order, with the reason why each waits.

    Examples:
      corral queue
      corral queue --json
    """

    async def work() -> list[operations.QueueEntry]:
        async with connected(nats, timeout=timeout) as client:
            return await client.queue()

    entries = run(work())
    if json:
        print_json(operations.Queue(entries=entries, total=len(entries)))
        return
    if not entries:
        console().print("[dim]the queue is empty[/]")
        return
    console().print(render.queue_table(entries, console().width))


def withdraw(
    request_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[REQUEST]...", help="Ids of requests, or unique prefixes.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All requests of the owner.")] = False,
    anyones: Annotated[bool, typer.Option("--any-owner", help="For operators: whoever owns the requests.")] = False,
    owner: Owner = None,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Withdraw queued requests (exit code 5 if one isn't queued or isn't yours).

    The command that waits for the request ends. If the request was granted in the meantime, its lease stays, and its
    id is printed.

    Examples:
      corral withdraw 5f0c…
      corral withdraw --all
      corral withdraw 5f0c… --any-owner
    """
    if every and anyones:
        raise exits.CommandError("--any-owner needs the ids of requests (see corral queue)", exits.USAGE)
    if bool(request_ids) == every:
        raise exits.CommandError("give the ids of requests (see corral queue), or --all", exits.USAGE)

    async def work() -> list[requests.Rejection | requests.Assignment]:
        async with connected(nats, owner=owner, timeout=timeout) as client:
            entries = await client.queue(owner=client.owner if every else None)
            mine = None if anyones else client.owner
            chosen = entries if every else [_waiting_one(entries, text, mine) for text in request_ids or []]
            return [await client.withdraw(entry.request_id, owner=entry.owner) for entry in chosen]

    done = run(work())
    if json:
        print_json(done)
    elif not done:
        console().print("[dim]none of your requests is queued[/]")
    else:
        for answer in done:
            if isinstance(answer, requests.Assignment):
                lease = answer.lease
                console().print(
                    f"[yellow]Already granted[/]: lease {escape(lease.lease_id)} of request "
                    f"{escape(lease.request_id)} holds its GPUs (corral release {escape(lease.lease_id)})"
                )
            else:
                console().print(f"[green]Withdrawn[/] {escape(answer.request_id)}")
    if any(isinstance(answer, requests.Assignment) for answer in done):
        raise typer.Exit(exits.FAILED)


def _waiting_one(entries: list[operations.QueueEntry], text: str, owner: str | None) -> operations.QueueEntry:
    """Find a request in the queue by its id, or by the beginning of its id; only the owner's unless that is None."""
    all_named = [entry for entry in entries if entry.request_id == text]
    all_named = all_named or [entry for entry in entries if entry.request_id.startswith(text)]
    found = [entry for entry in all_named if owner is None or entry.owner == owner]
    if len(found) == 1:
        return found[0]
    if all_named and not found:
        raise exits.CommandError(
            f"request {all_named[0].request_id} is {all_named[0].owner!r}'s: only its owner may withdraw it, "
            "and an operator with --any-owner",
            exits.NOT_YOURS,
        )
    if found:
        raise exits.CommandError(f"{len(found)} queued requests begin with {text!r}: give more of the id", exits.USAGE)
    raise exits.CommandError(f"no queued request {text!r}: see `corral queue`", exits.NOT_YOURS)
