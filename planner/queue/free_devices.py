"""Free devices by host in a virtual run: which hosts a request would take, found without a look at all of them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from heapq import heappop, heappush
from types import MappingProxyType
from typing import Final, TypeVar

LEAST_FREE: Final = 1e-9
"""Part of a device that counts as free."""
NO_LIMITS: Final[Mapping[int, float]] = MappingProxyType({})
_SEARCH: Final = 16
"""A search, in units of a host that it looks at."""
_ROUNDED: Final = 1e-6
"""Devices that the sum of all may be wrong by, since it is kept up to date by parts of devices."""


T = TypeVar("T")


def in_order(heap: Sequence[T]) -> Iterator[T]:
    """The items of a heap, the smallest first; it stays as it is, and is not copied."""
    front = [(heap[0], 0)] if heap else []
    while front:
        item, at = heappop(front)
        yield item
        for below in range(2 * at + 1, min(2 * at + 3, len(heap))):
            heappush(front, (heap[below], below))


class FreeDevices:
    """Free devices by host, where hosts are sorted by how many they have; of equal ones the first that came goes first.

    Args:
        free: devices by host; hosts with none are left out.

    Attributes:
        free: the same, as of now.
        looked: hosts that searches have looked at, and a little more for each search: a measure of the time taken.
    """

    def __init__(self, free: Mapping[int, float]) -> None:
        self.free: dict[int, float] = {}
        self.looked = 0
        self._numbers: dict[int, int] = {}
        """Number of each host, in the order in which they came; another one each time that it has had none."""
        self._count = 0
        self._total = 0.0
        self._counts: list[float] = []
        """Numbers of free devices that hosts have, or have had, ascending."""
        self._hosts: dict[float, list[tuple[int, int]]] = {}
        """Hosts that have, or have had, so many, as a heap of their numbers and names."""
        for host, count in free.items():
            if count > LEAST_FREE:
                self._set(host, count)

    def add(self, host: int, devices: float) -> None:
        """Add free devices of a host, or take them away."""
        self._set(host, self.free.get(host, 0.0) + devices)

    def _set(self, host: int, count: float) -> None:
        before = self.free.get(host)
        if count <= LEAST_FREE:
            if before is not None:
                del self.free[host]
                self._total -= before
            return
        if before is None:
            self._count += 1
            self._numbers[host] = self._count
        self._total += count - (before or 0.0)
        self.free[host] = count
        hosts = self._hosts.get(count)
        if hosts is None:
            hosts = self._hosts[count] = []
            insort(self._counts, count)
        heappush(hosts, (self._numbers[host], host))

    def within(self, most: Mapping[int, float]) -> dict[int, float]:
        """Free devices by host, but no more than `most` where that says something."""
        self.looked += len(self.free)
        found = dict(self.free)
        for host, count in most.items():
            if count <= LEAST_FREE:
                found.pop(host, None)
            elif host in found:
                found[host] = min(found[host], count)
        return found

    def tightest(self, devices: float, hosts: AbstractSet[int], most: Mapping[int, float] = NO_LIMITS) -> int | None:
        """The host with the fewest free devices, but as many as asked for; None if there is none.

        Args:
            devices: on the host.
            hosts: that may be used.
            most: devices that may be used at most, by host; any number on other hosts.
        """
        if not most:
            self.looked += _SEARCH
            for place in range(bisect_left(self._counts, devices), len(self._counts)):
                count = self._counts[place]
                first = self._first(count)
                if first is not None and first not in hosts:
                    break
                if first is not None:
                    return first
            else:
                return None
        found = self.tightest_hosts(1, devices, hosts, most)
        return None if found is None else found[0]

    def _first(self, count: float) -> int | None:
        """The first host that has so many free devices; None if none has."""
        heap, free, numbers = self._hosts[count], self.free, self._numbers
        while heap:
            at, host = heap[0]
            if free.get(host) == count and numbers[host] == at:
                return host
            heappop(heap)
        return None

    def tightest_hosts(
        self, number: int, devices: float, hosts: AbstractSet[int], most: Mapping[int, float] = NO_LIMITS
    ) -> list[int] | None:
        """So many hosts with the fewest free devices, but each with as many as asked for; None if there are fewer."""
        self.looked += _SEARCH
        found: list[int] = []
        if devices * number > self._total + _ROUNDED:
            return None
        limited = sorted((count, at, host) for count, at, host in self._limited(most, hosts) if count >= devices)
        limits = iter(limited)
        limit = next(limits, None)
        for place in range(bisect_left(self._counts, devices), len(self._counts)):
            count = self._counts[place]
            for at, host in self._of(count, hosts, most):
                while limit is not None and limit[:2] < (count, at):
                    found.append(limit[2])
                    limit = next(limits, None)
                    if len(found) >= number:
                        return found[:number]
                found.append(host)
                if len(found) >= number:
                    return found
        while limit is not None and len(found) < number:
            found.append(limit[2])
            limit = next(limits, None)
        return found if len(found) >= number else None

    def fewest(
        self, devices: float, hosts: AbstractSet[int], most: Mapping[int, float] = NO_LIMITS
    ) -> dict[int, float] | None:
        """Devices on as few hosts as possible, by host; None if there are not as many. The arguments are those of
        `tightest`, where `devices` are those on all hosts.
        """
        self.looked += _SEARCH
        if devices > self._total + _ROUNDED:
            return None
        found: dict[int, float] = {}
        left = devices
        limited = sorted(((-count, at, host) for count, at, host in self._limited(most, hosts)), reverse=True)
        for place in range(len(self._counts) - 1, -1, -1):
            count = self._counts[place]
            for at, host in self._of(count, hosts, most):
                while limited and limited[-1][:2] < (-count, at):
                    negative, _, other = limited.pop()
                    found[other] = min(left, -negative)
                    left -= found[other]
                    if not left:
                        return found
                found[host] = min(left, count)
                left -= found[host]
                if not left:
                    return found
        while limited:
            negative, _, other = limited.pop()
            found[other] = min(left, -negative)
            left -= found[other]
            if not left:
                return found
        return None

    def _limited(self, most: Mapping[int, float], hosts: AbstractSet[int]) -> Iterator[tuple[float, int, int]]:
        """Hosts of which only a part may be used: that, number and name of each."""
        for host, limit in most.items():
            if host in self.free and host in hosts and limit > LEAST_FREE:
                yield min(self.free[host], limit), self._numbers[host], host

    def _of(self, count: float, hosts: AbstractSet[int], without: Mapping[int, float]) -> Iterator[tuple[int, int]]:
        """Hosts that have so many free devices, in the order of their numbers: number and name of each.

        The devices must not change before the last was taken from it.
        """
        heap, kept = self._hosts[count], list[tuple[int, int]]()
        free, numbers = self.free, self._numbers
        try:
            while heap:
                at, host = entry = heappop(heap)
                self.looked += 1
                if free.get(host) != count or numbers[host] != at or (kept and kept[-1] == entry):
                    continue
                kept.append(entry)
                if host in hosts and host not in without:
                    yield entry
        finally:
            for entry in kept:
                heappush(heap, entry)
