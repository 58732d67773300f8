"""Metrics and readiness of a processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from ..schemas import subjects
from ..schemas.health import HealthStatus
from ..schemas.instruments import ROWS, Histogram
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
        database_bytes: size of the database on disk; None if it is not known.
        failing: maintenance jobs that fail at the moment, each with the reason.
        held_back: why retention is held back; empty if nothing is wrong.
        origin: for a lake: the check that partitions mirror the stream of telemetry.

    Attributes:
        queries: the query service; None before it is started.
        ingests: of the parts that it reads, by part.
    """

    def __init__(
        self,
        letters: DeadLetters,
        database_bytes: Callable[[], int] | None = None,
        failing: Mapping[str, str] | None = None,
        held_back: Callable[[], str] = str,
        origin: Origin | None = None,
    ) -> None:
        self.queries: QueryService | None = None
        self.ingests: dict[str, Ingest] = {}
        self._letters = letters
        self._database_bytes = database_bytes
        self._failing: Mapping[str, str] = {} if failing is None else failing
        self._held_back = held_back
        self._origin = origin
        self._counts: dict[str, list[Counts]] = {}

    def add(self, ingest: Ingest) -> None:
        """Add a part that is read now. The counts of a part that returns are continued."""
        self.ingests[ingest.part] = ingest
        self._counts.setdefault(ingest.part, []).append(ingest.counts)

    def remove(self, ingest: Ingest) -> None:
        """Remove a part that was released; its counts stay."""
        self.ingests.pop(ingest.part, None)

    def judge(self) -> HealthStatus:
        """Judge the processor's health: the reasons why it is not ready, and its metrics."""
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
        reasons += [f"{job} fails: {why}" for job, why in dict(self._failing).items()]
        reasons += [text for text in (self._held_back(), self._origin.problem if self._origin else "") if text]
        lag = {part: float(ingest.lag_messages) for part, ingest in self.ingests.items()}
        if self._origin is not None:
            lag[subjects.TELEMETRY_STREAM] = float(self._origin.behind)
        samples = Histogram(ROWS)
        for each in (counts for found in self._counts.values() for counts in found):
            _add(samples, each.batch_samples)
        values: dict[str, float | Histogram | Mapping[str, Any]] = {
            "lag_messages": lag,
            "lag_seconds": {part: ingest.lag_seconds for part, ingest in self.ingests.items()},
            "messages": self._sums("messages"),
            "samples": sum(self._sums("samples").values()),
            "duplicates": self._sums("duplicates"),
            "impossible_values": self._impossible(),
            "dead_letters": float(self._letters.total),
            "dead_letters_unpublished": float(self._letters.unpublished),
            "batch_messages": self._histograms("batch_messages"),
            "batch_samples": samples,
            "commit_seconds": self._histograms("commit_seconds"),
            "decode_cpu_seconds": self._sums("decode_seconds"),
            "write_cpu_seconds": self._sums("write_seconds"),
            "paused": float(any(ingest.paused for ingest in self.ingests.values())),
        }
        if self._database_bytes is not None:
            values["database_bytes"] = float(self._database_bytes())
        if queries is not None:
            values["queries"] = {outcome: float(count) for outcome, count in queries.counts.items()}
            values["queries_running"] = float(queries.running)
            values["queries_waiting"] = float(queries.waiting)
        return HealthStatus(reasons, values)

    def _sums(self, field: str) -> dict[str, float]:
        return {part: float(sum(getattr(each, field) for each in found)) for part, found in self._counts.items()}

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
