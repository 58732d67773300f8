"""Hardening of a DuckDB instance: what neither readers nor the storage need is denied for good."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from duckdb import DuckDBPyConnection


def lock(
    connection: DuckDBPyConnection,
    *,
    directories: Sequence[Path | str] = (),
    memory_bytes: int | None = None,
    spill_bytes: int | None = None,
    changeable: Sequence[str] = (),
) -> None:
    """Restrict an instance for good: deny access that neither readers nor the storage need.

    Call it once the storage has attached and loaded all that it needs. Afterwards no code in this process can open a
    file outside `directories` in the instance, load an extension, or change a setting other than `changeable`.

    Args:
        connection: to the instance.
        directories: that may still be read and written (the archive, and where snapshots go); a text is the URL of one.
        memory_bytes: for the instance; None leaves DuckDB's own limit.
        spill_bytes: on disk, for what does not fit; None leaves DuckDB's own limit.
        changeable: settings that may still be changed, by any statement in the instance.
    """
    if memory_bytes is not None:
        connection.execute(f"SET memory_limit = '{memory_bytes}B'")
    if spill_bytes is not None:
        connection.execute(f"SET max_temp_directory_size = '{spill_bytes}B'")
    names = [found.rstrip("/") if isinstance(found, str) else str(found.resolve()) for found in directories]
    allowed = ", ".join("'" + name.replace("'", "''") + "/'" for name in names)
    sql_names = [f"'{name}'" for name in changeable]
    for setting in (
        # A cursor does not inherit what its parent has set for itself: readers get UTC too.
        "GLOBAL TimeZone = 'UTC'",
        "python_enable_replacements = false",
        "autoinstall_known_extensions = false",
        "autoload_known_extensions = false",
        "allow_community_extensions = false",
        f"allowed_directories = [{allowed}]",
        "enable_external_access = false",
        f"allowed_configs = [{', '.join(sql_names)}]",
        "lock_configuration = true",
    ):
        connection.execute(f"SET {setting}")
