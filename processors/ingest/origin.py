"""Check that the stream of partitions still mirrors the stream of telemetry, and replace its source if it does not.

A server sources a stream by sequence: it continues after the last sequence that it has copied, even if the stream that
it copies from (the origin) was replaced. An origin that was created again, or set back to an older state, assigns those
sequences again. Messages with them are then skipped, or nothing is copied at all. So each processor compares the two
streams: when the origin was created, its last sequence, and whether the messages copied last are still there.

If they differ, the source of the stream of partitions is replaced. The origin is copied again under the next
*generation*, which each copied message names in its header. Nothing is deleted. Copies that the origin no longer has
keep their place, and are stored. Later copies come again, so the first ones are ignored. `Sourcing.kept` is the
boundary between the two. It is in the stream's metadata, so that all processors of all lakes agree.

A message is not stored until it is known to be in the present origin. After a gap it would make the messages that fill
the gap look like duplicates (`deduplication.py`).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js import api
from nats.js.errors import APIError, BucketNotFoundError, KeyWrongLastSequenceError, NotFoundError

from ...bus import permissions
from ...bus.stream_reader import created
from ...bus.tasks import heed_cancellation
from ...schemas import subjects
from .incoming import Incoming

log = logging.getLogger("corral.partitions")

STREAM: Final = "CORRAL_PARTITIONS"
BUCKET: Final = "corral_processors"
SOURCE_HEADER: Final = "Nats-Stream-Source"
CHECK_SECONDS: Final = 1.0
API_SECONDS: Final = 3.0
REFUSED_SECONDS: Final = 30.0
"""A request that the server does not allow is repeated after this time."""
REPORT_SECONDS: Final = 10.0
"""Time after which it is reported that the streams can't be compared, or that copying stands still."""
COALESCE_SECONDS: Final = 0.05
AT_ONCE: Final = 128
SCAN_MESSAGES: Final = 2048
"""Number of the newest copied messages that are compared one by one after the server or the processor was away."""

_AGAIN: Final = f"{subjects.PREFIX}.sourced.again"
"""Subject without messages: a transform of it makes a source a different one, so that the server copies it again."""
_GENERATION: Final = re.compile(re.escape(_AGAIN) + r"\.(\d+)")
_SOURCE: Final = re.compile(rf"{SOURCE_HEADER}: (\S+) (\d+) ([^\r]*)")
_CREATED, _SOURCED, _KEPT = "corral.origin.created", "corral.sourced.again", "corral.sourced.kept"
_GENERATIONS_KEPT: Final = 64


class Sourcing(Struct, frozen=True):
    """State of the sourcing of the stream of partitions, as stored in its metadata.

    Attributes:
        created: when the origin was created; empty if an older Corral created the stream.
        generation: number of times that the origin was found to be another one.
        kept: by earlier generation: its copies up to this sequence of the stream of partitions are stored, and those
            after it come again.
    """

    created: str = ""
    generation: int = 0
    kept: Mapping[int, int] = {}

    @classmethod
    def of(cls, metadata: Mapping[str, str] | None) -> Sourcing:
        """Parse a stream's metadata."""
        found = metadata or {}
        kept: dict[int, int] = {}
        with contextlib.suppress(msgspec.DecodeError):
            kept = msgspec.json.decode(found.get(_KEPT, "{}"), type=dict[int, int])
        sourced = found.get(_SOURCED, "0")
        return cls(found.get(_CREATED, ""), int(sourced) if sourced.isdecimal() else 0, kept)

    def metadata(self) -> dict[str, str]:
        """Format the state as metadata, with the newest `_GENERATIONS_KEPT` entries of `kept`."""
        kept = dict(sorted(self.kept.items())[-_GENERATIONS_KEPT:])
        return {
            _CREATED: self.created,
            _SOURCED: str(self.generation),
            _KEPT: json.dumps({str(generation): sequence for generation, sequence in kept.items()}),
        }

    def next(self, created: str, kept: int) -> Sourcing:
        """State of the next generation, for an origin created then. Copies of this one are stored up to a sequence."""
        return Sourcing(created, self.generation + 1, {**self.kept, self.generation: kept})

    def stores(self, generation: int, sequence: int, proven: int) -> bool | None:
        """True if a copied message is to be stored, False if not; None while that is not known yet.

        Args:
            generation: that it was copied in.
            sequence: its place in the stream of partitions.
            proven: sequence up to which the copies of this generation are known to be in the origin.
        """
        if generation < self.generation:
            return sequence <= self.kept.get(generation, sequence)
        return True if generation == self.generation and sequence <= proven else None


def transforms(partitions: int, generation: int = 0) -> list[api.SubjectTransform]:
    """Subject transforms of the source: they put the partition before the host. A generation above 0 adds a marker."""
    cut = f"{{{{wildcard(1)}}}}.{{{{partition({partitions},2)}}}}.{{{{wildcard(2)}}}}"
    found = [api.SubjectTransform(src=f"{subjects.PREFIX}.*.*", dest=f"{subjects.PREFIX}.{cut}")]
    if generation:
        again = f"{_AGAIN}.{generation}"
        found.append(api.SubjectTransform(src=again, dest=again))
    return found


def generation_of(source: str) -> int:
    """Generation that a message was copied in, from its source header; 0 if it names none."""
    found = _GENERATION.search(source)
    return int(found[1]) if found else 0


class _Copied(Struct, frozen=True):
    """A message of the stream of partitions: its generation, its sequence in the origin, and its payload in base64."""

    generation: int
    source: int
    payload: str


class Origin:
    """Compares the two streams for one processor while `run` runs.

    Args:
        nc: connection to the bus.
        owner: id of this process.
        partitions: number of partitions of the telemetry.
        make_streams: creates missing streams.

    Attributes:
        behind: messages of the origin that are not in the stream of partitions yet.
        checks: comparisons that were made.
    """

    def __init__(self, nc: Client, owner: str, partitions: int, make_streams: Callable[[], Awaitable[None]]) -> None:
        self._nc = nc
        self._js = nc.jetstream(timeout=API_SECONDS)
        self._owner = owner.encode()
        self._partitions = partitions
        self._make_streams = make_streams
        self._created = ""
        self._sourcing = Sourcing()
        self._proven = 0
        self._disturbed = True
        self._scanned_to = 0
        self._started: dict[str, int] = {}
        self._reconnects = -1
        self._asked = asyncio.Event()
        self._checked = asyncio.Event()
        self._problem = ""
        self._refused = ""
        self._refused_at = -math.inf
        self._failing_since = 0.0
        self._stands_since = time.monotonic()
        self._copied = (-1, -1)
        self.behind = 0
        self.checks = 0

    @property
    def problem(self) -> str:
        """Reason why telemetry is not copied, or why that can't be checked; empty if there is none."""
        if self._problem or self._refused:
            return self._problem or self._refused
        seconds = time.monotonic() - self._stands_since
        if self.behind and seconds > REPORT_SECONDS:
            return (
                f"{STREAM} is {self.behind} messages behind {subjects.TELEMETRY_STREAM}: none came for {seconds:.0f} s"
            )
        return ""

    def begin(self, part: str, after: int) -> None:
        """Register a part that is read from after a sequence on. What was copied since then is compared again."""
        self._started[part] = after
        if self._created and after < self._proven:
            self._proven = after
            self._disturb()

    def _disturb(self) -> None:
        """Have what was copied up to now compared message by message, since anything may have happened."""
        self._disturbed, self._scanned_to = True, 0

    def end(self, part: str) -> None:
        """Forget a part that is not read any more."""
        self._started.pop(part, None)

    async def passed(self, created: str, messages: Sequence[Incoming]) -> list[Incoming]:
        """Wait until it is known which of some messages are to be stored, and return those.

        All are returned if the server does not allow the comparison, or if their stream is gone.

        Args:
            created: creation time of the stream of partitions that they were read from.
            messages: with their headers.
        """
        seen = self.checks
        while True:
            if self._refused or (created != self._created and self.checks > seen + 1):
                # They can't be checked, or come from a stream that is gone, and can't be read again.
                return list(messages)
            if created == self._created:
                verdicts = [
                    self._sourcing.stores(
                        generation_of((message.headers or {}).get(SOURCE_HEADER, "")), message.sequence, self._proven
                    )
                    for message in messages
                ]
                if None not in verdicts:
                    return [message for message, stores in zip(messages, verdicts, strict=True) if stores]
            self._checked.clear()
            self._asked.set()
            await self._checked.wait()
            heed_cancellation()

    async def run(self) -> None:
        """Compare the streams repeatedly, until cancelled."""
        while True:
            heed_cancellation()
            self._asked.clear()
            going_well = await self._check_once()
            self._checked.set()
            # Several parts ask at about the same time.
            await asyncio.sleep(COALESCE_SECONDS if going_well else CHECK_SECONDS)
            if going_well and not self._disturbed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CHECK_SECONDS):
                        await self._asked.wait()

    async def _check_once(self) -> bool:
        """Compare once. False if that failed or was not allowed, or if the source differs and was not replaced."""
        if self._refused and time.monotonic() - self._refused_at < REFUSED_SECONDS:
            return False
        try:
            done = await self._check()
        except NotFoundError as error:
            self._disturb()
            await self._create_missing(error)
            return False
        except (NatsError, APIError, TimeoutError, OSError) as error:
            # Changes while a server was away went unnoticed.
            self._disturb()
            self._fail(
                f"{STREAM} can't be compared with {subjects.TELEMETRY_STREAM}: {str(error) or type(error).__name__}"
            )
            return False
        self._failing_since = 0.0
        self.checks += 1
        return done

    async def _create_missing(self, error: NotFoundError) -> None:
        try:
            await self._make_streams()
        except (NatsError, APIError, TimeoutError, OSError) as failed:
            why = str(failed) or type(failed).__name__
            self._fail(
                f"a stream of telemetry is gone, and can't be created: {why} (start `corral plan`, which creates it)"
            )
        else:
            log.warning("a stream of telemetry was gone, and was created again (%s)", error.description or error)

    def _fail(self, text: str) -> None:
        """Report a failure as the problem once failures have gone on for `REPORT_SECONDS`."""
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if now - self._failing_since > REPORT_SECONDS:
            self._report(text)

    def _refuse(self, text: str) -> None:
        self._refused_at = time.monotonic()
        if text != self._refused:
            log.error("%s", text)
        self._refused = text

    def _report(self, text: str) -> None:
        if text and text != self._problem:
            log.error("%s", text)
        self._problem = text

    async def _check(self) -> bool:
        raw = await self._ask(f"STREAM.INFO.{STREAM}")
        parts = _info(raw)
        # Asked after the other: all that the other has copied is from this origin, unless the origin was replaced.
        origin = _info(await self._ask(f"STREAM.INFO.{subjects.TELEMETRY_STREAM}"))
        sourcing = Sourcing.of(parts.config.metadata)
        last = parts.state.last_seq
        self._follow(created(parts), last)
        self._sourcing = sourcing
        why = _created_again(parts, sourcing, origin)
        replaced = f"{subjects.TELEMETRY_STREAM} {why}, and {STREAM} has copied another one"
        # An estimate, without a look at its messages.
        stands = 0 if why else origin.state.last_seq - _reported_lag(parts)
        try:
            if why:
                self._count(origin, stands, last)
            else:
                why, upto = await self._compare(parts, sourcing, origin)
                replaced = f"{subjects.TELEMETRY_STREAM} {why}, and {STREAM} has copied another one"
                if not why:
                    self._proven = upto
                    if upto >= self._scanned_to:
                        # What was copied meanwhile need not be compared one by one.
                        self._disturbed, self._scanned_to = False, 0
                    self._report("")
                    self._refused = ""
                    return True
            return await self._source_anew(raw, parts, sourcing, origin, replaced)
        except permissions.NotAllowed as error:
            self._count(origin, stands, last)
            what = (
                f"{replaced}: telemetry is missing from here on"
                if why
                else f"it is not known if {STREAM} still mirrors {subjects.TELEMETRY_STREAM}"
            )
            self._refuse(f"{what}. {error}. {_RENEW}")
            return False

    def _follow(self, stream: str, last: int) -> None:
        """Detect a replaced stream of partitions, or a reconnection, since the last comparison."""
        reconnects = self._nc.stats["reconnects"]
        if not self._created:
            self._proven = min(self._started.values(), default=last)
        elif stream != self._created or last < self._proven:
            # Its readers notice that, too, and start again.
            self._started.clear()
            self._proven = 0
            self._disturb()
        elif reconnects != self._reconnects:
            self._disturb()
        self._created, self._reconnects = stream, reconnects
        if self._disturbed and not self._scanned_to:
            self._scanned_to = last

    async def _compare(self, parts: api.StreamInfo, sourcing: Sourcing, origin: api.StreamInfo) -> tuple[str, int]:
        """Compare copied messages with the origin.

        Compared are the message that was the newest the last time, and the newest now. After a disturbance those
        between them are compared as well, at most `AT_ONCE` in a call and only the newest `SCAN_MESSAGES`.

        Returns:
            The reason why the origin is not the one that was copied (empty if it is), and the sequence up to which
            copies were compared.
        """
        last = parts.state.last_seq
        first = max(self._proven, self._scanned_to - SCAN_MESSAGES) if self._disturbed else last
        upto = min(last, first + AT_ONCE)
        sequences = sorted({self._proven, *range(first, upto + 1), last} - {0})
        copied = dict(zip(sequences, await asyncio.gather(*map(self._copied_message, sequences)), strict=True))
        newest = copied.get(last)
        if newest is not None and newest.generation == sourcing.generation:
            stands = newest.source
        elif newest is None and last:
            stands = origin.state.last_seq - _reported_lag(parts)
        else:
            stands = max(0, _starts_at(parts) - 1)
        self._count(origin, stands, last)
        if stands > origin.state.last_seq:
            return f"was set back from {stands} to {origin.state.last_seq}", upto
        now = [one for one in copied.values() if one is not None and one.generation == sourcing.generation]
        matches = await asyncio.gather(*(self._matches(one, origin) for one in now))
        other = next((one.source for one, same in zip(now, matches, strict=True) if not same), 0)
        if other:
            return f"was set back, and has grown since: its message {other} is another one", upto
        return "", upto

    def _count(self, origin: api.StreamInfo, stands: int, last: int) -> None:
        """Update how many messages the copying is behind, and since when it stands still."""
        self.behind = max(0, origin.state.last_seq - max(stands, origin.state.first_seq - 1))
        if not self.behind or (stands, last) != self._copied:
            self._stands_since = time.monotonic()
        self._copied = (stands, last)

    async def _source_anew(
        self, raw: dict[str, Any], parts: api.StreamInfo, sourcing: Sourcing, origin: api.StreamInfo, replaced: str
    ) -> bool:
        """Replace the source, so that the present origin is copied. Only one processor does; True if this one did."""
        kept = await self._last_unmatched(parts, sourcing, origin)
        # What is stored in any case need not wait until it is done.
        self._proven = max(self._proven, kept)
        if time.monotonic() - self._refused_at < REFUSED_SECONDS or not await self._alone(sourcing.generation + 1):
            return False
        begins = 1 + await self._last_matched(parts, sourcing, origin, kept)
        after = sourcing.next(created(origin), kept)
        config: dict[str, Any] = raw["config"]
        source: dict[str, Any] = {"name": subjects.TELEMETRY_STREAM}
        if begins > 1:
            source["opt_start_seq"] = begins
        source["subject_transforms"] = [
            {"src": each.src, "dest": each.dest} for each in transforms(self._partitions, after.generation)
        ]
        config["sources"] = [source]
        config["metadata"] = {**(config.get("metadata") or {}), **after.metadata()}
        again = _info(await self._ask(f"STREAM.INFO.{STREAM}"))
        if created(again) != created(parts) or Sourcing.of(again.config.metadata) != sourcing:
            return False
        try:
            await self._ask(f"STREAM.UPDATE.{STREAM}", config)
        except permissions.NotAllowed as error:
            self._refused_at = time.monotonic()
            self._report(f"{replaced}. New telemetry is not stored until it is copied again: {error}. {_RENEW}")
            return False
        log.warning("%s: copying it again from message %d", replaced, begins)
        self._report("")
        return True

    async def _alone(self, generation: int) -> bool:
        """Elect the processor that starts a generation; True if it is this one.

        It is the one that creates the generation's key. The key expires, so that another can take over from a failed
        one.
        """
        try:
            bucket = await self._js.key_value(BUCKET)
            await bucket.create(f"sourced.{generation}", self._owner)
        except KeyWrongLastSequenceError:
            return False
        except BucketNotFoundError:
            await self._make_streams()
            return False
        return True

    async def _last_unmatched(self, parts: api.StreamInfo, sourcing: Sourcing, origin: api.StreamInfo) -> int:
        """Sequence of the newest copy that the origin does not have: it and all copies before it are stored.

        If there is none among the newest `SCAN_MESSAGES`, it is the sequence before these.
        """
        at = parts.state.last_seq
        lowest = max(parts.state.first_seq - 1, at - SCAN_MESSAGES)
        while at > lowest:
            sequences = list(range(max(lowest, at - AT_ONCE) + 1, at + 1))
            matches = await asyncio.gather(*(self._still_there(each, sourcing, origin, False) for each in sequences))
            for sequence, same in zip(reversed(sequences), reversed(matches), strict=True):
                if not same:
                    return sequence
            at -= len(sequences)
        return at

    async def _last_matched(self, parts: api.StreamInfo, sourcing: Sourcing, origin: api.StreamInfo, kept: int) -> int:
        """Find the last copied message that the origin still has before those that it has lost, by binary search.

        Returns:
            Its sequence in the origin; 0 if there is none.
        """
        low, high = max(0, parts.state.first_seq - 1), kept  # `low` is in the origin, or nothing is; `high` is not
        while high - low > 1:
            middle = (low + high) // 2
            if await self._still_there(middle, sourcing, origin, True):
                low = middle
            else:
                high = middle
        found = await self._copied_message(low) if low else None
        if found is None or found.generation != sourcing.generation or not await self._matches(found, origin):
            return 0
        return min(found.source, origin.state.last_seq)

    async def _still_there(self, sequence: int, sourcing: Sourcing, origin: api.StreamInfo, too_old: bool) -> bool:
        """True if the origin still has a copied message, and also if the copy is gone or of an earlier generation.

        Args:
            sequence: of the copy.
            sourcing: as it is now.
            origin: as it is now.
            too_old: the result if the origin begins after that message.
        """
        found = await self._copied_message(sequence)
        if found is None or found.generation != sourcing.generation:
            return True
        if found.source < origin.state.first_seq:
            return too_old
        return found.source <= origin.state.last_seq and await self._matches(found, origin)

    async def _matches(self, copied: _Copied, origin: api.StreamInfo) -> bool:
        """True if the origin has that message at its sequence, or no message there any more."""
        if copied.source < origin.state.first_seq:
            return True
        there = await self._message(subjects.TELEMETRY_STREAM, copied.source)
        return there is None or there.get("data", "") == copied.payload

    async def _copied_message(self, sequence: int) -> _Copied | None:
        """Read a message of the stream of partitions; None if it is gone, or is no copy of telemetry."""
        found = await self._message(STREAM, sequence)
        if found is None:
            return None
        source = _SOURCE.search(base64.b64decode(found.get("hdrs", "")).decode(errors="replace"))
        if source is None or source[1] != subjects.TELEMETRY_STREAM:
            return None
        return _Copied(generation_of(source[3]), int(source[2]), found.get("data", ""))

    async def _message(self, stream: str, sequence: int) -> dict[str, Any] | None:
        """Read a message from the stream's leader, since a replica may lag behind; None if there is none."""
        try:
            return (await self._ask(f"STREAM.MSG.GET.{stream}", {"seq": sequence}))["message"]
        except NotFoundError as error:
            if error.err_code == _NO_MESSAGE:
                return None
            raise

    async def _ask(self, endpoint: str, body: object = None) -> dict[str, Any]:
        payload = json.dumps(body).encode() if body is not None else b""
        reply = await permissions.request(self._nc, f"$JS.API.{endpoint}", payload, timeout=API_SECONDS)
        answer: dict[str, Any] = json.loads(reply.data)
        if "error" in answer:
            raise APIError.from_error(answer["error"])
        return answer


_NO_MESSAGE: Final = 10037
_RENEW: Final = (
    "The server's configuration was written by an older Corral: `corral auth add`, `rotate` or `apply` of this one "
    "writes a new one, which the server then has to reload"
)


def _info(raw: dict[str, Any]) -> api.StreamInfo:
    return api.StreamInfo.from_response(json.loads(json.dumps(raw)))


def _created_again(parts: api.StreamInfo, sourcing: Sourcing, origin: api.StreamInfo) -> str:
    """Message if the origin was created again after what was copied; empty otherwise."""
    # An older Corral recorded no time, but created the stream of partitions after the origin.
    another = sourcing.created != created(origin) if sourcing.created else created(origin) > created(parts)
    return f"was created again at {created(origin)}" if another else ""


def _reported_lag(parts: api.StreamInfo) -> int:
    """Number of messages that the server reports as not copied yet: 0 if it does not copy at all."""
    return sum(source.lag or 0 for source in parts.sources or [])


def _starts_at(parts: api.StreamInfo) -> int:
    """Sequence of the origin at which the source begins; 0 for the origin's start."""
    return next((source.opt_start_seq or 0 for source in parts.config.sources or []), 0)
