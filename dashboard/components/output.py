"""View of what a task prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import LIBRARY
from .results import WhenReady


class OutputView(WhenReady, component="output.js", esm=LIBRARY):
    """Text that grows at its end, with a note where a part is missing. It can stay at its end as it grows."""

    def clear_text(self) -> None:
        """Remove all text."""
        self.tell("reset")

    def append(self, pieces: Sequence[tuple[str, str]]) -> None:
        """Add pieces: each a note about what is missing before it, empty if nothing is, and its text."""
        self.tell("append", [list[Any](piece) for piece in pieces])
