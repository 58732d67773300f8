"""Forecasts of when waiting requests start: computed a slice at a time, and corrected by how good past ones were."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from datetime import datetime
from typing import Final

from ....schemas.request_events import Forecast
from ....schemas.requests import WorkRequest
from ...placement.decide import ask_of
from ...queue import forecast as core
from ...queue.backfill import stay_of
from ...queue.durations import Estimate
from ...queue.line import size_of
from .estimates import Estimator
from .queue import Kind, QueuedRequest, WaitingQueue, time_of

EVERY_SECONDS: Final = 2.0
_ESTIMATES: Final = 64
"""Estimates of durations between two pauses."""
_SHORT_SECONDS: Final = 0.05
_PAUSE: Final = 4.0
"""Pause after each part of a round that is not short, in units of the time that it took and the last pause was late."""
_MOST_PAUSE: Final = 20.0
"""Limit on that pause, in units of the time that the part took."""
MAX_LOAD: Final = 0.1
"""Part of a core that forecasts may take: a long queue is forecast less often."""


class Forecaster:
    """Keeps the forecasts of a queue up to date, and the estimates of durations that they rest on.

    Args:
        queue: of the term.
        estimator: of durations.
    """

    def __init__(self, queue: WaitingQueue, estimator: Estimator) -> None:
        self._queue = queue
        self._estimator = estimator
        self._calibration = core.Calibration()
        self._recent: deque[tuple[float, WorkRequest]] = deque(maxlen=core.MOST_ARRIVALS)
        self._rounds = 0

    async def renew(self) -> float:
        """Compute all forecasts anew; returns the seconds until the next time."""
        if not len(self._queue):
            return EVERY_SECONDS
        busy = await self._revise_estimates()
        began = time.thread_time()
        now = time.time()
        self._rounds += 1
        work = core.forecasts(self._queue.line, now, seed=self._rounds, arrivals=self._arrivals(now))
        busy += time.thread_time() - began
        late = 0.0
        while True:
            began, began_at = time.thread_time(), time.monotonic()
            try:
                next(work)
            except StopIteration as done:
                found: dict[int, core.Forecast] = done.value
                break
            finally:
                busy += time.thread_time() - began
                slice_seconds = time.monotonic() - began_at  # of which others may have had a part of the core
            # A long round leaves most of the time to requests, and still more where these keep the planner busy.
            pause = min((slice_seconds + late) * _PAUSE, slice_seconds * _MOST_PAUSE) if busy > _SHORT_SECONDS else 0.0
            paused_at = time.monotonic()
            await asyncio.sleep(pause)
            late = max(0.0, time.monotonic() - paused_at - pause)
        for queued in list(self._queue):
            forecast = found.get(queued.entry.number)
            if queued.entry.group.refused:  # when groups give back is not known to the virtual runs
                queued.last_forecast = None
            elif forecast is not None:
                queued.last_forecast = self._published(queued, forecast, now)
                if queued.forecast is None:
                    queued.forecast, queued.uncorrected = queued.last_forecast, forecast
        return max(EVERY_SECONDS, busy / MAX_LOAD)

    def arrived(self, request: WorkRequest, now: float) -> None:
        """Note a request that was granted or waits: more like it are to be expected."""
        self._recent.append((now, request))

    def _arrivals(self, now: float) -> core.Arrivals:
        """Recent arrivals, as the queue would estimate them now."""
        fleet = self._queue.line.fleet
        found = core.Arrivals()
        for at, request in self._recent:
            ask, estimate = ask_of(fleet, request), self._estimator.of_request(request, now)
            found.add(core.Arrival(at, ask, request.priority, size_of(fleet, ask), estimate, stay_of(fleet, request)))
        return found

    async def _revise_estimates(self) -> float:
        """Estimate the durations of all queued requests anew; returns the processor time that it took, in seconds."""
        began, busy = time.thread_time(), 0.0
        found: dict[Kind, Estimate] = {}
        now = time.time()
        for kind, request in self._queue.kinds():
            found[kind] = self._estimator.of_request(request, now)
            if not len(found) % _ESTIMATES:
                busy += time.thread_time() - began
                await asyncio.sleep(0)
                began = time.thread_time()
        self._queue.revise(found, now)
        return busy + time.thread_time() - began

    def started(self, queued: QueuedRequest, now: float) -> None:
        """Learn from a request that starts now."""
        if queued.forecast is not None and queued.forecast.made_at is not None and queued.uncorrected is not None:
            self._calibration.started(queued.forecast.made_at.timestamp(), queued.uncorrected, now)

    def _published(self, queued: QueuedRequest, forecast: core.Forecast, now: float) -> Forecast:
        corrected = self._calibration.corrected(now, forecast)
        return Forecast(
            expected_start=_time(corrected.expected),
            earliest_start=_time(max(now, corrected.low)),
            latest_start=_time(corrected.high),
            made_at=time_of(now),
        )


def _time(seconds: float) -> datetime | None:
    # The year 9999 is the last that a time can have.
    return None if math.isinf(seconds) or seconds > 2.5e11 else time_of(seconds)
