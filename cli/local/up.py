"""`corral up`: a whole cluster on this machine, for as long as the command runs."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import signal
import socket
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.markup import escape

from ...bus import config_files
from ...bus.connect import DEFAULT_URL
from ...client import Client, CorralError
from ...schemas import operations
from ..exits import USAGE, CommandError
from ..options import console, say
from .access import LocalAccess, add_context, context_name, ensure_access, move_streams, remove_contexts, server_names
from .folders import dashboard_state, default_data
from .server import EmbeddedServer, server_binary
from .supervisor import DataFolder, Part, Supervisor, SupervisorEvent

READY_SECONDS = 60.0


def up(
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FOLDER", help="Data folder. Default: ~/.local/share/corral.")
    ] = None,
    port: Annotated[int, typer.Option("--port", help="Port of the bus; 0 picks a free one.", min=0, max=65535)] = 4222,
    listen: Annotated[
        str, typer.Option("--listen", metavar="ADDRESS", help="Address that the bus listens on.")
    ] = "127.0.0.1",
    source: Annotated[
        str, typer.Option("--source", help="auto, nvml, amd, simulated or none. auto simulates GPUs if there are none.")
    ] = "auto",
    hosts: Annotated[int, typer.Option("--hosts", help="Number of simulated hosts.", min=1)] = 4,
    devices: Annotated[int, typer.Option("--devices", help="Number of GPUs on each simulated host.", min=1)] = 8,
    background: Annotated[
        float,
        typer.Option(
            "--background",
            metavar="SHARE",
            help="Share of the simulated GPUs that are in use without a lease.",
            min=0,
            max=1,
        ),
    ] = 0.0,
    faults: Annotated[
        float,
        typer.Option(
            "--faults", metavar="N", help="Faults per simulated GPU and day; 300 triggers the device alerts.", min=0
        ),
    ] = 0.2,
    interval: Annotated[str, typer.Option("--interval", metavar="TIME", help="Sampling interval.")] = "1s",
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Disable authentication: anyone on this machine may do anything.")
    ] = False,
    no_dashboard: Annotated[bool, typer.Option("--no-dashboard", help="Don't start the dashboard.")] = False,
    http: Annotated[
        int | None,
        typer.Option(
            "--http", metavar="PORT", help="Port of loopback to serve the bus on over HTTP, too.", min=1, max=65535
        ),
    ] = None,
) -> None:
    """Start a complete cluster on this machine: bus, collector, runner, processor, planner, dashboard. Ctrl-C stops it.

    Processes that die are restarted. The data folder is kept, with history and leases.

    Each process has its own credentials, and so have you: `up` adds a context for the cluster to your configuration.
    Add other users with `corral auth add`. If --listen is not a loopback address, the bus uses TLS.

    Examples:
      corral up
      corral up --source simulated --hosts 100 --devices 8
      corral up --data /tmp/try --port 0
      corral up --http 8700
    """
    if source not in ("auto", "nvml", "amd", "simulated", "none"):
        raise CommandError(f"--source {source!r}: use auto, nvml, amd, simulated or none", USAGE)
    server_binary()
    if missing := missing_extras(source, dashboard=not no_dashboard, gateway=http is not None):
        extras = ",".join(extra for extra in missing if extra != "dashboard")
        if extras:
            raise CommandError(f"the cluster needs more than is installed: pip install 'corral[{extras}]'")
        say("corral: there will be no dashboard: pip install 'corral[dashboard]' adds it, --no-dashboard is silent")
    folder = DataFolder((data or default_data()).expanduser().absolute())
    try:
        if port and _taken(listen, port):
            raise CommandError(
                f"port {port} on {listen} is taken: by a NATS server, another user's `corral up`, or something else. "
                "--port 0 starts on a free port; on a NATS server that is there, `corral collect`, `process` and "
                "`plan` run without `up`"
            )
        if no_auth and server_names(listen):
            raise CommandError(
                f"--listen {listen} with --no-auth would let anyone do anything: omit one of them", USAGE
            )
        collector = collector_part(source, folder.path, hosts, devices, interval, background, faults)
        parts = cluster_parts(folder.path, collector)
        if not no_dashboard and "dashboard" not in missing:
            parts.append(dashboard_part(folder.path))
        if (sending := notifier_part()) is not None:
            parts.append(sending)
        if http is not None:
            if no_auth:
                raise CommandError("--http with --no-auth: tokens would prove nothing, so omit one of them", USAGE)
            parts.append(Part(name="gateway", arguments=["serve-http", "--listen", f"127.0.0.1:{http}"]))
        server = EmbeddedServer(folder.path / "nats", port, listen)
        local = None if no_auth else ensure_access(folder.path, server.pid_file, listen)
        move_streams(server.data, local is not None)
        if local is not None:
            parts = [local.part(part) for part in parts]
            server.include = local.authority.config
        asyncio.run(_up(folder, server, parts, collector, local, source))
    finally:
        folder.close()


_NEEDED: Final = {"processor": "duckdb", "planner": "numpy", "dashboard": "nicegui", "gateway": "uvicorn"}
"""Library of each extra that the cluster needs, by which the extra is recognized."""


def missing_extras(source: str, *, dashboard: bool, gateway: bool = False) -> list[str]:
    """Extras of the cluster's parts that are not installed.

    Args:
        source: as `--source`.
        dashboard: whether there shall be a dashboard.
        gateway: whether the bus shall be served over HTTP.
    """
    libraries = _NEEDED | {"nvml": {"collector": "pynvml"}, "amd": {"amd": "amdsmi"}}.get(source, {})
    left_out = {extra for extra, there in (("dashboard", dashboard), ("gateway", gateway)) if not there}
    wanted = {extra: library for extra, library in libraries.items() if extra not in left_out}
    return [extra for extra, library in wanted.items() if find_spec(library) is None]


def cluster_parts(data: Path, collector: Part | None) -> list[Part]:
    """Parts of a local cluster, in the order of starting."""
    parts = [
        Part(name="processor", arguments=["process", "--db", str(data / "history.duckdb")]),
        Part(name="planner", arguments=["plan"]),
    ]
    return [*parts, runner_part(data, collector), collector] if collector else parts


def runner_part(data: Path, collector: Part) -> Part:
    """The runner as a part, for the hosts that the collector reports. Its jobs run as the user who started it."""
    arguments = ["runner", "--own-account", "--end-jobs", "--state", str(data)]
    given = dict(pairwise(collector.arguments))
    made_up = {"simulated": ("sim", 4), "replay": ("replay", 1)}
    if (source := given.get("--source", "")) in made_up:
        prefix, hosts = given.get("--prefix", made_up[source][0]), int(given.get("--hosts", made_up[source][1]))
        width = max(4, len(str(hosts)))
        arguments += ["--host", f"{prefix}-[{1:0{width}d}-{hosts:0{width}d}]"]
    return Part(name="runner", arguments=arguments)


def dashboard_part(data: Path) -> Part:
    """The dashboard as a part, on loopback; it writes its URL to its state folder."""
    state = dashboard_state(data)
    (state / "url").unlink(missing_ok=True)
    return Part(name="dashboard", arguments=["dashboard", "--quiet", "--state", str(state)])


def notifier_part() -> Part | None:
    """The notifier as a part, if the user has a file of targets beside the configuration; None otherwise."""
    if not (config_files.path().parent / "notify-targets.toml").exists():
        return None
    if find_spec("apprise") is None:
        say("corral: there will be no notifications: pip install 'corral[notify]' adds them")
        return None
    return Part(name="notifier", arguments=["notifier"])


def collector_part(
    source: str, data: Path, hosts: int, devices: int, interval: str, background: float = 0.0, faults: float = 0.2
) -> Part | None:
    """The collector as a part: for this host's GPUs if there are any, else simulated."""
    if source == "none":
        return None
    if source == "auto":
        from ...collectors.detect import detect

        source = detect() or "simulated"
    arguments = ["collect", "--source", source, "--interval", interval, "--state", str(data / "collector")]
    if source == "simulated":
        arguments += ["--hosts", str(hosts), "--devices", str(devices), "--background", str(background)]
        arguments += ["--faults", str(faults)]
    return Part(name="collector", arguments=arguments)


async def _up(
    folder: DataFolder,
    server: EmbeddedServer,
    parts: Sequence[Part],
    collector: Part | None,
    local: LocalAccess | None,
    source: str,
) -> None:
    out = console()
    credentials = local and local.credentials
    name = context_name(folder.path, default_data())
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stopping.set)

    def tell(event: SupervisorEvent) -> None:
        if event.kind in ("died", "killed"):
            out.print(f"[red]✗[/] {event.part}: {escape(event.detail.rstrip())}")
        elif event.kind == "started" and ready:
            out.print(f"[green]✓[/] {event.part} is back (process {event.pid})")
        elif event.kind == "stopped":
            out.print(f"[dim]✓ {event.part} has stopped[/]")

    ready = False
    supervisor = Supervisor(server, parts, folder.path / "logs", tell, local and local.authority.credentials("planner"))
    try:
        with out.status("Starting the cluster…") if out.is_terminal else contextlib.nullcontext():
            await supervisor.start()
            folder.write(server.url)
            seen = dashboard_state(folder.path) / "url"
            waiting = asyncio.create_task(
                wait_until_ready(server.url, parts, credentials=credentials, dashboard_url=seen)
            )
            stopped = asyncio.create_task(stopping.wait())
            await asyncio.wait({waiting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            stopped.cancel()
            missing, summary = await waiting
            if credentials is None:
                connection_flags = "" if server.url == DEFAULT_URL else f" --nats {server.url}"
            else:
                connection_flags = "" if add_context(name, server.url, credentials) else f" --context {name}"
            devices = await _devices(server.url, credentials)
            _print_ready(server.url, folder.path, collector, missing, summary, connection_flags, devices, source)
            if gateway := next((part for part in parts if part.name == "gateway"), None):
                _print_gateway(gateway.arguments[-1], connection_flags)
            ready = True
            await stopping.wait()
        else:
            waiting.cancel()
        out.print("[dim]Stopping…[/]")
    finally:
        await supervisor.stop()
        if credentials is not None and folder.path != default_data():
            remove_contexts([name], server.url)


async def wait_until_ready(
    url: str,
    parts: Sequence[Part],
    timeout: float = READY_SECONDS,
    *,
    credentials: Path | None = None,
    dashboard_url: Path | None = None,
) -> tuple[list[str], operations.FleetSummary | None]:
    """Wait until each part answers and the planner sees devices.

    Returns:
        The parts that did not in time, and the fleet.
    """
    from ...client import connect

    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    # The runner waits for the planner, and jobs wait for the runner. The gateway needs only the bus.
    missing = {part.name for part in parts} - {"runner", "notifier", "gateway"}
    summary: operations.FleetSummary | None = None
    proof = str(credentials) if credentials else None
    async with connect(url, credentials=proof, patience=0.0, timeout=2.0, name="corral-up") as client:
        while missing and loop.time() < end:
            if "planner" in missing or "collector" in missing:
                with contextlib.suppress(CorralError):
                    summary = await client.fleet()
                    missing.discard("planner")
                    if summary.usable_devices:
                        missing.discard("collector")
            if dashboard_url is not None and _written(dashboard_url):
                missing.discard("dashboard")
            if "processor" in missing and await _history_answers(client):
                missing.discard("processor")
            if missing:
                await asyncio.sleep(0.1)
    return sorted(missing), summary


async def _devices(url: str, credentials: Path | None) -> list[operations.DeviceStatus]:
    from ...client import connect

    async with connect(url, credentials=str(credentials) if credentials else None, name="corral-up") as client:
        try:
            return list(await client.devices())
        except CorralError:
            return []


def _written(path: Path) -> bool:
    return path.exists()


async def _history_answers(client: Client) -> bool:
    try:
        await client.history()
    except CorralError:
        return False
    return True


def _print_ready(
    url: str,
    data: Path,
    collector: Part | None,
    missing: Sequence[str],
    summary: operations.FleetSummary | None,
    connection_flags: str,
    devices: Sequence[operations.DeviceStatus],
    chosen: str,
) -> None:
    out = console()
    for name in missing:
        out.print(f"[yellow]![/] the {name} is not ready yet; its log: {escape(str(data / 'logs' / f'{name}.log'))}")
    simulated = collector is not None and "simulated" in collector.arguments
    if summary is not None and summary.devices:
        kind = "simulated GPUs" if simulated else "GPUs"
        models = ", ".join(f"{count} × {name}" for name, count in sorted(summary.models.items()))
        out.print(f"[bold]{summary.devices} {kind}[/] on {summary.hosts} hosts: {escape(models)}")
        if simulated and chosen == "auto":
            out.print("[dim]This machine has no NVIDIA or AMD driver, so the GPUs are simulated (--source)[/]")
    out.print(f"[bold green]Corral is up[/] at [bold]{url}[/], data in {escape(str(data))}")
    # The option stands right after `corral`, so that it applies to whichever command follows.
    rows = [
        (f"corral{connection_flags} top", "watch the fleet"),
        *((f"corral{connection_flags} {command}", meaning) for command, meaning in work_hints(devices, simulated)),
        (f'corral{connection_flags} query "FROM samples LIMIT 5"', "query the history"),
    ]
    width = max(len(command) for command, _ in rows)
    for command, meaning in rows:
        out.print(f"  {escape(command.ljust(width))}   [dim]{meaning}[/]", soft_wrap=True)
    _print_dashboard(dashboard_state(data), data)
    out.print("[dim]Ctrl-C stops it.[/]")


def work_hints(devices: Sequence[operations.DeviceStatus], simulated: bool) -> list[tuple[str, str]]:
    """Example commands that get GPUs on this fleet, with their purpose; none if no GPU is free."""
    free = [one for one in devices if one.usable and not one.leases and not one.in_use]
    whole = [one for one in free if not one.mig_parent]
    if not free:
        return []
    # A request gets at most one MIG instance, and must ask for MIG.
    mig, together = ("", 2) if whole else (" --mig", 1)
    by_host: dict[str, list[int]] = {}
    for one in whole or free:
        by_host.setdefault(one.host, []).append(one.memory_free_bytes)
    most = max(by_host.values(), key=lambda host: (min(len(host), together), sorted(host)[-together:]))
    memory = min(sorted(most)[-together:]) >> 30
    asked = f"request --gpus {min(len(most), together)}{mig}" + (f" --memory {min(memory, 20)}GiB" if memory else "")
    # Simulated GPUs are on other hosts. `run` comes first: it releases its GPU, which matters if there is only one.
    anywhere = " --host any" if simulated else ""
    # There, no variable of a driver names them.
    variable = "CORRAL_LEASE" if simulated else "CUDA_VISIBLE_DEVICES"
    return [
        (f"run{anywhere} --gpus 1{mig} -- printenv {variable}", "run a command on a GPU"),
        (asked, "request GPUs"),
    ]


def _print_dashboard(state: Path, data: Path) -> None:
    """Print the dashboard's URL; on a terminal, as a link with a login token that works once.

    The token isn't printed elsewhere, since a log would keep it where others can read it.
    """
    from ...dashboard.security.login_links import login_link

    out = console()
    try:
        url = (state / "url").read_text()
    except FileNotFoundError:
        return
    again = "corral dashboard link" + ("" if data == default_data() else f" --state {shlex.quote(str(state))}")
    if out.is_terminal:
        out.print(f"Dashboard: [bold]{login_link(state)}[/]", soft_wrap=True)
        out.print(f"  [dim]that login link works once; for a new one: {escape(again)}[/]", soft_wrap=True)
    else:
        out.print(f"Dashboard: {url}; for a login link: `{escape(again)}`", soft_wrap=True)


def _print_gateway(listening: str, connection_flags: str) -> None:
    command = f"corral{connection_flags} auth token"
    console().print(f"HTTP: http://{listening}; `{escape(command)}` prints your token", soft_wrap=True)


def _taken(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False
