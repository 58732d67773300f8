"""Commands for models: whether the free GPUs can serve one (`fit`), and a lease with the commands for it (`serve`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.markup import escape

from ...client import Rejected
from ...client.server_commands import SERVERS, offer
from ...client.server_commands.command import Offer
from ...schemas import requests, units
from ...schemas.models.serving import FitVerdict, ServeFit, ServePlan, ServeWork
from .. import exits, render
from ..options import AsJson, NatsUrl, Owner, Timeout, connected, console, print_json, run
from .fit_tables import fit_lines, offer_lines, plan_lines
from .model_options import Asked, with_model_options

Server = Annotated[
    str | None,
    typer.Option("--server", help="Commands for one server: vllm, llama.cpp, exo or accelerate. Default: all."),
]
Choose = Annotated[int, typer.Option("--choose", min=1, metavar="N", help="Number of the plan.")]


class FitReport(msgspec.Struct, kw_only=True):
    """Report that `corral fit --json` prints, and `corral serve --plan` reads.

    Attributes:
        model: path or name of the model; empty if it was described by numbers.
        work: what was asked.
        fit: the answer.
        offers: commands of servers for the chosen plan; empty if it does not fit.
    """

    model: str = ""
    work: ServeWork
    fit: ServeFit
    offers: list[Offer] = []


@with_model_options
def fit(
    asked: Callable[[], Asked],
    choose: Choose = 1,
    server: Server = None,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 30.0,
) -> None:
    """Find out whether the free GPUs can serve a model, how to split it, and how fast (exit code 4 if they can't).

    Reads a Hugging Face config.json, headers of safetensors or GGUF files, or --params and --layers. Nothing is leased.
    Tokens per second are upper bounds: from data sheets, or from rates that --profile has.

    Examples:
      corral fit ./Llama-3.1-70B-Instruct --context 8192 --sequences 16
      corral fit model-Q4_K_M.gguf --server llama.cpp
      corral fit --params 70B --layers 80 --kv-heads 8 --heads 64 --dtype fp8
      corral fit ./config.json --with-more '4xNVIDIA H100 80GB HBM3'
    """
    _check_server(server)
    question = asked()
    report = _report(question, choose, server, nats, timeout)
    if json:
        print_json(report)
    else:
        out = console()
        for line in fit_lines(report.work, report.fit):
            out.print(line)
        if report.fit.plans:
            out.print(f"[bold]Plan {choose}[/]")
            for line in plan_lines(_chosen(report.fit, choose)):
                out.print(line)
            for line in offer_lines(report.offers):
                out.print(line, soft_wrap=True)
    if report.fit.verdict is FitVerdict.NO:
        raise typer.Exit(exits.REJECTED)


@with_model_options
def serve(
    asked: Callable[[], Asked],
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="Plans from `corral fit --json`, instead of a model."),
    ] = None,
    choose: Choose = 1,
    server: Server = None,
    ttl: Annotated[
        str, typer.Option("--ttl", metavar="TIME", help="Time to live of the lease, unless renewed.")
    ] = "1h",
    owner: Owner = None,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 30.0,
) -> None:
    """Lease the GPUs of a plan, and print the commands that start the server (exit code 4 if they can't be had).

    The plan is one that `corral fit --json` printed, or is made now for the model that the options describe. The lease
    ends after --ttl unless it is renewed.

    Examples:
      corral fit ./Llama-3.1-8B --json > plans.json && corral serve --plan plans.json
      corral serve ./Llama-3.1-8B --server vllm --ttl 8h
    """
    _check_server(server)
    if plan is not None:
        report = _read(plan)
        if report.fit.plans:
            report.offers = _offers(report, _chosen(report.fit, choose), server, report.model)
    else:
        report = _report(asked(), choose, server, nats, timeout)
    if not report.fit.plans:
        raise exits.CommandError(report.fit.message, exits.REJECTED)
    chosen = _chosen(report.fit, choose)

    async def work() -> requests.Lease:
        async with connected(nats, owner=owner, timeout=timeout) as client:
            named = [device.device for device in chosen.devices]
            name = report.work.model.name or "serve"
            return (await client.request(devices=named, ttl=units.parse_seconds(ttl), name=name)).lease

    try:
        lease = run(work())
    except Rejected as rejected:
        if json:
            print_json(rejected.rejection)
        else:
            console().print(f"[red]Rejected[/]: {escape(str(rejected))}")
            console().print("  [dim]corral fit makes a plan for the GPUs that are free now[/]")
        raise typer.Exit(exits.REJECTED) from None
    offers = _offers(report, chosen, server, report.model, lease.addresses)
    if json:
        print_json({"lease": lease, "plan": chosen, "offers": offers})
        return
    out = console()
    out.print(
        f"[bold green]Granted[/] lease [bold]{escape(lease.lease_id)}[/] to {escape(lease.owner)}, "
        f"ends in {render.left(lease)} unless it is renewed"
    )
    for line in plan_lines(chosen):
        out.print(line)
    for line in offer_lines(offers):
        out.print(line, soft_wrap=True)


def _check_server(server: str | None) -> None:
    if server is not None and server not in SERVERS:
        raise exits.CommandError(f"--server {server!r}: there are {', '.join(SERVERS)}", exits.USAGE)


def _report(question: Asked, choose: int, server: str | None, nats: str | None, timeout: float) -> FitReport:
    async def work() -> ServeFit:
        async with connected(nats, timeout=timeout) as client:
            return await client.fit_work(question.work, with_more=question.more, **question.fields)

    report = FitReport(model=question.path, work=question.work, fit=run(work()))
    if report.fit.plans:
        report.offers = _offers(report, _chosen(report.fit, choose), server, question.path)
    return report


def _offers(
    report: FitReport, chosen: ServePlan, server: str | None, path: str, addresses: dict[str, str] | None = None
) -> list[Offer]:
    named = path or report.work.model.name or "MODEL"
    wanted = [server] if server is not None else list(SERVERS)
    return [offer(name, chosen, report.work, named, addresses) for name in wanted]


def _chosen(found: ServeFit, number: int) -> ServePlan:
    if number > len(found.plans):
        raise exits.CommandError(f"--choose {number}: there are {len(found.plans)} plans", exits.USAGE)
    return found.plans[number - 1]


def _read(file: Path) -> FitReport:
    try:
        return msgspec.json.decode(file.read_bytes(), type=FitReport)
    except OSError as error:
        raise exits.CommandError(f"{file} can't be read: {error.strerror or error}", exits.USAGE) from None
    except msgspec.MsgspecError as error:
        raise exits.CommandError(f"{file} holds no plans of `corral fit --json`: {error}", exits.USAGE) from None
