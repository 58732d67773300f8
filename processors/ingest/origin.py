"""Whether the stream of partitions still repeats the stream of telemetry, and having it sourced anew where it doesn't.

A server sources a stream by number: it goes on behind the last number that it has copied, whatever became of the stream
that it copies from. One that was made anew, or set back, gives those numbers out again; what has them is left out, or
nothing is copied at all. So each processor compares the two: when the origin was made, how far it is, and whether what
was copied last is still what stands there.

Where they differ, the sources of the stream of partitions are replaced: it is copied from again under the next
*generation*, which each copied message names in its header. Nothing is deleted. What was copied before and the origin
has no more stays in its place, and is stored; what was copied behind it comes again, and is left out. `Sourcing.kept`
says where the one ends and the other begins, in the stream's own metadata, so that all processors of all lakes agree.

Until a message is known to be copied from what is there now, it is not stored: behind a gap it would make those that
fill it look as if they had come before (`deduplication.py`).
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
from ...bus.tasks import heed_cancellation
from ...schemas import subjects
from .columnar import Incoming
from .reader import made

log = logging.getLogger("corral.partitions")

STREAM: Final = "CORRAL_PARTITIONS"
BUCKET: Final = "corral_processors"
SOURCE_HEADER: Final = "Nats-Stream-Source"
CHECK_SECONDS: Final = 1.0
API_SECONDS: Final = 3.0
REFUSED_SECONDS: Final = 30.0
"""What the server does not allow is asked for again after it."""
TELL_SECONDS: Final = 10.0
"""Two streams that can't be compared for so long, or of which one is not copied, are told of."""
COALESCE_SECONDS: Final = 0.05
AT_ONCE: Final = 128
SCAN_MESSAGES: Final = 2048
"""Copied messages that are compared one by one where the server was away, or the processor; older ones are not."""

_AGAIN: Final = f"{subjects.PREFIX}.sourced.again"
"""Subject that nobody publishes on: a source is another one to the server where it has it too."""
_GENERATION: Final = re.compile(re.escape(_AGAIN) + r"\.(\d+)")
_SOURCE: Final = re.compile(rf"{SOURCE_HEADER}: (\S+) (\d+) ([^\r]*)")
_CREATED, _SOURCED, _KEPT = "corral.origin.created", "corral.sourced.again", "corral.sourced.kept"
_GENERATIONS_KEPT: Final = 64


class Sourcing(Struct, frozen=True):
    """How the stream of partitions is sourced, as its metadata say.

    Attributes:
        created: when the origin was made; empty where an older Corral has made the stream.
        generation: how often the origin was found to be another one.
        kept: of earlier generations: what was copied in them up to this sequence of the stream of partitions is
            stored, and what was copied behind it comes again.
    """

    created: str = ""
    generation: int = 0
    kept: Mapping[int, int] = {}

    @classmethod
    def of(cls, metadata: Mapping[str, str] | None) -> Sourcing:
        """As a stream's metadata say."""
        found = metadata or {}
        kept: dict[int, int] = {}
        with contextlib.suppress(msgspec.DecodeError):
            kept = msgspec.json.decode(found.get(_KEPT, "{}"), type=dict[int, int])
        sourced = found.get(_SOURCED, "0")
        return cls(found.get(_CREATED, ""), int(sourced) if sourced.isdecimal() else 0, kept)

    def metadata(self) -> dict[str, str]:
        """As they are written."""
        kept = dict(sorted(self.kept.items())[-_GENERATIONS_KEPT:])
        return {
            _CREATED: self.created,
            _SOURCED: str(self.generation),
            _KEPT: json.dumps({str(generation): sequence for generation, sequence in kept.items()}),
        }

    def next(self, created: str, kept: int) -> Sourcing:
        """The one after it: the origin is another one, and what was copied up to a sequence is stored."""
        return Sourcing(created, self.generation + 1, {**self.kept, self.generation: kept})

    def stores(self, generation: int, sequence: int, proven: int) -> bool | None:
        """Whether a copied message is to be stored; None where that is not known yet.

        Args:
            generation: that it was copied in.
            sequence: its place in the stream of partitions.
            proven: up to there, what this generation has copied is what the origin has.
        """
        if generation < self.generation:
            return sequence <= self.kept.get(generation, sequence)
        return True if generation == self.generation and sequence <= proven else None


def transforms(partitions: int, generation: int = 0) -> list[api.SubjectTransform]:
    """What becomes of subjects on their way: the partition is put before the host."""
    cut = f"{{{{wildcard(1)}}}}.{{{{partition({partitions},2)}}}}.{{{{wildcard(2)}}}}"
    found = [api.SubjectTransform(src=f"{subjects.PREFIX}.*.*", dest=f"{subjects.PREFIX}.{cut}")]
    if generation:
        again = f"{_AGAIN}.{generation}"
        found.append(api.SubjectTransform(src=again, dest=again))
    return found


def generation_of(source: str) -> int:
    """The generation that a message was copied in, by its header of the source."""
    found = _GENERATION.search(source)
    return int(found[1]) if found else 0


class _Copied(Struct, frozen=True):
    """A message of the stream of partitions: where it comes from, and what is in it."""

    generation: int
    source: int
    payload: str


class Origin:
    """Compares the two streams for one processor, for as long as `run` runs.

    Args:
        nc: connection to the bus.
        owner: id of this process.
        partitions: that the telemetry is cut into.
        make_streams: makes the streams that are missing.

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
        self._made = ""
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
        """What keeps telemetry from being copied, or nobody from knowing whether it is; empty where nothing does."""
        if self._problem or self._refused:
            return self._problem or self._refused
        seconds = time.monotonic() - self._stands_since
        if self.behind and seconds > TELL_SECONDS:
            return (
                f"{STREAM} is {self.behind} messages behind {subjects.TELEMETRY_STREAM}: none came for {seconds:.0f} s"
            )
        return ""

    def begin(self, part: str, after: int) -> None:
        """A part is read from behind a sequence on: what was copied since is compared."""
        self._started[part] = after
        if self._made and after < self._proven:
            self._proven = after
            self._disturb()

    def _disturb(self) -> None:
        """Anything may have happened: what was copied up to now is compared one by one."""
        self._disturbed, self._scanned_to = True, 0

    def end(self, part: str) -> None:
        """A part is read no more."""
        self._started.pop(part, None)

    async def passed(self, created: str, messages: Sequence[Incoming]) -> list[Incoming]:
        """Those of some messages that are to be stored, once that is known.

        Args:
            created: of the stream of partitions that they were read from.
            messages: with their headers.
        """
        seen = self.checks
        while True:
            if self._refused or (created != self._made and self.checks > seen + 1):
                # Nobody can tell, or they come from a stream that is gone: they are not to be had again.
                return list(messages)
            if created == self._made:
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
        """Compare, again and again, until cancelled."""
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
        """Compare; False where that came to nothing."""
        if self._refused and time.monotonic() - self._refused_at < REFUSED_SECONDS:
            return False
        try:
            done = await self._check()
        except NotFoundError as error:
            self._disturb()
            await self._make_what_is_gone(error)
            return False
        except (NatsError, APIError, TimeoutError, OSError) as error:
            # What happens while a server is away, nobody has seen.
            self._disturb()
            self._fail(
                f"{STREAM} can't be compared with {subjects.TELEMETRY_STREAM}: {str(error) or type(error).__name__}"
            )
            return False
        self._failing_since = 0.0
        self.checks += 1
        return done

    async def _make_what_is_gone(self, error: NotFoundError) -> None:
        try:
            await self._make_streams()
        except (NatsError, APIError, TimeoutError, OSError) as failed:
            why = str(failed) or type(failed).__name__
            self._fail(f"a stream of telemetry is gone, and can't be made: {why} (make it with `corral plan`)")
        else:
            log.warning("a stream of telemetry was gone, and is made anew (%s)", error.description or error)

    def _fail(self, text: str) -> None:
        """What fails for long enough is a problem."""
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if now - self._failing_since > TELL_SECONDS:
            self._tell(text)

    def _refuse(self, text: str) -> None:
        self._refused_at = time.monotonic()
        if text != self._refused:
            log.error("%s", text)
        self._refused = text

    def _tell(self, text: str) -> None:
        if text and text != self._problem:
            log.error("%s", text)
        self._problem = text

    async def _check(self) -> bool:
        raw = await self._ask(f"STREAM.INFO.{STREAM}")
        parts = _info(raw)
        # Asked behind the other: what that had copied by then is of this one, unless this one is another.
        origin = _info(await self._ask(f"STREAM.INFO.{subjects.TELEMETRY_STREAM}"))
        sourcing = Sourcing.of(parts.config.metadata)
        last = parts.state.last_seq
        self._follow(made(parts), last)
        self._sourcing = sourcing
        why = _made_anew(parts, sourcing, origin)
        told = f"{subjects.TELEMETRY_STREAM} {why}, and {STREAM} has copied another one"
        # As far as can be told without its messages.
        stands = 0 if why else origin.state.last_seq - _said_to_lag(parts)
        try:
            if why:
                self._count(origin, stands, last)
            else:
                why, upto = await self._compare(parts, sourcing, origin)
                told = f"{subjects.TELEMETRY_STREAM} {why}, and {STREAM} has copied another one"
                if not why:
                    self._proven = upto
                    if upto >= self._scanned_to:
                        # What was copied meanwhile is as when nothing has happened.
                        self._disturbed, self._scanned_to = False, 0
                    self._tell("")
                    self._refused = ""
                    return True
            return await self._source_anew(raw, parts, sourcing, origin, told)
        except permissions.NotAllowed as error:
            self._count(origin, stands, last)
            what = (
                f"{told}: telemetry is missing from here on"
                if why
                else f"nobody can tell whether {STREAM} still repeats {subjects.TELEMETRY_STREAM}"
            )
            self._refuse(f"{what}. {error}. {_RENEW}")
            return False

    def _follow(self, stream: str, last: int) -> None:
        """Note what may have happened to the stream of partitions, or to the server, since the last time."""
        reconnects = self._nc.stats["reconnects"]
        if not self._made:
            self._proven = min(self._started.values(), default=last)
        elif stream != self._made or last < self._proven:
            # Whoever reads it notices too, and begins anew.
            self._started.clear()
            self._proven = 0
            self._disturb()
        elif reconnects != self._reconnects:
            self._disturb()
        self._made, self._reconnects = stream, reconnects
        if self._disturbed and not self._scanned_to:
            self._scanned_to = last

    async def _compare(self, parts: api.StreamInfo, sourcing: Sourcing, origin: api.StreamInfo) -> tuple[str, int]:
        """Why the origin is not what was copied, empty where it is; and up to where that is known then.

        The message that was the newest the last time is looked at, and the newest; where anything may have happened in
        between, so are those between them.
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
            stands = origin.state.last_seq - _said_to_lag(parts)
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
        """How far the copying is."""
        self.behind = max(0, origin.state.last_seq - max(stands, origin.state.first_seq - 1))
        if not self.behind or (stands, last) != self._copied:
            self._stands_since = time.monotonic()
        self._copied = (stands, last)

    async def _source_anew(
        self, raw: dict[str, Any], parts: api.StreamInfo, sourcing: Sourcing, origin: api.StreamInfo, told: str
    ) -> bool:
        """Have the stream of partitions copy the origin as it is now. Of all processors one does so."""
        kept = await self._last_unmatched(parts, sourcing, origin)
        # What is stored in any case need not wait until it is done.
        self._proven = max(self._proven, kept)
        if time.monotonic() - self._refused_at < REFUSED_SECONDS or not await self._alone(sourcing.generation + 1):
            return False
        begins = 1 + await self._last_matched(parts, sourcing, origin, kept)
        after = sourcing.next(made(origin), kept)
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
        if made(again) != made(parts) or Sourcing.of(again.config.metadata) != sourcing:
            return False
        try:
            await self._ask(f"STREAM.UPDATE.{STREAM}", config)
        except permissions.NotAllowed as error:
            self._refused_at = time.monotonic()
            self._tell(f"{told}. What is new is not stored until it is copied again: {error}. {_RENEW}")
            return False
        log.warning("%s: it is copied again from message %d on", told, begins)
        self._tell("")
        return True

    async def _alone(self, generation: int) -> bool:
        """Whether it is this processor that begins a generation. Another one may, if this one has not for a while."""
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
        """The newest copied message that the origin does not have: it, and what was copied before it, is stored."""
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
        """The last message of the origin that stands before those that it has lost, and was copied; 0 if none was."""
        low, high = max(0, parts.state.first_seq - 1), kept  # the first is there, or nothing is; the last is not
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
        """Whether the origin has what was copied. What an earlier generation has copied is not looked for.

        Args:
            sequence: of the copy.
            sourcing: how it is copied now.
            origin: as it is now.
            too_old: the answer where the origin begins behind it.
        """
        found = await self._copied_message(sequence)
        if found is None or found.generation != sourcing.generation:
            return True
        if found.source < origin.state.first_seq:
            return too_old
        return found.source <= origin.state.last_seq and await self._matches(found, origin)

    async def _matches(self, copied: _Copied, origin: api.StreamInfo) -> bool:
        """Whether the origin has that message in its place; True where it has none there any more."""
        if copied.source < origin.state.first_seq:
            return True
        there = await self._message(subjects.TELEMETRY_STREAM, copied.source)
        return there is None or there.get("data", "") == copied.payload

    async def _copied_message(self, sequence: int) -> _Copied | None:
        """A message of the stream of partitions; None where it has none there any more."""
        found = await self._message(STREAM, sequence)
        if found is None:
            return None
        source = _SOURCE.search(base64.b64decode(found.get("hdrs", "")).decode(errors="replace"))
        if source is None or source[1] != subjects.TELEMETRY_STREAM:
            return None
        return _Copied(generation_of(source[3]), int(source[2]), found.get("data", ""))

    async def _message(self, stream: str, sequence: int) -> dict[str, Any] | None:
        """By its leader: a copy may not have it yet."""
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
    "The server's configuration was written by an older Corral: any `corral auth add`, `rotate` or `apply` of this one "
    "writes it anew, and the server has to be told to read it"
)


def _info(raw: dict[str, Any]) -> api.StreamInfo:
    return api.StreamInfo.from_response(json.loads(json.dumps(raw)))


def _made_anew(parts: api.StreamInfo, sourcing: Sourcing, origin: api.StreamInfo) -> str:
    """In words, if the origin was made behind what was copied; empty otherwise."""
    # Where an older Corral has made the stream of partitions, it did so behind the origin.
    another = sourcing.created != made(origin) if sourcing.created else made(origin) > made(parts)
    return f"was made anew at {made(origin)}" if another else ""


def _said_to_lag(parts: api.StreamInfo) -> int:
    """Messages that the server says it has not copied yet: 0 where it does not copy at all."""
    return sum(source.lag or 0 for source in parts.sources or [])


def _starts_at(parts: api.StreamInfo) -> int:
    """Where its source begins; 0 at the start of the origin."""
    return next((source.opt_start_seq or 0 for source in parts.config.sources or []), 0)
