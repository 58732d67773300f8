"""`corral serve`: leases the GPUs of a plan and prints the commands for it, or starts them by jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer
from rich.markup import escape

from ....client import Client, InvalidRequest, Rejected
from ....client.jobs.spec import JobFields
from ....client.server_commands.command import FIRST_PORT, Offer
from ....client.server_commands.jobs import STARTED, ServeJob, serve_jobs
from ....schemas import requests
from ....schemas.models.serving import ServePlan
from ....schemas.values import units
from ....schemas.work.jobs import Job
from ... import exits, render
from ...options import AsJson, NatsUrl, Owner, Timeout, connected, console, print_json, run
from ..jobs.variables import variables
from .fit_report import (
    Choose,
    FitReport,
    Listen,
    Load,
    Measured,
    Port,
    Server,
    Where,
    ask,
    check_server,
    chosen,
    named,
    offers,
    read,
)
from .fit_tables import offer_lines, plan_lines
from .model_options import Asking, with_model_options

_STARTING: Final = "Starting it"


@with_model_options
def serve(
    asked: Asking,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="Plans from `corral fit --json`, instead of a model."),
    ] = None,
    choose: Choose = 1,
    server: Server = None,
    load: Load = None,
    port: Port = FIRST_PORT,
    listen: Listen = "",
    measured: Measured = True,
    ttl: Annotated[
        str | None,
        typer.Option("--ttl", metavar="TIME", help="Time to live of the lease, unless renewed. Default: 1h."),
    ] = None,
    start: Annotated[
        bool,
        typer.Option("--start", help="Start it by jobs, one for each copy of the model.", rich_help_panel=_STARTING),
    ] = False,
    limit: Annotated[
        str | None,
        typer.Option("--max", metavar="TIME", help="End the jobs after this time.", rich_help_panel=_STARTING),
    ] = None,
    retries: Annotated[
        int,
        typer.Option("--retries", metavar="N", min=0, help="Restarts if a server ends.", rich_help_panel=_STARTING),
    ] = 0,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            "-e",
            metavar="K=V|NAME",
            help="Variable for the servers; NAME takes its value here. Repeatable.",
            rich_help_panel=_STARTING,
        ),
    ] = None,
    cd: Annotated[
        str | None,
        typer.Option("--cd", "-C", metavar="FOLDER", help="Working directory.", rich_help_panel=_STARTING),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option("--image", metavar="IMAGE", help="Container image to run in.", rich_help_panel=_STARTING),
    ] = None,
    owner: Owner = None,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 30.0,
) -> None:
    """Lease the GPUs of a plan, and print the commands that start the server (exit code 4 if they can't be had).

    The plan is one that `corral fit --json` printed, or is made now for the model that the options describe. The lease
    ends after --ttl unless it is renewed.

    With --start, jobs lease the GPUs and execute the commands on their hosts, until `corral cancel`. On all hosts of a
    copy of the model they start together, and end together.

    Examples:
      corral fit ./Llama-3.1-8B --json > plans.json && corral serve --plan plans.json
      corral serve ./Llama-3.1-8B --server vllm --ttl 8h
      corral serve /models/Llama-3.1-8B --server vllm --start --listen 0.0.0.0 --env PATH
    """
    check_server(server)
    _check_options(start, ttl, {"--max": limit, "--retries": retries, "--env": env, "--cd": cd, "--image": image})
    if plan is not None and asked.names_model:
        raise exits.CommandError("--plan has its model: leave out the other one", exits.USAGE)
    where = Where(load, port, listen)
    report = ask(asked(), choose, server, where, nats, timeout, measured=measured) if plan is None else read(plan)
    if not report.fit.plans:
        raise exits.CommandError(report.fit.message, exits.REJECTED)
    one = chosen(report.fit, choose)
    if not start:
        seconds = _seconds(ttl)
        _check_offered(offers(report, one, server, where))
        _lease(report, one, server, where, seconds, owner, json, nats, timeout)
        return
    jobs = _jobs(report, one, server, where)
    fields: JobFields = {"retries": retries, "env": variables(env or [])}
    if limit is not None:
        fields["max"] = limit
    if cd is not None:
        fields["directory"] = cd
    if image is not None:
        fields["image"] = image
    _start(one, jobs, fields, owner, json, nats, timeout)


def _check_options(start: bool, ttl: str | None, given: dict[str, object]) -> None:
    if start and ttl is not None:
        raise exits.CommandError("--ttl is for leases: jobs keep their GPUs until they end (--max)", exits.USAGE)
    for option, value in given.items():
        if value and not start:
            raise exits.CommandError(f"{option} goes with --start: without it, commands are printed", exits.USAGE)


def _seconds(ttl: str | None) -> float:
    try:
        return units.parse_seconds("1h" if ttl is None else ttl)
    except ValueError as error:
        raise exits.CommandError(f"--ttl: {error}", exits.USAGE) from None


def _check_offered(made: list[Offer]) -> None:
    """Refuse to lease GPUs for a plan that no server can express, before anything is leased."""
    if all(one.refusal for one in made):
        refused = "; ".join(f"{one.server}: {one.refusal}" for one in made)
        raise exits.CommandError(f"no command for this plan: {refused} (--choose takes another plan)", exits.USAGE)


def _lease(
    report: FitReport,
    plan: ServePlan,
    server: str | None,
    where: Where,
    ttl_seconds: float,
    owner: str | None,
    json: bool,
    nats: str | None,
    timeout: float,
) -> None:
    """Lease the GPUs, and print the commands."""

    async def work() -> requests.Lease:
        async with connected(nats, owner=owner, timeout=timeout) as client:
            uuids = [device.device for device in plan.devices]
            name = report.work.model.name or "serve"
            return (await client.request(devices=uuids, ttl=ttl_seconds, name=name)).lease

    try:
        lease = run(work())
    except Rejected as rejected:
        _print_rejected(rejected, json)
        raise typer.Exit(exits.REJECTED) from None
    made = offers(report, plan, server, where, lease.addresses)
    if json:
        print_json({"lease": lease, "plan": plan, "offers": made})
        return
    out = console()
    out.print(
        f"[bold green]Granted[/] lease [bold]{escape(lease.lease_id)}[/] to {escape(lease.owner)}, "
        f"ends in {render.left(lease)} unless it is renewed"
    )
    for line in plan_lines(plan):
        out.print(line)
    for line in offer_lines(made):
        out.print(line, soft_wrap=True)


def _print_rejected(rejected: Rejected, json: bool) -> None:
    if json:
        print_json(rejected.rejection)
    else:
        console().print(f"[red]Rejected[/]: {escape(str(rejected))}")
        console().print("  [dim]corral fit makes a plan for the GPUs that are free now[/]")


def _jobs(report: FitReport, plan: ServePlan, server: str | None, where: Where) -> list[ServeJob]:
    """Jobs of the server that is named, or of the first that expresses the plan.

    Raises:
        CommandError: none does, or the model has no name that a server could load.
    """
    path = named(report, where)
    if not path:
        raise exits.CommandError(
            "the model was described by numbers: say what the server loads, with --load PATH", exits.USAGE
        )
    refused: list[str] = []
    for name in [server] if server is not None else STARTED:
        try:
            return serve_jobs(name, plan, report.work, path, port=where.port, listen=where.listen)
        except InvalidRequest as error:
            refused.append(str(error))
    raise exits.CommandError(f"{'; '.join(refused)} (--choose takes another plan)", exits.USAGE)


def _start(
    plan: ServePlan,
    jobs: list[ServeJob],
    fields: JobFields,
    owner: str | None,
    json: bool,
    nats: str | None,
    timeout: float,
) -> None:
    """Submit the jobs, all or none, and print them."""

    async def work() -> list[Job]:
        async with connected(nats, owner=owner, timeout=timeout) as client:
            explained = await client.explain(devices=[device.device for device in plan.devices])
            if explained.rejection is not None:
                raise Rejected(explained.rejection)
            return await _submitted(client, jobs, fields)

    try:
        submitted = run(work())
    except Rejected as rejected:
        _print_rejected(rejected, json)
        raise typer.Exit(exits.REJECTED) from None
    if json:
        print_json({"jobs": submitted, "plan": plan})
        return
    out = console()
    for line in plan_lines(plan):
        out.print(line)
    for job, one in zip(submitted, jobs, strict=True):
        place = "" if one.port is None else f", requests at port {one.port} of {escape(one.serving_host)}"
        out.print(
            f"[bold green]Submitted[/] job [bold]{job.job_id}[/] on {escape(', '.join(one.hosts))}{place}"
            f"  [dim]corral logs -f {job.job_id} · corral cancel {job.job_id}[/]"
        )


async def _submitted(client: Client, jobs: list[ServeJob], fields: JobFields) -> list[Job]:
    submitted: list[Job] = []
    try:
        for one in jobs:
            whole: JobFields = {
                **fields,
                "devices": one.devices,
                "host_count": len(one.hosts),
                "name": one.name,
                "labels": one.labels,
            }
            submitted.append(await client.jobs.submit(one.script, **whole))
    except Exception:
        for job in submitted:
            await client.jobs.cancel(job, reason="another copy of the model could not be submitted")
        raise
    return submitted
