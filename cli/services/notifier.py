"""`corral notifier`: tells people by e-mail, chat and webhook when something happens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...bus import config_files
from ...schemas.values.units import parse_seconds
from ..exits import NOT_YOURS, USAGE, CommandError
from ..options import NatsUrl, say
from .logs import LogFormat, LogFormatOption, LogLevel, LogLevelOption, Verbose, configure
from .run_service import STOP_WITHIN, StopWithin, run_service, stop_seconds

if TYPE_CHECKING:
    from ...notifier.rulebook import Files


def notifier(
    targets: Annotated[
        Path | None,
        typer.Option(
            "--targets",
            envvar="CORRAL_NOTIFY_TARGETS",
            metavar="FILE",
            help="Addresses with their passwords. Default: notify-targets.toml beside corral.toml, if it is there.",
        ),
    ] = None,
    rules: Annotated[
        Path | None,
        typer.Option(
            "--rules",
            envvar="CORRAL_NOTIFY_RULES",
            metavar="FILE",
            help="Rules of the operator. Default: notify-rules.toml beside corral.toml, if it is there.",
        ),
    ] = None,
    owner_targets: Annotated[
        Path | None,
        typer.Option(
            "--owner-targets",
            envvar="CORRAL_NOTIFY_OWNER_TARGETS",
            metavar="FOLDER",
            help="Folder with a file of targets for each owner: ann.toml.",
        ),
    ] = None,
    every: Annotated[
        str,
        typer.Option("--every", metavar="TIME", help="Interval of looking at leases, devices, the queue and groups."),
    ] = "15s",
    send_within: Annotated[
        str, typer.Option("--send-within", metavar="TIME", help="Timeout of an attempt to send.")
    ] = "30s",
    give_up: Annotated[
        str, typer.Option("--give-up", metavar="TIME", help="Time for which a message is tried; then it is dropped.")
    ] = "1d",
    check: Annotated[bool, typer.Option("--check", help="Check the files, and end.")] = False,
    nats: NatsUrl = None,
    stop_within: StopWithin = STOP_WITHIN,
    log_format: LogFormatOption = LogFormat.AUTO,
    log_level: LogLevelOption = LogLevel.INFO,
    verbose: Verbose = False,
) -> None:
    """Send notifications by e-mail, chat and webhook, until stopped. Changed files are read again.

    Owners make rules of their own with `corral notify`. A second notifier stands by for the first.

    Examples:
      corral notifier
      corral notifier --targets targets.toml --rules rules.toml --check
      corral notifier --owner-targets /etc/corral/notify-targets.d --give-up 4h
    """
    from ...notifier.rulebook import Files, WrongFiles
    from ...notifier.service import Notifier, NotifierSettings, WrongCredentials

    files = Files(
        rules=_file(rules, "notify-rules.toml", "--rules"),
        targets=_file(targets, "notify-targets.toml", "--targets"),
        folder=owner_targets,
    )
    if owner_targets is not None and not owner_targets.is_dir():
        raise CommandError(f"--owner-targets: there is no folder {owner_targets}", USAGE)
    try:
        if check:
            _check(files)
            return
        seconds = {
            option: _seconds(text, option)
            for option, text in (("--every", every), ("--send-within", send_within), ("--give-up", give_up))
        }
        identity = configure("notifier", log_format, log_level, verbose=verbose)
        within = stop_seconds(stop_within)

        working = Notifier(
            NotifierSettings(
                files=files,
                nats_url=nats,
                every_seconds=seconds["--every"],
                send_seconds=seconds["--send-within"],
                give_up_seconds=seconds["--give-up"],
            )
        )
    except WrongFiles as error:
        raise CommandError(str(error), USAGE) from error
    if files.targets is None and files.folder is None:
        say("corral: warning: there are no targets yet, so nothing can be sent: write a file for --targets")
    identity.named(working.instance)
    try:
        run_service(working.run(), within)
    except WrongCredentials as error:
        raise CommandError(str(error), NOT_YOURS) from error


def _file(given: Path | None, name: str, option: str) -> Path | None:
    if given is not None:
        if not given.exists():
            raise CommandError(f"{option}: there is no file {given}", USAGE)
        return given
    for folder in (config_files.path().parent, config_files.MACHINE_FILE.parent):
        if (found := folder / name).exists():
            return found
    return None


def _seconds(text: str, option: str) -> float:
    try:
        seconds = parse_seconds(text)
    except ValueError as error:
        raise CommandError(f"{option}: {error}", USAGE) from error
    if not 0.1 <= seconds <= 30 * 86400:
        raise CommandError(f"{option} wants a time from 100ms to 30d", USAGE)
    return seconds


def _check(files: Files) -> None:
    """Check files: also the addresses, and that rules name targets that are there.

    Raises:
        CommandError: something is wrong.
    """
    from ...notifier.rulebook import RuleBook
    from ...notifier.sending import service_of, why_not

    book = RuleBook(files)
    book.read()
    wrong = list(book.problems)
    for target in book.targets.by_name.values():
        problem = why_not(target.url)
        if problem:
            wrong.append(f"target {target.name!r}: {problem}")
        else:
            print(f"target {target.name}: {service_of(target.url)}")
    for owned in book.rules:
        if owned.problem:
            known = ", ".join(sorted(book.targets.by_name)) or "none"
            wrong.append(f"rule {owned.rule.name!r}: {owned.problem}; there are {known}")
        else:
            print(f"rule {owned.rule.name}: {', '.join(owned.rule.on)} to {', '.join(owned.rule.to)}")
    if wrong:
        raise CommandError("; ".join(wrong), USAGE)
