"""Two real `corral process` that share a lake on a real PostgreSQL: one is killed, frozen, or asked to go."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from corral.cli.local.server import EmbeddedServer
from corral.processors.ingest import partitions
from corral.processors.storage.lake import lake as lakes
from corral.schemas import codec, subjects
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js import api
from support.history import Asking, sample_batch

PARTITIONS = 4


class Sharing:
    """Processors as processes of their own, over one lake."""

    def __init__(self, lake: lakes.Lake, url: str, folder: Path) -> None:
        self._lake, self._url, self._folder = lake, url, folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "corral.cli.main", "process", "--lake", self._lake.catalog]
        command += ["--lake-data", self._lake.data, "--partitions", str(PARTITIONS), "--nats", self._url]
        with (self._folder / f"processor-{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def log(self, number: int) -> str:
        return (self._folder / f"processor-{number}.log").read_text()

    async def rows(self, sql: str) -> list[tuple[Any, ...]]:
        def ask() -> list[tuple[Any, ...]]:
            connection = lakes.attach(self._lake, read_only=True)
            try:
                return connection.execute(sql).fetchall()
            finally:
                connection.close()

        return await asyncio.to_thread(ask)

    async def until(self, sql: str, value: Any, seconds: float = 40.0) -> None:
        deadline = time.monotonic() + seconds
        found: Any = None
        while time.monotonic() < deadline:
            try:
                found = (await self.rows(sql))[0][0]
            except duckdb.Error as error:
                found = error
            if found == value:
                return
            await asyncio.sleep(0.3)
        logs = "\n".join(self.log(at)[-3000:] for at in range(len(self.processes)))
        raise AssertionError(f"{sql}: {found}, not {value}\n{logs}")


@pytest.fixture
def sharing(lake: lakes.Lake, server: EmbeddedServer, tmp_path: Path) -> Iterator[Sharing]:
    found = Sharing(lake, server.url, tmp_path)
    yield found
    for process in found.processes:
        process.kill()
        process.wait()


async def owners(nc: Client) -> dict[str, str]:
    """Who owns which part."""
    bucket = await nc.jetstream().key_value(partitions.BUCKET)
    try:
        keys = [key for key in await bucket.keys() if ".part." in key]
        return {key.partition(".part.")[2]: ((await bucket.get(key)).value or b"").decode() for key in keys}
    except Exception:  # an entry that ends at this moment
        return {}


async def owned(nc: Client, enough: Callable[[dict[str, str]], bool], seconds: float = 60.0) -> dict[str, str]:
    deadline = time.monotonic() + seconds
    found: dict[str, str] = {}
    while time.monotonic() < deadline:
        try:
            found = await owners(nc)
        except Exception:  # the bucket is not made yet
            found = {}
        if enough(found):
            return found
        await asyncio.sleep(0.1)
    raise AssertionError(f"the parts are not owned as they should be: {found}")


PARTS = PARTITIONS + 5
"""Of the samples, inventories, facts, requests and maintenance."""


@pytest.mark.long
async def test_telemetry_that_is_made_anew_is_copied_again_by_one_of_them(nc: Client, sharing: Sharing) -> None:
    js = nc.jetstream(timeout=1)

    async def publish(numbers: range) -> None:
        for number in numbers:
            batch = sample_batch(f"h{number % 8}", 1 + number // 8, agent="run", devices=1, ticks=1, step_ns=1)
            for _ in range(300):
                try:
                    await js.publish(subjects.samples_subject(batch.host), codec.encode(batch))
                    break
                except (NatsError, TimeoutError):  # the processors have not made the stream yet
                    await asyncio.sleep(0.1)

    sharing.start(), sharing.start()
    await owned(nc, lambda by: len(by) == PARTS and len(set(by.values())) == 2)
    await publish(range(80))
    await sharing.until("SELECT count(*) FROM samples", 80)
    await js.delete_stream(subjects.TELEMETRY_STREAM)
    # The last of each host had come before.
    await publish(range(72, 160))
    await sharing.until("SELECT count(*) FROM samples", 160)
    logs = sharing.log(0) + sharing.log(1)
    assert logs.count("copying it again from message 1") == 1
    lag: dict[str, int] = {}
    async with asyncio.timeout(60):
        while not lag:  # on a slow machine parts change hands, and nobody answers meanwhile
            with contextlib.suppress(NatsError):
                lag = (await Asking(nc).status()).lag_messages
            await asyncio.sleep(0.1)
    assert lag[subjects.TELEMETRY_STREAM] == 0
    assert await sharing.rows("SELECT count(*) FROM samples") == [(160,)]


@pytest.mark.long
async def test_a_killed_and_a_frozen_processor_lose_and_double_nothing(nc: Client, sharing: Sharing) -> None:
    js = nc.jetstream()
    # Less than the time to live that processors give it themselves: the test waits for it twice.
    await js.create_key_value(api.KeyValueConfig(bucket=partitions.BUCKET, ttl=4.0))
    sent = 0
    stop = asyncio.Event()

    async def publish() -> None:
        nonlocal sent
        while not stop.is_set():
            sent += 1
            batch = sample_batch(f"h{sent % 40}", sent, agent=f"run-{sent % 40}", devices=2, ticks=2, step_ns=1000)
            await js.publish(subjects.samples_subject(batch.host), codec.encode(batch), timeout=30)
            await asyncio.sleep(0.004)

    publishing = asyncio.create_task(publish())
    first, second = sharing.start(), sharing.start()
    await owned(nc, lambda by: len(by) == PARTS and len(set(by.values())) == 2)
    # Each partition has stored something, whoever owned it then.
    await sharing.until("SELECT count(DISTINCT stream) FROM store.arrivals", PARTITIONS)
    # One seems dead, and wakes up with batches of parts that it has lost.
    first.send_signal(signal.SIGSTOP)
    await owned(nc, lambda by: len(by) == PARTS and len(set(by.values())) == 1)
    first.send_signal(signal.SIGCONT)
    await owned(nc, lambda by: len(by) == PARTS and len(set(by.values())) == 2)
    await asyncio.sleep(1)
    second.kill()
    second.wait()
    await owned(nc, lambda by: len(by) == PARTS and len(set(by.values())) == 1)
    stop.set()
    await publishing
    await sharing.until("SELECT count(*) FROM samples", sent * 4)
    rows = await sharing.rows(
        "SELECT count(*), count(DISTINCT (host, device, time)), count(DISTINCT host) FROM samples"
    )
    assert rows == [(sent * 4, sent * 4, 40)]
    # Each host's values are those that were sent.
    totals = await sharing.rows("SELECT sum(gpu_utilization_percent) FROM samples")
    assert totals == [(float(sum((at + n) % 100 for n in range(1, sent + 1) for at in range(4))),)]
    # Whoever is left answers for all.
    asking = Asking(nc)
    assert await asking.rows("SELECT count(*) FROM samples") == [[sent * 4]]
    assert (await asking.status()).processor == (
        await sharing.rows("SELECT value FROM corral_meta WHERE key = 'processor'")
    )[0][0]
    body = codec.encode({"sql": "FROM ducklake_snapshots('lake')"}, codec.JSON)
    refused = (await nc.request(subjects.QUERY, body, timeout=10)).data
    assert b'"refused"' in refused
    first.send_signal(signal.SIGTERM)
    assert first.wait(20) == 0
    # What it owned is free for others at once.
    assert await owners(nc) == {}
