"""`corral runner`: starts the jobs of this host, and supervises them."""

from __future__ import annotations

import os
import re
import socket
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from msgspec import Struct

from ..exits import FAILED, USAGE, CommandError
from ..options import NatsUrl
from ..options_struct import takes
from .logs import LogFormat, LogFormatOption, LogLevel, LogLevelOption, Verbose, configure
from .run_service import STOP_WITHIN, StopWithin, run_service, stop_seconds

if TYPE_CHECKING:
    from ...runners.service import RunnerSettings

_WHO: Final = "Accounts"
_HOSTS: Final = re.compile(r"(.*)\[(\d+)-(\d+)\](.*)")


class ExecutorName(StrEnum):
    """Executor that may be used."""

    SYSTEMD = "systemd"
    PODMAN = "podman"
    DOCKER = "docker"
    PROCESS = "process"


class RunnerOptions(Struct, frozen=True, kw_only=True):
    """Options of `corral runner`, on the command line and in the configuration file."""

    nats: NatsUrl = None
    host: Annotated[
        list[str] | None,
        typer.Option(
            envvar="CORRAL_HOST",
            metavar="NAME",
            help="As the collector has it; this machine's name. sim-[0001-0004] for a simulated fleet.",
        ),
    ] = None
    state: Annotated[
        Path | None,
        typer.Option(
            envvar="CORRAL_STATE_DIR", metavar="FOLDER", help="For jobs and their output; ~/.local/state/corral."
        ),
    ] = None
    executor: Annotated[
        list[ExecutorName] | None,
        typer.Option(
            envvar="CORRAL_EXECUTOR", metavar="NAME", help="Only these: systemd, podman, docker, process. Default: all."
        ),
    ] = None
    keep: Annotated[
        str, typer.Option(envvar="CORRAL_KEEP_OUTPUT", metavar="TIME", help="Output of jobs that have ended.")
    ] = "7d"
    end_jobs: Annotated[
        bool, typer.Option("--end-jobs", help="End the jobs when the runner is stopped. Else they go on.")
    ] = False
    owners: Annotated[
        list[str] | None,
        typer.Option(
            envvar="CORRAL_OWNERS", metavar="GLOB", help="Whose jobs may run here. Default: all.", rich_help_panel=_WHO
        ),
    ] = None
    accounts: Annotated[
        list[str] | None,
        typer.Option(
            envvar="CORRAL_ACCOUNTS",
            metavar="OWNER=NAME",
            help="Account of an owner. Default: the owner's name.",
            rich_help_panel=_WHO,
        ),
    ] = None
    own_account: Annotated[
        bool,
        typer.Option(
            "--own-account",
            envvar="CORRAL_OWN_ACCOUNT",
            help="All jobs run as the runner's account, as they do unless it is root.",
            rich_help_panel=_WHO,
        ),
    ] = False
    stop_within: StopWithin = STOP_WITHIN
    log_format: LogFormatOption = LogFormat.AUTO
    log_level: LogLevelOption = LogLevel.INFO
    verbose: Verbose = False


@takes(RunnerOptions)
def runner(options: RunnerOptions) -> None:
    """Run the jobs of this host, until stopped. The jobs go on then, and are found again at the next start.

    [bold]Examples[/bold]
      corral runner                                       as root: each job as its owner's account
      corral runner --owners alice                        as yourself: only for your own jobs
      corral runner --accounts alice@lab=alice --keep 30d
      corral runner --host 'sim-[0001-0004]' --executor process
    """
    identity = configure("runner", options.log_format, options.log_level, verbose=options.verbose)
    within = stop_seconds(options.stop_within)
    try:
        settings = _settings(options, within)
    except ValueError as error:
        raise CommandError(str(error), USAGE) from error
    identity.named(settings.hosts[0])
    from ...runners.host import HostTaken
    from ...runners.service import Runner

    try:
        working = Runner(settings)
    except (HostTaken, OSError) as error:
        raise CommandError(str(error), FAILED) from error
    run_service(working.run(), within)


def _settings(options: RunnerOptions, within_seconds: float) -> RunnerSettings:
    from ...runners.accounts import Accounts
    from ...runners.executors import Executors, Name
    from ...runners.service import RunnerSettings, log, state_folder
    from ...schemas.values.units import parse_seconds

    executors = Executors([Name(name) for name in options.executor or []])
    if not executors.names:
        raise ValueError(f"--executor: none of {', '.join(options.executor or [])} is here")
    owners = _parts(options.owners) or ["*"]
    accounts = Accounts(_accounts(options.accounts), owners, own=options.own_account)
    if accounts.own:
        log.warning("jobs of %s run as this runner's own account (user id %d)", ", ".join(owners), os.geteuid())
    if executors.unconfined:
        log.warning("jobs without an image are not confined: %s", executors.unconfined)
    return RunnerSettings(
        hosts=expand_hosts(_parts(options.host)) or [socket.gethostname()],
        state=state_folder(options.state),
        accounts=accounts,
        executors=executors,
        nats_url=options.nats,
        keep_seconds=parse_seconds(options.keep),
        end_seconds=max(0.5, within_seconds - 2.0) if options.end_jobs else 0.0,
    )


def expand_hosts(names: list[str]) -> list[str]:
    """Expand ranges in names of hosts: `sim-[0001-0003]` is three of them.

    Raises:
        ValueError: a range has no host.
    """
    found: list[str] = []
    for name in names:
        match = _HOSTS.fullmatch(name)
        if match is None:
            found.append(name)
            continue
        before, first, last, after = match.groups()
        numbers = range(int(first), int(last) + 1)
        if not numbers or len(numbers) > 10_000:
            raise ValueError(f"--host {name}: write the smaller number first, and at most 10000 hosts")
        found += [f"{before}{number:0{len(first)}d}{after}" for number in numbers]
    return list(dict.fromkeys(found))


def _parts(given: list[str] | None) -> list[str]:
    """Texts of an option that may be given several times; one from the environment may hold several, with commas."""
    return [part.strip() for text in given or [] for part in text.split(",") if part.strip()]


def _accounts(given: list[str] | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in _parts(given):
        owner, sign, name = text.rpartition("=")
        if not sign or not owner or not name:
            raise ValueError(f"--accounts {text}: write OWNER=NAME, as in alice@lab=alice")
        found[owner] = name
    return found
