"""Lists that don't fit in one message: fetched completely, each entry once."""

from fnmatch import fnmatchcase

import pytest
from corral.client import InvalidRequest
from corral.client.paging import all_devices, all_queued
from corral.schemas.operations import DeviceFilter, Devices, DeviceStatus, Queue, QueueEntry, QueueFilter
from hypothesis import given
from hypothesis import strategies as st

HOSTS = st.sets(st.text("019ab-_", min_size=1, max_size=5), min_size=1, max_size=40)


def planner(hosts: set[str], most: int):
    """Answers as the planner does: by globs, and not more than a message holds."""
    fleet = [
        DeviceStatus(uuid=f"GPU-{host}-{index}", host=host, index=index) for host in sorted(hosts) for index in (0, 1)
    ]

    async def ask(wanted: DeviceFilter) -> Devices:
        found = [one for one in fleet if not wanted.hosts or any(fnmatchcase(one.host, glob) for glob in wanted.hosts)]
        if len(found) > most:
            raise InvalidRequest("the answer is too large", "too_large")
        return Devices(devices=found)

    return fleet, ask


@given(HOSTS, st.sampled_from([[], ["*1*"], ["a*", "*-*"]]))
async def test_no_device_is_missed_or_listed_twice(hosts: set[str], globs: list[str]) -> None:
    fleet, ask = planner(hosts, most=10)
    expected = [one for one in fleet if not globs or any(fnmatchcase(one.host, glob) for glob in globs)]
    try:
        found = await all_devices(ask, DeviceFilter(hosts=globs))
    except InvalidRequest:
        # Names of letters alone can't be told apart by digits: that is said, not guessed.
        assert len(expected) > 10
        return
    assert found == expected


async def test_ten_thousand_devices_are_listed() -> None:
    fleet, ask = planner({f"node-{number:04}" for number in range(5000)}, most=2000)
    assert await all_devices(ask, DeviceFilter()) == fleet
    with pytest.raises(InvalidRequest):
        await all_devices(planner({"one"}, most=1)[1], DeviceFilter())


async def test_a_request_that_is_pushed_back_between_parts_is_listed_once() -> None:
    waiting = [f"r{number}" for number in range(6)]

    async def ask(wanted: QueueFilter) -> Queue:
        entries = [
            QueueEntry(request_id=name, owner="o", position=place, waiting_seconds=0, message="")
            for place, name in enumerate(waiting, 1)
        ]
        part = Queue(entries=entries[wanted.offset : wanted.offset + 2], total=len(entries))
        if wanted.offset == 2:  # a request of higher priority arrives after the second part
            waiting.insert(0, "urgent")
        return part

    found = await all_queued(ask, QueueFilter())
    assert [entry.request_id for entry in found] == ["r0", "r1", "r2", "r3", "r4", "r5"]
    assert [entry.position for entry in found] == [1, 2, 3, 5, 6, 7]
