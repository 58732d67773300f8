"""Decode samples into Arrow: the bytes of a column are joined over all messages of a group, and not decoded singly.

Messages with the same columns form a group. Lengths, ranges and times are checked on the joined arrays. A value out of
range becomes null. If a length or a time is wrong, the offending message is searched for, and refused as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


class Incoming(NamedTuple):
    """A message as it was received.

    Attributes:
        subject: where it was published.
        payload: its bytes.
        sequence: its place in the stream.
        headers: of the message, if any.
        stored_ns: when the server stored it, nanoseconds since the epoch; 0 where that is not known.
    """

    subject: str
    payload: bytes
    sequence: int
    headers: dict[str, str] | None = None
    stored_ns: int = 0


class Refusal(NamedTuple):
    """A message that can't be stored.

    Attributes:
        message: which.
        code: as in `DeadLetter.code`.
        reason: in words, with the path of the field.
    """

    message: Incoming
    code: str
    reason: str


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
_LARGE_BYTES: Final = 16 * 1024
"""Arrays in messages of at least this size are views into the message; in smaller ones they are copies. A view costs
more than a copy of a few bytes: the garbage collector tracks it, and traverses the views of a waiting batch again each
time that as many more have come."""


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
    message: Incoming
    samples: _Samples[Any]
    numbers: bytes
    size: int


class _BadMessagesError(Exception):
    """Invalid messages of a group: their positions, an error code, and the reason for each."""

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
    """

    def __init__(self, series: Series, clocks: HostClocks | None = None) -> None:
        self._series = series
        self._clocks = clocks or HostClocks()
        self._devices: dict[str, _Devices] = {}
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
        groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[_Item]] = {}
        for message in messages:
            try:
                item = self._open(message)
            except codec.DecodeError as error:
                refused.append(Refusal(message, error.code, str(error)))
                continue
            samples = item.samples
            if not is_new(samples.host, samples.agent, samples.sequence):
                self.duplicates += 1
                continue
            groups.setdefault((tuple(samples.columns), tuple(samples.nulls)), []).append(item)
        for (columns, nulls), group in groups.items():
            while group:
                try:
                    stored = np.array([item.message.stored_ns or now_ns for item in group], dtype="<i8")
                    table, newest, impossible = _table(group, columns, nulls, stored)
                    tables.append(table)
                    for name, number in impossible.items():
                        self.impossible[name] = self.impossible.get(name, 0) + number
                    self._observe_clocks(group, newest, stored)
                    accepted += [item.message for item in group]
                    break
                except _BadMessagesError as bad:
                    positions = set(bad.positions)
                    refused.extend(Refusal(group[at].message, bad.code, bad.reason(at)) for at in sorted(positions))
                    group = [item for at, item in enumerate(group) if at not in positions]

    def _observe_clocks(self, group: Sequence[_Item], newest: NDArray[np.int64], stored: NDArray[np.int64]) -> None:
        """Report messages whose times are off, and those of watched hosts, to `HostClocks`; none of a replay."""
        off = np.abs(stored - newest) > _OFF_NS
        watched = self._clocks.watched
        if not watched and not off.any():
            return
        for at in range(len(group)) if watched else np.flatnonzero(off).tolist():
            samples = group[at].samples
            # A replay may keep the times of its recording.
            if samples.source != "replay" and (off[at] or self._clocks.watches(samples.host)):
                self._clocks.observe(samples.host, int(newest[at]), int(stored[at]))

    def _open(self, message: Incoming) -> _Item:
        payload = message.payload
        large = len(payload) >= _LARGE_BYTES
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
            return _Item(message, samples, known.numbers, size >> 3)
        if not size or size % tick:
            raise codec.DecodeError(
                f"Expected a multiple of {tick} bytes ({tick // 8} devices), got {size} - at `$.times_ns`",
                "invalid",
                "$.times_ns",
            )
        return _Item(message, samples, known.numbers * (size // tick), size >> 3)

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
    group: Sequence[_Item], columns: tuple[str, ...], nulls: tuple[str, ...], stored: NDArray[np.int64]
) -> tuple[ArrowTable, NDArray[np.int64], dict[str, int]]:
    """Build the table of a group.

    Returns:
        The table, each message's newest time by its host's clock, and the number of impossible values by metric.
    """
    counts = [item.size for item in group]
    ends = np.cumsum(counts)
    rows = int(ends[-1])
    times = np.frombuffer(b"".join([item.samples.times_ns for item in group]), dtype="<i8")
    newest: NDArray[np.int64] = np.maximum.reduceat(times, ends - np.asarray(counts, dtype="<i8"))
    times = _set_right(times, counts, newest, stored)
    _check_times(times, ends)
    arrays: dict[str, pa.Array] = {
        "time": pa.array(times // 1000, type=pa.int64()).cast(TIME_TYPE),
        "series": pa.Array.from_buffers(pa.int32(), rows, [None, pa.py_buffer(b"".join([i.numbers for i in group]))]),
    }
    masks = dict(zip(nulls, zip(*[item.samples.nulls.values() for item in group], strict=True), strict=True))
    parts = zip(*[item.samples.columns.values() for item in group], strict=True)
    impossible: dict[str, int] = {}
    for name, part in zip(columns, parts, strict=True):
        metric = METRICS.get(name)
        if metric is not None:  # a newer collector may know more
            arrays[name], found = _column(metric, part, masks.get(name), counts)
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


def _column(
    metric: Metric,
    parts: Sequence[bytes | memoryview],
    masks: Sequence[bytes | memoryview] | None,
    counts: Sequence[int],
) -> tuple[Any, int]:
    """Build a column, with impossible values set to null, and count these."""
    name, dtype = metric.name, np.dtype(metric.row.unit.dtype)
    _check_lengths(parts, counts, dtype.itemsize, f"$.columns.{name}")
    joined = b"".join(parts)
    values: NDArray[Any] = np.frombuffer(joined, dtype=dtype)
    valid: NDArray[np.bool_] | None = None
    if masks is not None:
        _check_lengths(masks, counts, 1, f"$.nulls.{name}")
        there: NDArray[np.bool_] = np.frombuffer(b"".join(masks), dtype=np.uint8) == 0
        valid = None if there.all() else there
    possible = _possible(metric, values if valid is None else values[valid])
    impossible = 0
    if possible is not None:
        impossible = int(np.count_nonzero(~possible))
        if valid is None:
            valid = possible
        else:
            valid[valid] = possible
    if valid is None:
        return pa.Array.from_buffers(_ARROW[metric.row.unit.dtype], len(values), [None, pa.py_buffer(joined)], 0), 0
    nulls = len(values) - int(np.count_nonzero(valid))
    buffers = [pa.py_buffer(np.packbits(valid, bitorder="little")), pa.py_buffer(joined)]
    return pa.Array.from_buffers(_ARROW[metric.row.unit.dtype], len(values), buffers, nulls), impossible


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
