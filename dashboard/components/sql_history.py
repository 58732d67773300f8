"""Statements that a user has run or saved. The browser keeps them; the server never gets the list."""

from __future__ import annotations

from . import LIBRARY
from .results import WhenReady


class SqlHistory(WhenReady, component="sql_history.js", esm=LIBRARY):
    """Recent statements and saved questions of a user in this browser, each with a link.

    Args:
        owner: name of the user; others who log in with the same browser don't see them.
    """

    def __init__(self, owner: str) -> None:
        super().__init__()
        self._props["owner"] = owner

    def add(self, sql: str) -> None:
        """Add a statement that was run, and offer to save it."""
        self.tell("add", sql)
