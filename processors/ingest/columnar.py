"""Decode samples into Arrow: the bytes of a column are joined over all messages of a group, and not decoded singly.

Messages of a known layout are read together (`layouts.py`), and the others decoded one by one; those with the same
columns then form a group. Lengths, ranges and times are checked on the joined arrays. A value out of range becomes
null. If a length or a time is wrong, the offending message is searched for, and refused as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
from msgspec import Struct
from numpy.typing import NDArray

from ...schemas import codec, speakers
from ...schemas.metrics import METRICS, Metric
from ...schemas.telemetry import SCHEMA_VERSION
from ...schemas.values.clocks import AHEAD_SECONDS
from ..storage.protocol import ArrowTable, Series
from .hostclocks import HostClocks
from .incoming import Incoming, Refusal
from .layouts import FEW, LARGE_BYTES, Block, Layouts

EARLIEST_NS: Final = 946_684_800_000_000_000
"""2000-01-01: a clock that was never set says 1970."""

_OFF_NS: Final = int(AHEAD_SECONDS * 1e9)

TIME_TYPE: Final = pa.timestamp("us", "UTC")
_ARROW: Final = {"<f4": pa.float32(), "<i4": pa.int32(), "<i8": pa.int64()}
SCHEMA: Final = pa.schema(
    [("time", TIME_TYPE), ("series", pa.int32())]
    + [(name, _ARROW[metric.row.unit.dtype]) for name, metric in METRICS.items()]
)
"""Schema of `Batch.samples`."""

_MESSAGES_AT_ONCE: Final = 2048
"""Messages whose columns are joined at once: the objects of many more fit into no cache, and cost thrice as much."""
_MAX_CACHED: Final = 200_000


_Array = TypeVar("_Array", bytes, memoryview)


class _Samples(Struct, Generic[_Array], frozen=True):
    """`SampleBatch` with undecoded devices: equal bytes mean equal devices, so their numbers are those of before."""

    host: str
    agent: str
    sequence: int
    source: str
    devices: msgspec.Raw
    times_ns: _Array
    columns: dict[str, _Array]
    nulls: dict[str, _Array] = {}
    version: int = SCHEMA_VERSION


_COPIED: Final = _Samples[bytes]
_VIEWED: Final = _Samples[memoryview]
_decode_copied: Final = msgspec.msgpack.Decoder(_COPIED).decode
_decode_viewed: Final = msgspec.msgpack.Decoder(_VIEWED).decode
"""Arrays in messages of `LARGE_BYTES` are views into the message; in smaller ones they are copies. A view costs more
than a copy of a few bytes: the garbage collector tracks it, and traverses the views of a waiting batch again each time
that as many more have come."""


class _Devices(NamedTuple):
    """Devices of the last message of a subject.

    Attributes:
        host: that the message names.
        raw: the devices as in the message.
        numbers: series of each, as bytes.
        tick_bytes: length of their times in one tick.
    """

    host: str
    raw: msgspec.Raw
    numbers: bytes
    tick_bytes: int


class _Item(NamedTuple):
    """A message that was decoded by itself."""

    position: int
    message: Incoming
    samples: _Samples[Any]
    numbers: bytes
    size: int


class _Column(NamedTuple):
    """Joined values and nulls of a metric."""

    metric: Metric
    values: bytes
    nulls: bytes | None


class _Single:
    """Messages with the same columns that were decoded one by one."""

    def __init__(self, items: list[_Item], columns: tuple[str, ...], nulls: tuple[str, ...]) -> None:
        self.items = items
        self._columns = columns
        self._nulls = nulls

    @property
    def positions(self) -> list[int]:
        return [item.position for item in self.items]

    def without(self, bad: set[int]) -> _Single:
        items = [item for at, item in enumerate(self.items) if at not in bad]
        return _Single(items, self._columns, self._nulls)

    def hosts(self) -> list[str]:
        return [item.samples.host for item in self.items]

    def sources(self) -> list[str]:
        return [item.samples.source for item in self.items]

    def counts(self) -> list[int]:
        return [item.size for item in self.items]

    def times(self) -> bytes:
        return b"".join([item.samples.times_ns for item in self.items])

    def numbers(self) -> bytes:
        return b"".join([item.numbers for item in self.items])

    def columns(self) -> Iterator[_Column]:
        counts = self.counts()
        masks = zip(*[item.samples.nulls.values() for item in self.items], strict=True)
        nulls = dict(zip(self._nulls, masks, strict=True))
        parts = zip(*[item.samples.columns.values() for item in self.items], strict=True)
        for name, part in zip(self._columns, parts, strict=True):
            metric = METRICS.get(name)
            if metric is None:  # a newer collector may know more
                continue
            _check_lengths(part, counts, np.dtype(metric.row.unit.dtype).itemsize, f"$.columns.{name}")
            mask = nulls.get(name)
            if mask is not None:
                _check_lengths(mask, counts, 1, f"$.nulls.{name}")
            yield _Column(metric, b"".join(part), None if mask is None else b"".join(mask))


class _Together:
    """Messages of one layout that were read together."""

    def __init__(self, block: Block) -> None:
        self._block = block

    @property
    def positions(self) -> list[int]:
        return self._block.positions.tolist()

    def without(self, bad: set[int]) -> _Together:
        chosen = np.ones(len(self._block.positions), np.bool_)
        chosen[list(bad)] = False
        return _Together(self._block.only(chosen))

    def hosts(self) -> list[str]:
        return [head.host for head in self._block.heads]

    def sources(self) -> list[str]:
        return [head.source for head in self._block.heads]

    def counts(self) -> list[int]:
        return [self._block.layout.samples] * len(self._block.positions)

    def times(self) -> bytes:
        return self._block.times()

    def numbers(self) -> bytes:
        heads = self._block.heads
        ticks = 4 * self._block.layout.samples // len(heads[0].numbers)
        return b"".join([head.numbers * ticks for head in heads])

    def columns(self) -> Iterator[_Column]:
        for name in self._block.layout.columns:
            yield _Column(METRICS[name], self._block.column(name), self._block.mask(name))


class _BadMessagesError(Exception):
    """Invalid messages of a group: their positions in it, an error code, and the reason for each."""

    def __init__(self, positions: Sequence[int], code: str, reason: Callable[[int], str]) -> None:
        super().__init__(code)
        self.positions = positions
        self.code = code
        self.reason = reason


class Decoder:
    """Decodes messages of samples into one Arrow table. For use by one thread.

    Args:
        series: numbers of devices.
        clocks: observes messages whose times are off.
        few: number of messages of one layout from which they are read together.
    """

    def __init__(self, series: Series, clocks: HostClocks | None = None, few: int = FEW) -> None:
        self._series = series
        self._clocks = clocks or HostClocks()
        self._devices: dict[str, _Devices] = {}
        self._layouts = Layouts(few)
        self._few = few
        self.duplicates = 0
        self.impossible: dict[str, int] = {}

    def decode(
        self, messages: Sequence[Incoming], is_new: Callable[[str, str, int], bool], now_ns: int
    ) -> tuple[ArrowTable | None, list[Incoming], list[Refusal]]:
        """Decode messages into a table with the columns of `SCHEMA`.

        Args:
            messages: of the subject of samples, in the order of the stream.
            is_new: true if a message of an agent's run is no duplicate; see `deduplication.py`.
            now_ns: used as the time when a message was stored, if that is not known.

        Returns:
            The table (None without any sample), the messages that are in it, and those that are refused.
        """
        tables: list[ArrowTable] = []
        accepted: list[Incoming] = []
        refused: list[Refusal] = []
        for first in range(0, len(messages), _MESSAGES_AT_ONCE):
            self._decode_some(messages[first : first + _MESSAGES_AT_ONCE], is_new, now_ns, tables, accepted, refused)
        return (pa.concat_tables(tables) if tables else None), accepted, refused

    def _decode_some(
        self,
        messages: Sequence[Incoming],
        is_new: Callable[[str, str, int], bool],
        now_ns: int,
        tables: list[ArrowTable],
        accepted: list[Incoming],
        refused: list[Refusal],
    ) -> None:
        blocks, heads, sequences = self._layouts.read(messages)
        alone: dict[tuple[tuple[str, ...], tuple[str, ...]], list[_Item]] = {}
        repeated: set[int] = set()
        for position, head in enumerate(heads):
            if head is not None:
                if not is_new(head.host, head.agent, sequences[position]):
                    repeated.add(position)
                continue
            message = messages[position]
            try:
                item = self._open(position, message)
            except codec.DecodeError as error:
                refused.append(Refusal(message, error.code, str(error)))
                continue
            samples = item.samples
            if is_new(samples.host, samples.agent, samples.sequence):
                alone.setdefault((tuple(samples.columns), tuple(samples.nulls)), []).append(item)
            else:
                self.duplicates += 1
        groups: list[_Single | _Together] = [_Single(items, *names) for names, items in alone.items()]
        self.duplicates += len(repeated)
        for block in blocks:
            new = block
            if repeated:
                new = block.only(np.array([at not in repeated for at in block.positions.tolist()]))
            groups.append(_Together(new))
        dated: list[tuple[int, str, str, int, int, bool]] = []
        for group in groups:
            while positions := group.positions:
                stored = np.array([messages[at].stored_ns or now_ns for at in positions], dtype="<i8")
                try:
                    table, newest, impossible = _table(group, stored)
                except _BadMessagesError as bad:
                    refused.extend(
                        Refusal(messages[positions[at]], bad.code, bad.reason(at)) for at in sorted(bad.positions)
                    )
                    group = group.without(set(bad.positions))
                    continue
                tables.append(table)
                for name, number in impossible.items():
                    self.impossible[name] = self.impossible.get(name, 0) + number
                dated += self._dated(group, newest, stored)
                accepted += [messages[at] for at in positions]
                if len(messages) >= self._few and isinstance(group, _Single):
                    self._learn(group)
                break
        if len(groups) > 1:
            dated.sort()
        for _, host, source, newest_ns, stored_ns, off in dated:
            # A replay may keep the times of its recording.
            if source != "replay" and (off or self._clocks.watches(host)):
                self._clocks.observe(host, newest_ns, stored_ns)

    def _dated(
        self, group: _Single | _Together, newest: NDArray[np.int64], stored: NDArray[np.int64]
    ) -> Iterable[tuple[int, str, str, int, int, bool]]:
        """Position, host, source and times of messages, and true for those whose times are off; nothing if none is."""
        off = np.abs(stored - newest) > _OFF_NS
        if not self._clocks.watched and not off.any():
            return ()
        numbers = newest.tolist(), stored.tolist(), off.tolist()
        return zip(group.positions, group.hosts(), group.sources(), *numbers, strict=True)

    def _learn(self, group: _Single) -> None:
        """Learn the layouts of accepted messages: of each subject the last."""
        for item in {item.message.subject: item for item in group.items}.values():
            samples, known = item.samples, self._devices[item.message.subject]
            if known.raw == samples.devices:
                self._layouts.learn(item.message, samples.host, samples.agent, samples.source, known.numbers)

    def _open(self, position: int, message: Incoming) -> _Item:
        payload = message.payload
        large = len(payload) >= LARGE_BYTES
        try:
            samples = _decode_viewed(payload) if large else _decode_copied(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            # Whole numbers may be written as floats; of all else it says what is wrong.
            samples = codec.decode(payload, _VIEWED if large else _COPIED)
        if samples.version != SCHEMA_VERSION:
            text = f"Version {samples.version} of the schema is not known, only {SCHEMA_VERSION} - at `$.version`"
            raise codec.DecodeError(text, "invalid", "$.version")
        known = self._devices.get(message.subject)
        if known is None or known.host != samples.host or known.raw != samples.devices:
            known = _Devices(samples.host, samples.devices.copy(), *self._numbers(message, samples))
            if len(self._devices) >= _MAX_CACHED:
                self._devices.clear()
            self._devices[message.subject] = known
        size, tick = len(samples.times_ns), known.tick_bytes
        if size == tick:
            return _Item(position, message, samples, known.numbers, size >> 3)
        if not size or size % tick:
            raise codec.DecodeError(
                f"Expected a multiple of {tick} bytes ({tick // 8} devices), got {size} - at `$.times_ns`",
                "invalid",
                "$.times_ns",
            )
        return _Item(position, message, samples, known.numbers * (size // tick), size >> 3)

    def _numbers(self, message: Incoming, samples: _Samples[Any]) -> tuple[bytes, int]:
        host = samples.host
        speakers.check_host(host, message.subject)
        try:
            devices = msgspec.msgpack.decode(samples.devices, type=list[str])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            text = str(error).partition(" - at `$")[0]
            raise codec.DecodeError(f"{text} - at `$.devices`", "invalid", "$.devices") from None
        if not devices or "" in devices:
            raise codec.DecodeError("Expected uuids, at least one - at `$.devices`", "invalid", "$.devices")
        if len(set(devices)) != len(devices):
            raise codec.DecodeError("A device is named twice - at `$.devices`", "invalid", "$.devices")
        numbers = np.array([self._series.number(host, device) for device in devices], dtype="<i4")
        return numbers.tobytes(), 8 * len(devices)


def _table(
    group: _Single | _Together, stored: NDArray[np.int64]
) -> tuple[ArrowTable, NDArray[np.int64], dict[str, int]]:
    """Build the table of a group.

    Returns:
        The table, each message's newest time by its host's clock, and the number of impossible values by metric.
    """
    counts = group.counts()
    ends = np.cumsum(counts)
    rows = int(ends[-1])
    times = np.frombuffer(group.times(), dtype="<i8")
    newest: NDArray[np.int64] = np.maximum.reduceat(times, ends - np.asarray(counts, dtype="<i8"))
    times = _set_right(times, counts, newest, stored)
    _check_times(times, ends)
    arrays: dict[str, pa.Array] = {
        "time": pa.array(times // 1000, type=pa.int64()).cast(TIME_TYPE),
        "series": pa.Array.from_buffers(pa.int32(), rows, [None, pa.py_buffer(group.numbers())]),
    }
    impossible: dict[str, int] = {}
    for column in group.columns():
        name = column.metric.name
        arrays[name], found = _array(column)
        if found:
            impossible[name] = found
    empty: dict[pa.DataType, pa.Array] = {}
    full: list[pa.Array] = []
    for field in SCHEMA:
        array = arrays.get(field.name)
        if array is None:
            array = empty.get(field.type)
            if array is None:
                array = empty[field.type] = pa.nulls(rows, field.type)
        full.append(array)
    return pa.Table.from_arrays(full, schema=SCHEMA), newest, impossible


def _array(column: _Column) -> tuple[Any, int]:
    """Build the array of a column, with impossible values set to null, and count these."""
    metric, joined, nulls = column
    values: NDArray[Any] = np.frombuffer(joined, dtype=metric.row.unit.dtype)
    valid: NDArray[np.bool_] | None = None
    if nulls is not None:
        there: NDArray[np.bool_] = np.frombuffer(nulls, dtype=np.uint8) == 0
        valid = None if there.all() else there
    possible = _possible(metric, values if valid is None else values[valid])
    impossible = 0
    if possible is not None:
        impossible = int(np.count_nonzero(~possible))
        if valid is None:
            valid = possible
        else:
            valid[valid] = possible
    kind = _ARROW[metric.row.unit.dtype]
    if valid is None:
        return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(joined)], 0), 0
    missing = len(values) - int(np.count_nonzero(valid))
    buffers = [pa.py_buffer(np.packbits(valid, bitorder="little")), pa.py_buffer(joined)]
    return pa.Array.from_buffers(kind, len(values), buffers, missing), impossible


def _check_lengths(parts: Sequence[bytes | memoryview], counts: Sequence[int], itemsize: int, path: str) -> None:
    lengths = list(map(len, parts))
    expected = [count * itemsize for count in counts] if itemsize > 1 else list(counts)
    if lengths == expected:
        return
    bad = [at for at, (length, wanted) in enumerate(zip(lengths, expected, strict=True)) if length != wanted]
    raise _BadMessagesError(
        bad, "invalid", lambda at: f"Expected {expected[at]} bytes, got {lengths[at]} - at `{path}`"
    )


def _possible(metric: Metric, present: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Mask of the values that are possible for a metric; None if all are, as nearly always.

    The minimum and maximum suffice to see that all are: NaN propagates into both, and fails each comparison.
    """
    if not len(present):
        return None
    least, greatest = metric.minimum, metric.maximum
    floats = present.dtype.kind == "f"
    low = -math.inf if least is None else least
    high = math.inf if greatest is None else greatest
    if floats:
        smallest, largest = float(present.min()), float(present.max())
        if smallest >= low and largest <= high and -math.inf < smallest and largest < math.inf:
            return None
    elif (least is None or int(present.min()) >= least) and (greatest is None or int(present.max()) <= greatest):
        return None
    with np.errstate(invalid="ignore"):
        good = (present >= low) & (present <= high)
    if floats:
        good &= np.isfinite(present)
    return good


def _set_right(
    times: NDArray[np.int64], counts: Sequence[int], newest: NDArray[np.int64], stored: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Apply `clocks.set_right` to many messages: only times that are ahead are corrected.

    If a clock was set while the samples of a message were taken, only a part of its times are ahead.
    """
    late = newest > stored + _OFF_NS
    if not late.any():
        return times
    ahead = np.repeat(np.where(late, newest - stored, 0), counts)
    return np.where(times > np.repeat(stored + _OFF_NS, counts), times - ahead, times)


def _check_times(times: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
    if int(times.min()) < EARLIEST_NS:
        bad = np.unique(np.searchsorted(ends, np.flatnonzero(times < EARLIEST_NS), side="right")).tolist()
        raise _BadMessagesError(
            bad, "out_of_range", lambda _: "A time lies before 2000: the host's clock is not set - at `$.times_ns`"
        )
