"""Sizes of a database's tables, views and macros, to compute how a statement grows when its names are expanded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from duckdb import DuckDBPyConnection
from msgspec import Struct

WORDS: Final = 4
"""This many words of a view's text take DuckDB as long as one node."""

_WORD: Final = re.compile(r"\w+")
_TEXT: Final = re.compile(r"'[^']*'")
_VIEW: Final = re.compile(r"(?is)^.*?\bAS\b")


class Relation(Struct, frozen=True):
    """Size of a relation in FROM.

    Attributes:
        nodes: number added by each mention of it.
        width: number of columns.
        row: nodes of the values of all columns.
        values: nodes of the value of a column, by its name in lower case.
        other: largest number of nodes of a column that is not in `values`.
    """

    nodes: int = 1
    width: int = 1
    row: int = 1
    values: Mapping[str, int] = {}
    other: int = 1

    @property
    def largest(self) -> int:
        """Nodes of the largest value."""
        return max(self.other, *self.values.values(), 1)

    def renamed(self, names: Any) -> Relation:
        """The relation with renamed columns. Renaming is not tracked, so each column counts as large as the largest."""
        return Relation(self.nodes, self.width, self.row, {}, self.largest) if names else self


class Catalogue(Struct, frozen=True):
    """Sizes of the relations and macros in a database.

    Attributes:
        relations: tables and views, by name in lower case.
        macros: number of times that one mentions an argument at most, by its name in lower case.
    """

    relations: Mapping[str, Relation] = {}
    macros: Mapping[str, int] = {}


def read_catalogue(cursor: DuckDBPyConnection) -> Catalogue:
    """Measure the views, tables and macros of the database."""
    found = cursor.execute(
        "SELECT lower(table_name), count(*) FROM duckdb_columns() WHERE NOT internal GROUP BY ALL"
    ).fetchall()
    widths: dict[str, int] = dict(found)
    texts = dict(cursor.execute("SELECT lower(view_name), sql FROM duckdb_views() WHERE NOT internal").fetchall())
    words = {name: _words(_VIEW.sub("", _TEXT.sub("", text or ""), count=1)) for name, text in texts.items()}
    sizes: dict[str, int] = {}
    relations = {
        name: Relation(_view_size(name, words, sizes), width, width) for name, width in widths.items() if width
    }
    macros = cursor.execute(
        "SELECT lower(function_name), parameters, macro_definition FROM duckdb_functions()"
        " WHERE function_type = 'macro'"
    ).fetchall()
    return Catalogue(relations, _macros(macros))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _view_size(name: str, words: Mapping[str, list[str]], sizes: dict[str, int]) -> int:
    """Size of a view in nodes, from the words of its text and the sizes of the views that it mentions."""
    if name not in sizes:
        sizes[name] = 1  # a column may have the name of a view
        said = words.get(name, [])
        sizes[name] = 1 + len(said) // WORDS + sum(_view_size(word, words, sizes) for word in said if word in words)
    return sizes[name]


def _macros(rows: Iterable[tuple[str, list[str] | None, str | None]]) -> dict[str, int]:
    """Number of times that each macro mentions an argument at most. Of several forms of a macro the largest counts."""
    texts: dict[str, list[tuple[list[str], list[str]]]] = {}
    for name, parameters, definition in rows:
        texts.setdefault(name, []).append(([p.lower() for p in parameters or []], _words(definition or "")))
    found: dict[str, int] = {}

    def times(name: str) -> int:
        if name not in found:
            found[name] = 1  # a parameter may have the name of a macro
            found[name] = max(_times(parameters, said) for parameters, said in texts[name])
        return found[name]

    def _times(parameters: list[str], said: list[str]) -> int:
        result = max((said.count(parameter) for parameter in parameters), default=1)
        for word in said:
            if word in texts and word not in parameters:
                result *= times(word)
        return max(result, 1)

    for name in texts:
        times(name)
    return found
