"""How large a statement becomes while DuckDB binds it, computed from its text and its tree before it does.

DuckDB replaces names by what they stand for: a CTE, a view, an alias of the same SELECT, a macro's argument, `*`. Where
each level of a short statement says the level below twice, it doubles with each; and while DuckDB expands it, neither a
timeout nor a cancellation is heard. What is counted here are the nodes that come of it, rather too many than too few.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, cast

import duckdb
from duckdb import DuckDBPyConnection
from msgspec import Struct

NODES: Final = 20_000
"""That a statement may grow by: what is larger takes DuckDB seconds to bind, or all memory."""

BETWEENS: Final = 3
"""DuckDB goes over the value before a BETWEEN so many times."""

_WORD: Final = re.compile(r"\w+")
WORDS: Final = 4
"""Of a view's text take DuckDB as long as a node."""

_QUERIES: Final = ("SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE")
_TEXT: Final = re.compile(r"'[^']*'")
_VIEW: Final = re.compile(r"(?is)^.*?\bAS\b")


class TooLarge(Exception):
    """A statement grows beyond all bounds; the message says how, and what to do."""


class Relation(Struct, frozen=True):
    """What can stand in FROM.

    Attributes:
        nodes: that come with each mention of it.
        width: columns.
        row: nodes of the values of all columns.
        values: nodes of the value of a column, by its name in lower case.
        other: of the columns that are not in `values`, at most.
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
        """The same where columns are given other names: which is which is not followed."""
        return Relation(self.nodes, self.width, self.row, {}, self.largest) if names else self


class Catalogue(Struct, frozen=True):
    """What a database has, as far as it grows.

    Attributes:
        relations: tables and views, by name in lower case.
        macros: how often one says an argument, by its name in lower case.
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
    """Words of a view's text, with those of the views that it mentions."""
    if name not in sizes:
        sizes[name] = 1  # a column may be called as a view
        said = words.get(name, [])
        sizes[name] = 1 + len(said) // WORDS + sum(_view_size(word, words, sizes) for word in said if word in words)
    return sizes[name]


def _macros(rows: Iterable[tuple[str, list[str] | None, str | None]]) -> dict[str, int]:
    """A macro may have several forms: the largest counts."""
    texts: dict[str, list[tuple[list[str], list[str]]]] = {}
    for name, parameters, definition in rows:
        texts.setdefault(name, []).append(([p.lower() for p in parameters or []], _words(definition or "")))
    found: dict[str, int] = {}

    def times(name: str) -> int:
        if name not in found:
            found[name] = 1  # a parameter may be called as a macro
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


# Before it is parsed: DuckDB's parser itself copies two things.


def check_text(sql: str) -> None:
    """Refuse what would grow in the parser: the value of `CASE value WHEN … WHEN …` is copied for each WHEN, a window
    of the WINDOW clause for each OVER. And what the tree does not show: a CTE that DuckDB must copy.

    Raises:
        TooLarge: it would grow too much.
    """
    lower = sql.lower()
    if not any(word in lower for word in ("case", "window", "materialized")):
        return
    if any(not char.isascii() and unicodedata.category(char)[0] in "ZC" for char in sql):
        # The parser takes some of them for spaces, the tokenizer does not.
        raise TooLarge("a CASE, WINDOW or MATERIALIZED beside characters that can't be seen: write plain spaces")
    tokens = list(_tokens(sql))
    if ("not", "materialized") in itertools.pairwise(tokens):
        raise TooLarge("NOT MATERIALIZED is not for readers: leave both words away")
    copies = _copies(tokens)
    if copies > NODES:
        raise TooLarge(
            "the SQL says too much again and again: write CASE WHEN value = … in place of CASE value WHEN …, and fewer "
            "OVERs of the windows in a WINDOW clause"
        )


def _tokens(sql: str) -> Iterator[str]:
    """Keywords in lower case, anything else as nothing; a CASE, WHEN or END that is a label is nothing, too."""
    text = sql.encode(errors="replace")
    label = False
    for place, kind in duckdb.tokenize(sql):
        found = _WORD.match(text[place : place + 16].decode(errors="ignore"))
        word = found[0].lower() if found and kind == duckdb.token_type.keyword else ""
        yield "" if label and word in ("case", "when", "end") else word
        label = word == "as" or (kind == duckdb.token_type.operator and text[place : place + 1] == b".")


class _Case(Struct):
    """A CASE that is open: where it began, what stands before its first WHEN, and its WHENs so far."""

    start: int
    value: int = 0
    whens: int = 0


def _copies(tokens: Iterable[str]) -> int:
    """Tokens that the parser adds."""
    cases: list[_Case] = []
    overs = window = copied = place = 0
    for place, token in enumerate(tokens, 1):
        if token == "case":
            cases.append(_Case(place + copied))
        elif token in ("when", "end") and not cases:
            raise TooLarge("a CASE and its END do not match")
        elif token == "when":
            case = cases[-1]
            case.value = case.value if case.whens else place + copied - case.start - 1
            case.whens += 1
        elif token == "end":
            case = cases.pop()
            copied = min(copied + case.value * max(0, case.whens - 1), 100 * NODES)
        elif token == "over":
            overs += 1
        elif token == "window":
            window = window or place
    if cases:
        raise TooLarge("a CASE and its END do not match")
    return copied + overs * (place - window if window else 0)


# After that: what binding adds.


class _Scope:
    """The names that an expression may say."""

    def __init__(self, outer: _Scope | None = None) -> None:
        self.outer = outer
        self.values: dict[str, int] = {}
        self.other = outer.other if outer else 1
        self.widths: dict[str, int] = {}
        self.width = 0
        self.row = 0
        self.nodes = 0
        # What `*` passes on: of the own relations alone.
        self.own: dict[str, int] = {}
        self.own_other = 1
        self.largest = 1

    def add(self, relation: Relation, alias: str) -> None:
        self.nodes += relation.nodes
        self.width += relation.width
        self.row += relation.row
        for name, value in relation.values.items():
            self.own[name] = max(value, self.own.get(name, 0))
            self.name(name, value)
        self.own_other = max(self.own_other, relation.other)
        self.largest = max(self.largest, relation.largest)
        self.other = max(self.other, relation.other)
        if alias:
            # A relation's name is also a value: a struct of its columns.
            self.name(alias, relation.row)
            self.widths[alias] = max(relation.width, self.widths.get(alias, 0))

    def name(self, name: str, value: int) -> None:
        self.values[name] = max(value, self.values.get(name, 0))

    def value(self, names: Iterable[str]) -> int:
        lower = [name.lower() for name in names]
        found = 0
        scope: _Scope | None = self
        while scope is not None:
            found = max([found, *(scope.values[name] for name in lower if name in scope.values)])
            scope = scope.outer
        return found or self.other


def check_tree(tree: Mapping[str, Any], catalogue: Catalogue, written: int) -> None:
    """Refuse a statement that becomes too large once all names in it stand for what they mean.

    Args:
        tree: of one statement, as DuckDB serialises it.
        catalogue: of the database.
        written: characters of the statement, which are no growth.

    Raises:
        TooLarge: it does.
    """
    expander = _Expander(catalogue, NODES + written)
    for statement in cast("list[dict[str, Any]]", tree["statements"]):
        expander.query(statement["node"], {}, None)


class _Expander:
    def __init__(self, catalogue: Catalogue, most: int) -> None:
        self._catalogue = catalogue
        self._most = most

    def _check(self, nodes: int) -> int:
        """Stop at once: counting on would take as long as what is counted."""
        if nodes > self._most:
            raise TooLarge(
                f"the SQL becomes more than {NODES:,} parts once its names are replaced by what they stand for: "
                "say each view, CTE, alias and * less often"
            )
        return nodes

    def query(self, node: dict[str, Any], ctes: Mapping[str, Relation], outer: _Scope | None) -> Relation:
        """What a SELECT, or several that are united, come to."""
        ctes, nodes = self._ctes(node, ctes, outer)
        kind = node.get("type")
        if kind == "SELECT_NODE":
            result = self._select(node, ctes, outer)
        elif kind == "CTE_NODE":
            own = self.query(node["query"], ctes, outer)
            result = self.query(node["child"], {**ctes, str(node["cte_name"]).lower(): own}, outer)
        elif kind == "RECURSIVE_CTE_NODE":
            first = self.query(node["left"], ctes, outer)
            seen = Relation(1, first.width, first.row, {}, first.largest)
            again = self.query(node["right"], {**ctes, str(node["cte_name"]).lower(): seen}, outer)
            result = Relation(first.nodes + again.nodes, first.width, first.row, {}, first.largest)
        else:
            result = self._united(node, ctes, outer)
        nodes = self._check(result.nodes + nodes)
        return Relation(nodes, result.width, result.row, result.values, result.other)

    def _ctes(
        self, node: dict[str, Any], ctes: Mapping[str, Relation], outer: _Scope | None
    ) -> tuple[Mapping[str, Relation], int]:
        nodes = 0
        found = cast("list[dict[str, Any]]", (node.get("cte_map") or {}).get("map") or [])
        if not found:
            return ctes, 0
        known = dict(ctes)
        for entry in found:
            # The tree does not say whether DuckDB is to keep the rows or to copy the statement: as if it copied.
            value = entry["value"]
            relation = self.query(value["query"]["node"], known, outer).renamed(value.get("aliases"))
            nodes = self._check(nodes + relation.nodes)
            known[str(entry["key"]).lower()] = relation
        return known, nodes

    def _united(self, node: dict[str, Any], ctes: Mapping[str, Relation], outer: _Scope | None) -> Relation:
        parts: list[Relation] = []
        by_name = False
        stack = [node]
        scope = _Scope(outer)
        while stack:
            part = stack.pop()
            if part.get("type") != "SET_OPERATION_NODE" or (
                part is not node and (part.get("cte_map") or {}).get("map")
            ):
                parts.append(self.query(part, ctes, outer))
                continue
            by_name = by_name or "NAME" in str(part.get("setop_type"))
            children = part.get("children") or [part.get("left"), part.get("right")]
            stack.extend(child for child in children if child)
            scope.nodes += self._expression(part.get("modifiers"), ctes, scope)
        widths = [part.width for part in parts]
        rows = [part.row for part in parts]
        together = sum if by_name else max
        return Relation(
            scope.nodes + sum(part.nodes for part in parts),
            together(widths),
            together(rows),
            {},
            max(part.largest for part in parts),
        )

    def _select(self, node: dict[str, Any], ctes: Mapping[str, Relation], outer: _Scope | None) -> Relation:
        scope = _Scope(outer)
        self._from(node.get("from_table"), ctes, scope)
        values: dict[str, int] = {}
        other, width, row, nodes = 1, 0, 0, scope.nodes + 1
        for item in cast("list[dict[str, Any]]", node["select_list"]):
            columns, value = self._item(item, ctes, scope)
            nodes = self._check(nodes + columns * value)
            width += columns
            row += columns * value
            alias = str(item.get("alias") or (item.get("column_names") or [""])[-1]).lower()
            if item.get("class") == "STAR" and not _changes(item):
                for name, own in scope.own.items():
                    values[name] = max(own, values.get(name, 0))
                other = max(other, scope.own_other)
            elif alias and columns == 1:
                values[alias] = max(value, values.get(alias, 0))
                # From here on the alias may be said.
                scope.name(alias, value)
            else:
                other = max(other, value)
        if any(_changes(item) or _has_star(item) for item in node["select_list"]):
            # Columns have kept their names and changed their values.
            other = max([other, *values.values()])
            values = {}
        rest = [value for key, value in node.items() if key not in ("select_list", "from_table", "cte_map")]
        return Relation(nodes + self._expression(rest, ctes, scope), max(width, 1), max(row, 1), values, other)

    def _item(self, item: dict[str, Any], ctes: Mapping[str, Relation], scope: _Scope) -> tuple[int, int]:
        """How many columns an item makes, and the nodes of each."""
        columns = 1
        if item.get("class") == "STAR" and not item.get("columns"):
            name = str(item.get("relation_name") or "").lower()
            columns = scope.widths.get(name, max(scope.width, scope.value([name]))) if name else scope.width
            inside = self._expression([value for key, value in item.items() if key != "relation_name"], ctes, scope)
            share = -(-scope.row // max(scope.width, 1))
            return max(columns, 1), max(share, 1) + inside
        if _has_star(item):
            columns = max(scope.width, 1)
        value = max(self._expression(item, ctes, scope), 1)
        if item.get("function_name") in ("unnest", "unlist"):
            columns *= value
            value = 1
        return columns, value

    def _from(self, source: dict[str, Any] | None, ctes: Mapping[str, Relation], scope: _Scope) -> None:
        """Add what stands in FROM to a scope, from left to right."""
        stack: list[Any] = [source]
        joins: list[dict[str, Any]] = []
        while stack:
            node = stack.pop()
            if not isinstance(node, dict):
                continue
            found = cast("dict[str, Any]", node)
            alias = str(found.get("alias") or found.get("table_name") or "").lower()
            names = found.get("column_name_alias")
            kind = found.get("type")
            if kind == "JOIN":
                joins.append(found)
                stack += [found.get("right"), found.get("left")]
                continue
            relation = self._relation(found, kind, ctes, scope).renamed(names)
            self._check(scope.nodes + relation.nodes)
            scope.add(relation, alias)
        for join in joins:
            # Their conditions may say columns of both sides.
            parts = [value for key, value in join.items() if key not in ("left", "right")]
            scope.nodes += self._expression(parts, ctes, scope)

    def _relation(self, node: dict[str, Any], kind: Any, ctes: Mapping[str, Relation], scope: _Scope) -> Relation:
        if kind == "BASE_TABLE":
            name = str(node["table_name"]).lower()
            if name in ctes and not node.get("schema_name"):
                return ctes[name]
            return self._catalogue.relations.get(name, Relation(1, 64, 64))
        if kind == "SUBQUERY":
            return self.query(node["subquery"]["node"], ctes, scope)
        if kind == "SHOW_REF" and node.get("query"):
            inner = self.query(node["query"], ctes, scope)
            return Relation(inner.nodes + 16 * inner.row, 16, 16)
        if kind == "TABLE_FUNCTION":
            nodes = self._expression(node.get("function"), ctes, scope)
            return Relation(nodes, max(8, nodes), max(8, nodes), {}, nodes)
        if kind == "EXPRESSION_LIST":
            lines = cast("list[list[Any]]", node.get("values") or [])
            nodes = self._expression(lines, ctes, scope)
            # A value is no larger than a line's part of all: lines have the same types.
            row = -(-nodes // max(1, len(lines)))
            return Relation(nodes, max(map(len, lines), default=1), row, {}, row)
        if kind == "PIVOT":
            return self._pivot(node, ctes, scope)
        return Relation()

    def _pivot(self, node: dict[str, Any], ctes: Mapping[str, Relation], scope: _Scope) -> Relation:
        inner = _Scope(scope)
        self._from(node.get("source"), ctes, inner)
        columns = 1
        for pivot in cast("list[dict[str, Any]]", node.get("pivots") or []):
            columns *= max(1, len(pivot.get("entries") or []))
        each = max(1, self._expression(node.get("aggregates"), ctes, inner))
        width = inner.width + columns * max(1, len(node.get("aggregates") or []))
        nodes = inner.nodes + columns * each + self._expression(node.get("pivots"), ctes, inner)
        return Relation(nodes, width, inner.row + columns * each, {}, max(inner.largest, each))

    def _expression(self, expression: Any, ctes: Mapping[str, Relation], scope: _Scope) -> int:
        """Nodes of an expression, or of all that are in a part of the tree."""
        nodes = 0
        stack: list[tuple[Any, int]] = [(expression, 1)]
        while stack:
            part, times = stack.pop()
            if isinstance(part, list):
                stack.extend((value, times) for value in cast("list[Any]", part))
                continue
            if not isinstance(part, dict):
                continue
            node = cast("dict[str, Any]", part)
            kind = node.get("class")
            if kind is None and node.get("type") in _QUERIES:
                nodes += times * self.query(node, ctes, scope).nodes
                continue
            if kind == "CONSTANT":
                nodes += times
                continue
            if kind == "COLUMN_REF":
                nodes += times * scope.value(node["column_names"])
                continue
            if kind == "POSITIONAL_REFERENCE" or kind == "STAR":
                nodes += times * max(scope.largest, scope.other)
            elif kind is not None:
                nodes += times
            stack.extend(self._children(node, times))
        return nodes

    def _children(self, node: dict[str, Any], times: int) -> Iterator[tuple[Any, int]]:
        """What is below a node, and how often DuckDB goes over it."""
        if node.get("class") == "BETWEEN":
            yield node["input"], times * BETWEENS
            yield from ((value, times) for key, value in node.items() if key != "input")
            return
        said = times * self._catalogue.macros.get(str(node.get("function_name", "")).lower(), 1)
        children = cast("list[dict[str, Any]]", node.get("children") or [])
        # What a lambda makes of an element is as large as often as it says the element.
        elements = max([1, *(_mentions(child) for child in children if child.get("class") == "LAMBDA")])
        yield from ((child, said if child.get("class") == "LAMBDA" else said * elements) for child in children)
        yield from ((value, times) for key, value in node.items() if key != "children")


def _parts(expression: Any, *, subqueries: bool = True) -> Iterator[dict[str, Any]]:
    """Every object of an expression."""
    stack = [expression]
    while stack:
        part = stack.pop()
        if isinstance(part, list):
            stack.extend(cast("list[Any]", part))
        elif isinstance(part, dict):
            node = cast("dict[str, Any]", part)
            yield node
            if node.get("class") != "CONSTANT" and (subqueries or node.get("class") != "SUBQUERY"):
                stack.extend(node.values())


def _has_star(item: dict[str, Any]) -> bool:
    """Whether an item stands for as many columns as there are."""
    plain = item.get("class") == "STAR" and not item.get("columns")
    return not plain and any(part.get("class") == "STAR" for part in _parts(item, subqueries=False))


def _changes(item: dict[str, Any]) -> bool:
    """Whether a `*` gives columns other values or names."""
    return item.get("class") == "STAR" and any(item.get(key) for key in ("replace_list", "rename_list"))


def _mentions(node: dict[str, Any]) -> int:
    """How often a lambda says its parameters."""
    names = {str(part["column_names"][-1]).lower() for part in _parts(node.get("lhs")) if part.get("column_names")}
    refs = (part["column_names"] for part in _parts(node.get("expr")) if part.get("class") == "COLUMN_REF")
    return sum(str(ref[0]).lower() in names for ref in refs)
