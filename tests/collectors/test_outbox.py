"""The outbox keeps the order, loses nothing but what it counts, and what it has spilt outlives it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from corral.collectors.agent import spill as spill_module
from corral.collectors.agent.outbox import Outbox
from corral.collectors.agent.spill import SpillBusy
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

LIMIT = 4000


class OutboxModel(RuleBasedStateMachine):
    """Against a plain list of numbers: what waits, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        # Small enough that memory, segments and the limit are all crossed.
        spill_module.SEGMENT_BYTES = 900
        self.outbox = Outbox(LIMIT, self.folder / "spill", memory_bytes=800)
        self.waiting: list[int] = []
        self.in_flight: list[int] = []
        self.finished: set[int] = set()
        self.sizes: dict[int, int] = {}
        self.number = 0
        self.dropped_before = 0
        self.away = False

    def teardown(self) -> None:
        self.outbox.close()
        shutil.rmtree(self.folder)
        spill_module.SEGMENT_BYTES = 4 * 2**20

    @rule(size=st.integers(1, 700), beyond=st.booleans())
    def put(self, size: int, beyond: bool) -> None:
        self.number += 1
        self.sizes[self.number] = size
        self.waiting.append(self.number)
        self.outbox.put("subject", f"a-{self.number}", bytes(size), samples=1, beyond_limit=beyond)
        while (
            not beyond and sum(self.sizes[number] for number in self.waiting + self.in_flight) > LIMIT and self.waiting
        ):
            self.finished.add(self.waiting.pop(0))
            self.dropped_before += 1

    @rule()
    def take(self) -> None:
        entry = self.outbox.take()
        assert (entry is None) == (not self.waiting)
        if entry is not None:
            number = self.waiting.pop(0)
            assert entry.message_id == f"a-{number}"
            assert entry.payload == bytes(self.sizes[number])
            self.in_flight.append(number)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def done(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.in_flight))
        assert self.outbox.done(f"a-{number}")
        self.in_flight.remove(number)
        self.finished.add(number)

    @rule()
    def rewind(self) -> None:
        self.outbox.rewind()
        self._back()

    @rule()
    def bus_goes(self) -> None:
        self.outbox.spill()
        self.away = True
        self._back()

    @rule()
    def bus_comes(self) -> None:
        self.outbox.unspill()
        self.away = False

    @precondition(lambda self: self.away and not self.in_flight)
    @rule()
    def killed_and_started_again(self) -> None:
        """Nothing is closed in order: the next run finds what the files hold."""
        copy = self.folder / f"copy-{self.number}-{len(list(self.folder.iterdir()))}"
        shutil.copytree(self.outbox._spill.folder, copy)
        self.outbox._spill.close()
        found = Outbox(LIMIT, copy, memory_bytes=800)
        # A segment is deleted as a whole, so some that were done may be found again: their ids tell the stream.
        numbers = [int(entry.message_id[2:]) for entry in iter(found.take, None)]
        assert numbers == sorted(set(numbers))
        again = set(numbers) - set(self.waiting)
        # With them there may be too much: then the oldest are dropped once more.
        lost = set(self.waiting) - set(numbers)
        assert len(lost) <= found.dropped_messages
        assert not lost or max(lost) < min(numbers)
        self.waiting = [number for number in self.waiting if number in numbers]
        assert again <= self.finished
        for number in again:
            found.done(f"a-{number}")
        found.rewind()
        self.outbox = found
        self.dropped_before = found.dropped_messages
        self.away = False

    def _back(self) -> None:
        self.waiting = self.in_flight + self.waiting
        self.in_flight = []

    @invariant()
    def counts(self) -> None:
        assert len(self.outbox) == len(self.waiting) + len(self.in_flight)
        assert self.outbox.bytes == sum(self.sizes[number] for number in self.waiting + self.in_flight)
        assert self.outbox.dropped_messages == self.outbox.dropped_samples == self.dropped_before


OutboxModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestOutboxModel = OutboxModel.TestCase


def _filled(folder: Path, count: int) -> None:
    outbox = Outbox(2**20, folder)
    outbox.spill()
    for number in range(count):
        outbox.put("subject", f"a-{number}", b"payload %d" % number)
    outbox.close()


def test_a_record_that_was_cut_short_costs_only_itself(tmp_path: Path) -> None:
    _filled(tmp_path, 5)
    file = next(tmp_path.glob("*.spill"))
    file.write_bytes(file.read_bytes()[:-3])
    outbox = Outbox(2**20, tmp_path)
    assert [entry.message_id for entry in iter(outbox.take, None)] == ["a-0", "a-1", "a-2", "a-3"]
    outbox.close()


def test_a_spoilt_byte_is_found_and_ends_the_segment(tmp_path: Path) -> None:
    _filled(tmp_path, 5)
    file = next(tmp_path.glob("*.spill"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    file.write_bytes(raw)
    outbox = Outbox(2**20, tmp_path)
    assert [entry.message_id for entry in iter(outbox.take, None)] == ["a-0", "a-1"]
    outbox.close()


@pytest.mark.parametrize("gone", [False, True])
def test_what_the_disk_spoils_meanwhile_is_counted_and_in_nobodys_way(tmp_path: Path, gone: bool) -> None:
    outbox = Outbox(2**20, tmp_path)
    outbox.spill()
    for number in range(5):
        outbox.put("subject", f"a-{number}", b"payload %d" % number, samples=2)
    file = next(tmp_path.glob("*.spill"))
    if gone:
        file.unlink()
    else:
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 0xFF
        file.write_bytes(raw)
    ids = [entry.message_id for entry in iter(outbox.take, None)]
    assert ids == ([] if gone else ["a-0", "a-1"])
    lost = 5 - len(ids)
    assert (outbox.dropped_messages, outbox.dropped_samples) == (lost, 2 * lost)
    outbox.put("subject", "a-5", b"payload 5")
    assert [entry.message_id for entry in iter(outbox.take, None)] == ["a-5"]
    for message_id in (*ids, "a-5"):
        outbox.done(message_id)
    assert (len(outbox), outbox.bytes) == (0, 0)
    assert not list(tmp_path.glob("*.spill"))
    outbox.close()


def test_what_is_done_leaves_no_file(tmp_path: Path) -> None:
    _filled(tmp_path, 5)
    outbox = Outbox(2**20, tmp_path)
    while entry := outbox.take():
        assert entry.doubtful
        outbox.done(entry.message_id)
    assert not list(tmp_path.glob("*.spill"))
    outbox.close()


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    first = Outbox(2**20, tmp_path)
    with pytest.raises(SpillBusy, match=r"process \d+"):
        Outbox(2**20, tmp_path)
    first.close()
    Outbox(2**20, tmp_path).close()


def test_a_full_disk_keeps_what_fits_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = Outbox(2000, tmp_path)
    outbox.put("subject", "a-1", bytes(500))

    def full(*_: object, **__: object) -> list[int]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outbox._spill, "append", full)
    outbox.spill()
    for number in range(2, 7):
        outbox.put("subject", f"a-{number}", bytes(500))
    assert [entry.message_id for entry in iter(outbox.take, None)] == ["a-3", "a-4", "a-5", "a-6"]
    assert outbox.dropped_messages == 2
    # Nobody is told that they are kept.
    assert outbox.close() == 4


def test_a_disk_that_fills_while_records_wait_on_it_keeps_the_newest_in_memory_behind_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox(2**20, tmp_path, memory_bytes=1000)
    outbox.spill()
    for number in range(3):
        outbox.put("subject", f"a-{number}", bytes(300))
    append = outbox._spill.append

    def full(*_: object, **__: object) -> list[int]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outbox._spill, "append", full)
    for number in range(3, 8):
        outbox.put("subject", f"a-{number}", bytes(300))
    # Of what the disk did not take the newest stay; what it has is kept.
    assert (outbox.dropped_messages, len(outbox), outbox.bytes) == (2, 6, 1800)
    outbox.unspill()
    first = outbox.take()
    assert first is not None
    assert (first.message_id, outbox.done("a-0")) == ("a-0", True)
    # There is room again: all go to the file, in order, and outlive the agent.
    monkeypatch.setattr(outbox._spill, "append", append)
    outbox.put("subject", "a-8", bytes(300))
    assert outbox._spill.unread == 4
    assert outbox.close() == 0
    again = Outbox(2**20, tmp_path)
    assert [entry.message_id for entry in iter(again.take, None)][-6:] == ["a-1", "a-2", "a-5", "a-6", "a-7", "a-8"]
    again.close()


def test_what_waits_behind_a_full_disk_is_sent_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = Outbox(2**20, tmp_path, memory_bytes=1000)
    outbox.spill()
    outbox.put("subject", "a-0", bytes(300))

    def full(*_: object, **__: object) -> list[int]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outbox._spill, "append", full)
    outbox.put("subject", "a-1", bytes(300))
    outbox.put("subject", "a-2", bytes(300))
    assert [entry.message_id for entry in iter(outbox.take, None)] == ["a-0", "a-1", "a-2"]
    outbox.rewind()
    outbox.put("subject", "a-3", bytes(300))
    assert [entry.message_id for entry in iter(outbox.take, None)] == ["a-0", "a-1", "a-2", "a-3"]
    assert all(outbox.done(f"a-{number}") for number in range(4))
    assert (len(outbox), outbox.bytes, outbox.dropped_messages) == (0, 0, 0)
    outbox.close()
