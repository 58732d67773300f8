"""`corral plan`: runs the planner, which answers work requests."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from ...schemas.limits import STALE_AFTER_SECONDS
from ...schemas.values.units import parse_bytes, parse_seconds
from ...schemas.work.runs import REPORT_SECONDS, RUNNER_LOST_SECONDS
from ..options import NatsUrl
from .logs import LogFormat, LogFormatOption, LogLevel, LogLevelOption, Verbose, configure
from .run_service import STOP_WITHIN, StopWithin, run_service, stop_seconds

_LIMITS = "Limits per owner"


def plan(
    nats: NatsUrl = None,
    policy: Annotated[
        str | None,
        typer.Option("--policy", envvar="CORRAL_POLICY", metavar="NAME", help="Default ranking policy."),
    ] = None,
    stale_after: Annotated[
        str,
        typer.Option(
            "--stale-after",
            envvar="CORRAL_STALE_AFTER",
            metavar="TIME",
            help="A device gets no new work after this time without samples.",
        ),
    ] = f"{STALE_AFTER_SECONDS:g}s",
    lost_after: Annotated[
        str,
        typer.Option(
            "--lost-after",
            envvar="CORRAL_LOST_AFTER",
            metavar="TIME",
            help="A host is lost, and its leases end, after this time without samples.",
        ),
    ] = "2m",
    runner_lost_after: Annotated[
        str,
        typer.Option(
            "--runner-lost-after",
            metavar="TIME",
            help="A host gets no new jobs after this time without a report of its runner.",
        ),
    ] = f"{RUNNER_LOST_SECONDS:g}s",
    order: Annotated[
        str,
        typer.Option(
            "--order", metavar="NAME", help="Order of the queue: shortest, fifo, fair, or module:function of your own."
        ),
    ] = "shortest",
    overdue_after: Annotated[
        str,
        typer.Option(
            "--overdue-after",
            metavar="TIME",
            help="A request that has waited for this time goes ahead of all of its priority that have not.",
        ),
    ] = "90d",
    owner_rate: Annotated[
        float,
        typer.Option(
            "--owner-rate",
            metavar="N",
            min=0,
            help="Rate limit: requests per second and owner; 0 for none.",
            rich_help_panel=_LIMITS,
        ),
    ] = 500.0,
    owner_burst: Annotated[
        float,
        typer.Option(
            "--owner-burst", metavar="N", min=1, help="Burst of the rate limit, in requests.", rich_help_panel=_LIMITS
        ),
    ] = 2000.0,
    owner_waiting: Annotated[
        int,
        typer.Option(
            "--owner-waiting", metavar="N", min=1, help="Maximum queued requests per owner.", rich_help_panel=_LIMITS
        ),
    ] = 1000,
    owner_leases: Annotated[
        int,
        typer.Option(
            "--owner-leases", metavar="N", min=1, help="Maximum active leases per owner.", rich_help_panel=_LIMITS
        ),
    ] = 10_000,
    owner_lease_bytes: Annotated[
        str,
        typer.Option(
            "--owner-lease-bytes",
            metavar="SIZE",
            help="Maximum size of an owner's lease records in the planner's bucket.",
            rich_help_panel=_LIMITS,
        ),
    ] = "64MiB",
    most_request: Annotated[
        str, typer.Option("--most-request", metavar="SIZE", help="Maximum size of a request.", rich_help_panel=_LIMITS)
    ] = "1MiB",
    stop_within: StopWithin = STOP_WITHIN,
    log_format: LogFormatOption = LogFormat.AUTO,
    log_level: LogLevelOption = LogLevel.INFO,
    verbose: Verbose = False,
) -> None:
    """Run the planner, which answers work requests from live telemetry and durable leases.

    Several can run for high availability: one is the leader, and another takes over within seconds.

    Examples:
      corral plan
      corral plan --nats nats://bus:4222 --policy pack
      corral plan --stale-after 30s --lost-after 5m
    """
    from ...planner.limits import Limits
    from ...planner.placement.policies import POLICIES
    from ...planner.queue.order import rule_of
    from ...planner.service import Settings
    from ...planner.service import plan as work

    identity = configure("planner", log_format, log_level, verbose=verbose)
    within = stop_seconds(stop_within)
    if policy is not None and policy not in POLICIES:
        raise typer.BadParameter(f"{policy!r} is not known: use one of {', '.join(POLICIES)}", param_hint="--policy")
    try:
        rule_of(order)
        settings = Settings(
            policy=policy,
            order=order,
            overdue_seconds=parse_seconds(overdue_after),
            stale_after_seconds=parse_seconds(stale_after),
            lost_after_seconds=parse_seconds(lost_after),
            runner_lost_seconds=_longer_than_reports(parse_seconds(runner_lost_after)),
            limits=Limits(
                requests_per_second=owner_rate,
                burst=owner_burst,
                waiting=owner_waiting,
                leases=owner_leases,
                lease_bytes=parse_bytes(owner_lease_bytes),
                request_bytes=parse_bytes(most_request),
            ),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    stop = asyncio.Event()
    run_service(work(nats, settings, stop=stop, named=identity.named), within, stop)


def _longer_than_reports(seconds: float) -> float:
    if seconds <= REPORT_SECONDS:
        raise ValueError(f"--runner-lost-after must be more than the {REPORT_SECONDS:g} s between reports of a runner")
    return seconds
