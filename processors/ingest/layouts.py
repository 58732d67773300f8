"""Read messages of samples that differ only in their numbers, many at once.

The messages of one collector begin with the same bytes, but for their sequence number. Those of all hosts with as many
devices and the same metrics end with the same bytes, but for the values. Both are learnt from a message that was
decoded and accepted. A later message with exactly these bytes decodes to the same fields, so that its values are taken
from the same places. Every other message is left to the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec
import numpy as np
from msgspec import Raw, Struct
from numpy.typing import NDArray

from ...schemas.metrics import METRICS
from .incoming import Incoming

FEW: Final = 32
"""Messages of one layout that are read together: with fewer, what is done once for all costs more than it saves."""
LARGE_BYTES: Final = 16 * 1024
"""Messages of at least this size are left to the decoder: their arrays are copied once less there."""
_MAX_HEADS: Final = 200_000
_MAX_SIZES: Final = 1000
_LAYOUTS_OF_A_SIZE: Final = 4
_LEARN_AT_ONCE: Final = 4
"""Layouts that are learnt between two calls of `read`: one takes as long as decoding several messages."""
_ROWS_AT_ONCE: Final = 256
"""Messages that are compared at once, so that the result stays in the cache."""
_TIMES: Final = "times_ns"
_WIDTHS: Final = bytes([1] * 0x80 + [0] * 0x4C + [2, 3, 5] + [0] * 0x31)
"""Length of an unsigned integer of at most 32 bits in MessagePack, by its first byte; 0 for everything else."""


class _Start(Struct):
    """The fields of `SampleBatch` in its head, as they are encoded."""

    host: Raw
    agent: Raw
    sequence: Raw
    source: Raw
    devices: Raw


class _Arrays(Struct):
    """The fields of `SampleBatch` that hold values, as views into the message."""

    times_ns: memoryview
    columns: dict[str, memoryview]
    nulls: dict[str, memoryview] = {}


_decode_start: Final = msgspec.msgpack.Decoder(_Start).decode
_decode_arrays: Final = msgspec.msgpack.Decoder(_Arrays).decode


class Head(NamedTuple):
    """The bytes that the messages of one collector begin with, and what they say.

    Attributes:
        before: the bytes before the sequence number.
        between: the bytes behind it, up to the end of the last field of `_Start`.
        host: the host's name.
        agent: id of the collector's run.
        source: as in `SampleBatch`.
        numbers: series of each device, as bytes.
    """

    before: bytes
    between: bytes
    host: str
    agent: str
    source: str
    numbers: bytes


class Layout:
    """The bytes that messages of the same metrics end with, and the places of values in them.

    Args:
        message: a message.
        start: where its end begins.
        arrays: its arrays, none of which begins before that.

    Attributes:
        samples: number of device samples in a message.
        columns: names of its columns, as far as they are known metrics.
        nulls: those of them that have nulls.
        record: the arrays as fields of a structured type.
    """

    def __init__(self, message: bytes, start: int, arrays: _Arrays) -> None:
        named = {_TIMES: arrays.times_ns}
        named |= {f"columns.{name}": view for name, view in arrays.columns.items()}
        named |= {f"nulls.{name}": view for name, view in arrays.nulls.items()}
        places = {name: _place(view, message) for name, view in named.items() if len(view)}
        self._skeleton = np.frombuffer(message, np.uint8, offset=start).copy()
        self._free = np.zeros(len(self._skeleton), np.bool_)
        """Mask of the bytes that may have any value."""
        for at, end in places.values():
            self._free[at - start : end - start] = True
        self.samples = len(arrays.times_ns) // 8
        self.columns = tuple(name for name in arrays.columns if name in METRICS)
        self.nulls = tuple(name for name in self.columns if name in arrays.nulls)
        known = [_TIMES, *map("columns.{}".format, self.columns), *map("nulls.{}".format, self.nulls)]
        self.record = np.dtype(
            {
                "names": known,
                "formats": [f"V{len(named[name])}" for name in known],
                "offsets": [places[name][0] - start for name in known],
                "itemsize": len(self._skeleton),
            }
        )

    def fits(self, tails: bytes) -> NDArray[np.bool_]:
        """Mask of the ends of messages that have this layout, in the joined ends of messages that have its length."""
        rows = np.frombuffer(tails, np.uint8).reshape(-1, len(self._skeleton))
        found = np.ones(len(rows), np.bool_)
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            same = rows[first : first + _ROWS_AT_ONCE] == self._skeleton
            same |= self._free
            if not same.all():
                found[first : first + _ROWS_AT_ONCE] = same.all(axis=1)
        return found


class Block(NamedTuple):
    """Messages of one layout.

    Attributes:
        layout: of all of them.
        positions: of each among the messages that were given, in order.
        heads: of each.
        records: the arrays of each, of the type `layout.record`.
    """

    layout: Layout
    positions: NDArray[np.intp]
    heads: Sequence[Head]
    records: NDArray[np.void]

    def only(self, chosen: NDArray[np.bool_]) -> Block:
        """The chosen messages of it."""
        heads = [self.heads[at] for at in np.flatnonzero(chosen).tolist()]
        return Block(self.layout, self.positions[chosen], heads, self.records[chosen])

    def times(self) -> bytes:
        """Joined times of all messages."""
        return self.records[_TIMES].tobytes()

    def column(self, name: str) -> bytes:
        """Joined values of a metric."""
        return self.records[f"columns.{name}"].tobytes()

    def mask(self, name: str) -> bytes | None:
        """Joined nulls of a metric; None if the messages have none."""
        return self.records[f"nulls.{name}"].tobytes() if name in self.layout.nulls else None


class _Alike(NamedTuple):
    """Messages whose heads are known, and whose ends have the same length."""

    positions: list[int]
    tails: list[bytes]


class Layouts:
    """Layouts of messages that were decoded. For use by one thread.

    Args:
        few: fewer messages of one layout are left to the decoder.
    """

    def __init__(self, few: int = FEW) -> None:
        self._few = few
        self._heads: dict[str, Head] = {}
        self._layouts: dict[tuple[int, int], list[Layout]] = {}
        """By the length of the end, and that of `Head.numbers`."""
        self._unknown: set[tuple[int, int]] = set()
        """Keys of the messages in the last call of `read` that have another layout."""
        self._learnt = 0

    def read(self, messages: Sequence[Incoming]) -> tuple[list[Block], list[Head | None], list[int]]:
        """Read the messages whose layouts are known.

        Returns:
            The blocks, and for each message its head, None if it is in no block, and its sequence number.
        """
        known: list[Head | None] = [None] * len(messages)
        sequences = [0] * len(messages)
        self._unknown.clear()
        self._learnt = 0
        if len(messages) < self._few:
            return [], known, sequences
        found: dict[tuple[int, int], _Alike] = {}
        get_head, widths = self._heads.get, _WIDTHS
        size, devices, alike = 0, 0, _Alike([], [])
        for position, message in enumerate(messages):
            head = get_head(message.subject)
            payload = message.payload
            if head is None or len(payload) >= LARGE_BYTES:
                continue
            before, between, _, _, _, numbers = head
            at = len(before)
            # With as many bytes behind the head there is a sequence number.
            if len(payload) < at + len(between) + 5 or not payload.startswith(before):
                continue
            width = widths[payload[at]]
            if not width or not payload.startswith(between, at + width):
                continue
            tail = payload[at + width + len(between) :]
            if len(tail) != size or len(numbers) != devices:
                size, devices = len(tail), len(numbers)
                alike = found.setdefault((size, devices), _Alike([], []))
            alike.positions.append(position)
            alike.tails.append(tail)
            known[position] = head
            sequences[position] = payload[at] if width == 1 else int.from_bytes(payload[at + 1 : at + width], "big")
        blocks: list[Block] = []
        for key, alike in found.items():
            left = alike.positions
            if len(left) >= self._few:
                left = self._add_blocks(blocks, key, alike, known)
            for position in left:
                known[position] = None
        return blocks, known, sequences

    def _add_blocks(
        self, blocks: list[Block], key: tuple[int, int], alike: _Alike, known: Sequence[Head | None]
    ) -> list[int]:
        """Add the blocks of messages that may be alike, and return the positions of those that are in none."""
        positions, tails = np.array(alike.positions), b"".join(alike.tails)
        unknown = np.ones(len(positions), np.bool_)
        left = unknown.copy()
        for layout in self._layouts.get(key, ()):
            fits = layout.fits(tails) & unknown
            unknown &= ~fits
            if np.count_nonzero(fits) < self._few:
                continue
            left &= ~fits
            heads = [head for at in alike.positions if (head := known[at]) is not None]
            block = Block(layout, positions, heads, np.frombuffer(tails, layout.record))
            blocks.append(block if fits.all() else block.only(fits))
            if not unknown.any():
                break
        if unknown.any():
            self._unknown.add(key)
        return positions[left].tolist()

    def learn(self, message: Incoming, host: str, agent: str, source: str, numbers: bytes) -> None:
        """Learn from a message that was decoded and accepted.

        Args:
            message: the message.
            host, agent, source: as in `SampleBatch`.
            numbers: series of its devices, as bytes.
        """
        payload = message.payload
        if len(payload) >= LARGE_BYTES:
            return
        fields = _decode_start(payload)
        at, behind = _place(fields.sequence, payload)
        if behind - at != _WIDTHS[payload[at]]:
            return
        start = max(_place(raw, payload)[1] for raw in (fields.host, fields.agent, fields.source, fields.devices))
        start = max(start, behind)
        head = Head(payload[:at], payload[behind:start], host, agent, source, numbers)
        if self._heads.get(message.subject) != head:
            if len(self._heads) >= _MAX_HEADS:
                self._heads.clear()
            self._heads[message.subject] = head
        key = len(payload) - start, len(numbers)
        if (key not in self._layouts or key in self._unknown) and self._learnt < _LEARN_AT_ONCE:
            self._learn_layout(payload, start, key)

    def _learn_layout(self, payload: bytes, start: int, key: tuple[int, int]) -> None:
        known = self._layouts.get(key, [])
        if any(layout.fits(payload[start:]).all() for layout in known):
            return
        self._learnt += 1
        arrays = _decode_arrays(payload)
        views = [arrays.times_ns, *arrays.columns.values(), *arrays.nulls.values()]
        if any(len(view) and _place(view, payload)[0] < start for view in views):
            return  # the fields are in another order
        if len(self._layouts) >= _MAX_SIZES:
            self._layouts.clear()
        self._layouts[key] = [Layout(payload, start, arrays), *known[: _LAYOUTS_OF_A_SIZE - 1]]


def _place(view: memoryview | Raw, message: bytes) -> tuple[int, int]:
    """Begin and end of a view into a message."""
    at = _address(view) - _address(message)
    return at, at + memoryview(view).nbytes


def _address(data: bytes | memoryview | Raw) -> int:
    return np.frombuffer(data, np.uint8).__array_interface__["data"][0]
