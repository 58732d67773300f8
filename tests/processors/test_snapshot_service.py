"""Copies of the history on request: how many are kept, for how long, and who is refused one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from corral.processors.query.snapshots import SnapshotService
from corral.schemas import subjects
from nats.aio.client import Client

KEPT_SECONDS = 1.5


def write(path: Path, archive: bool) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"copy" * 100)
    return 7


@pytest.fixture
async def folder(nc: Client, tmp_path: Path) -> AsyncIterator[Path]:
    folder = tmp_path / "history.duckdb.snapshots"
    service = SnapshotService(nc, folder, write, lambda: 1000, kept_seconds=KEPT_SECONDS)
    await service.start()
    yield folder
    await service.stop()
    assert not folder.exists()


def kept(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*")}


async def ask(nc: Client, subject: str = subjects.SNAPSHOT, body: bytes = b"{}") -> dict[str, Any]:
    return json.loads((await nc.request(subject, body, timeout=5)).data)


async def read(nc: Client, snapshot: str, **fields: Any) -> bytes:
    body = json.dumps({"snapshot_id": snapshot, **fields}).encode()
    return (await nc.request(f"{subjects.SNAPSHOT_READ}.olga", body, timeout=1)).data


async def test_a_copy_is_made_and_read_in_ones_own_name(nc: Client, folder: Path) -> None:
    made = await ask(nc, f"{subjects.SNAPSHOT}.olga")
    assert (made["bytes"], made["samples"]) == (400, 7)
    assert await read(nc, made["snapshot_id"], offset=396) == b"copy"
    with pytest.raises(TimeoutError):
        await read(nc, made["snapshot_id"], done=True)
    assert kept(folder) == set()


@pytest.mark.parametrize("body", [b"", b'{"type":"io.nats.jetstream.api.v1.stream_msg_get_response"}', b"no JSON"])
async def test_what_is_no_request_makes_no_copy(nc: Client, folder: Path, body: bytes) -> None:
    """An answer of the server's own, say, that somebody has had sent here."""
    answer = await ask(nc, body=body)
    assert answer["type"] == "error"
    assert kept(folder) == set()


async def test_two_copies_are_kept_at_most_and_the_least_read_one_goes(nc: Client, folder: Path) -> None:
    first, second = [(await ask(nc))["snapshot_id"] for _ in range(2)]
    await read(nc, first)
    third = (await ask(nc))["snapshot_id"]
    assert kept(folder) == {first, third}
    assert json.loads(await read(nc, second))["code"] == "not_found"
    assert await read(nc, third) == b"copy" * 100


async def test_what_is_no_piece_is_told_with_a_status(nc: Client, folder: Path) -> None:
    for content, encode, decode in (
        ("application/json", msgspec.json.encode, msgspec.json.decode),
        ("application/msgpack", msgspec.msgpack.encode, msgspec.msgpack.decode),
    ):
        headers = {"Content-Type": content}
        made = await nc.request(subjects.SNAPSHOT, encode({"tomorrow": 1}), timeout=5, headers=headers)
        snapshot = decode(made.data)
        assert snapshot["warnings"] == json.loads((made.headers or {})["Corral-Warnings"])
        for body, code, status in (
            ({"snapshot_id": "nope"}, "not_found", "404"),
            ({"snapshot_id": 5}, "invalid", "400"),
            ({}, "invalid", "400"),
        ):
            answer = await nc.request(f"{subjects.SNAPSHOT_READ}.olga", encode(body), timeout=5, headers=headers)
            told = decode(answer.data)
            assert (told["type"], told["code"]) == ("error", code)
            assert answer.headers is not None
            assert answer.headers["Nats-Service-Error-Code"] == status
            assert (answer.headers["Nats-Service-Error"], answer.headers["Content-Type"]) == (told["message"], content)
        body = encode({"snapshot_id": snapshot["snapshot_id"]})
        piece = await nc.request(f"{subjects.SNAPSHOT_READ}.olga", body, timeout=5, headers=headers)
        assert (piece.data, piece.headers) == (b"copy" * 100, {"Content-Type": "application/octet-stream"})


async def test_a_copy_that_nobody_fetches_goes_by_itself(nc: Client, folder: Path) -> None:
    made = await ask(nc)
    assert kept(folder) == {made["snapshot_id"]}
    await asyncio.sleep(KEPT_SECONDS + 0.5)
    assert kept(folder) == set()


async def test_no_copy_is_begun_where_it_would_fill_the_disk(nc: Client, tmp_path: Path) -> None:
    service = SnapshotService(nc, tmp_path / "snapshots", write, lambda: 2**60)
    await service.start()
    try:
        answer = await ask(nc)
        assert answer["code"] == "unavailable"
        assert "free beside the database" in answer["message"]
        assert kept(tmp_path / "snapshots") == set()
    finally:
        await service.stop()
