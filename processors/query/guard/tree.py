"""Statements as DuckDB's parser sees them: `json_serialize_sql` as nested objects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast


def objects(tree: Any, *, subqueries: bool = True) -> Iterator[dict[str, Any]]:
    """Yield every object of a tree. Constants are leaves: what they hold is data, never a node.

    Args:
        tree: of a statement, or a part of it.
        subqueries: true to descend into them.
    """
    stack = [tree]
    while stack:
        part = stack.pop()
        if isinstance(part, list):
            stack.extend(cast("list[Any]", part))
        elif isinstance(part, dict):
            node = cast("dict[str, Any]", part)
            yield node
            if node.get("class") != "CONSTANT" and (subqueries or node.get("class") != "SUBQUERY"):
                stack.extend(node.values())
