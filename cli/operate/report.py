"""`corral report`: what a period's leases used and cost, as text, HTML or PDF."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from ...client.reports.asking import ask_usage, scope_of
from ...client.reports.forms import Form, renderer
from ...client.reports.periods import FORMS, Period, between, period_of
from ...client.reports.usage import UsageReport
from ...client.reports.usage_sql import By, Filters
from ...schemas.values.units import parse_seconds
from ..clock_times import zone_of
from ..exits import FAILED, USAGE, CommandError
from ..options import NatsUrl, connected, run, say
from ..price_list import read_prices

report = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", add_completion=False)


@report.callback()
def reports() -> None:
    """Report on the use of the fleet in a period.

    Examples:
      corral report usage --period last-month
      corral report usage --period 2026-10 --by group,owner --prices prices.toml --format html -o october.html
    """


@report.command()
def usage(
    period: Annotated[str | None, typer.Option("--period", metavar="PERIOD", help=f"{FORMS} (default).")] = None,
    begin: Annotated[
        str | None, typer.Option("--from", metavar="TIME", help="Begin, instead of --period: a date, or a time.")
    ] = None,
    end: Annotated[
        str | None,
        typer.Option("--to", metavar="TIME", help="End: a date, which counts to its end, or a time."),
    ] = None,
    zone: Annotated[
        str | None,
        typer.Option("--zone", metavar="ZONE", help="Time zone of days, such as Europe/Berlin. Default: this host's."),
    ] = None,
    by: Annotated[str, typer.Option("--by", metavar="WHAT,…", help="Rows: group, owner, model.")] = "group,owner,model",
    prices: Annotated[
        Path | None, typer.Option("--prices", metavar="FILE", help="Prices, in TOML; without them there is no cost.")
    ] = None,
    form: Annotated[Form, typer.Option("--format", "-f", help="Form of the report.")] = Form.MARKDOWN,
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to a file. Default: stdout.")
    ] = None,
    owner: Annotated[str | None, typer.Option("--owner", metavar="NAME", help="Only this owner.")] = None,
    mine: Annotated[bool, typer.Option("--mine", help="Only your own use.")] = False,
    group: Annotated[
        str | None, typer.Option("--group", metavar="GROUP", help="Only this group, and those within.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Only these models: a name, a part of it, or a glob.")
    ] = None,
    timeout: Annotated[str, typer.Option("--timeout", metavar="TIME", help="Timeout of each query.")] = "2m",
    nats: NatsUrl = None,
) -> None:
    """Report what was asked, granted, used, left idle and paid in a period.

    Leases are cut at the ends of the period. The same history gives the same bytes (docs/how-to/reports.md). HTML and
    PDF need the extra `report`.

    Examples:
      corral report usage --period last-month
      corral report usage --period 2026-10 --by group,owner,model --prices prices.toml --format pdf -o october.pdf
      corral report usage --mine --period this-week
      corral report usage --from 2026-10-01 --to 2026-10-15 --zone UTC --format csv > usage.csv
    """
    if owner is not None and mine:
        raise CommandError("--owner and --mine exclude each other", USAGE)
    if form is Form.PDF and out is None and sys.stdout.isatty():
        raise CommandError("a PDF is not for a terminal: write it to a file with -o", USAGE)
    form = Form.JSON if json else form
    now = datetime.now(UTC)
    about, columns = _period(period, begin, end, zone, now), _columns(by)
    price_list = None if prices is None else read_prices(prices)
    render = renderer(form)

    async def ask() -> UsageReport:
        async with connected(nats) as client:
            filters = Filters(owner=client.owner if mine else owner, group=group, model=model)
            try:
                scope = scope_of(about, columns, filters, now)
            except ValueError as error:
                raise CommandError(str(error), USAGE) from None
            return await ask_usage(client, scope, price_list, _seconds(timeout))

    made = run(ask())
    for one in made.unpriced:
        say(f"corral: warning: no price for {one.model or 'an unknown model'} ({one.granted_gpu_hours} GPU-hours)")
    _write(render(made), out)


def _period(name: str | None, begin: str | None, end: str | None, zone: str | None, now: datetime) -> Period:
    if name is not None and (begin is not None or end is not None):
        raise CommandError("--period and --from/--to exclude each other", USAGE)
    if end is not None and begin is None:
        raise CommandError("--to needs --from", USAGE)
    named = zone_of(zone).name
    try:
        if begin is not None:
            return between(begin, end, named, now)
        return period_of(name or "last-month", named, now)
    except ValueError as error:
        raise CommandError(f"{'--period' if begin is None else '--from/--to'}: {error}", USAGE) from None


def _columns(text: str) -> list[By]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if name not in list(By)]
    if wrong or not names or len(set(names)) < len(names):
        raise CommandError(f"--by {text!r}: write one or more of {', '.join(By)}, separated by commas", USAGE)
    return [By(name) for name in names]


def _seconds(timeout: str) -> float:
    try:
        found = parse_seconds(timeout)
    except ValueError as error:
        raise CommandError(f"--timeout: {error}", USAGE) from None
    if not 0 < found <= 600:
        raise CommandError(f"--timeout {timeout}: must be above 0 and at most 10m", USAGE)
    return found


def _write(data: bytes, out: Path | None) -> None:
    if out is None or str(out) == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    try:
        out.write_bytes(data)
    except OSError as error:
        raise CommandError(f"can't write {out}: {error.strerror}", FAILED) from None
