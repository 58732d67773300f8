"""Parquet files that are written while their rows arrive: complete or an error, and never whole in memory."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from corral.client import CorralError
from corral.dashboard.parquet import as_parquet

ipc: Any = pyarrow.ipc
parquet: Any = pyarrow.parquet


def arrow_of(table: Any, rows: int) -> bytes:
    sink = io.BytesIO()
    with ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return sink.getvalue()


async def in_pieces(whole: bytes, size: int, taken: list[int]) -> AsyncGenerator[bytes]:
    for start in range(0, len(whole), size):
        taken.append(start)
        yield whole[start : start + size]
        await asyncio.sleep(0)


async def file_of(pieces: AsyncGenerator[bytes]) -> bytes:
    return b"".join([piece async for piece in as_parquet(pieces)])


async def test_all_rows_are_in_the_file() -> None:
    table = pa.table({"n": list(range(5000)), "text": [str(n) for n in range(5000)]})
    made = await file_of(in_pieces(arrow_of(table, 100), 1000, []))
    assert parquet.read_table(io.BytesIO(made)).equals(table)


async def test_what_parquet_does_not_take_ends_the_question() -> None:
    intervals = pa.array([pa.MonthDayNano([1, 2, 3])] * 50_000)
    whole = arrow_of(pa.table({"interval": intervals}), 1000)
    taken: list[int] = []
    with pytest.raises(CorralError, match="the file can't be written"):
        await file_of(in_pieces(whole, 100, taken))
    assert len(taken) < len(whole) / 200, "what nobody needs any more was asked for all the same"


async def test_an_answer_that_breaks_off_is_what_is_told() -> None:
    async def broken() -> AsyncGenerator[bytes]:
        yield arrow_of(pa.table({"n": [1]}), 1)[:100]
        raise CorralError("the processor is gone")

    with pytest.raises(CorralError, match="the processor is gone"):
        await file_of(broken())
