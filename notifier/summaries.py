"""Summaries of jobs that have ended, from the history, for the messages about them."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import msgspec
from msgspec.structs import replace

from ..client.client import Client
from ..client.errors import CorralError
from ..client.jobs import summary as job_summary
from ..schemas.query import ResultFormat
from ..schemas.work.jobs import FINAL
from ..schemas.work.notifications import NewsKind
from .news import JobEnd, News

log = logging.getLogger("corral.notifier")

_TRIES: Final = 6
_TRY_SECONDS: Final = 1.5
_QUERY_SECONDS: Final = 10.0
_AT_ONCE: Final = 4
_MOST: Final = 2 * _AT_ONCE
"""Jobs that end at once and get summaries: the news of all others would wait for that of each."""


class Summaries:
    """Adds summaries to news of jobs.

    Args:
        client: asks the history.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._asking = 0

    async def add(self, news: News) -> News:
        """News of a job that has ended, with its summary if the history has it within some seconds.

        Of many that end at once the first few get summaries.
        """
        subject = news.subject
        if not isinstance(subject, JobEnd) or news.kind is not NewsKind.JOB_ENDED:
            return news
        if self._asking >= _MOST:
            return news
        self._asking += 1
        try:
            async with self._turns:
                lines = await self._lines(subject.job.job_id)
        finally:
            self._asking -= 1
        return replace(news, subject=JobEnd(subject.job, subject.tasks, lines))

    async def _lines(self, job_id: str) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for attempt in range(_TRIES):
            if attempt:
                await asyncio.sleep(_TRY_SECONDS)
            try:
                sql = job_summary.statement(job_id)
                result = await self._client.query(sql, format=ResultFormat.JSON, timeout=_QUERY_SECONDS)
                summary = job_summary.summary_of(job_id, result.dicts())
            except (CorralError, msgspec.ValidationError, OSError, TimeoutError) as error:
                log.debug("no summary of job %s: %s", job_id, error)
                return found
            if summary is not None:
                found = job_summary.lines(summary)
                if summary.state in FINAL and summary.gpu_utilization_percent_mean is not None:
                    return found
        return found
