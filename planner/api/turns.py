"""Turns of the messages that wait to be handled: which is next, and which is refused since too many wait.

Messages are handled in the order of their arrival. Once many wait, renewals, releases and what operators and runners
say go before requests and questions, of which one is handled after each three of them: a flood of requests must not let
leases expire, nor keep devices that have been given back from those that wait for them.

Messages are begun in batches, one in each iteration of the event loop, of as many as take `query_costs.TURN_SECONDS`
together: heartbeats and acknowledgements come in between. That is time on the processor, so that a planner that has a
small part of a core does not spend it on the other work of each iteration; by the clock it is a few times that at most.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from enum import IntEnum
from typing import Any, Final, NamedTuple

from ..broker.waiting import query_costs

MOST_WAITING: Final = 4000
"""Requests, and likewise questions, that may wait: two seconds of work or so. More are refused."""
IN_ORDER: Final = 256
"""Up to so many requests and questions wait in one line with the other messages: they delay these by 0.1 s or so."""
_OVERBOOKED: Final = 2
"""So many times more may wait if each sender has only a few."""
_LEASES_AHEAD: Final = 3
"""Messages about leases that go before each other one that waits."""
_MOST_AT_ONCE: Final = 256
_MOST_BY_CLOCK: Final = 4.0
"""A batch may take so many times as long by the clock, where others take the processor."""


class Rank(IntEnum):
    """Rank of a message."""

    LEASES = 0
    """Operations on leases and jobs, reports of runners, commands of operators."""
    REQUESTS = 1
    """Requests for devices, and jobs."""
    QUESTIONS = 2
    """Listings, explanations, plans."""


Work = Callable[[], Coroutine[Any, Any, None]]


class _Waiting(NamedTuple):
    number: int
    sender: str
    work: Work


class Turns:
    """The messages that wait.

    Args:
        start: runs the handling of a message as a task.
        most: number of messages of a rank that may wait, but of `Rank.LEASES`; None for `MOST_WAITING`.
    """

    def __init__(self, start: Callable[[Coroutine[Any, Any, None]], None], most: int | None = None) -> None:
        self._start = start
        self._most = MOST_WAITING if most is None else most
        self._waiting: dict[Rank, deque[_Waiting]] = {rank: deque() for rank in Rank}
        self._senders: dict[Rank, Counter[str]] = {rank: Counter() for rank in Rank}
        self._at_once = 1
        self._scheduled = False
        self._count = 0
        self._ahead = 0
        """Messages about leases that went ahead of others since one of these was handled, while many wait."""

    def __len__(self) -> int:
        """Number of messages that wait."""
        return sum(map(len, self._waiting.values()))

    def add(self, rank: Rank, sender: str, work: Work) -> bool:
        """Let a message wait for its turn.

        A message that is one too many is refused if its sender has its share of those that wait already, so that one
        that sends many keeps no other from being heard.

        Args:
            rank: of the message.
            sender: its client or owner.
            work: handles it.

        Returns:
            False if it is refused.
        """
        waiting, senders = self._waiting[rank], self._senders[rank]
        if rank is not Rank.LEASES and len(waiting) >= self._most:
            share = self._most // len(senders)
            if senders[sender] > share or len(waiting) >= _OVERBOOKED * self._most:
                return False
        self._count += 1
        waiting.append(_Waiting(self._count, sender, work))
        senders[sender] += 1
        self._schedule()
        return True

    def clear(self) -> None:
        """Forget all messages."""
        for rank in Rank:
            self._waiting[rank].clear()
            self._senders[rank].clear()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        """Begin a batch: its tasks take their first step in the next iteration, between two callbacks."""
        loop = asyncio.get_running_loop()
        began: list[float] = []
        loop.call_soon(lambda: began.extend((time.thread_time(), time.perf_counter())))
        count = 0
        while count < self._at_once and (work := self._next()) is not None:
            self._start(work())
            count += 1
        loop.call_soon(self._end, began, count)

    def _end(self, began: list[float], count: int) -> None:
        took = max(1e-6, time.thread_time() - began[0], (time.perf_counter() - began[1]) / _MOST_BY_CLOCK)
        if count == self._at_once or took > query_costs.TURN_SECONDS:
            fitting = int(count * min(2.0, query_costs.TURN_SECONDS / took))
            self._at_once = min(_MOST_AT_ONCE, max(1, fitting))
        self._scheduled = False
        if len(self):
            self._scheduled = True
            self._begin()

    def _next(self) -> Work | None:
        """The message whose turn it is; None if none waits."""
        leases, requests, questions = self._waiting.values()
        among = list(Rank)
        if leases and len(requests) + len(questions) > IN_ORDER:
            self._ahead = (self._ahead + 1) % (_LEASES_AHEAD + 1)
            among = [Rank.LEASES] if self._ahead else [Rank.REQUESTS, Rank.QUESTIONS]
        first = min(((self._waiting[rank][0].number, rank) for rank in among if self._waiting[rank]), default=None)
        return None if first is None else self._take(first[1])

    def _take(self, rank: Rank) -> Work:
        found = self._waiting[rank].popleft()
        senders = self._senders[rank]
        senders[found.sender] -= 1
        if not senders[found.sender]:
            del senders[found.sender]
        return found.work
