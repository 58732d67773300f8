"""Metrics and readiness of a processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from ..schemas import subjects
from ..schemas.health import HealthStatus
from ..schemas.instruments import ROWS, Histogram
from ..schemas.query import ProcessorStatus
from .ingest.deadletters import DeadLetters
from .ingest.ingest import Counts, Ingest
from .ingest.origin import Origin
from .query.service import QueryService

LAG_SECONDS: Final = 30.0
"""With more lag than this a processor is not ready: its history does not show the present state."""


class ProcessorMetrics:
    """Metrics and health check of one processor.

    Args:
        letters: its dead letters.
        database_bytes: size of the database on this disk; None if it is elsewhere.
        failing: maintenance jobs that fail at the moment, each with the reason.
        held_back: why retention is held back; empty if nothing is wrong.
        behind: maintenance jobs that are behind, each with the seconds since it was due.

    Attributes:
        queries: the query service; None before it is started.
        origin: for a lake: the check that partitions mirror the stream of telemetry.
        ingests: of the parts that it reads, by part.
    """

    def __init__(
        self,
        letters: DeadLetters,
        database_bytes: Callable[[], int | None] = lambda: None,
        failing: Callable[[], Mapping[str, str]] = dict,
        held_back: Callable[[], str] = str,
        behind: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self.queries: QueryService | None = None
        self.origin: Origin | None = None
        self.ingests: dict[str, Ingest] = {}
        self._letters = letters
        self._database_bytes = database_bytes
        self._failing = failing
        self._held_back = held_back
        self._behind = behind
        self._counts: dict[str, list[Counts]] = {}

    def add(self, ingest: Ingest) -> None:
        """Add a part that is read now. The counts of a part that returns are continued."""
        self.ingests[ingest.part] = ingest
        self._counts.setdefault(ingest.part, []).append(ingest.counts)

    def remove(self, ingest: Ingest) -> None:
        """Remove a part that was released; its counts stay."""
        self.ingests.pop(ingest.part, None)

    def status(self, processor: str, database: str) -> ProcessorStatus:
        """State of ingest, as the endpoint `history.status` answers it.

        Args:
            processor: id of the history.
            database: path or URL of its data.
        """
        ingests = self.ingests.values()
        return ProcessorStatus(
            processor=processor,
            database=database,
            watermarks={part: number for ingest in ingests for part, number in ingest.watermarks().items()},
            lag_messages=self._lag_messages(),
            samples=sum(self._sums("samples").values()),
            dead_letters=self._letters.total,
            duplicates=sum(self._sums("duplicates").values()),
            paused=next((ingest.paused for ingest in ingests if ingest.paused), ""),
            database_bytes=self._database_bytes() or 0,
        )

    def health_status(self) -> HealthStatus:
        """The reasons why the processor is not ready, and its metrics."""
        reasons: list[str] = []
        for part, ingest in self.ingests.items():
            if not ingest.begun:
                reasons.append(f"{part} is not read yet")
            elif ingest.paused:
                reasons.append(f"{part} is not stored: {ingest.paused}")
            elif ingest.lag_seconds > LAG_SECONDS:
                reasons.append(f"{part} is {ingest.lag_seconds:.0f} s behind, by {ingest.lag_messages} messages")
        queries = self.queries
        if queries is None:
            reasons.append("it does not answer queries yet")
        reasons += [f"{job} fails: {why}" for job, why in dict(self._failing()).items()]
        reasons += [
            f"{job}: due for {seconds / 60:.0f} min, and not done since: it needs more CPU time or a faster disk"
            for job, seconds in dict(self._behind()).items()
        ]
        reasons += [text for text in (self._held_back(), self.origin.problem if self.origin else "") if text]
        samples = Histogram(ROWS)
        for each in (counts for found in self._counts.values() for counts in found):
            _add(samples, each.batch_samples)
        values: dict[str, float | Histogram | Mapping[str, Any]] = {
            "lag_messages": {part: float(lag) for part, lag in self._lag_messages().items()},
            "lag_seconds": {part: ingest.lag_seconds for part, ingest in self.ingests.items()},
            "messages": self._floats("messages"),
            "samples": float(sum(self._sums("samples").values())),
            "duplicates": self._floats("duplicates"),
            "impossible_values": self._impossible(),
            "dead_letters": float(self._letters.total),
            "dead_letters_unpublished": float(self._letters.unpublished),
            "batch_messages": self._histograms("batch_messages"),
            "batch_samples": samples,
            "commit_seconds": self._histograms("commit_seconds"),
            "decode_cpu_seconds": self._floats("decode_seconds"),
            "write_cpu_seconds": self._floats("write_seconds"),
            "paused": float(any(ingest.paused for ingest in self.ingests.values())),
        }
        if (size := self._database_bytes()) is not None:
            values["database_bytes"] = float(size)
        if queries is not None:
            values["queries"] = {outcome: float(count) for outcome, count in queries.counts.items()}
            values["queries_running"] = float(queries.running)
            values["queries_waiting"] = float(queries.waiting)
        return HealthStatus(reasons, values)

    def _lag_messages(self) -> dict[str, int]:
        found = {part: ingest.lag_messages for part, ingest in self.ingests.items()}
        return found if self.origin is None else {subjects.TELEMETRY_STREAM: self.origin.behind} | found

    def _sums(self, field: str) -> dict[str, Any]:
        """Sums of a counter over all that has read a part, by part."""
        return {part: sum(getattr(each, field) for each in found) for part, found in self._counts.items()}

    def _floats(self, field: str) -> dict[str, float]:
        return {part: float(number) for part, number in self._sums(field).items()}

    def _impossible(self) -> dict[str, float]:
        sums: dict[str, float] = {}
        for each in (counts for found in self._counts.values() for counts in found):
            for name, number in each.impossible.items():
                sums[name] = sums.get(name, 0.0) + number
        return sums

    def _histograms(self, field: str) -> dict[str, Histogram]:
        sums: dict[str, Histogram] = {}
        for part, found in self._counts.items():
            sums[part] = Histogram(getattr(found[0], field).bounds)
            for each in found:
                _add(sums[part], getattr(each, field))
        return sums


def _add(to: Histogram, more: Histogram) -> None:
    to.counts = [a + b for a, b in zip(to.counts, more.counts, strict=True)]
    to.total += more.total
