"""Size of a statement after DuckDB has bound it, computed from its tree beforehand.

DuckDB expands names: of a CTE, a view, an alias of the same SELECT, a macro's argument, `*`. If each level of a short
statement mentions the level below twice, its size doubles with each level. While DuckDB expands it, timeouts and
cancellations have no effect. The resulting nodes are counted here, as an upper estimate. What the parser copies before
that is counted in `parse_growth.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, cast

from .catalogue import Catalogue, Relation
from .parse_growth import NODES, TooLarge
from .tree import objects

BETWEENS: Final = 3
"""Number of times that DuckDB expands the value before a BETWEEN."""

_QUERIES: Final = ("SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE")


class _Scope:
    """Names that an expression may mention, with the number of nodes that each stands for."""

    def __init__(self, outer: _Scope | None = None) -> None:
        self.outer = outer
        self.values: dict[str, int] = {}
        self.other = outer.other if outer else 1
        self.widths: dict[str, int] = {}
        self.width = 0
        self.row = 0
        self.nodes = 0
        # Values that `*` passes on: only those of this scope's relations.
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
    """Refuse a statement that becomes too large once all its names are expanded.

    Args:
        tree: of one statement, as DuckDB serializes it.
        catalogue: of the database.
        written: number of characters of the statement; they are no growth, so they are added to the bound.

    Raises:
        TooLarge: it becomes too large.
    """
    expander = _Expander(catalogue, NODES + written)
    for statement in cast("list[dict[str, Any]]", tree["statements"]):
        expander.query(statement["node"], {}, None)


class _Expander:
    def __init__(self, catalogue: Catalogue, most: int) -> None:
        self._catalogue = catalogue
        self._most = most

    def _check(self, nodes: int) -> int:
        """Raise `TooLarge` as soon as the bound is exceeded: counting further would take as long as the expansion."""
        if nodes > self._most:
            raise TooLarge(
                f"the SQL becomes more than {NODES:,} parts once its names are replaced by what they stand for: "
                "say each view, CTE, alias and * less often"
            )
        return nodes

    def query(self, node: dict[str, Any], ctes: Mapping[str, Relation], outer: _Scope | None) -> Relation:
        """Size of a query's result: of a SELECT, a set operation, or a query with CTEs."""
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
            # The tree does not say if DuckDB is to materialize the CTE or to copy it: assume that it copies.
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
                # From here on the alias may be used.
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
        """Number of columns that an item of a SELECT list makes, and the nodes of each."""
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
        """Add the relations in FROM to a scope, from left to right."""
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
            # Their conditions may use columns of both sides.
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
        """Number of nodes of an expression, or of all expressions in a part of the tree."""
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
        """Children of a node, each with the number of times that DuckDB expands it."""
        if node.get("class") == "BETWEEN":
            yield node["input"], times * BETWEENS
            yield from ((value, times) for key, value in node.items() if key != "input")
            return
        said = times * self._catalogue.macros.get(str(node.get("function_name", "")).lower(), 1)
        children = cast("list[dict[str, Any]]", node.get("children") or [])
        # A lambda's result grows with the number of times that it mentions the element.
        elements = max([1, *(_mentions(child) for child in children if child.get("class") == "LAMBDA")])
        yield from ((child, said if child.get("class") == "LAMBDA" else said * elements) for child in children)
        yield from ((value, times) for key, value in node.items() if key != "children")


def _has_star(item: dict[str, Any]) -> bool:
    """True if an item is not a plain `*` but contains a star, so that it makes as many columns as there are."""
    plain = item.get("class") == "STAR" and not item.get("columns")
    return not plain and any(part.get("class") == "STAR" for part in objects(item, subqueries=False))


def _changes(item: dict[str, Any]) -> bool:
    """True if a `*` replaces or renames columns."""
    return item.get("class") == "STAR" and any(item.get(key) for key in ("replace_list", "rename_list"))


def _mentions(node: dict[str, Any]) -> int:
    """Number of times that a lambda mentions its parameters."""
    names = {str(part["column_names"][-1]).lower() for part in objects(node.get("lhs")) if part.get("column_names")}
    refs = (part["column_names"] for part in objects(node.get("expr")) if part.get("class") == "COLUMN_REF")
    return sum(str(ref[0]).lower() in names for ref in refs)
