"""Panel with what a job and its selected task have used, from the history."""

from __future__ import annotations

from ...client import CorralError
from ...client.jobs.summary import JobSummary, lines
from ...schemas.work.jobs import task_name
from ..fleet import problem_of
from ..html import table, tag
from ..page_frame import Frame, Notice


class SummaryPanel:
    """Use of a job, compared with what it asked for; hidden while the history knows nothing of it.

    Args:
        frame: frame of the page.
    """

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._shown: list[list[tuple[str, str]]] = []
        with tag("section", "panel") as self._place:
            with tag("div", "panel-head"):
                tag("h2", text="What it used")
                tag("span", "note", "from the history, all attempts together")
            self._notice = Notice()
            self._rows = tag("div")
        self._place.set_visibility(False)

    async def show(self, job_id: str, index: int | None) -> bool:
        """Show a job, and a task of it if an index is given. Returns true if the history knows the job."""
        names = [job_id] if index is None else [job_id, task_name(job_id, index)]
        try:
            found = [await self.frame.jobs.summary(name) for name in names]
        except CorralError as error:
            # Without a history there is nothing to show; what was shown stays.
            self._notice.tell(problem_of(error, self.frame.fleet.url) if self._shown else None)
            return bool(self._shown)
        self._notice.tell(None)
        shown = [lines(one) if one is not None else [] for one in found]
        self._place.set_visibility(any(shown))
        if shown != self._shown:
            self._shown = shown
            self._rows.clear()
            with self._rows:
                for name, one, rows in zip(names, found, shown, strict=True):
                    if rows:
                        _show(name, one, rows, headed=len(names) > 1)
        return found[0] is not None


def _show(name: str, found: JobSummary | None, rows: list[tuple[str, str]], *, headed: bool) -> None:
    if headed:
        state = f", {found.state}" if found is not None else ""
        tag("div", "note", f"{'Task' if '_' in name else 'Job'} {name}{state}").style("margin-top:8px")
    table(("", ""), rows)
