"""`corral top` on a real cluster, driven by its keys, on a small terminal."""

import fcntl
import io
import json
import os
import pty
import select
import struct
import subprocess
import termios
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from corral.cli import render
from corral.cli.top.rows import HISTORY, SORTS, by_host, filter_and_sort, sparkline
from corral.client import Client, connect
from corral.client.fleet_view import STATE_WORDS, FleetView, device_state, gpus_free
from corral.schemas.operations import DeviceStatus, FleetSummary
from corral.schemas.requests import LeaseState
from corral.schemas.telemetry import ProcessSample
from msgspec.structs import replace
from rich.console import Console
from support.local_cluster import CORRAL, LocalCluster, environment, wait_for

pytest.importorskip("textual", reason="corral[top] is not installed")

from corral.cli.top.app import DevicePage, TopApp
from corral.cli.top.tables import Rows
from textual.screen import Screen
from textual.widgets import Input


@pytest.fixture
async def client(cluster: LocalCluster) -> AsyncIterator[Client]:
    async with connect(cluster.url, owner="tester") as made:
        yield made


def screen(app: TopApp) -> list[str]:
    """What is to be seen, line by line."""
    return ["".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips()]


async def test_the_fleet_is_seen_sorted_filtered_and_operated(client: Client) -> None:
    held = (await client.request(gpus=2, name="watched")).lease
    board = FleetView(client, history=HISTORY)
    await board.refresh()
    app = TopApp(board, interval=0.2)
    async with app.run_test(size=(80, 24)) as pilot:
        text = "\n".join(await showing(pilot, app, "8 GPUs on 2 hosts", "6 free", "tester: watc"))
        for device in await client.devices():
            assert device.host in text
        for title in ("HOST", "MODEL", "STATE", "HELD BY", "UTIL%", "LAST", "GiB", "°C", "W"):
            assert title in text, f"{title} has no room"

        rows = app.query_one("#devices-rows", Rows)
        await pilot.press("p")
        for expected in ("util", "memory"):
            await pilot.press("s")
            assert f"by {expected}" in "\n".join(screen(app))
        used = [device.memory_used_bytes for device in rows._rows]
        assert used == sorted(used, reverse=True)
        await pilot.press("r")
        assert [device.memory_used_bytes for device in rows._rows] == sorted(used)
        await pilot.press("p")

        await pilot.press("3")
        lines = await showing(pilot, app, held.lease_id[-6:])
        assert [line.split()[:2] for line in lines if held.lease_id[-6:] in line] == [["tester", "watched"]], lines
        await pilot.press("1")

        await pilot.press("slash", *"zzz")
        assert not rows._rows
        app.query_one("#filter", Input).value = held.lease_id
        await pilot.press("enter")
        assert {device.uuid for device in rows._rows} == {grant.device for grant in held.grants}
        await pilot.press("enter")
        await showing(pilot, app, rows.current.uuid, "watched", page=DevicePage)
        await pilot.press("escape")

        # Nothing happens without a reason and Enter.
        uuid = rows.current.uuid
        await pilot.press("d", *"fan", "escape")
        assert not (await client.devices(devices=[uuid]))[0].drain_reason
        await pilot.press("d", *"fan", "enter")
        await until(pilot, lambda: drained(client, uuid, "fan"))
        await pilot.press("d", "escape")
        assert "fan" in (await client.devices(devices=[uuid]))[0].drain_reason
        await pilot.press("d", "y")
        await until(pilot, lambda: undrained(client, uuid))

        # One's own lease is released, another's is taken back, which needs a reason.
        await pilot.press("3")
        await showing(pilot, app, "watched")
        app.query_one("#leases-rows", Rows).action_move_to(at(app, "leases", held.lease_id))
        await pilot.press("x", "n")
        assert len(await client.leases(lease_id=held.lease_id)) == 1
        await pilot.press("x", "enter")
        await until(pilot, lambda: ended(client, held.lease_id, LeaseState.RELEASED))
        other = (await client.request(gpus=1, owner="somebody", name="other")).lease
        await until(pilot, lambda: shown(app, other.lease_id))
        app.query_one("#leases-rows", Rows).action_move_to(at(app, "leases", other.lease_id))
        await pilot.press("x", *"done", "enter")
        await until(pilot, lambda: ended(client, other.lease_id, LeaseState.EVICTED))


async def until(pilot: Any, condition: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(600):
        if await condition():
            return
        await pilot.pause(0.1)
    raise AssertionError(condition)


async def showing(pilot: Any, app: TopApp, *words: str, page: type[Screen[Any]] = Screen) -> list[str]:
    """The screen, line by line, once all words are on it and it is of this kind."""

    async def all_there() -> bool:
        text = "\n".join(screen(app))
        return isinstance(app.screen, page) and all(word in text for word in words)

    await until(pilot, all_there)
    return screen(app)


async def drained(client: Client, uuid: str, reason: str) -> bool:
    return reason in (await client.devices(devices=[uuid]))[0].drain_reason


async def undrained(client: Client, uuid: str) -> bool:
    return not (await client.devices(devices=[uuid]))[0].drain_reason


async def ended(client: Client, lease_id: str, state: LeaseState) -> bool:
    return [one.state for one in await client.leases(lease_id=lease_id, states=tuple(LeaseState))] == [state]


async def shown(app: TopApp, lease_id: str) -> bool:
    return at(app, "leases", lease_id) >= 0


def at(app: TopApp, view: str, key: str) -> int:
    rows = app.query_one(f"#{view}-rows", Rows)
    return next((number for number, row in enumerate(rows._rows) if rows._key(row) == key), -1)


async def test_processes_are_seen_with_their_leases_and_what_is_wrong_first(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(_: FleetView) -> None:
        """Ignore later samples of the host, which would replace these processes."""

    monkeypatch.setattr(FleetView, "follow_processes", nothing)
    held = (await client.request(gpus=1, share=0.5, memory="1GiB", name="greedy")).lease
    board = FleetView(client, history=HISTORY)
    await board.refresh()
    assert board.last is not None
    device = next(one for one in board.last.devices if one.uuid == held.grants[0].device)
    board._processes = {
        device.host: [
            ProcessSample(device=device.uuid, pid=11, lease=held.lease_id, memory_used_bytes=2**29, name="good"),
            ProcessSample(device=device.uuid, pid=12, memory_used_bytes=2**20, name="stranger", user="eve"),
            ProcessSample(device=device.uuid, pid=13, lease="long-gone", memory_used_bytes=2**20, name="late"),
        ]
    }
    app = TopApp(board, interval=3600)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("5")
        lines = await showing(pilot, app, "good", "stranger", "late", "2 lease violations")
        rows = [line for line in lines if any(name in line for name in ("good", "stranger", "late"))]
        assert ["no lease" in rows[0], "lease has ended" in rows[1], "good" in rows[2]] == [True] * 3, rows
        await pilot.press("enter")
        await showing(pilot, app, "stranger", "no lease", page=DevicePage)
    await client.release(held.lease_id)


def test_it_runs_in_a_real_terminal_of_80_by_24_and_leaves_it_as_it_was(cluster: LocalCluster) -> None:
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(there)
    process = subprocess.Popen(
        [*CORRAL, "top", "--sort", "util"],
        env=environment(CORRAL_NATS_URL=cluster.url, TERM="xterm-256color"),
        stdin=there,
        stdout=there,
        stderr=there,
        start_new_session=True,
    )
    seen = bytearray()

    def said(text: bytes) -> bool:
        while select.select([here], [], [], 0.05)[0]:
            seen.extend(os.read(here, 65536))
        return text in seen

    try:
        wait_for(lambda: said(b"8 GPUs"), 30)
        wait_for(lambda: said(b"sim-0001"), 30)
        os.write(here, b"2")
        wait_for(lambda: said(b"USABLE"), 30)
        os.write(here, b"q")
        wait_for(lambda: said(b"") or process.poll() is not None, 30)
        assert process.wait(30) == 0
        said(b"")
        assert b"\x1b[?1049l" in seen, "the other screen is left"
        assert termios.tcgetattr(there) == before
    finally:
        process.kill()
        os.close(here)
        os.close(there)


async def test_five_thousand_devices_stay_within_the_screen(client: Client) -> None:
    board = FleetView(client, history=HISTORY)
    await board.refresh()
    assert board.last is not None
    board.last.devices = [
        DeviceStatus(uuid=f"GPU-{number}", host=f"node-{number // 8:04}", index=number % 8, model="NVIDIA H100")
        for number in range(5000)
    ]
    board.last.fleet = FleetSummary(devices=5000, hosts=625)
    app = TopApp(board, interval=3600)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("end")
        lines = await showing(pilot, app, "node-0624")
        assert len(lines) == 24
        assert any(line.lstrip().startswith("HOST") for line in lines), "the head stays"
        await pilot.press("home", "2")
        await showing(pilot, app, "node-0000")


def test_scripts_get_it_once(cluster: LocalCluster) -> None:
    seen = json.loads(cluster.corral("top", "--json", "--sort", "power").stdout)
    assert set(seen) == {"time", "fleet", "devices", "leases", "queue"}
    power = [device["power_watts"] for device in seen["devices"]]
    assert power == sorted(power, reverse=True)
    for arguments in (["--once"], []):  # in a pipe it prints once of itself
        done = cluster.corral("top", *arguments)
        assert done.returncode == 0
        assert done.stdout.count("sim-000") >= 8


def test_rows_are_picked_by_words_and_sorted_by_every_column() -> None:
    devices = [
        DeviceStatus(uuid="GPU-1", host="b", index=1, model="NVIDIA H100", utilization_percent=5.0, leases=["l1"]),
        DeviceStatus(uuid="GPU-2", host="a", index=0, model="NVIDIA T4", utilization_percent=None),
        DeviceStatus(uuid="GPU-3", host="a", index=1, model="NVIDIA H100", usable=False, why_not=["stale"]),
    ]
    for sort in SORTS:
        assert len(filter_and_sort(devices, sort, False, "")) == 3
    assert [one.uuid for one in filter_and_sort(devices, "host", False, "")] == ["GPU-2", "GPU-3", "GPU-1"]
    assert [one.uuid for one in filter_and_sort(devices, "util", False, "")] == ["GPU-1", "GPU-2", "GPU-3"]
    for words, found in (("h100 leased", ["GPU-1"]), ("stale", ["GPU-3"]), ("free", ["GPU-2"]), ("*t4", ["GPU-2"])):
        assert [one.uuid for one in filter_and_sort(devices, "host", False, words)] == found
    # Somebody computes on it without a lease, or it is booked now: it is not free.
    busy = DeviceStatus(uuid="GPU-4", host="c", index=0, in_use=True, in_use_reason="a process without a lease")
    until, later = "booked for ann until 2026-12-01T08:00:00Z", "booked for ann from 2026-12-01T08:00:00Z"
    for device, state in ((busy, "in use"), (replace(busy, in_use=False, booked=until), "reserved"),
                          (replace(busy, in_use=False, booked=later), "free")):  # fmt: skip
        assert STATE_WORDS[device_state(device)].startswith(state)
        assert len(filter_and_sort([device], "host", False, state.replace(" ", "_"))) == 1
    assert filter_and_sort([busy], "host", False, "free") == []
    assert gpus_free(FleetSummary(share_free=2.5), [busy, *devices]) == 1.5
    assert [(row.host, row.devices, row.leased) for row in by_host(devices)] == [("a", 2, 0), ("b", 1, 1)]
    assert sparkline([0, None, 50, 100], 6) == "  ▁ ▅█"


def test_tables_keep_the_state_and_the_holder_on_a_narrow_screen() -> None:
    devices = [
        DeviceStatus(
            uuid="GPU-1", host="node-0001", index=0, model="NVIDIA A100-SXM4-80GB", leases=["a9106ad3ab-1-1"],
            share_free=0, memory_total_bytes=80 * 2**30, memory_used_bytes=2**30, power_watts=300,
        )
    ]  # fmt: skip
    holders = {"a9106ad3ab-1-1": "ann: fine-tuning-of-something-with-a-long-name"}
    for width in (60, 80, 120, 200):
        console = Console(width=width, file=io.StringIO())
        console.print(render.devices_table(devices, holders, width))
        head, row = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
        assert all(len(line.rstrip()) <= width for line in (head, row))
        assert ("HELD BY" in head, "ann: fine" in row, "leased" in row) == (True, True, True), row
        assert ("OF GiB" in head, "80.0" in row, "…" in row) == (width >= 120, width >= 120, width < 200), (head, row)
