"""Tables and views of the rollups in a lake: the same columns as the embedded storage's. `partition.py` writes them."""

from __future__ import annotations

from typing import Final

from duckdb import DuckDBPyConnection

from ....schemas.metrics import METRICS
from ... import views
from .. import rollup_columns as shapes
from ..rollup_columns import HOUR, LEVELS, MINUTE, TEN_SECONDS, Level
from ..schema import sql_text
from ..statements import add_missing
from .progress import Progress

_METRICS: Final = list(METRICS.values())
_BINNED: Final = shapes.binned(_METRICS)


_SERIES: Final = "concat(host, '/', device) AS series"
"""Name of a device in the views that other views join: a lake has no numbers for devices."""


def create(connection: DuckDBPyConnection) -> None:
    """Create the tables of a new lake."""
    key = "time TIMESTAMPTZ, host VARCHAR, device VARCHAR"
    for level in LEVELS:
        columns = ", ".join(f"{name} {sql}" for name, sql in shapes.columns(_METRICS, level))
        connection.execute(f"CREATE TABLE {level.table} ({key}, {columns})")
        if level.bins:
            connection.execute(f"CREATE TABLE {level.table}_bins ({key}, metric VARCHAR, bin SMALLINT, n UINTEGER)")


def shape(level: Level) -> list[tuple[str, str]]:
    """Name and type of each column of a level apart from its key."""
    return shapes.columns(_METRICS, level)


def add_columns(connection: DuckDBPyConnection) -> None:
    """Add the columns that the rollups of an older lake lack."""
    for level in LEVELS:
        add_missing(connection, level.table, shapes.columns(_METRICS, level))


def take_progress(connection: DuckDBPyConnection) -> Progress:
    """Progress of the rollups of a lake of version 4 or older, which had one owner; its table is dropped."""
    rows = connection.execute("SELECT level, snapshot FROM store.rolled").fetchall()
    done = {str(level): int(snapshot) for level, snapshot in rows}
    connection.execute("DROP TABLE store.rolled")
    samples, hours = min(done.get(TEN_SECONDS.name, 0), done.get(MINUTE.name, 0)), done.get(HOUR.name, 0)
    # Hours were made up to a snapshot of the samples. The minutes that were written after it are theirs since then.
    return Progress(samples, min(samples, hours))


def view_statements() -> list[str]:
    """Statements that create or replace the views and macros of a lake."""
    found: list[str] = []
    linear = ", ".join(sql_text(metric.name) for metric in _BINNED if shapes.is_linear(metric))
    for level in LEVELS:
        columns = ", ".join(shapes.shown(level))
        found.append(f"VIEW rollup_{level.name} AS SELECT time, host, device, {columns} FROM {level.table}")
        found.append(f"VIEW store.series_{level.name} AS SELECT time, {_SERIES}, {columns} FROM {level.table}")
        if level.bins:
            found.append(
                f"VIEW rollup_{level.name}_bins AS SELECT time, host, device, metric, "
                f"CASE WHEN metric IN ({linear}) THEN bin WHEN bin = {shapes.ZERO_BIN} THEN 0 "
                f"ELSE pow({shapes.BIN_RATIO}, bin) END AS value, n FROM {level.table}_bins"
            )
            found.append(
                f"VIEW store.series_{level.name}_bins AS SELECT time, {_SERIES}, metric, bin, n FROM {level.table}_bins"
            )
    hours = shapes.HOUR.table
    found.append(f"VIEW store.series AS SELECT DISTINCT {_SERIES}, host, device FROM {hours}")
    found.append(f"MACRO {shapes.WEIGHTED_QUANTILE}")
    found += [f"VIEW {name} AS {sql}" for name, sql in views.definitions()]
    rows = ", ".join(f"({sql_text(v.name)}, {sql_text(v.question)})" for v in views.VIEWS.values())
    found.append(f"VIEW questions AS FROM (VALUES {rows}) AS q(view, question)")
    return [f"CREATE OR REPLACE {statement}" for statement in found] + [
        f"COMMENT ON VIEW {view.name} IS {sql_text(view.question)}" for view in views.VIEWS.values()
    ]
