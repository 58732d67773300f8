"""Growth of a statement in DuckDB's parser, which copies CASE values and windows, computed from its text."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Final

import duckdb
from msgspec import Struct

NODES: Final = 20_000
"""Nodes that a statement may grow by: a larger one takes DuckDB seconds to bind, or all memory."""

_WORD: Final = re.compile(r"\w+")


class TooLarge(Exception):
    """A statement grows beyond its bound; the message says how, and what to do."""


def check_text(sql: str) -> None:
    """Refuse a statement that would grow too much in the parser, or that has a CTE which DuckDB must copy.

    The parser copies the value of `CASE value WHEN … WHEN …` for each WHEN, and a window of the WINDOW clause for each
    OVER. The tree does not show if a CTE is NOT MATERIALIZED, and so copied.

    Raises:
        TooLarge: it is refused.
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
    """Yield keywords in lower case, and an empty string for other tokens and for a CASE, WHEN or END used as a name."""
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
    """Number of tokens that the parser adds."""
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
