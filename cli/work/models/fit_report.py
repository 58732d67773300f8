"""Questions about serving a model with their answers, as `corral fit --json` prints and `corral serve --plan` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import typer

from ....client.measured.find import with_measured_rates
from ....client.server_commands import SERVERS, offer
from ....client.server_commands.command import FIRST_PORT, Offer
from ....schemas.models.serving import ServeFit, ServePlan, ServeWork
from ... import exits
from ...options import connected, run, say
from .model_options import Asked

_COMMANDS = "Commands"
Server = Annotated[
    str | None,
    typer.Option("--server", help="Commands for one server: vllm, llama.cpp, exo or accelerate. Default: all."),
]
Choose = Annotated[int, typer.Option("--choose", min=1, metavar="N", help="Number of the plan.")]
Load = Annotated[
    str | None,
    typer.Option(
        "--load",
        metavar="PATH|NAME",
        help="What servers load, where that is not the file that was read: a path on the hosts, or a name.",
        rich_help_panel=_COMMANDS,
    ),
]
Port = Annotated[
    int,
    typer.Option(
        "--port", min=1, max=65_000, help="HTTP port of the first server; replicas follow.", rich_help_panel=_COMMANDS
    ),
]
Listen = Annotated[
    str,
    typer.Option(
        "--listen",
        metavar="ADDRESS",
        help="Address at which servers take requests: 0.0.0.0 for all. Default: theirs.",
        rich_help_panel=_COMMANDS,
    ),
]


Measured = Annotated[
    bool,
    typer.Option(
        "--measured/--no-measured",
        help="Use rates that your own jobs have measured for this model, and AIConfigurator's tables if installed.",
        rich_help_panel="Devices",
    ),
]


class Where(NamedTuple):
    """Names in the commands.

    Attributes:
        load: path or name of the model, as servers load it; None for the file that was read.
        port: HTTP port of the first server.
        listen: address at which servers take requests; empty for their default.
    """

    load: str | None = None
    port: int = FIRST_PORT
    listen: str = ""


class FitReport(msgspec.Struct, kw_only=True):
    """Report of `corral fit`.

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


def check_server(server: str | None) -> None:
    """Refuse an unknown server.

    Raises:
        CommandError: it is not one of `SERVERS`.
    """
    if server is not None and server not in SERVERS:
        raise exits.CommandError(f"--server {server!r}: there are {', '.join(SERVERS)}", exits.USAGE)


def ask(
    question: Asked,
    choose: int,
    server: str | None,
    where: Where,
    nats: str | None,
    timeout: float,
    *,
    measured: bool = True,
) -> FitReport:
    """Ask the planner, and make the commands of the chosen plan.

    Args:
        question: what is asked.
        choose: number of the plan.
        server: whose commands; None for all.
        where: names in the commands.
        nats: URL of the bus; None for the default.
        timeout: for each answer.
        measured: use rates that were measured, behind those of a profile.
    """

    async def work() -> tuple[ServeWork, ServeFit]:
        async with connected(nats, timeout=timeout) as client:
            asked = question.work
            if measured:
                asked, problem = await with_measured_rates(client, asked)
                if problem:
                    say(f"corral: {problem}")
            return asked, await client.fit_work(asked, with_more=question.more, **question.fields)

    asked, found = run(work())
    report = FitReport(model=loaded_path(question.path), work=asked, fit=found)
    if report.fit.plans:
        report.offers = offers(report, chosen(report.fit, choose), server, where)
    return report


def loaded_path(path: str) -> str:
    """Absolute path that servers load a model from that was read here: the folder of its files, or a GGUF file."""
    if not path:
        return ""
    place = Path(path).absolute()
    if place.is_dir():
        parts = [] if (place / "config.json").is_file() else sorted(place.glob("*.gguf"))
        return str(parts[0] if parts else place)
    return str(place if place.suffix == ".gguf" else place.parent)


def offers(
    report: FitReport, plan: ServePlan, server: str | None, where: Where, addresses: Mapping[str, str] | None = None
) -> list[Offer]:
    """Commands of one server, or of all."""
    wanted = [server] if server is not None else list(SERVERS)
    path = named(report, where) or "MODEL"
    return [offer(name, plan, report.work, path, addresses, port=where.port, listen=where.listen) for name in wanted]


def named(report: FitReport, where: Where) -> str:
    """Path or name of the model, as servers load it; empty if it was described by numbers."""
    return where.load or report.model or report.work.model.name


def chosen(found: ServeFit, number: int) -> ServePlan:
    """The plan of a number.

    Raises:
        CommandError: there are fewer.
    """
    if number > len(found.plans):
        count = len(found.plans)
        there = f"there are {count} plans" if count > 1 else "there is one plan"
        raise exits.CommandError(f"--choose {number}: {there}", exits.USAGE)
    return found.plans[number - 1]


def read(file: Path) -> FitReport:
    """Read what `corral fit --json` printed.

    Raises:
        CommandError: it can't be read, or is something else.
    """
    try:
        return msgspec.json.decode(file.read_bytes(), type=FitReport)
    except OSError as error:
        raise exits.CommandError(f"{file} can't be read: {error.strerror or error}", exits.USAGE) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise exits.CommandError(f"{file} holds no plans of `corral fit --json`: {error}", exits.USAGE) from None
