"""The stream of telemetry is lost, made anew or set back under processors that read what another stream repeats of it.

They run on the server that is installed, and on that which `TEST_NATS_SERVER` names, since versions differ in what they
go on copying.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from corral.bus.access import users
from corral.bus.access.roles import Role
from corral.bus.connect import connect
from corral.bus.layout import ensure_layout
from corral.cli.local import server as servers
from corral.cli.local.server import EmbeddedServer
from corral.processors.ingest import origin as origins
from corral.processors.ingest import partitions
from corral.processors.ingest.deadletters import DeadLetters
from corral.processors.ingest.ingest import Ingest
from corral.processors.ingest.origin import Origin, Sourcing
from corral.processors.metrics import ProcessorMetrics
from corral.processors.storage import Database
from corral.schemas import codec, subjects
from msgspec.structs import replace
from nats.aio.client import Client
from nats.errors import Error as NatsError
from support.empty_history import new_database
from support.history import sample_batch
from support.secured_bus import SecuredBus

PARTITIONS = 2
BEGAN_NS = time.time_ns() - 3600 * 10**9
OTHER_SERVER = os.environ.get("TEST_NATS_SERVER", "")
TELEMETRY_FILES = "jetstream/$G/streams/" + subjects.TELEMETRY_STREAM


@pytest.fixture(params=["installed", "other"])
def _binary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    if request.param == "other":
        if not OTHER_SERVER:
            pytest.skip("TEST_NATS_SERVER names no nats-server of another version")
        monkeypatch.setattr(servers, "server_binary", lambda: OTHER_SERVER)


@pytest.fixture
def server(_binary: None, tmp_path: Path) -> Iterator[EmbeddedServer]:
    embedded = EmbeddedServer(tmp_path / "nats")
    embedded.start()
    yield embedded
    embedded.kill()


async def wait_for(what: Callable[[], Awaitable[bool]] | Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = what()
        if found if isinstance(found, bool) else await found:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not come to that")


async def publish(nc: Client, numbers: Iterable[int], hosts: int = 4, counted: bool = True) -> None:
    """One sample a message, each with a time of its own, from one run of a collector a host."""
    js = nc.jetstream(timeout=1)
    deadline = time.monotonic() + 30
    for number in numbers:
        host = f"h{number % hosts}"
        batch = sample_batch(
            host, 1 + number // hosts, agent="run", devices=1, ticks=1, start_ns=BEGAN_NS + number * 10**9
        )
        payload = codec.encode(batch if counted else replace(batch, sequence=0))
        while True:
            try:
                await js.publish(subjects.samples_subject(host), payload)
                break
            except (NatsError, TimeoutError, OSError):
                assert time.monotonic() < deadline, "the stream was not made anew"
                await asyncio.sleep(0.1)


class Processor:
    """What of a lake's processor reads the partitions, over a database that several of them share."""

    def __init__(self, nc: Client, database: Database, name: str, numbers: Iterable[int]) -> None:
        js = nc.jetstream()

        async def make_streams() -> None:
            await ensure_layout(js)
            await partitions.ensure_stream(js, PARTITIONS)

        self.make_streams = make_streams
        letters = DeadLetters(js)
        self.origin = Origin(nc, name, PARTITIONS, make_streams)
        consumers = partitions.consumers(PARTITIONS)
        self.ingests = [
            Ingest(
                nc,
                database,
                replace(consumers[f"{partitions.STREAM}/{number}"], linger_seconds=0.05),
                letters,
                make_streams,
                self.origin,
            )
            for number in numbers
        ]
        self.metrics = ProcessorMetrics(letters)
        self.metrics.origin = self.origin
        for ingest in self.ingests:
            self.metrics.add(ingest)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self.make_streams()
        self._tasks = [asyncio.create_task(self.origin.run()), *(asyncio.create_task(i.run()) for i in self.ingests)]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task


class Fleet:
    """A server, a database, and two processors that come and go."""

    def __init__(self, server: EmbeddedServer, nc: Client, database: Database) -> None:
        self.server, self.nc, self.database = server, nc, database
        self.processors: list[Processor] = []
        self._clients: list[Client] = []

    async def start(self) -> None:
        for number in range(2):
            client = await connect(self.server.url, name=f"processor-{number}")
            self._clients.append(client)
            self.processors.append(Processor(client, self.database, str(number), [number]))
            await self.processors[-1].start()

    async def stop(self) -> None:
        for processor in self.processors:
            await processor.stop()
        for client in self._clients:
            await client.close()
        self.processors, self._clients = [], []

    def rows(self) -> list[int]:
        """The numbers of the samples that are stored, each as often as it is."""
        times = self.database.cursor().execute("SELECT epoch_ns(time) FROM samples ORDER BY 1").fetchall()
        return [round((ns - BEGAN_NS) / 1e9) for (ns,) in times]

    async def stored(self, numbers: Iterable[int]) -> None:
        wanted = sorted(numbers)
        try:
            await wait_for(lambda: len(self.rows()) >= len(wanted))
        finally:
            found = self.rows()
            assert found == wanted, (sorted(set(wanted) - set(found)), [n for n in found if found.count(n) > 1])

    async def copied(self, messages: int) -> None:
        js = self.nc.jetstream()

        async def there() -> bool:
            return (await js.stream_info(partitions.STREAM)).state.messages == messages

        await wait_for(there)

    def lose(self, copy: Path | None = None) -> None:
        """The server comes back without the stream of telemetry, or with a copy of it; it has all others."""
        self.server.kill()
        shutil.rmtree(self.server.data / TELEMETRY_FILES)
        if copy is not None:
            shutil.copytree(copy, self.server.data / TELEMETRY_FILES)
        self.server.start()

    def copy(self, to: Path) -> Path:
        """A copy of the stream of telemetry."""
        self.server.stop()
        shutil.copytree(self.server.data / TELEMETRY_FILES, to)
        self.server.start()
        return to

    async def sourcing(self) -> Sourcing:
        return Sourcing.of((await self.nc.jetstream().stream_info(partitions.STREAM)).config.metadata)


@pytest.fixture
async def fleet(server: EmbeddedServer, nc: Client, tmp_path: Path) -> AsyncIterator[Fleet]:
    database = new_database(tmp_path)
    found = Fleet(server, nc, database)
    yield found
    await found.stop()
    database.close()


async def test_an_origin_that_is_deleted_is_made_and_copied_from_its_start(fleet: Fleet, nc: Client) -> None:
    await fleet.start()
    await publish(nc, range(40))
    await fleet.stored(range(40))
    await nc.jetstream().delete_stream(subjects.TELEMETRY_STREAM)
    # Nobody but the processors makes it. Some had come before, as from a collector that had no answer for them.
    await publish(nc, range(36, 60))
    await fleet.stored(range(60))
    assert (await fleet.sourcing()).generation == 1
    # And once more, which is the same.
    await nc.jetstream().delete_stream(subjects.TELEMETRY_STREAM)
    await publish(nc, range(60, 70))
    await fleet.stored(range(70))
    assert (await fleet.sourcing()).generation == 2
    await wait_for(lambda: all(not each.origin.problem and not each.origin.behind for each in fleet.processors))


async def test_an_origin_that_is_lost_with_the_servers_disk_is_copied_from_its_start(fleet: Fleet, nc: Client) -> None:
    await fleet.start()
    await publish(nc, range(40))
    await fleet.stored(range(40))
    fleet.lose()
    await publish(nc, range(40, 100))
    await fleet.stored(range(100))


async def test_what_is_copied_and_not_read_yet_is_not_lost_with_the_origin(fleet: Fleet, nc: Client) -> None:
    await fleet.start()
    await publish(nc, range(20))
    await fleet.stored(range(20))
    await fleet.stop()
    await publish(nc, range(20, 50))
    await fleet.copied(50)
    js = nc.jetstream()
    await js.delete_stream(subjects.TELEMETRY_STREAM)
    await ensure_layout(js)
    await publish(nc, range(50, 70))
    await fleet.start()
    await fleet.stored(range(70))


async def test_a_gap_wider_than_what_is_remembered_of_a_run_is_filled(fleet: Fleet, nc: Client, tmp_path: Path) -> None:
    """A server goes on behind the last number that it has copied: what comes behind the gap is not stored first."""
    await fleet.start()
    await publish(nc, range(10), hosts=1)
    await fleet.stored(range(10))
    copy = fleet.copy(tmp_path / "copy")
    await publish(nc, range(10, 200), hosts=1)
    await fleet.stored(range(200))
    await fleet.stop()
    fleet.lose(copy)
    await publish(nc, range(200, 450), hosts=1)
    # Of 250 messages the first 190 have numbers that were copied before.
    await fleet.copied(260)
    await fleet.start()
    await fleet.stored(range(450))


@pytest.mark.parametrize("counted", [True, False])
async def test_an_origin_that_is_set_back_is_copied_from_where_it_was_set_back_to(
    fleet: Fleet, nc: Client, tmp_path: Path, counted: bool
) -> None:
    """Messages that nobody counts can't be told apart by their numbers: they come once all the same."""
    await fleet.start()
    await publish(nc, range(10), counted=counted)
    await fleet.stored(range(10))
    copy = fleet.copy(tmp_path / "copy")
    await publish(nc, range(10, 20), counted=counted)
    await fleet.stored(range(20))
    fleet.lose(copy)
    await publish(nc, range(20, 24), counted=counted)
    await fleet.stored(range(24))
    js = nc.jetstream()
    [source] = (await js.stream_info(partitions.STREAM)).config.sources or []
    assert source.opt_start_seq == 11
    # It goes on from there over another start of the server.
    fleet.server.kill()
    fleet.server.start()
    await publish(nc, range(24, 40), counted=counted)
    await fleet.stored(range(40))


async def test_an_origin_that_was_set_back_and_has_grown_beyond_is_noticed(
    fleet: Fleet, nc: Client, tmp_path: Path
) -> None:
    await publish(nc, range(10))
    await fleet.start()
    await fleet.stored(range(10))
    copy = fleet.copy(tmp_path / "copy")
    await publish(nc, range(10, 20))
    await fleet.stored(range(20))
    await fleet.stop()
    await publish(nc, range(20, 30))
    await fleet.copied(30)
    fleet.lose(copy)
    # The same numbers again, and more of them: by number alone nothing is missing.
    await publish(nc, range(30, 60))
    await fleet.start()
    await fleet.stored(range(60))
    assert (await fleet.sourcing()).kept == {0: 30}


async def test_a_restart_changes_nothing(fleet: Fleet, nc: Client) -> None:
    await fleet.start()
    await publish(nc, range(10))
    fleet.server.kill()
    fleet.server.start()
    await publish(nc, range(10, 30))
    await fleet.stored(range(30))
    checks = [each.origin.checks for each in fleet.processors]
    await wait_for(lambda: all(each.origin.checks > n + 1 for each, n in zip(fleet.processors, checks, strict=True)))
    assert (await fleet.sourcing()).generation == 0


async def test_a_stream_that_an_older_corral_made_is_followed_too(fleet: Fleet, nc: Client) -> None:
    js = nc.jetstream()
    await partitions.ensure_stream(js, PARTITIONS)
    config = (await js.stream_info(partitions.STREAM)).config
    config.metadata = {}
    await js.delete_stream(partitions.STREAM)
    await js.add_stream(config)
    await fleet.start()
    await publish(nc, range(10))
    await fleet.stored(range(10))
    assert (await fleet.sourcing()).created == ""
    await js.delete_stream(subjects.TELEMETRY_STREAM)
    await publish(nc, range(10, 20))
    await fleet.stored(range(20))


def test_which_copies_are_stored() -> None:
    now = Sourcing("made", 2, {0: 10, 1: 25})
    assert Sourcing.of({"_nats.ver": "2", **now.metadata()}) == now
    assert Sourcing.of(None) == Sourcing.of({"corral.sourced.kept": "?", "corral.sourced.again": "x"}) == Sourcing()
    stored = [(0, 10), (1, 25), (2, 40), (5, 3)]
    assert [now.stores(*each, 40) for each in stored] == [True, True, True, None]
    assert [now.stores(*each, 40) for each in [(0, 11), (1, 26), (2, 41)]] == [False, False, None]
    for generation in (0, 1, 12):
        cut = partitions.transforms(8, generation)
        header = f"T 7 {chr(12).join(each.src or '' for each in cut)} {chr(12).join(each.dest for each in cut)} s"
        assert origins.generation_of(header) == generation


async def test_rights_of_an_older_configuration_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on as before; with those of this version it needs nobody's help."""
    new = {"$JS.API.STREAM.UPDATE.CORRAL_PARTITIONS", "$JS.API.STREAM.MSG.GET.CORRAL_TELEMETRY"}
    new.add("$JS.API.STREAM.MSG.GET.CORRAL_PARTITIONS")
    rows = users.MATRIX
    assert new < {subject for row in rows if Role.PROCESSOR in row.roles for subject in row.subjects}
    old = tuple(replace(row, subjects=tuple(each for each in row.subjects if each not in new)) for row in rows)
    monkeypatch.setattr(users, "MATRIX", old)
    secured = SecuredBus(tmp_path)
    secured.add(Role.PROCESSOR, "history")
    secured.add(Role.ADMIN, "root")
    monkeypatch.setattr(origins, "REFUSED_SECONDS", 0.5)
    secured.server.start()
    database = new_database(tmp_path)
    nc, admin = await secured.connect("history"), await secured.connect("root")
    processor = Processor(nc, database, "p", range(PARTITIONS))

    def rows_there() -> Any:
        return database.cursor().execute("SELECT count(*) FROM samples").fetchone()

    try:
        await processor.start()
        await publish(admin, range(10))
        await wait_for(lambda: rows_there() == (10,))
        await wait_for(lambda: bool(processor.origin.problem))
        reasons = "; ".join(processor.metrics.health_status().reasons)
        assert "it is not known if CORRAL_PARTITIONS still mirrors CORRAL_TELEMETRY" in reasons
        assert "STREAM.MSG.GET.CORRAL_PARTITIONS" in reasons
        assert "`corral auth add`" in reasons
        await admin.jetstream().delete_stream(subjects.TELEMETRY_STREAM)
        await publish(admin, range(10, 15))
        await wait_for(lambda: "was created again" in processor.origin.problem)
        # The stream that was sourced is gone, and the server says that it lags by nothing.
        await wait_for(lambda: processor.origin.behind == 5)
        lag = processor.metrics.health_status().values["lag_messages"]
        assert isinstance(lag, dict)
        assert lag[subjects.TELEMETRY_STREAM] == 5
        monkeypatch.setattr(users, "MATRIX", rows)
        secured.authority.write_config()
        secured.server.process.send_signal(1)  # type: ignore[union-attr]
        await wait_for(lambda: rows_there() == (15,))
        await wait_for(lambda: not processor.origin.problem)
    finally:
        await processor.stop()
        database.close()
        for client in (nc, admin):
            await client.close()
        secured.server.kill()
