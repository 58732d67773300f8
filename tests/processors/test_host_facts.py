"""Facts of hosts over time: what changed after the upgrade, and when."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from corral.processors.storage.host_facts import facts_of
from corral.schemas.subjects import inventory_subject
from corral.schemas.telemetry import DeviceInfo, HostInfo, Inventory, Link
from msgspec.structs import replace
from support.history import History

CHANGES = "SELECT host, device, index, fact, before, after FROM host_changes ORDER BY time, host, device, fact"


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    made = History(tmp_path / "history.duckdb")
    yield made
    made.database.close()


def told(history: History, inventory: Inventory, after: float = 1.0) -> None:
    history.take(inventory_subject(inventory.host.name), inventory, after=after)


def machine(name: str, *uuids: str, driver: str = "570.1", vbios: str = "96.01") -> Inventory:
    count = len(uuids)
    return Inventory(
        host=HostInfo(name=name, driver=driver, kernel="6.8.0", labels={"rack": "r1"}),
        agent="a",
        time_ns=10**18,
        devices=[
            DeviceInfo(uuid=uuid, host=name, index=at, name="H100", driver=driver, firmware={"vbios": vbios})
            for at, uuid in enumerate(uuids)
        ],
        links=[[Link.SAME if a == b else Link.NVLINK for b in range(count)] for a in range(count)],
        nvlink_counts=[[0 if a == b else 18 for b in range(count)] for a in range(count)],
    )


def test_an_upgrade_is_a_change_with_both_versions(history: History) -> None:
    before = machine("h1", "A", "B")
    told(history, before)
    told(history, before)  # the same again each minute is no change
    told(history, machine("h2", "C"))
    assert history.rows(CHANGES) == []
    (stored,) = history.rows("SELECT count(*) FROM host_facts WHERE host = 'h1'")
    assert stored[0] == len(facts_of(before, {device.uuid: device for device in before.devices}))

    after = machine("h1", "A", "B", driver="580.2", vbios="96.02")
    told(history, replace(after, host=replace(after.host, labels={}), leaving=True))  # the collector stops: no facts
    assert history.rows(CHANGES) == []
    link = [[Link.SAME, Link.SYSTEM], [Link.SYSTEM, Link.SAME]]
    told(history, replace(after, links=link, nvlink_counts=[]))
    assert history.rows(CHANGES) == [
        ("h1", "A", 0, "firmware vbios", "96.01", "96.02"),
        ("h1", "A", 0, "link to B", "nvlink × 18", "system"),
        ("h1", "B", 1, "firmware vbios", "96.01", "96.02"),
        ("h1", None, None, "driver", "570.1", "580.2"),
    ]
    # What was true at a time.
    driver = (
        "SELECT value FROM host_facts WHERE host = 'h1' AND fact = 'driver' "
        "AND {0} >= valid_from AND ({0} < valid_to OR valid_to IS NULL)"
    )
    (first,) = history.rows("SELECT min(valid_from) FROM host_facts")
    assert history.rows(driver.format(f"TIMESTAMPTZ '{first[0]}'")) == [("570.1",)]
    assert history.rows(driver.format("now()")) == [("580.2",)]


def test_a_device_that_comes_goes_or_moves_is_one_row(history: History) -> None:
    told(history, machine("h1", "A", "B"))
    told(history, machine("h2", "C"))
    told(history, machine("h1", "A"))
    told(history, machine("h2", "C", "B"))
    assert history.rows(CHANGES) == [
        ("h1", "B", 1, "index", "1", None),
        ("h1", None, None, "devices", "2", "1"),
        ("h2", "B", 1, "index", None, "1"),
        ("h2", None, None, "devices", "1", "2"),
    ]
    # A host that lists another's device has no facts about it.
    told(history, machine("h3", "A"))
    assert history.rows("SELECT DISTINCT host FROM host_facts WHERE device = 'A' AND valid_to IS NULL") == [("h1",)]
    (count,) = history.rows("SELECT value FROM host_facts WHERE host = 'h3' AND fact = 'devices'") or [("0",)]
    assert count == ("0",)
