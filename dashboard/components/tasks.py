"""Grid of a job's tasks, with one cell per task, colored by its state."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any, Final

from msgspec import to_builtins
from nicegui.events import GenericEventArguments

from .. import cells
from ..job_tasks import STATES
from . import LIBRARY
from .results import WhenReady

_NAMES: Final = [state.value for state in STATES]


class TaskGrid(WhenReady, component="tasks.js", esm=LIBRARY):
    """A canvas with a cell for each of up to 100,000 tasks.

    Args:
        on_open: called with the position of the task that was chosen.
    """

    def __init__(self, on_open: Callable[[int], Any]) -> None:
        super().__init__()
        self._shown: bytes | None = None

        def opened(event: GenericEventArguments) -> Any:
            args: Any = event.args
            return on_open(args) if isinstance(args, int) and not isinstance(args, bool) else None

        self.on("open", opened)

    def show(self, indexes: Sequence[int], codes: bytes, selected: int) -> None:
        """Show the tasks; later only what has changed of their states is sent.

        Args:
            indexes: indexes of the tasks in the array, ascending.
            codes: code of the state of each, in `job_tasks.STATES`.
            selected: position of the selected task; -1 for none.
        """
        if self._shown is None or len(self._shown) != len(codes) or not self.able:
            run = (indexes.start, indexes.step) if isinstance(indexes, range) else None
            packed = "" if run else cells.packed(indexes, "I")
            self.tell("show", _NAMES, run, packed, base64.b64encode(codes).decode(), selected)
        elif update := cells.update(self._shown, codes, wide=True):
            self.tell("change", to_builtins(update))
        self._shown = codes

    def select(self, position: int) -> None:
        """Mark a task as selected; -1 for none."""
        if self.able:
            self.tell("select", position)
