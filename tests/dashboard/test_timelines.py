"""The time series of the device page, out of a real history."""

from __future__ import annotations

import asyncio
import base64
from array import array

from corral.client import connect
from corral.dashboard.history import Window, timelines
from support.local_cluster import LocalCluster


def times(packed: str) -> list[float]:
    found = array("d")
    found.frombytes(base64.b64decode(packed))
    return found.tolist()


async def test_a_timeline_that_is_too_long_keeps_its_newest_points(cluster: LocalCluster) -> None:
    of_one = "FROM samples WHERE device = (SELECT min(device) FROM devices)"
    async with connect(cluster.url) as client:
        while (await client.query(f"SELECT count(*) {of_one}")).scalar() < 30:
            await asyncio.sleep(0.1)
        [(device, newest)] = (await client.query(f"SELECT min(device), epoch_ms(max(time)) {of_one}")).rows
        window = Window(seconds=600.0)
        [whole] = await timelines(client, device, ["power_watts"], window)
        [series] = await timelines(client, device, ["power_watts"], window, max_points=10)
    assert times(whole.times) == sorted(times(whole.times))
    assert times(series.times) == sorted(times(series.times))
    assert len(times(series.times)) == 10
    assert times(series.times)[-1] >= newest, "the newest point is there"
