"""The Python client on a real cluster: grants, exceptions, held leases, releases."""

import asyncio
import itertools
import os
import threading
import time

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.client import (
    Client,
    Conflict,
    HeldLease,
    InvalidRequest,
    LeaseLost,
    NoService,
    NotFound,
    NotOwner,
    QueryFailed,
    Rejected,
    SyncClient,
    Unavailable,
    connect,
    lease,
)
from corral.schemas.requests import LeaseState, RejectionCode, WorkItem
from support.local_cluster import LocalCluster


@pytest.fixture
def client(cluster: LocalCluster):
    with SyncClient(cluster.url, owner="pythonist") as made:
        yield made


async def states(client: Client, lease_id: str) -> list[LeaseState]:
    return [one.state for one in await client.leases(lease_id=lease_id, states=tuple(LeaseState))]


# Held for a block


async def test_a_lease_is_renewed_while_it_is_held_and_released_after(cluster: LocalCluster) -> None:
    async with connect(cluster.url, owner="pythonist") as client:
        async with client.lease(gpus=2, memory="8GiB", ttl=1, name="block") as held:
            assert len(held.devices) == 2
            there = held.environment_of(held.hosts[0])
            assert set(there["CUDA_VISIBLE_DEVICES"].split(",")) == set(held.devices)
            assert held.environment["CUDA_VISIBLE_DEVICES"] == ""  # this is none of the fleet's hosts
            await asyncio.sleep(1.6)
            assert await states(client, held.lease_id) == [LeaseState.ACTIVE]
            held.check()
        assert await states(client, held.lease_id) == [LeaseState.RELEASED]


async def test_a_block_whose_lease_is_taken_is_left_with_the_reason(cluster: LocalCluster) -> None:
    async with connect(cluster.url) as client:

        async def evicted() -> None:
            async with client.lease() as held:
                await client.evict(held.lease_id, reason="maintenance")
                await asyncio.sleep(30)

        with pytest.raises(LeaseLost, match="maintenance"):
            await evicted()
        # What is cancelled from outside stays cancelled, and its lease is given back.
        entered = asyncio.Future[HeldLease]()

        async def work() -> None:
            async with client.lease() as held:
                entered.set_result(held)
                await asyncio.sleep(30)

        task = asyncio.create_task(work())
        held = await entered
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await states(client, held.lease_id) == [LeaseState.RELEASED]


async def test_whoever_wants_to_be_called_is_called_and_goes_on(cluster: LocalCluster) -> None:
    async with connect(cluster.url) as client:
        told = asyncio.Future[LeaseLost]()
        async with client.lease(on_lost=told.set_result) as held:
            await client.release(held.lease_id)
            lost = await asyncio.wait_for(told, 10)
        assert lost.lease_id == held.lease_id
        assert held.lost is lost


async def test_a_coroutine_function_can_be_decorated(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRAL_HOST", "sim-0001")
    async with connect(cluster.url) as client:

        @client.lease(gpus=1, set_environment=True)
        async def train(epochs: int, lease: HeldLease) -> tuple[int, str, str]:
            return epochs, lease.lease_id, os.environ["CORRAL_LEASE"]

        first, second = await train(3), await train(epochs=4)
        assert [first[0], second[0]] == [3, 4]
        assert first[1] != second[1]
        assert first[1] == first[2]
        assert "CORRAL_LEASE" not in os.environ
        assert await states(client, first[1]) == [LeaseState.RELEASED]


def test_the_same_without_asyncio(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRAL_NATS_URL", cluster.url)
    monkeypatch.setenv("CORRAL_HOST", "sim-0001")
    with SyncClient(cluster.url) as client:
        with lease(gpus=1, ttl=1, set_environment=True, name="sync") as held:
            assert os.environ["CORRAL_LEASE"] == held.lease_id
            time.sleep(1.4)
            assert [one.lease_id for one in client.leases(lease_id=held.lease_id)] == [held.lease_id]
        assert "CORRAL_LEASE" not in os.environ
        assert client.leases(lease_id=held.lease_id) == []

        def evicted() -> None:
            with client.lease() as held:
                client.evict(held.lease_id, reason="gone")
                while held.lost is None:
                    time.sleep(0.01)
                with pytest.raises(LeaseLost):
                    held.check()

        with pytest.raises(LeaseLost, match="gone"):
            evicted()

        called = threading.Event()
        with client.lease(on_lost=lambda _: called.set()) as held:
            client.evict(held.lease_id, reason="gone")
            assert called.wait(10)

        # What goes wrong in the block is what comes out of it.
        with pytest.raises(ZeroDivisionError), client.lease() as held:
            _ = 1 / 0
        assert client.leases(lease_id=held.lease_id) == []

        @lease(gpus=1)
        def work(lease: HeldLease) -> list[str]:
            return lease.devices

        assert work()[0].startswith("GPU-")


# Refusals


def test_each_refusal_is_an_exception_of_its_own(client: SyncClient) -> None:
    with pytest.raises(Rejected) as rejected:
        client.request(gpus=100)
    assert rejected.value.code is RejectionCode.IMPOSSIBLE
    assert not rejected.value.could_ever_fit
    assert sum(reason.devices for reason in rejected.value.reasons) == 8
    for fields, field in (
        ({"gpus": -1}, "$.gpus"),
        ({"gpus": 2, "gpu_memory": "1GiB"}, "$.gpu_memory"),
        ({"memory": "x"}, "$.gpu_memory_bytes"),
    ):
        with pytest.raises(InvalidRequest) as invalid:
            client.request(**fields)
        assert invalid.value.field == field
    with pytest.raises(InvalidRequest, match="larger than the bus allows"):
        client.query(f"SELECT '{'x' * 2_000_000}'")
    with pytest.raises(InvalidRequest, match="share"):
        client.request(gpus=2, share=0.5)  # the planner's own rule
    with pytest.raises(NotFound):
        client.renew("nothing")
    held = client.request(request_id="once").lease
    assert client.request(request_id="once").lease == held
    with pytest.raises(Conflict):
        client.request(request_id="once", gpus=2)
    with pytest.raises(NotOwner):
        client.release(held.lease_id, owner="somebody-else")
    client.release(held.lease_id)


def test_nobody_there_is_told_from_nobody_listening(server: EmbeddedServer) -> None:
    with pytest.raises(Unavailable, match="corral up"):
        SyncClient("nats://127.0.0.1:9", wait=0.2)
    with SyncClient(server.url, patience=0.2) as client:
        for call in (client.fleet, lambda: client.query("SELECT 1"), lambda: client.request(wait="10s")):
            with pytest.raises(NoService):
                call()


# Work items, queue, history, live


def test_work_items_come_back_with_their_devices(client: SyncClient) -> None:
    items = [WorkItem(id=f"layer-{number}", cost=number + 1.0) for number in range(6)]
    held = client.request(gpus=2, items=items, method="balanced").lease
    assert sorted(str(item) for grant in held.grants for item in grant.items) == [item.id for item in items]
    client.release(held.lease_id)


async def test_a_request_waits_until_something_comes_free(cluster: LocalCluster) -> None:
    async with connect(cluster.url, owner="pythonist") as client:
        host = (await client.devices())[0].host
        blocker = await client.request(gpus=4, hosts=host)
        seen = asyncio.Queue[int]()
        waiting = asyncio.create_task(
            client.request(gpus=4, hosts=host, wait="30s", on_wait=lambda entry: seen.put_nowait(entry.position))
        )
        assert await seen.get() == 1
        await client.release(blocker.lease.lease_id)
        granted = await asyncio.wait_for(waiting, 10)
        await client.release(granted.lease.lease_id)


def test_a_query_comes_in_the_form_that_is_wanted(client: SyncClient) -> None:
    sql = "SELECT i, 'row ' || i AS text, NULL AS nothing FROM range(3) r(i) ORDER BY i"
    for format in ("json", "arrow"):
        result = client.query(sql, format=format)
        assert result.columns == ["i", "text", "nothing"]
        assert result.rows == [(0, "row 0", None), (1, "row 1", None), (2, "row 2", None)]
        assert result.arrow().column("i").to_pylist() == [0, 1, 2]
        assert result.dicts()[1] == {"i": 1, "text": "row 1", "nothing": None}
        assert "<td>row 2</td>" in result._repr_html_()
    assert client.query("SELECT 42").scalar() == 42
    assert client.query("FROM range(10)", limit=4).truncated
    # Larger than any message of the bus.
    large = client.query("SELECT i, repeat('x', 100) AS text FROM range(100000) r(i)", limit=100_000)
    assert [row[0] for row in large.rows] == list(range(100_000))
    with pytest.raises(QueryFailed, match="Could not convert"):
        client.query("SELECT 'x'::INTEGER")
    with pytest.raises(QueryFailed, match="nowhere"):
        client.query("FROM nowhere")


def test_data_frames_have_times_numbers_and_nulls(client: SyncClient) -> None:
    polars, pandas = pytest.importorskip("polars"), pytest.importorskip("pandas")
    sql = "SELECT TIMESTAMPTZ '2026-01-02 03:04:05+00' AS time, 'h' AS host, 1.5 AS value, NULL::INTEGER AS nothing"
    for format in ("arrow", "json"):
        result = client.query(sql, format=format)
        frame = result.polars()
        assert frame.columns == ["time", "host", "value", "nothing"]
        assert frame.select("host", "value", "nothing").rows() == [("h", 1.5, None)]
        table = result.pandas()
        assert table["value"].sum() == 1.5
        assert table["nothing"].isna().all()
        assert pandas.to_datetime(table["time"], utc=True)[0] == pandas.Timestamp("2026-01-02T03:04:05Z")
    # A sum of whole numbers is wider than any of them, and a decimal has its own digits: in a frame both are numbers.
    sums = "SELECT sum(i) AS n, sum(i / 2::DECIMAL(9, 1)) AS half, (sum(i) * 10 ** 25)::DECIMAL(38) AS large "
    for format in ("arrow", "json"):
        table = client.query(f"{sums}, NULL::HUGEINT AS nothing FROM range(5) t(i)", format=format).pandas()
        assert [str(table[name].dtype) for name in ("n", "half")] == ["int64", "float64"]
        assert (table["n"] / 4).tolist() == [2.5]
        assert table["large"].astype(float).tolist() == [1e26]
        assert table["nothing"].isna().all()
    typed = client.query(sql, format="arrow").polars()
    assert typed.schema["time"] == polars.Datetime("us", "UTC")
    # An empty result still has its columns.
    empty = client.query(f"FROM ({sql}) WHERE false", format="json")
    assert (empty.polars().columns, list(empty.pandas().columns)) == (result.columns, result.columns)


def test_samples_can_be_watched(client: SyncClient) -> None:
    device = client.devices()[0]
    samples = list(itertools.islice(client.watch(devices=[device.uuid]), 2))
    assert {sample.device for sample in samples} == {device.uuid}
    assert samples[0].time_ns < samples[1].time_ns
    assert samples[0].memory_total_bytes == device.memory_total_bytes


def test_notebooks_show_tables(client: SyncClient) -> None:
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell.instance()
    # As the first cell of a notebook does it: nothing else is asked for.
    shell.run_cell("import importlib, corral.client; importlib.reload(corral.client)")

    def shown(value: object) -> str:
        return shell.display_formatter.format(value)[0]["text/html"]

    granted = client.request(name="<b>bold</b>", labels={"a": "b"})
    assert granted.lease.grants[0].device in shown(granted)
    assert "<b>" not in shown(granted.lease)
    client.release(granted.lease.lease_id)
    assert shown(client.devices()).count("<tr>") == 9
    with client.lease(name="<i>held</i>") as held:
        assert held.devices[0] in shown(held)
        assert "<i>" not in shown(held)
    assert "8" in shown(client.fleet())
    with pytest.raises(Rejected) as rejected:
        client.request(gpus=100)
    assert rejected.value.reasons[0].detail in shown(rejected.value.rejection)
