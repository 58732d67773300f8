"""The time series of the device page, out of a real history."""

from __future__ import annotations

import asyncio
import base64
from array import array

from corral.client import connect
from corral.dashboard.history import Window, timelines
from support.local_cluster import LocalCluster, wait_for


def times(packed: str) -> list[float]:
    found = array("d")
    found.frombytes(base64.b64decode(packed))
    return found.tolist()


def test_a_timeline_that_is_too_long_keeps_its_newest_points(cluster: LocalCluster) -> None:
    of_one = "FROM samples WHERE device = (SELECT min(device) FROM devices)"
    wait_for(lambda: cluster.rows(f"SELECT count(*) > 30 {of_one}") == [[True]])
    [[device, newest]] = cluster.rows(f"SELECT min(device), epoch_ms(max(time)) {of_one}")

    async def series() -> list[list[float]]:
        async with connect(cluster.url) as client:
            window = Window(seconds=600.0)
            whole = await timelines(client, device, ["power_watts"], window)
            cut = await timelines(client, device, ["power_watts"], window, max_points=10)
        return [times(one.times) for one in (*whole, *cut)]

    whole, cut = asyncio.run(series())
    assert whole == sorted(whole)
    assert cut == sorted(cut)
    assert len(whole) > len(cut) == 10
    assert cut[-1] >= newest, "the newest point is there"
