"""A full queue: who is refused may ask again, and is decided anew."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.client import connect
from corral.planner.broker import broker, retry_times
from corral.planner.broker.retry_times import LEAST_SECONDS, MOST_SECONDS, RetryTimes
from support.published_fleet import devices, planner, until_ready


def test_refused_clients_are_told_to_come_back_as_fast_as_they_can_be_taken() -> None:
    times = RetryTimes()
    assert LEAST_SECONDS <= times.next_seconds(100.0) <= 1.5 * LEAST_SECONDS
    afters: list[float] = []
    for second in range(8):  # a thousand are taken each second, and as many refused
        for _ in range(1000):
            times.note_taken()
        afters = [times.next_seconds(101.0 + second) for _ in range(1000)]
    assert LEAST_SECONDS <= min(afters) <= max(afters) <= 5 * LEAST_SECONDS
    # All at once: they come back over the time that it takes to take them, not together.
    afters = sorted(times.next_seconds(109.0) for _ in range(100_000))
    assert 60 < afters[len(afters) // 2] < 130
    assert afters[-1] <= MOST_SECONDS
    assert LEAST_SECONDS <= times.next_seconds(1000.0) <= 1.5 * LEAST_SECONDS


async def test_what_a_full_queue_refused_is_granted_once_there_is_room(
    server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker, "MAX_WAITING", 1)
    monkeypatch.setattr(retry_times, "LEAST_SECONDS", 0.05)
    async with (
        devices(server.url, tmp_path),
        planner(server.url),
        connect(server.url, owner="ann", patience=60) as ann,
        asyncio.timeout(60),
    ):
        await until_ready(ann)
        blocker = await ann.request(gpus=2, ttl="1h")
        others = [asyncio.create_task(ann.request(gpus=1, wait="60s")) for _ in range(2)]
        while (await ann.fleet()).waiting_requests < 1:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await ann.release(blocker.lease.lease_id)
        assert len({(await other).lease.lease_id for other in others}) == 2
