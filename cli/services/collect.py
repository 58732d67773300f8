"""`corral collect`: reads telemetry from a source and publishes it."""

from __future__ import annotations

import logging
import socket
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec import Struct

from ..exits import FAILED, USAGE, CommandError
from ..options import NatsUrl
from ..options_struct import takes
from .logs import LogFormat, LogFormatOption, LogLevel, LogLevelOption, Verbose, configure
from .run_service import STOP_WITHIN, StopWithin, run_service, stop_seconds

if TYPE_CHECKING:
    from ...collectors.source import Source


class SourceName(StrEnum):
    """Source of the telemetry."""

    AUTO = "auto"
    NVML = "nvml"
    AMD = "amd"
    SIMULATED = "simulated"
    REPLAY = "replay"


_HOST = "This host"
_SIMULATED = "Simulated fleet"
_REPLAY = "Replay"


class CollectOptions(Struct, frozen=True, kw_only=True):
    """Options of `corral collect`, on the command line and in the configuration file."""

    source: Annotated[
        SourceName,
        typer.Option(envvar="CORRAL_SOURCE", help="auto takes NVML or AMD, whichever is there."),
    ] = SourceName.AUTO
    interval: Annotated[
        str, typer.Option(envvar="CORRAL_INTERVAL", metavar="TIME", help="Between samples, from 20ms.")
    ] = "1s"
    batch: Annotated[
        str, typer.Option(envvar="CORRAL_BATCH", metavar="TIME", help="Samples of so long share one message.")
    ] = "250ms"
    nats: NatsUrl = None
    host: Annotated[
        str | None,
        typer.Option(envvar="CORRAL_HOST", metavar="NAME", help="Default: this machine's name.", rich_help_panel=_HOST),
    ] = None
    label: Annotated[
        list[str] | None,
        typer.Option(
            envvar="CORRAL_LABELS", metavar="KEY=VALUE", help="Of the host, for requests.", rich_help_panel=_HOST
        ),
    ] = None
    processes: Annotated[
        str,
        typer.Option(
            envvar="CORRAL_PROCESSES",
            metavar="TIME",
            help="Between lists of processes; 0: none.",
            rich_help_panel=_HOST,
        ),
    ] = "10s"
    with_commands: Annotated[
        bool,
        typer.Option(
            "--with-commands",
            envvar="CORRAL_WITH_COMMANDS",
            help="Publish command lines too. They may hold secrets.",
            rich_help_panel=_HOST,
        ),
    ] = False
    buffer: Annotated[
        str, typer.Option(envvar="CORRAL_BUFFER", metavar="SIZE", help="Kept for the bus while it is away.")
    ] = "256MiB"
    state: Annotated[
        Path | None,
        typer.Option(envvar="CORRAL_STATE_DIR", metavar="FOLDER", help="For the spill file; ~/.local/state/corral."),
    ] = None
    spill: Annotated[bool, typer.Option(help="Keep what waits on disk while the bus is away.")] = True
    hosts: Annotated[
        int | None,
        typer.Option(metavar="N", help="How many. Default: 4, or 1 to replay.", rich_help_panel=_SIMULATED),
    ] = None
    devices: Annotated[int, typer.Option(metavar="N", help="On each host.", rich_help_panel=_SIMULATED)] = 8
    seed: Annotated[int, typer.Option(help="The same seed makes the same fleet.", rich_help_panel=_SIMULATED)] = 1
    models: Annotated[str, typer.Option(metavar="MIX", help="Such as H100:3,T4:1.", rich_help_panel=_SIMULATED)] = ""
    background: Annotated[
        float, typer.Option(metavar="SHARE", help="Devices busy without a lease.", rich_help_panel=_SIMULATED)
    ] = 0.05
    misbehaving: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Leased devices used beyond their lease.", rich_help_panel=_SIMULATED),
    ] = 0.0
    faults: Annotated[
        float, typer.Option(metavar="N", help="Xid and ECC events per device a day.", rich_help_panel=_SIMULATED)
    ] = 0.2
    time_scale: Annotated[
        float, typer.Option(metavar="N", help="Seconds of simulation in one.", rich_help_panel=_SIMULATED)
    ] = 1.0
    prefix: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of host names: sim-0001, replay-0001.", rich_help_panel=_SIMULATED),
    ] = None
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Parquet or CSV of samples.", rich_help_panel=_REPLAY)
    ] = None
    speed: Annotated[float, typer.Option(metavar="N", help="Times faster.", rich_help_panel=_REPLAY)] = 1.0
    loop: Annotated[bool, typer.Option("--loop", help="Begin again at the end.", rich_help_panel=_REPLAY)] = False
    keep_time: Annotated[
        bool, typer.Option("--keep-time", help="Publish the recorded times, not the present.", rich_help_panel=_REPLAY)
    ] = False
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=COLUMN", help="Where names do not match.", rich_help_panel=_REPLAY),
    ] = None
    stop_within: StopWithin = STOP_WITHIN
    log_format: LogFormatOption = LogFormat.AUTO
    log_level: LogLevelOption = LogLevel.INFO
    verbose: Verbose = False


@takes(CollectOptions)
def collect(options: CollectOptions) -> None:
    """Collect GPU telemetry and publish it, until stopped.

    [bold]Examples[/bold]
      corral collect                                             this host's GPUs, once a second
      corral collect --interval 20ms --batch 250ms               fast enough to see a training step
      corral collect --source simulated --hosts 100              a fleet that is not there
      corral collect --source replay --file gpu.parquet --speed 60

    The bus may come and go: messages are kept, on disk too, and sent in order when it is back.
    """
    identity = configure("collector", options.log_format, options.log_level, verbose=options.verbose)
    within = stop_seconds(options.stop_within)
    chosen = options.source
    try:
        if chosen is SourceName.AUTO:
            chosen = _auto()
        settings = _settings(options)
        name, source = _source(chosen, options)
        identity.named(name)
        _run(name, source, settings, options, within)
    except ValueError as error:
        raise CommandError(str(error), USAGE) from error
    except ModuleNotFoundError as error:
        if error.name not in ("numpy", "pyarrow"):
            raise
        extra = "replay" if chosen is SourceName.REPLAY else "simulated"
        raise CommandError(f"{chosen} telemetry needs {error.name}: pip install 'corral[{extra}]'") from error


def _settings(options: CollectOptions) -> dict[str, Any]:
    """Arguments of the collector service in its own units."""
    from ...schemas.values.units import parse_bytes, parse_seconds

    return {
        "interval_seconds": parse_seconds(options.interval),
        "batch_seconds": parse_seconds(options.batch),
        "processes_seconds": parse_seconds(options.processes),
        "buffer_bytes": parse_bytes(options.buffer),
    }


def _source(chosen: SourceName, options: CollectOptions) -> tuple[str, Source]:
    """Make a source; returns the agent's name, too.

    Raises:
        ValueError: options that do not fit the source.
    """
    labels = _pairs(options.label, "--label rack=r1")
    if chosen is SourceName.SIMULATED:
        return _simulated(options, labels)
    if chosen is SourceName.REPLAY:
        return _replay(options, labels)
    name = _token(options.host or socket.gethostname())
    return name, _hardware(chosen, name, labels, options.with_commands)


def _simulated(options: CollectOptions, labels: dict[str, str]) -> tuple[str, Source]:
    from ...collectors.simulated.source import SimulatedSource

    name = _token(options.prefix or options.host or "sim")
    return name, SimulatedSource(
        4 if options.hosts is None else options.hosts,
        options.devices,
        seed=options.seed,
        models=options.models,
        background=options.background,
        misbehaving=options.misbehaving,
        faults_per_device_day=options.faults,
        time_scale=options.time_scale,
        prefix=name,
        labels=labels,
    )


def _replay(options: CollectOptions, labels: dict[str, str]) -> tuple[str, Source]:
    from ...collectors.replay.source import ReplaySource

    if options.file is None:
        raise ValueError("a replay needs --file with a Parquet or CSV file of samples")
    name = _token(options.prefix or options.host or "replay")
    return name, ReplaySource(
        options.file,
        speed=options.speed,
        loop=options.loop,
        keep_time=options.keep_time,
        hosts=1 if options.hosts is None else options.hosts,
        prefix=name,
        columns=_pairs(options.column, "--column memory_used_bytes=mem"),
        labels=labels,
    )


def _hardware(chosen: SourceName, name: str, labels: dict[str, str], with_commands: bool) -> Source:
    if chosen is SourceName.AMD:
        from ...collectors.amd.source import AmdSource

        return AmdSource(host=name, labels=labels, with_commands=with_commands)
    from ...collectors.nvml.source import NvmlSource

    return NvmlSource(host=name, labels=labels, with_commands=with_commands)


def _run(name: str, source: Source, settings: dict[str, Any], options: CollectOptions, within_seconds: float) -> None:
    from ...collectors.agent.claim import HostTaken
    from ...collectors.agent.spill import SpillBusy
    from ...collectors.service import DRAIN_SECONDS
    from ...collectors.service import collect as work

    # Messages that the bus doesn't accept in time are written to disk, which takes time too.
    drain = min(DRAIN_SECONDS, within_seconds / 2)
    serving = work(
        source,
        name=name,
        nats_url=options.nats,
        state=options.state,
        spill=options.spill,
        drain_seconds=drain,
        **settings,
    )
    try:
        run_service(serving, within_seconds)
    except (HostTaken, SpillBusy) as error:
        raise CommandError(str(error), FAILED) from error


def _auto() -> SourceName:
    """Choose NVML or AMD, depending on the driver. Simulated telemetry is published only if requested explicitly.

    Raises:
        ValueError: neither driver is available.
    """
    from ...collectors.detect import detect

    found = detect()
    if found is None:
        raise ValueError(
            "no GPU driver is loaded here. --source nvml (or amd) waits for one, --source simulated makes up a fleet"
        )
    return SourceName(found)


def _token(name: str) -> str:
    from ...schemas.subjects import host_token

    token = host_token(name)
    if token != name:
        logging.getLogger("corral.collector").warning("the name %r goes into subjects as %r", name, token)
    return token


def _pairs(given: list[str] | None, example: str) -> dict[str, str]:
    """Parse `KEY=VALUE` texts; a text from the environment may hold several, separated by commas.

    Raises:
        ValueError: a text has no `=`, or no key.
    """
    found: dict[str, str] = {}
    for text in given or []:
        for part in filter(None, (part.strip() for part in text.split(","))):
            key, sign, value = part.partition("=")
            if not sign or not key.strip():
                raise ValueError(f"{part!r} is no KEY=VALUE, as in {example}")
            found[key.strip()] = value.strip()
    return found
