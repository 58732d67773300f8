"""The bus side of a runner: reports that are answered with orders, orders between reports, and the output of runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Collection
from typing import Final

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from ..bus import permissions
from ..bus.health import LastSeen
from ..bus.process import corral_version
from ..bus.tasks import heed_cancellation
from ..schemas import codec, subjects
from ..schemas.requests import Error
from ..schemas.work.runs import REPORT_SECONDS, RunnerReport, RunOrders
from .host import Host
from .output import NEW, Output, Piece, open_output

log = logging.getLogger("corral.runner")

BATCH_SECONDS: Final = 0.01
"""Time in which changes share one report."""
ANSWER_SECONDS: Final = 5.0
RETRY_SECONDS: Final = 1.0
FOLLOW_SECONDS: Final = 0.2
"""Time between readings of outputs that grow."""
MOST_REASON: Final = 256
"""Characters of the reason why a host starts no jobs, in a report."""
QUIET_SECONDS: Final = 1.0
"""Time between readings of outputs that don't."""
_HEADERS: Final = {codec.CONTENT_TYPE_HEADER: codec.MSGPACK}


class Reporter:
    """Reports the runs of one host, and receives its orders.

    Args:
        nc: connection to the bus.
        host: the runs.
        runner: id of this start of the runner.
        token: secret of this start: only orders with it are carried out.
        executors: names, for the report.

    Attributes:
        answered: time since a planner last answered.
        sent: number of reports that were answered.
    """

    def __init__(self, nc: Client, host: Host, runner: str, token: str, executors: list[str]) -> None:
        self._nc = nc
        self._host = host
        self._runner = runner
        self._token = token
        self._executors = executors
        self._subject = subjects.runner_subject(subjects.host_token(host.name))
        self._changed: set[str] = set()
        self._wake = asyncio.Event()
        self._last_refusal = ""
        self._said_unready = ""
        self.answered = LastSeen()
        self.sent = 0

    def change(self, keys: Collection[str]) -> None:
        """Report runs soon."""
        self._changed.update(keys)
        self._wake.set()

    async def run(self) -> None:
        """Report until cancelled."""
        subject = subjects.runs_subject(subjects.host_token(self._host.name))
        subscription = await self._nc.subscribe(subject, cb=self._on_orders)
        complete_at = 0.0
        try:
            while True:
                heed_cancellation()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, complete_at - time.monotonic())):
                        await self._wake.wait()
                        await asyncio.sleep(BATCH_SECONDS)
                self._wake.clear()
                complete = time.monotonic() >= complete_at
                changed, self._changed = self._changed, set()
                if await self._report(None if complete else changed):
                    complete_at = time.monotonic() + REPORT_SECONDS if complete else complete_at
                else:
                    # What was not reported is in the next complete report.
                    complete_at = time.monotonic() + RETRY_SECONDS
                    await asyncio.sleep(RETRY_SECONDS)
        finally:
            with contextlib.suppress(NatsError, OSError, ValueError):
                await subscription.unsubscribe()

    async def _report(self, keys: Collection[str] | None) -> bool:
        runs, complete = self._host.runs.report(keys)
        unready = self._host.readiness.reason[:MOST_REASON]
        if keys is not None and not runs and unready == self._said_unready:
            return True
        asked = frozenset(self._host.runs.runs)
        report = RunnerReport(
            host=self._host.name,
            runner=self._runner,
            token=self._token,
            boot_id=self._host.runs.boot_id,
            version=corral_version(),
            executors=self._executors,
            unready=unready,
            runs=runs,
            complete=complete,
        )
        if not self._nc.is_connected:
            return False
        try:
            answer = await permissions.request(
                self._nc, self._subject, codec.encode(report), timeout=ANSWER_SECONDS, headers=_HEADERS
            )
        except (NatsError, OSError, TimeoutError) as error:
            self._refused(str(error) or type(error).__name__)
            return False
        taken = self._take(answer.data, codec.content_type(answer.headers), asked)
        self._said_unready = unready if taken else self._said_unready
        return taken

    async def _on_orders(self, message: Msg) -> None:
        with contextlib.suppress(codec.DecodeError):
            self._take(message.data, codec.content_type(message.headers or _HEADERS), frozenset())

    def _take(self, data: bytes, content_type: str, asked: Collection[str]) -> bool:
        try:
            orders = codec.decode(data, RunOrders | Error, content_type)  # pyright: ignore[reportArgumentType]
        except codec.DecodeError as error:
            self._refused(f"orders that can't be read: {error}")
            return False
        if isinstance(orders, Error):
            self._refused(orders.message)
            return False
        assert isinstance(orders, RunOrders)
        if not secrets.compare_digest(orders.token, self._token):
            self._refused("orders without the token of this runner")
            return False
        self._last_refusal = ""
        self.answered.now()
        self.sent += 1
        self._host.order(orders, asked)
        return True

    def _refused(self, why: str) -> None:
        # A planner that is starting answers soon.
        if why != self._last_refusal and self.answered.seconds > 2 * RETRY_SECONDS:
            self._last_refusal = why
            log.warning("%s: no orders: %s", self._host.name, why)


class LogPublisher:
    """Publishes what the runs of a host print.

    Args:
        nc: connection to the bus.
        host: the runs.

    Attributes:
        published_bytes: of output.
    """

    def __init__(self, nc: Client, host: Host) -> None:
        self._nc = nc
        self._host = host
        self._outputs: dict[str, Output] = {}
        self._token = subjects.host_token(host.name)
        self._stream_missing = False
        self.published_bytes = 0

    async def run(self) -> None:
        """Follow outputs until cancelled."""
        try:
            while True:
                heed_cancellation()
                grew = False
                for key in list(self._host.followed):
                    grew = await self._follow(key) or grew
                await asyncio.sleep(FOLLOW_SECONDS if grew else QUIET_SECONDS)
        finally:
            for output in self._outputs.values():
                output.close()

    async def _follow(self, key: str) -> bool:
        """Publish what is new of an output. Returns true if there was something."""
        known = self._host.followed[key]
        status = known.status
        if status is None or not self._nc.is_connected:
            return False
        output = self._outputs.get(key)
        if output is None:
            output = self._outputs[key] = Output(known.run.run_id, open_output(status))
        pieces = output.pieces(time.monotonic(), ended=known.over)
        known.log_bytes = output.size
        if output.progress is not None and output.progress != known.progress:
            known.progress = output.progress
            self._host.report_soon(key)
        if not await self._publish(key, pieces):
            output.rewind()
            return False
        if output.finished:
            output.close()
            del self._outputs[key], self._host.followed[key]
            with contextlib.suppress(OSError):  # it is published again then, by the next start of the runner
                self._host.journal.ended.add_logged(key)
        return bool(pieces)

    async def _publish(self, key: str, pieces: list[Piece]) -> bool:
        run = self._host.followed[key].run
        kept: list[asyncio.Task[Msg]] = []
        for piece in pieces:
            subject = subjects.log_subject(
                self._token, run.job_id, run.index or 0, piece.part, run.owner, attempt=run.attempt
            )
            data = codec.encode(piece.chunk)
            self.published_bytes += len(piece.chunk.data)
            if piece.part == NEW or self._stream_missing:
                await self._nc.publish(subject, data, headers=_HEADERS)
            else:
                work = permissions.request(self._nc, subject, data, timeout=ANSWER_SECONDS, headers=_HEADERS)
                kept.append(asyncio.create_task(work))
        answers = await asyncio.gather(*kept, return_exceptions=True)
        failed = next((answer for answer in answers if isinstance(answer, BaseException)), None)
        if failed is None:
            return True
        if not isinstance(failed, NatsError | OSError | TimeoutError):
            raise failed
        log.warning("%s: what it prints can't be published: %s", key, failed)
        return False
