"""The analytics layer: views over the history, each of which answers one question of an operator.

A view is one `.sql` file in this folder: a SELECT, and above it comments with its question and the meaning of each
column. Views read the rollups wherever these suffice, so that a month is answered as fast as a day.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Final

from duckdb import DuckDBPyConnection
from msgspec import Struct

NAMES: Final = (
    "host_clocks",
    "host_changes",
    "host_drains",
    "lease_spans",
    "lease_minutes",
    "lease_buckets",
    "lease_device_usage",
    "lease_usage",
    "idle_while_leased",
    "usage_by_owner",
    "group_usage",
    "fleet_by_hour",
    "throttling",
    "device_health",
    "memory_right_sizing",
    "without_processes",
    "processes_now",
    "devices_now",
    "stranded_capacity",
    "lease_violations",
    "queue_forecasts",
    "waiting_requests",
    "waits_by_owner",
    "waits_by_model",
    "unserved_demand",
    "duration_estimates",
    "preemptions",
    "job_summary",
    "stalled_tasks",
    "job_costs",
)
"""Names of the views, in the order in which they build on each other."""

INTERNAL: Final = ("lease_untotaled", "lease_used", "lease_idle", "lease_p95")
"""Views in the schema `store` that others are made of, about leases of which `store.lease_totals` has no rows."""
INTERNAL_AFTER: Final = "lease_buckets"
"""The views after this one may read the internal ones, and those read the views up to it."""


class View(Struct, frozen=True):
    """A view with its documentation.

    Attributes:
        name: of the view.
        question: that it answers.
        detail: how, where that needs saying; empty otherwise.
        columns: what each means, in order.
        sql: the SELECT.
    """

    name: str
    question: str
    detail: str
    columns: dict[str, str]
    sql: str


def read(name: str) -> View:
    """Read a view from its file.

    Raises:
        ValueError: the file has no question.
    """
    text = files("corral.processors.views").joinpath(f"{name}.sql").read_text(encoding="utf-8")
    words: dict[str, str] = {}
    current = ""
    lines = text.splitlines()
    for line in lines:
        if not line.startswith("--"):
            break
        if line.startswith("--   "):
            words[current] += " " + line[5:].strip()
        else:
            current, _, meaning = line[3:].partition(":")
            words[current] = meaning.strip()
    question = words.pop("question", "")
    if not question:
        raise ValueError(f"{name}.sql: the first line has to be its question")
    detail = words.pop("detail", "")
    sql = "\n".join(line for line in lines if not line.startswith("--")).strip()
    return View(name, question, detail, words, sql)


def internal(name: str) -> str:
    """Read the SELECT of an internal view from its file."""
    text = files("corral.processors.views").joinpath("internal").joinpath(f"{name}.sql").read_text(encoding="utf-8")
    return text.strip()


VIEWS: Final = {name: read(name) for name in NAMES}
"""All views by name."""
INTERNAL_VIEWS: Final = {f"store.{name}": internal(name) for name in INTERNAL}
"""All internal views by name, with their schema."""


def definitions() -> list[tuple[str, str]]:
    """Name and SELECT of each view, the internal ones included, in the order in which they are created."""
    found: list[tuple[str, str]] = []
    for view in VIEWS.values():
        found.append((view.name, view.sql))
        if view.name == INTERNAL_AFTER:
            found += INTERNAL_VIEWS.items()
    return found


def install(connection: DuckDBPyConnection) -> None:
    """Recreate all views in the schema `main`. The tables and rollups that they read must exist."""
    connection.begin()
    try:
        for name, sql in definitions():
            connection.execute(f"CREATE OR REPLACE VIEW {name if '.' in name else f'main.{name}'} AS {sql}")
        for view in VIEWS.values():
            connection.execute(f"COMMENT ON VIEW main.{view.name} IS {_text(view.question)}")
            for column, meaning in view.columns.items():
                connection.execute(f'COMMENT ON COLUMN main.{view.name}."{column}" IS {_text(meaning)}')
        rows = ", ".join(f"({_text(view.name)}, {_text(view.question)})" for view in VIEWS.values())
        connection.execute(f"CREATE OR REPLACE VIEW main.questions AS FROM (VALUES {rows}) AS q(view, question)")
        connection.commit()
    except BaseException:
        connection.rollback()
        raise


def bring_up(connection: DuckDBPyConnection, tables: str) -> None:
    """Call `install` unless these views exist already: creating them takes half a second.

    Args:
        connection: to a database with the tables and rollups.
        tables: description of these; if it has changed, every view is recreated.
    """
    made = hashlib.sha256(repr((list(VIEWS.values()), INTERNAL_VIEWS, tables)).encode()).hexdigest()
    row = connection.execute(
        "SELECT comment FROM duckdb_views() WHERE schema_name = 'main' AND view_name = 'questions'"
    ).fetchone()
    if row is None or row[0] != made:
        install(connection)
        # Any Corral that creates views recreates this one as well, and so removes the comment.
        connection.execute(f"COMMENT ON VIEW main.questions IS {_text(made)}")


def document() -> str:
    """Render `docs/views.md`: every view with its question and its columns."""
    lines = [
        "# Views",
        "",
        "Each view answers one question. Ask any of them with `corral query`, or join and filter them like tables:",
        "",
        "```console",
        '$ corral query "FROM idle_while_leased ORDER BY idle_kwh DESC LIMIT 10"',
        "$ corral query \"SELECT name, avg(energy_kwh) FROM lease_usage WHERE owner = 'alice' GROUP BY name\"",
        "```",
        "",
        "`FROM questions` shows the list below in SQL, and `DESCRIBE` a view's types. This page is generated from the "
        "comments in `processors/views/*.sql`; [numbers](numbers.md) says how each number is computed, and what a "
        "silence does to it.",
        "",
        "| view | question |",
        "| --- | --- |",
        *(f"| [`{view.name}`](#{view.name}) | {view.question} |" for view in VIEWS.values()),
        "",
    ]
    for view in VIEWS.values():
        lines += [f"## {view.name}", "", f"**{view.question}**", ""]
        if view.detail:
            lines += [view.detail, ""]
        lines += ["| column | meaning |", "| --- | --- |"]
        lines += [f"| `{column}` | {meaning} |" for column, meaning in view.columns.items()]
        lines.append("")
    return "\n".join(lines)


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
