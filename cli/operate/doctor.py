"""`corral doctor`: diagnoses this host and the fleet, with a fix for each problem."""

from __future__ import annotations

import json as jsonlib
import math
import os
import platform
import shutil
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from typing import Any, Final

import typer
from nats.errors import Error as NatsError
from rich.markup import escape

from ...bus import stream_reader
from ...client import Client, CorralError
from ...client.health import ask_health
from ...client.leases.environment import local_host
from ...schemas import codec, subjects
from ...schemas.telemetry import AgentReport
from ...schemas.values.units import format_bytes
from ..exits import FAILED, CommandError
from ..local.folders import default_data
from ..options import AsJson, NatsUrl, connected, console, print_json, run
from . import doctor_services
from .findings import Finding, note, ok, problem

CLOCK_SECONDS: Final = 1.0
"""Maximum clock offset in seconds; beyond it, samples look old, or as if they came from the future."""
LAG_MESSAGES: Final = 1000
_SHOWN: Final = 5
FULL: Final = 0.9
BUCKET_FULL: Final = 0.8
MIN_FULL_SHARE: Final = 0.02
"""Minimum fill of a stream, as part of its size limit, for an estimate of its rate."""
FREE_BYTES: Final = 2 * 2**30


def doctor(json: AsJson = False, nats: NatsUrl = None) -> None:
    """Diagnose this host and the fleet: versions, driver, bus, streams, clock, disk, services.

    Each finding has a fix. Exit code 1 if there is a problem.

    Examples:
      corral doctor
      corral --context lab doctor --json
    """
    findings: list[Finding] = []

    async def work() -> None:
        async for finding in examine(nats):
            findings.append(finding)
            if not json:
                _print(finding)

    run(work())
    if json:
        print_json({"findings": findings})
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(FAILED)


def _print(finding: Finding) -> None:
    sign = {"ok": "[green]✓[/]", "note": "[yellow]![/]", "problem": "[red]✗[/]"}[finding.level]
    console().print(f"{sign} [bold]{finding.what}[/]: {escape(finding.detail)}")
    if finding.fix:
        console().print(f"    {escape(finding.fix)}", style="yellow" if finding.level == "note" else "red")


async def examine(nats: str | None) -> AsyncIterator[Finding]:
    """Run all checks, from this host outwards. Checks that need the bus are skipped if it can't be reached."""
    yield versions()
    yield configuration()
    yield driver()
    yield disk()
    try:
        async with connected(nats, timeout=3) as client:
            async for finding in _bus(client):
                yield finding
            for look in (_collector, _planner, _runners, confinement, _bucket, _history, _hosts):
                try:
                    yield await look(client)
                except CorralError as error:
                    yield problem(look.__name__.strip("_"), str(error), _FIXES[look.__name__])
            for finding in await doctor_services.optional(client):
                yield finding
            if (login := await doctor_services.login(client.identity)) is not None:
                yield login
    except CorralError as error:
        yield problem("bus", str(error), "start a NATS server with JetStream, or set CORRAL_NATS_URL to yours")


def versions() -> Finding:
    """Report the versions of Corral, Python and the system, and the parts whose dependencies are installed."""
    parts = {
        "collector": ("pynvml", "amdsmi"),
        "processor": ("duckdb",),
        "planner": ("numpy",),
        "server": (),
    }
    able = [name for name, modules in parts.items() if modules and any(find_spec(module) for module in modules)]
    try:
        from ..local.server import server_binary

        server_binary()
        able.append("server")
    except RuntimeError:
        pass
    system = f"Python {platform.python_version()} on {platform.system()} {platform.release()}"
    return ok("versions", f"corral {metadata.version('corral')}, {system}; can run: {', '.join(able) or 'the client'}")


def configuration() -> Finding:
    """Check the configuration files."""
    from ...bus import config_files
    from .. import config
    from .config import check_all

    there = [path for path in config_files.paths() if path.is_file()]
    try:
        check_all(there)
        found = config.read()
    except CommandError as error:
        return problem("configuration", str(error), "correct the file: corral config check validates it")
    except ModuleNotFoundError as error:
        return note(
            "configuration", f"has settings of a service that is not installed ({error.name})", "install the service"
        )
    if found.current and found.current not in found.contexts:
        return problem("configuration", f"no context {found.current!r}", "corral context use another, or add it")
    files = ", ".join(map(str, there)) or "no file"
    return ok("configuration", f"{files}; context {found.current}" if found.current else files)


def driver() -> Finding:
    """Check the GPU driver of this host."""
    try:
        import pynvml
    except ImportError:
        return note("driver", "pynvml is not installed", "pip install 'corral[collector]', if this host has GPUs")
    nvml: Any = pynvml
    try:
        nvml.nvmlInit()
    except Exception as error:  # NVML has a separate class for each error
        return note(
            "driver", f"no NVIDIA driver ({error})", "nothing to do, unless this host has GPUs: check with nvidia-smi"
        )
    try:
        return ok("driver", f"NVIDIA {nvml.nvmlSystemGetDriverVersion()}, {nvml.nvmlDeviceGetCount()} GPUs")
    finally:
        nvml.nvmlShutdown()


def disk() -> Finding:
    """Check the free disk space for the data of `corral up` and a collector's spill file."""
    folder = default_data()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return problem("disk", f"{folder} can't be written", "use another folder with --data, or correct its owner")
    if free < FREE_BYTES:
        return note(
            "disk", f"{format_bytes(free)} free at {folder}", "free disk space: history and streams need some GiB"
        )
    return ok("disk", f"{format_bytes(free)} free at {folder}")


async def _bus(client: Client) -> AsyncIterator[Finding]:
    nc = client.nc
    began = time.perf_counter()
    await nc.flush(3)
    took = (time.perf_counter() - began) * 1000
    url = nc.connected_url.netloc if nc.connected_url else "?"
    version = nc.connected_server_version
    server = f"nats-server {version.major}.{version.minor}.{version.patch}"
    yield ok("bus", f"{url} answers in {took:.1f} ms, {server}")
    if (exposed := _exposed(client)) is not None:
        yield exposed
    for stream in subjects.STREAMS:
        info = await _stream(client, stream.name)
        if info is None:
            yield problem(
                f"stream {stream.name}",
                "is missing",
                "every service creates it when it starts, if JetStream is enabled (-js)",
            )
            continue
        used, most = info["state"]["bytes"], info["config"]["max_bytes"]
        detail = f"{info['state']['messages']:,} messages, {format_bytes(used)} of {format_bytes(most)}"
        if most > 0 and used > FULL * most:
            yield note(
                f"stream {stream.name}",
                detail,
                "it drops its oldest messages: harmless if the processor keeps up (below), else the history has gaps",
            )
        elif stream.name == subjects.FACTS_STREAM and (days := _days_held(info)) < stream.max_age_seconds / 86400:
            yield note(
                f"stream {stream.name}",
                f"{detail}; at the current rate it holds {days:.3g} of {stream.max_age_seconds / 86400:g} days",
                f"enlarge it: `nats stream edit {stream.name} --max-bytes=…`, and renew leases less often",
            )
        else:
            yield ok(f"stream {stream.name}", detail)
        if stream.name == subjects.TELEMETRY_STREAM and "ts" in info:
            yield _clock(info["ts"])


def _days_held(info: dict[str, Any]) -> float:
    """Retention of a stream in days at its current rate of bytes; infinite if unlimited, or with too little data."""
    state, most = info["state"], info["config"]["max_bytes"]
    if most <= 0 or state["bytes"] < MIN_FULL_SHARE * most or "ts" not in info:
        return math.inf
    seconds = (_time(info["ts"]) - _time(state["first_ts"])).total_seconds()
    return most / state["bytes"] * max(seconds, 1.0) / 86400


def _exposed(client: Client) -> Finding | None:
    """Check that a bus beyond this machine requires credentials and TLS; None for a bus on loopback."""
    nc = client.nc
    host = nc.connected_url.hostname if nc.connected_url else None
    if host is None or host == "localhost" or host.startswith("127.") or host == "::1":
        return None
    said: dict[str, Any] = nc._server_info  # pyright: ignore[reportPrivateUsage]  # nats-py has no other way to it
    if not said.get("auth_required"):
        return note(
            "access",
            "no authentication: anyone who reaches the bus may do anything",
            "corral auth init, and docs/security.md",
        )
    if not said.get("tls_required"):
        return note("access", "no TLS: traffic can be read in transit", "corral auth init --tls-host NAME")
    return ok("access", f"with credentials, over TLS; user {client.identity.user or 'unknown'}")


async def _stream(client: Client, name: str) -> dict[str, Any] | None:
    """Stream info as the server sends it, with the server's time; None if there is no such stream."""
    try:
        reply = await client.nc.request(f"$JS.API.STREAM.INFO.{name}", b"", timeout=3)
    except Exception:  # no JetStream, or not allowed
        return None
    info = jsonlib.loads(reply.data)
    return None if "error" in info else info


def _time(text: str) -> datetime:
    # Python reads at most microseconds.
    return datetime.fromisoformat(text.replace("Z", "+00:00")[:26].split("+")[0]).replace(tzinfo=UTC)


def _clock(text: str) -> Finding:
    server = _time(text)
    apart = (datetime.now(UTC) - server).total_seconds()
    if abs(apart) > CLOCK_SECONDS:
        return problem(
            "clock",
            f"this host is {abs(apart):.1f} s {'ahead of' if apart > 0 else 'behind'} the bus",
            "run a time service (chrony, systemd-timesyncd) on both",
        )
    return ok("clock", f"within {abs(apart) * 1000:.0f} ms of the bus")


async def _collector(client: Client) -> Finding:
    host = local_host()
    try:
        message = await stream_reader.last(client.nc, subjects.TELEMETRY_STREAM, subjects.agent_subject(host))
    except (NatsError, TimeoutError) as error:
        return problem("collector", f"its reports can't be read: {error}", _FIXES[_collector.__name__])
    if message is None:
        hosts = (await client.fleet()).hosts
        return note(
            "collector",
            f"none has reported from {host} ({hosts} hosts in the fleet)",
            "corral collect here, if this host has GPUs",
        )
    report = codec.decode(message.data, AgentReport)
    # By the later of its clock and the bus's, since one of them may be wrong.
    age = time.time() - max(report.time_ns / 1e9, message.stored_at)
    if age > 35:
        return problem("collector", f"of {host} has not reported for {age:.0f} s", "restart it: corral collect")
    if report.dropped_samples:
        return note(
            "collector",
            f"has dropped {report.dropped_samples:,} samples",
            "use a larger --buffer, or enlarge the bus's streams",
        )
    if not report.processes_identified:
        return note(
            "collector",
            f"of {host} runs in a PID namespace, so it can't attribute processes on the devices to leases",
            "use the host's: hostPID: true on Kubernetes, --pid=host for a container",
        )
    return ok("collector", f"{report.source} on {host}, {report.ticks:,} ticks, {report.late_ticks:,} late")


async def _planner(client: Client) -> Finding:
    summary = await client.fleet()
    detail = f"{summary.devices} devices on {summary.hosts} hosts, {summary.usable_devices} usable"
    if summary.devices == 0:
        return note("planner", "sees no devices", "start a collector on a GPU host: corral collect")
    if summary.usable_devices < summary.devices:
        devices = await client.devices()
        why = sorted({reason for device in devices if not device.usable for reason in device.why_not})
        return note("planner", f"{detail}; the others: {', '.join(why)}", "corral devices shows which")
    return ok("planner", detail)


async def _runners(client: Client) -> Finding:
    """Check that the hosts of the fleet can take jobs."""
    summary = await client.fleet()
    if summary.runner_hosts is None:
        return note("runners", "the planner is of a version without jobs", "update it")
    if unready := summary.unready_runners:
        some = "; ".join(f"{host}: {why}" for host, why in list(unready.items())[:_SHOWN])
        more = f"; and {len(unready) - _SHOWN} more" if len(unready) > _SHOWN else ""
        return problem("runners", f"no jobs are started on {some}{more}", "have its runner write there again")
    missing = summary.hosts - summary.runner_hosts
    if not missing:
        return ok("runners", f"all {summary.hosts} hosts take jobs")
    names = ", ".join(summary.without_runner[:_SHOWN]) + (f" and {missing - _SHOWN} more" if missing > _SHOWN else "")
    return note(
        "runners",
        f"{missing} of {summary.hosts} hosts take no jobs (corral submit): no runner reports from {names}",
        "corral runner there, if they shall; leases (corral run) need none",
    )


async def confinement(client: Client) -> Finding:
    """Check that jobs can open their own devices only."""
    runners = await ask_health(client.nc, "runner")
    if not runners:
        return ok("confinement", "no runner answers: no jobs are started")
    weak = [one.instance for one in runners if any(each.name == "unconfined" and each.value for each in one.measures)]
    if not weak:
        return ok("confinement", f"jobs are kept from devices of others by all {len(runners)} runners")
    names = ", ".join(weak[:_SHOWN]) + (f" and {len(weak) - _SHOWN} more" if len(weak) > _SHOWN else "")
    return note(
        "confinement",
        f"nothing keeps jobs without an image from devices of others on {names}",
        "run corral runner as root where systemd runs with cgroups v2; its log says what is missing",
    )


async def _bucket(client: Client) -> Finding:
    """Check the free space in the planner's bucket, which holds leases and rejections."""
    leader = next((found for found in await ask_health(client.nc, "planner") if found.role == "leader"), None)
    values = {measure.name: measure.value for measure in leader.measures} if leader is not None else {}
    if "bucket_bytes" not in values:
        return note("bucket", "no leading planner reports the size of its bucket", _FIXES[_planner.__name__])
    used, most = values["bucket_bytes"], values["bucket_max_bytes"]
    if not most:
        return ok("bucket", f"leases and rejections take {format_bytes(int(used))}, without a limit")
    detail = f"leases and rejections take {format_bytes(int(used))} of {format_bytes(int(most))}"
    if used < BUCKET_FULL * most:
        return ok("bucket", detail)
    twice = f"`nats stream edit KV_{subjects.PLANNER_BUCKET} --max-bytes={int(2 * most)}`"
    return note("bucket", f"{detail}: above 85 % nothing is granted", f"let leases end, or enlarge it: {twice}")


async def _history(client: Client) -> Finding:
    status = await client.history()
    lag = sum(status.lag_messages.values())
    detail = f"{status.database}, {format_bytes(status.database_bytes)}, {lag:,} messages behind"
    if status.paused:
        return problem(
            "history", f"the processor is paused: {status.paused}", "nothing is lost so far: remove the cause"
        )
    reasons = {why for one in await ask_health(client.nc, "processor") if not one.ready for why in one.reasons}
    if reasons:
        return note("history", f"{detail}; {'; '.join(sorted(reasons))}", "corral health processor names the processor")
    if lag > LAG_MESSAGES:
        return note("history", detail, "it is catching up, or too slow: check its disk and CPU")
    if status.dead_letters:
        return note(
            "history",
            f"{detail}; {status.dead_letters:,} messages refused",
            "corral query 'FROM dead_letters' lists the reasons",
        )
    return ok("history", detail)


# Only hosts that were seen recently, relative to the newest: nothing can be fixed on hosts that were removed.
_REPORTING: Final = "last_seen > (SELECT max(last_seen) FROM hosts) - INTERVAL 10 MINUTES"
WRONG_CLOCKS: Final = (
    f"SELECT host, offset_seconds FROM host_clocks JOIN hosts USING (host) WHERE until IS NULL AND {_REPORTING}"
)
LISTED_TWICE: Final = f"SELECT device, owner, host FROM device_conflicts WHERE {_REPORTING}"


async def _hosts(client: Client) -> Finding:
    """Check the history for hosts with a wrong clock and devices that two hosts list."""
    off = await client.query(WRONG_CLOCKS, format="json")
    twice = await client.query(LISTED_TWICE, format="json")
    said = [
        f"the clock of {host} is {abs(offset):.0f} s {'ahead' if offset > 0 else 'behind'}" for host, offset in off.rows
    ]
    said += [f"{device} is reported by {owner}, its owner, and by {host}" for device, owner, host in twice.rows]
    if not said:
        return ok("hosts", "clocks are right, and no two hosts report the same device")
    more = f"; and {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
    return note(
        "hosts",
        "; ".join(said[:_SHOWN]) + more,
        "run a time service on them; use one collector per machine, --state folder and device "
        "(see the tables host_clocks and device_conflicts)",
    )


_FIXES: Final[dict[str, str]] = {
    _collector.__name__: "is JetStream enabled?",
    _planner.__name__: "corral plan",
    _runners.__name__: "corral plan",
    confinement.__name__: "corral runner",
    _bucket.__name__: "corral plan",
    _history.__name__: "corral process",
    _hosts.__name__: "corral process",
}
