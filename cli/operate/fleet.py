"""Commands that show and operate the fleet: `devices`, `fleet`, `watch`, `drain`, `undrain`, `evict`."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.markup import escape

from ...client import Client
from ...client.fleet_view import STATE_WORDS, gpus_free, holder, state_counts
from ...schemas import operations, requests
from ...schemas.values.units import format_bytes
from .. import exits, render
from ..fitting import facts
from ..options import AsJson, Hosts, Models, NatsUrl, Timeout, connected, console, print_json, run, say
from ..work.host_messages import models_of_fleet
from ..work.request_options import pairs
from .reserve import From, ZoneName, maintain

Devices = Annotated[
    list[str] | None, typer.Option("--device", metavar="UUID", help="Devices (UUIDs) that match. Repeatable.")
]


def devices(
    host: Hosts = None,
    model: Models = None,
    device: Devices = None,
    free: Annotated[bool, typer.Option("--free", help="Only devices that can take work now.")] = False,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """List devices with their load, free memory, state and leases.

    Examples:
      corral devices
      corral devices --model '*A100*' --free
      corral devices --json | jq '.devices[] | select(.usable) | .uuid'
    """

    async def work() -> tuple[list[operations.DeviceStatus], dict[str, str]]:
        async with connected(nats, timeout=timeout) as client:
            found = await client.devices(hosts=host or (), models=model or (), devices=device or ())
            if model and not found and not (await client.fleet(models=model)).devices:
                say(f"corral: {await models_of_fleet(client)}")
            held = not json and any(one.leases for one in found)
            return found, {one.lease_id: holder(one) for one in (await client.leases() if held else ())}

    found, holders = run(work())
    if free:
        found = [one for one in found if one.usable and one.share_free > 0 and not one.in_use]
    if json:
        print_json(operations.Devices(devices=found))
    elif found:
        console().print(render.devices_table(found, holders, console().width))
    else:
        console().print(f"[dim]no devices{' match' if host or model or device or free else ''}[/]")


def fleet(
    host: Hosts = None,
    model: Models = None,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Show totals of the fleet, or of the devices that match.

    Examples:
      corral fleet
      corral fleet --model H100 --json
    """

    async def work() -> tuple[operations.FleetSummary, list[operations.DeviceStatus]]:
        async with connected(nats, timeout=timeout) as client:
            only = {"hosts": host or (), "models": model or ()}
            return await client.fleet(**only), [] if json else await client.devices(**only)

    summary, found = run(work())
    if json:
        print_json(summary)
        return
    rows = {
        "hosts": str(summary.hosts),
        "GPUs": f"{summary.devices}: {_states(found)}" if found else str(summary.devices),
        **_jobs_row(summary),
        "leases": f"{summary.active_leases} active, {summary.waiting_requests} waiting",
        "memory": f"{format_bytes(summary.memory_used_bytes)} used of {format_bytes(summary.memory_total_bytes)}, "
        f"{format_bytes(summary.memory_free_bytes)} available",
        "free": f"{gpus_free(summary, found):g} GPUs, parts of shared ones included",
        "utilization": render.number(summary.utilization_percent_mean, " %", 1),
        "temperature": render.number(summary.temperature_celsius_mean, " °C", 1),
        "power": render.number(summary.power_watts_total, " W"),
        "models": ", ".join(f"{count} × {name}" for name, count in sorted(summary.models.items())),
    }
    console().print(facts(rows))


def _jobs_row(summary: operations.FleetSummary) -> dict[str, str]:
    """Row with the number of hosts that start jobs, and reasons of unready runners; none from an older planner."""
    if summary.runner_hosts is None:
        return {}
    unready = [f"{host}: {why}" for host, why in summary.unready_runners.items()]
    return {"jobs": "; ".join([f"on {summary.runner_hosts} of {summary.hosts} hosts", *unready])}


def _states(devices: Iterable[operations.DeviceStatus]) -> str:
    """Number of devices in each state, the most available first."""
    counts = state_counts(devices)
    return ", ".join(f"{counts[state]} {words}" for state, words in STATE_WORDS.items() if counts[state])


def watch(
    host: Hosts = None,
    device: Devices = None,
    count: Annotated[int, typer.Option("--count", "-n", help="Stop after this many samples; 0 never stops.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="No effect: the output is always JSON.")] = False,
    nats: NatsUrl = None,
) -> None:
    """Stream samples as they arrive, as JSON lines.

    Examples:
      corral watch --count 10
      corral watch --host node-7 | jq -c '{device, power_watts}'
    """
    import msgspec

    async def work() -> None:
        left = count
        async with connected(nats) as client:
            async for sample in client.watch(hosts=host or (), devices=device or ()):
                typer.echo(msgspec.json.encode(sample))
                left -= 1
                if left == 0:
                    return

    run(work())


DrainHosts = Annotated[
    list[str] | None, typer.Option("--host", metavar="NAME", help="All devices of a host. Repeatable.")
]
HostArguments = Annotated[
    list[str] | None, typer.Argument(metavar="[HOST]...", help="Hosts, as with --host.", show_default=False)
]
DrainDevices = Annotated[
    list[str] | None, typer.Option("--device", metavar="UUID", help="UUID of a device. Repeatable.")
]
DrainLabels = Annotated[
    list[str] | None,
    typer.Option("--host-label", metavar="K=V", help="All hosts with this label, also those that join later."),
]


def drain(
    name: HostArguments = None,
    reason: Annotated[str, typer.Option("--reason", "-r", help="Reason, which users see.")] = "",
    host: DrainHosts = None,
    device: DrainDevices = None,
    host_label: DrainLabels = None,
    begin: From = None,
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="End, for maintenance.")] = None,
    zone: ZoneName = None,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Keep new work off devices or hosts, until `corral undrain`; existing leases continue.

    Without options, list the drains. With --until, and --from, it is maintenance for that time: until the begin only
    leases that end in time are placed there (--max), and it ends by itself. Leases that may run into it are listed.
    `corral reserve` lists and cancels it.

    Examples:
      corral drain
      corral drain --host node-7 --reason 'new driver'
      corral drain --device GPU-8a3c… --reason 'ECC errors'
      corral drain --host-label rack=r1 --reason 'power work'
      corral drain node-7 --from 'sat 06:00' --until 'sat 12:00' --reason 'new fans'
    """
    host = [*(name or []), *(host or [])]
    planned = begin is not None or until is not None
    listing = not (reason or host or device or host_label or planned)
    if not listing:
        _need(host, device, host_label)
        if not reason:
            raise exits.CommandError("give a reason: --reason", exits.USAGE)
    if planned:
        maintain(
            host,
            device or (),
            pairs(host_label or [], "--host-label"),
            begin=begin,
            until=until,
            reason=reason,
            zone=zone,
            json=json,
            nats=nats,
            timeout=timeout,
        )
        return

    async def work() -> dict[str, str]:
        async with connected(nats, timeout=timeout) as client:
            if listing:
                return await client.undrain()
            return await client.drain(
                reason=reason,
                hosts=host,
                devices=device or (),
                host_labels=pairs(host_label or [], "--host-label"),
            )

    _print_drains(run(work()), json)


def undrain(
    name: HostArguments = None,
    host: DrainHosts = None,
    device: DrainDevices = None,
    host_label: DrainLabels = None,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Allow new work on drained devices or hosts again.

    Examples:
      corral undrain node-7
      corral undrain --device GPU-8a3c…
    """
    host = [*(name or []), *(host or [])]
    _need(host, device, host_label)

    async def work() -> dict[str, str]:
        async with connected(nats, timeout=timeout) as client:
            labels = pairs(host_label or [], "--host-label")
            before = await client.undrain()
            left = await client.undrain(hosts=host, devices=device or (), host_labels=labels)
            asked = {
                *(f"host:{one}" for one in host),
                *(f"device:{one}" for one in device or ()),
                *(f"label:{key}={value}" for key, value in labels.items()),
            }
            for one in sorted(asked - before.keys()):
                say(f"corral: {one.partition(':')[2]} is not drained")
            return left

    _print_drains(run(work()), json)


def _need(*what: list[str] | None) -> None:
    if not any(what):
        raise exits.CommandError("name what to drain: --host, --device or --host-label", exits.USAGE)


def _print_drains(drains: dict[str, str], json: bool) -> None:
    if json:
        print_json(operations.Drains(drains=drains))
    elif drains:
        made = render.table("DRAINED", "REASON")
        for what, why in drains.items():
            made.add_row(escape(what), escape(why))
        console().print(made)
    else:
        console().print("[dim]no drains[/]")


def evict(
    lease_id: Annotated[str, typer.Argument(metavar="LEASE", help="Id of the lease.")],
    reason: Annotated[str, typer.Option("--reason", "-r", help="Reason, which the lease's holder gets.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask for confirmation.")] = False,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Evict a lease: end it against its owner's will. The holder's work is stopped.

    Examples:
      corral evict 01JD… --reason 'node-7 goes down at noon'
    """

    async def work() -> requests.Lease:
        async with connected(nats, timeout=timeout) as client:
            await _confirm(client, lease_id, yes or json)
            return await client.evict(lease_id, reason=reason)

    lease = run(work())
    if json:
        print_json(lease)
    else:
        console().print(f"[green]Evicted[/] {escape(lease.lease_id)} of {escape(lease.owner)}")


def preempt(
    lease_id: Annotated[str, typer.Argument(metavar="LEASE", help="Id of the lease.")],
    reason: Annotated[str, typer.Option("--reason", "-r", help="Reason, which the lease's holder gets.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask for confirmation.")] = False,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Preempt a preemptible lease: its holder gets a notice, saves its work, and the lease ends after its grace.

    Exit code 5 if the lease isn't preemptible or hasn't lasted for its --min-run yet: 'corral evict' ends it at once.

    Examples:
      corral preempt 01JD… --reason 'a course needs the GPUs at noon'
    """

    async def work() -> requests.Lease:
        async with connected(nats, timeout=timeout) as client:
            await _confirm(client, lease_id, yes or json, "Preempt it?")
            return await client.preempt(lease_id, reason=reason)

    lease = run(work())
    if json:
        print_json(lease)
    elif lease.preemption is not None and lease.state is requests.LeaseState.ACTIVE:
        left = render.duration((lease.preemption.ends_at - datetime.now(UTC)).total_seconds())
        console().print(f"[green]Preempted[/] {escape(lease.lease_id)} of {escape(lease.owner)}: it ends in {left}")
    else:
        console().print(f"[green]Preempted[/] {escape(lease.lease_id)} of {escape(lease.owner)}")


async def _confirm(client: Client, lease_id: str, sure: bool, question: str = "Evict it?") -> None:
    import sys

    if sure or not sys.stdin.isatty():
        return
    found = await client.leases(lease_id=lease_id)
    if found:
        console().print(render.leases_table(found, console().width))
    typer.confirm(question, abort=True)
