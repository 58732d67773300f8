"""What a runner publishes of an output, as a reader puts it together: whole, or with its holes named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from corral.client.jobs.logs import LogPiece, Output
from corral.runners.output import NEW
from corral.runners.output import Output as Published
from corral.schemas.work.jobs import TaskPart
from corral.schemas.work.runs import LOG_CHUNK_BYTES, LOG_HEAD_CHUNKS, LOG_TAIL_CHUNKS, LogChunk
from hypothesis import given, settings
from hypothesis import strategies as st

KEPT = (LOG_HEAD_CHUNKS + LOG_TAIL_CHUNKS) * LOG_CHUNK_BYTES
PATTERN = bytes(range(251)) * (3 * LOG_CHUNK_BYTES // 251 + 1)
WRITES = st.lists(
    st.tuples(st.one_of(st.integers(1, 300), st.integers(30_000, 3 * LOG_CHUNK_BYTES)), st.floats(0, 20)), max_size=12
)


def stored(stream: dict[str, LogChunk]) -> tuple[list[LogChunk], LogChunk | None]:
    return [chunk for part, chunk in stream.items() if part != NEW], stream.get(NEW)


@settings(max_examples=30)
@given(WRITES, st.integers(0, 12), st.data())
def test_followed_from_any_moment_it_is_whole(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, float]], begin: int, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("output") / "file"
    path.touch()
    published = Published("7_0.1", os.open(path, os.O_RDONLY))
    reader = Output(0, TaskPart(host="h"))
    stream: dict[str, LogChunk] = {}
    found: list[LogPiece] = []

    def fetch() -> None:
        chunks, last = stored(stream)
        found.extend([*reader.take_all(chunks), *reader.take_last(last)])

    now, size = 0.0, 0
    with path.open("ab") as file:
        for number, (count, pause) in enumerate([*writes, (0, 0.0)]):
            file.write((PATTERN * 2)[size % 251 : size % 251 + count])
            file.flush()
            now, size = now + pause, size + count
            pieces = published.pieces(now, ended=number == len(writes))
            stream |= {piece.part: piece.chunk for piece in pieces}
            if number == begin:
                fetch()
            for piece in pieces if number > begin else []:
                if data.draw(st.integers(0, 9)) == 0:  # the subscription has lost it
                    continue
                if not reader.follows(piece.chunk):
                    fetch()
                if not reader.hold(piece.chunk, now):
                    found.extend(reader.take_held(now))
                    found.extend(each for each in [reader.take(piece.chunk)] if each is not None)
    fetch()
    found.extend(reader.take_held(now + 60))
    published.close()
    whole = path.read_bytes()
    position = 0
    for piece in found:
        assert piece.offset == position + piece.missed
        assert whole[piece.offset : piece.offset + len(piece.data)] == piece.data
        position = piece.offset + len(piece.data)
    assert (position, reader.ended) == (size, True)
    if size <= KEPT - LOG_CHUNK_BYTES:
        assert sum(piece.missed for piece in found) == 0


def test_of_much_output_begin_and_end_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (40 * LOG_CHUNK_BYTES // 256))
    published = Published("7_0.1", os.open(path, os.O_RDONLY))
    stream = {piece.part: piece.chunk for piece in published.pieces(0.0, ended=True)}
    published.close()
    reader = Output(0, TaskPart(host="h"))
    found = list(reader.take_all(stored(stream)[0]))
    assert sum(len(piece.data) for piece in found) == KEPT
    assert [piece.missed for piece in found if piece.missed] == [40 * LOG_CHUNK_BYTES - KEPT]
