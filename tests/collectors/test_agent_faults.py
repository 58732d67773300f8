"""Real collector processes against a real bus that goes, comes back and forgets; and agents that are killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from corral.bus.connect import connect
from corral.bus.layout import ensure_layout, stream_config
from corral.cli.local.server import EmbeddedServer
from corral.collectors.agent import claim as claim_module
from corral.collectors.agent import publisher as publisher_module
from corral.collectors.agent.claim import HostTaken
from corral.collectors.agent.outbox import Outbox
from corral.collectors.agent.publisher import Publisher
from corral.collectors.replay.source import ReplaySource
from corral.collectors.service import collect
from corral.collectors.simulated.source import SimulatedSource
from corral.schemas import codec, subjects
from corral.schemas.telemetry import AgentReport, DeviceEvent, SampleBatch
from nats.aio.client import Client
from nats.js import api
from nats.js.errors import KeyNotFoundError

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Start]:
    """Starts collectors; those that still run at the end are killed."""
    running: list[subprocess.Popen[str]] = []

    def start(url: str, *arguments: str, state: str = "state") -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "corral.cli.main", "collect", "--source", "simulated", "--hosts", "3"]
        command += ["--devices", "2", "--interval", "20ms", "--batch", "20ms", "--nats", url]
        command += ["--state", str(tmp_path / state), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


async def until(condition: Callable[[], bool], what: str, seconds: float = 15.0) -> None:
    for _ in range(round(seconds / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"not within {seconds:.0f} s: {what}")


def spilt(tmp_path: Path, state: str = "state") -> int:
    size = 0
    for file in (tmp_path / state).glob("collector/sim/*.spill"):
        with contextlib.suppress(FileNotFoundError):  # sent and deleted since it was listed
            size += file.stat().st_size
    return size


async def stored(nc: Client) -> dict[str, list[tuple[str, str, bytes]]]:
    """Everything in both streams: message id, subject and payload, in the streams' order."""
    found: dict[str, list[tuple[str, str, bytes]]] = {}
    js = nc.jetstream()
    for stream in (subjects.TELEMETRY_STREAM, subjects.INVENTORY_STREAM, subjects.FACTS_STREAM):
        messages = found[stream] = []
        config = api.ConsumerConfig(ack_policy=api.AckPolicy.NONE, mem_storage=True)
        consumer = await js.pull_subscribe("corral.v1.>", stream=stream, config=config)
        left = (await consumer.consumer_info()).num_pending or 0
        while left:
            for message in await consumer.fetch(min(left, 500), timeout=5):
                messages.append((message.headers["Nats-Msg-Id"], message.subject, message.data))
                left -= 1
    return found


def agent_of(message_id: str) -> str:
    """The agent's run that a message is of, from its id `<key>.<agent>-<sequence>`."""
    return message_id.rpartition("-")[0].partition(".")[2]


def sequences(found: dict[str, list[tuple[str, str, bytes]]]) -> dict[str, list[list[int]]]:
    """By agent: the sequences in each stream, in its order."""
    by_agent: dict[str, list[list[int]]] = {}
    for number, messages in enumerate(found.values()):
        for message_id, _, _ in messages:
            sequence = int(message_id.rpartition("-")[2])
            by_agent.setdefault(agent_of(message_id), [[] for _ in found])[number].append(sequence)
    return by_agent


def assert_once_and_in_order(per_stream: list[list[int]], missing: int = 0) -> int:
    """Each stream grows, and together they have every sequence once; returns the last."""
    for numbers in per_stream:
        assert numbers == sorted(set(numbers))
    everything = sorted(number for numbers in per_stream for number in numbers)
    assert len(everything) == len(set(everything))
    assert everything[-1] - len(everything) == missing
    return everything[-1]


async def connected(server: EmbeddedServer) -> Client:
    return await connect(server.url, name="test", wait_seconds=10)


async def test_an_agent_killed_without_a_bus_delivers_once_and_in_order_after_its_restart(
    tmp_path: Path, collector: Start
) -> None:
    server = EmbeddedServer(tmp_path / "nats")
    server.start()
    url = server.url
    server.stop()
    first = collector(url)
    await until(lambda: spilt(tmp_path) > 200_000, "the first run spills")
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = collector(url)
    size = spilt(tmp_path)
    await until(lambda: spilt(tmp_path) > size + 200_000, "the second run spills behind the first")
    second.send_signal(signal.SIGKILL)
    second.wait()

    server.start()
    try:
        third = collector(url)
        await until(lambda: spilt(tmp_path) == 0, "everything is sent")
        third.send_signal(signal.SIGTERM)
        output, _ = third.communicate(timeout=15)
        assert third.returncode == 0, output
        nc = await connected(server)
        found = await stored(nc)
        await nc.close()
    finally:
        server.kill()
    by_agent = sequences(found)
    assert len(by_agent) == 3
    # A killed run may lose what it was about to write, never what lies before that.
    lasts = [assert_once_and_in_order(per_stream) for per_stream in by_agent.values()]
    assert min(lasts[:2]) > 50
    # The runs follow each other in the stream.
    order = [agent_of(message_id) for message_id, _, _ in found[subjects.TELEMETRY_STREAM]]
    assert order == sorted(order, key=list(by_agent).index)


async def test_a_server_that_is_restarted_under_load_loses_and_doubles_nothing(
    tmp_path: Path, collector: Start
) -> None:
    server = EmbeddedServer(tmp_path / "nats")
    server.start()
    try:
        process = collector(server.url, "--hosts", "20")
        for number in range(2):
            await asyncio.sleep(1.0)
            server.stop() if number % 2 else server.kill()
            await until(lambda: spilt(tmp_path) > 0, "it spills")
            server.start()
            await until(lambda: spilt(tmp_path) == 0, "it has caught up")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=15)
        assert process.returncode == 0, output
        nc = await connected(server)
        found = await stored(nc)
        await nc.close()
    finally:
        server.kill()
    (per_stream,) = sequences(found).values()
    assert assert_once_and_in_order(per_stream) > 500
    kinds = [
        codec.decode(payload, DeviceEvent).kind
        for _, subject, payload in found[subjects.FACTS_STREAM]
        if subject == subjects.events_subject("sim")
    ]
    assert (kinds[0], kinds[-1]) == ("agent_started", "agent_stopped")


async def test_what_a_full_buffer_drops_is_counted_and_told(tmp_path: Path, collector: Start) -> None:
    server = EmbeddedServer(tmp_path / "nats")
    server.start()
    url = server.url
    server.stop()
    process = collector(url, "--buffer", "1MiB", "--hosts", "40")
    await until(lambda: spilt(tmp_path) > 2**19, "it spills")
    await asyncio.sleep(1.5)
    server.start()
    try:
        await until(lambda: spilt(tmp_path) == 0, "it has caught up")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=15)
        nc = await connected(server)
        found = await stored(nc)
        await nc.close()
    finally:
        server.kill()
    (per_stream,) = sequences(found).values()
    reports = [
        codec.decode(payload, AgentReport)
        for _, subject, payload in found[subjects.TELEMETRY_STREAM]
        if subject == subjects.agent_subject("sim")
    ]
    dropped = reports[-1].dropped_messages
    assert dropped > 0
    assert assert_once_and_in_order(per_stream, missing=dropped) > dropped
    events = [
        codec.decode(payload, DeviceEvent)
        for _, subject, payload in found[subjects.FACTS_STREAM]
        if subject == subjects.events_subject("sim")
    ]
    # The newest tells of all: an earlier one may have been dropped itself.
    told = [event for event in events if event.kind == "samples_dropped"][-1]
    assert told.data["messages_total"] == dropped
    assert told.data["samples_total"] == reports[-1].dropped_samples > 0
    # The oldest went first: the run's own beginning is gone.
    assert min(number for numbers in per_stream for number in numbers) > 1


async def test_what_the_bus_refuses_for_good_at_the_end_is_counted_and_told(server: EmbeddedServer, nc: Client) -> None:
    js = nc.jetstream()
    config = (await js.stream_info(subjects.TELEMETRY_STREAM)).config
    config.max_msg_size = 2048
    await js.update_stream(config)
    # The samples of 20 ticks share a message, which is too large; the last is closed by the end.
    work = collect(
        SimulatedSource(1, 8),
        name="sim",
        nats_url=server.url,
        interval_seconds=0.04,
        batch_seconds=0.8,
        processes_seconds=0,
        report_seconds=0.1,
        spill=False,
    )
    running = asyncio.create_task(work)
    reports = await nc.subscribe(subjects.agent_subject("sim"))
    async with asyncio.timeout(20):
        while True:
            report = codec.decode((await reports.next_msg(timeout=20)).data, AgentReport)
            if report.dropped_messages and 5 <= report.ticks % 20 <= 12:
                break
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    found = await stored(nc)
    (per_stream,) = sequences(found).values()
    last = codec.decode(found[subjects.TELEMETRY_STREAM][-1][2], AgentReport)
    assert last.dropped_messages > 0
    assert_once_and_in_order(per_stream, missing=last.dropped_messages)


async def test_the_second_agent_of_a_name_is_refused_until_the_first_is_gone(
    server: EmbeddedServer, nc: Client, collector: Start, tmp_path: Path
) -> None:
    first = collector(server.url)
    bucket = await nc.jetstream().key_value(subjects.HOSTS_BUCKET)
    holder: dict[str, object] = {}

    async def held_by(pid: int) -> None:
        async with asyncio.timeout(20):
            while holder.get("pid") != pid:
                await asyncio.sleep(0.1)
                with contextlib.suppress(KeyNotFoundError):
                    holder.update(json.loads((await bucket.get("sim")).value or b"{}"))

    await held_by(first.pid)
    agent = holder["agent"]
    second = collector(server.url, state="other")
    output, _ = await asyncio.to_thread(second.communicate, timeout=20)
    assert second.returncode == 1
    assert f"sim is already collected by agent {agent} (process {first.pid} on " in output
    # What it has read meanwhile is not its to tell, now or later.
    assert spilt(tmp_path, "other") == 0
    # On the same machine even the state folder tells.
    third = collector(server.url)
    output, _ = await asyncio.to_thread(third.communicate, timeout=20)
    assert third.returncode == 1
    assert f"process {first.pid}" in output
    first.send_signal(signal.SIGKILL)
    first.wait()
    # A dead process on this machine is seen to be dead; nobody waits for the entry to expire.
    fourth = collector(server.url)
    await held_by(fourth.pid)
    fourth.send_signal(signal.SIGTERM)
    fourth.communicate(timeout=15)
    assert fourth.returncode == 0
    assert {agent_of(message[0]) for message in (await stored(nc))[subjects.TELEMETRY_STREAM]} == {
        agent,
        holder["agent"],
    }


async def test_a_name_whose_agent_died_on_another_machine_is_free_when_its_entry_expires(
    server: EmbeddedServer, collector: Start
) -> None:
    nc = await connected(server)
    js = nc.jetstream()
    ttl = 4.0
    bucket = await js.create_key_value(api.KeyValueConfig(bucket=subjects.HOSTS_BUCKET, ttl=ttl))
    elsewhere = {"agent": "gone", "pid": 1, "address": "elsewhere", "started_at_ns": 0}
    claimed = time.monotonic()
    await bucket.put("sim", json.dumps(elsewhere).encode())
    process = collector(server.url)
    holder = 1
    async with asyncio.timeout(20):
        while holder != process.pid:
            await asyncio.sleep(0.02)
            with contextlib.suppress(KeyNotFoundError):
                holder = json.loads((await bucket.get("sim")).value or b"{}")["pid"]
    # Not a moment earlier: the claim might have been renewed until then.
    assert time.monotonic() - claimed >= ttl
    await nc.close()


async def test_an_agent_whose_name_was_taken_while_it_could_not_renew_gives_way(
    server: EmbeddedServer, nc: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(claim_module, "RENEW_SECONDS", 0.2)
    source = SimulatedSource(1, 1)
    work = collect(source, name="sim", nats_url=server.url, interval_seconds=0.02, state=tmp_path, drain_seconds=0.1)
    running = asyncio.create_task(work)
    samples = await nc.subscribe("corral.v1.samples.*")
    await samples.next_msg(timeout=10)
    bucket = await nc.jetstream().key_value(subjects.HOSTS_BUCKET)
    rival = json.dumps({"agent": "rival", "pid": 7, "address": "node-9", "started_at_ns": 0}).encode()

    async def renew() -> None:
        while True:
            await bucket.put("sim", rival)
            await asyncio.sleep(0.2)

    renewing = asyncio.create_task(renew())
    with pytest.raises(HostTaken, match=r"agent rival \(process 7 on node-9"):
        async with asyncio.timeout(10):
            await running
    renewing.cancel()
    assert json.loads((await bucket.get("sim")).value or b"{}")["agent"] == "rival"


async def test_data_that_ends_is_all_sent_however_long_it_takes(server: EmbeddedServer, tmp_path: Path) -> None:
    file = tmp_path / "samples.csv"
    rows = [f"{second},gpu{gpu},{second}" for second in range(15_000) for gpu in range(8)]
    file.write_text("epoch_s,device,power_watts\n" + "\n".join(rows))
    # More than the buffer holds: a recording is not read faster than the bus takes it.
    source = ReplaySource(file, speed=1e9, hosts=8)
    await collect(
        source,
        name="replay",
        nats_url=server.url,
        interval_seconds=0.02,
        batch_seconds=0.02,
        buffer_bytes=2**20,
        drain_seconds=0.01,
        state=tmp_path,
    )
    nc = await connected(server)
    found = await stored(nc)
    await nc.close()
    count = 0
    for _, subject, payload in found[subjects.TELEMETRY_STREAM]:
        if subject.startswith(subjects.SAMPLES):
            batch = codec.decode(payload, SampleBatch)
            count += len(batch.times_ns) // 8
    assert count == 120_000


class DeafProxy:
    """Forwards what the client says and, while `deaf`, nothing of what the server answers to publications."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.deaf = False
        self.url = ""
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, up = await asyncio.open_connection("127.0.0.1", self.port)
        self._writers += [writer, up]
        await asyncio.gather(self._pump(reader, up, False), self._pump(upstream, writer, True))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, answers: bool) -> None:
        try:
            while data := await source.read(65536):
                if not (answers and self.deaf):
                    sink.write(data)
                    await sink.drain()
        except OSError:
            pass
        sink.close()

    def cut(self) -> None:
        for writer in self._writers:
            writer.close()
        self._writers.clear()

    async def stop(self) -> None:
        assert self._server is not None
        self.cut()
        self._server.close()


@pytest.mark.parametrize("silent", [False, True], ids=["cut", "silent"])
async def test_what_was_stored_unheard_longer_ago_than_the_stream_remembers_is_not_stored_twice(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    nc = await connected(server)
    js = nc.jetstream()
    for stream in subjects.STREAMS:
        config = stream_config(stream)
        config.duplicate_window = 0.2
        await js.add_stream(config)
    monkeypatch.setattr(publisher_module, "DOUBT_SECONDS", 0.1)
    proxy = DeafProxy(server.port)
    await proxy.start()
    outbox = Outbox(2**20)
    sending = Publisher(outbox, proxy.url, name="test")
    task = asyncio.create_task(sending.run())

    def put(first: int, last: int) -> None:
        for number in range(first, last + 1):
            outbox.put(subjects.samples_subject(f"h{number % 2}"), f"run-{number}", b"%d" % number)
        sending.wake()

    put(1, 10)
    async with asyncio.timeout(10):
        await sending.drained()
    proxy.deaf = True
    put(11, 20)
    for _ in range(500):
        if (await js.stream_info(subjects.TELEMETRY_STREAM)).state.messages == 20:
            break
        await asyncio.sleep(0.02)
    assert outbox.in_flight == 10
    await asyncio.sleep(0.5)
    if silent:
        # The connection stands, and nobody answers: that is noticed although there is always something to send.
        monkeypatch.setattr(publisher_module, "ACK_WAIT_SECONDS", 0.3)
        for number in range(21, 31):
            put(number, number)
            await asyncio.sleep(0.05)
        proxy.deaf = False
    else:
        proxy.cut()
        proxy.deaf = False
        put(21, 30)
    async with asyncio.timeout(10):
        await sending.drained()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await proxy.stop()
    ids = [message_id for message_id, _, _ in (await stored(nc))[subjects.TELEMETRY_STREAM]]
    assert ids == [f"run-{number}" for number in range(1, 31)]
    await nc.close()


async def test_a_missing_stream_is_made_and_a_full_one_waited_for(server: EmbeddedServer) -> None:
    nc = await connected(server)
    js = nc.jetstream()
    outbox = Outbox(2**20)
    sending = Publisher(outbox, server.url, name="test")
    task = asyncio.create_task(sending.run())
    for number in range(1, 6):
        outbox.put(subjects.samples_subject("h"), f"run-{number}", b"x")
    sending.wake()
    async with asyncio.timeout(10):
        await sending.drained()
    # A stream that takes no more: publications are refused one by one, and come in order once it takes them again.
    config = (await js.stream_info(subjects.TELEMETRY_STREAM)).config
    config.max_msgs, config.discard = 5, api.DiscardPolicy.NEW
    await js.update_stream(config)
    for number in range(6, 21):
        outbox.put(subjects.samples_subject("h"), f"run-{number}", b"x")
    sending.wake()
    await asyncio.sleep(0.5)
    assert len(outbox) == 15
    config.max_msgs = -1
    await js.update_stream(config)
    async with asyncio.timeout(15):
        await sending.drained()
    ids = [message_id for message_id, _, _ in (await stored(nc))[subjects.TELEMETRY_STREAM]]
    assert ids == [f"run-{number}" for number in range(1, 21)]
    assert outbox.dropped_messages == 0
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await nc.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--interval", "0"], "an interval of 0 s is not possible"),
        (["--interval", "-1s"], "is no duration"),
        (["--interval", "5ms"], "20ms or more"),
        (["--batch", "soon"], "is no duration"),
        (["--buffer", "10B"], "too small"),
        (["--buffer", "10"], "say 10GiB"),
        (["--prefix", " .*> "], "is no host name"),
        (["--label", "rack"], "no KEY=VALUE"),
        (["--source", "replay"], "needs --file"),
        (["--models", "Voodoo2"], "no simulated model"),
    ],
)
def test_what_can_not_be_is_refused_as_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from corral.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["collect", "--source", "simulated", "--state", str(tmp_path), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_host_name_goes_into_subjects_as_one_token(server: EmbeddedServer, collector: Start) -> None:
    process = collector(server.url, "--prefix", "rack 1.gpu*")

    async def first_subject() -> str:
        nc = await connected(server)
        await ensure_layout(nc.jetstream())
        messages = await nc.subscribe("corral.v1.samples.>")
        subject = (await messages.next_msg(timeout=60)).subject
        await nc.close()
        return subject

    assert asyncio.run(first_subject()).startswith("corral.v1.samples.rack-1-gpu-0")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=15)
    assert "'rack 1.gpu*' goes into subjects as 'rack-1-gpu'" in output
    assert os.waitstatus_to_exitcode(process.returncode) == 0
