"""Panel with what a task prints: begin, end and what comes, for those who may read it."""

from __future__ import annotations

import contextlib
from typing import Any, Final

from nicegui import ui

from ...client import CorralError
from ...schemas.values.units import format_bytes
from ...schemas.work.jobs import Job, JobTask
from ..fleet import Problem, problem_of
from ..html import on_choice, tag
from ..job_output import OutputText
from ..jobs import FollowedOutput
from ..page_frame import Frame, Notice
from .output import OutputView

_PUMP_SECONDS: Final = 0.5


class OutputPanel:
    """Output of the selected task of a job, followed while the page is open.

    Args:
        frame: frame of the page.
    """

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._open = contextlib.ExitStack()
        self._followed: FollowedOutput | None = None
        self._key: tuple[str, int] | None = None
        self._owner = ""
        self._host = ""
        self._hosts: list[str] = []
        self._attempt = self._position = 0
        with tag("section", "panel") as self._place:
            with tag("div", "panel-head"):
                tag("h2", text="Output")
                with tag("div", "bar"):
                    self._note = tag("span", "note", "")
                    self._chooser = tag("div")
            self._notice = Notice()
            self._view = OutputView()
        self._place.set_visibility(False)
        frame.on_close(self.close)
        ui.timer(_PUMP_SECONDS, self._pump)

    def close(self) -> None:
        """Stop following."""
        self._followed = self._key = None
        self._open.close()

    def show(self, job: Job, task: JobTask | None) -> None:
        """Show the output of a task, which may be another one than before; None for no task."""
        self._owner = job.owner
        may = self.frame.may_read(job.owner)
        self._place.set_visibility(may and task is not None and bool(task.attempt))
        if not may or task is None or not task.attempt:
            self.close()
            return
        key = (job.job_id, task.index)
        if key != self._key:
            self.close()
            self._reset("")
            try:
                self._followed = self._open.enter_context(self.frame.jobs.follow_output(*key))
            except CorralError as error:
                self._tell(error)
                return
            self._key = key
        assert self._followed is not None
        self._followed.follow(task)
        self._choose_hosts([part.host for part in task.parts])
        self._pump()

    def _choose_hosts(self, hosts: list[str]) -> None:
        if hosts == self._hosts:
            return
        self._hosts = hosts
        self._chooser.clear()
        if self._host not in hosts:
            self._reset(hosts[0] if hosts else "")
        if len(hosts) > 1:
            with self._chooser, tag("select", "field", aria_label="Host") as chooser:
                for host in hosts:
                    tag("option", "", host, value=host, selected=host == self._host or None)
            on_choice(chooser, lambda host: self._reset(host) if host in self._hosts else None)

    def _reset(self, host: str) -> None:
        self._host = host
        self._attempt = self._position = 0
        self._view.clear_text()

    def _pump(self) -> None:
        """Send what is new to the browser."""
        followed = self._followed
        if followed is None:
            return
        if not self.frame.may_read(self._owner):
            self._place.set_visibility(False)
            self.close()
            return
        text = followed.texts.get(self._host)
        self._tell(followed.error)
        self._note.set_text(_words(text, followed.ended))
        if text is None or not self._view.able:
            return
        if text.attempt != self._attempt:
            self._reset(self._host)
            self._attempt = text.attempt
        pieces: list[tuple[str, str]] = []
        for entry in text.since(self._position):
            missing = max(0, entry.offset - self._position)
            pieces.append((_hole(missing, self._host, text.file) if missing else "", entry.text))
            self._position = entry.end
        if pieces:
            self._view.append(pieces)

    def _tell(self, error: CorralError | None) -> None:
        self._notice.tell(None if error is None else _problem(error, self.frame.fleet.url))


def _problem(error: CorralError, bus: str | None) -> Problem:
    found = problem_of(error, bus)
    if found.kind == "error":
        return Problem(kind="error", title="The output can't be read", detail=found.detail)
    return found


def _hole(missing: int, host: str, file: str) -> str:
    where = f"; all of it is in {file} on {host}" if file else ""
    return f"{format_bytes(missing)} are missing here: the bus keeps begin and end only{where}"


def _words(text: OutputText | None, ended: bool) -> str:
    if text is None:
        return "Nothing was printed" if ended else "Nothing is printed yet"
    attempt = f", attempt {text.attempt}" if text.attempt > 1 else ""
    where: Any = f", in {text.file}" if text.file else ""
    return f"{format_bytes(text.position)}{attempt}{where}{'' if ended else ', live'}"
