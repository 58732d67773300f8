"""What each group used, hour by hour: from leases that name their group, in a file and in a lake."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from corral.client.reports import usage_sql
from corral.client.reports.periods import period_of, slices
from corral.processors.storage import Batch
from corral.processors.storage.lake import lake as lakes
from corral.schemas.requests import Grant, Lease, LeaseEvent, LeaseEventKind, LeaseState
from support.empty_history import new_database

START = datetime(2026, 1, 5, 8, tzinfo=UTC)
PART = "CORRAL_PARTITIONS/1"
ANSWER = [
    # From 8:40 to 10:15, two H100s and half a T4 that could be preempted.
    (8, "lab/vision", "H100", 1, 2 * 1200, 2 * 1200),
    (8, "lab/vision", "T4", 1, 600, 600),
    (9, "lab/nlp", "H100", 2, 120, 60),
    (9, "lab/vision", "H100", 1, 2 * 3600, 2 * 3600),
    (9, "lab/vision", "T4", 1, 1800, 1800),
    (10, "lab/vision", "H100", 1, 2 * 900, 2 * 900),
    (10, "lab/vision", "T4", 1, 450, 450),
    # Granted before there were groups.
    (11, None, "H100", 1, 3600, 0),
]


def story(lease_id: str, group: str, first: float, last: float, models: dict[str, float], **more: Any) -> list[Any]:
    """Grant and end of a lease, in minutes after `START`; of models and shares."""
    lease = Lease(
        lease_id=lease_id, owner="ann", state=LeaseState.ACTIVE, granted_at=START + timedelta(minutes=first),
        expires_at=START + timedelta(days=1), ttl_seconds=86400.0, group=group, **more,
        grants=[Grant(host="h1", device=f"{lease_id}-{name}", model=name.split("/")[0], share=share)
                for name, share in models.items()],
    )  # fmt: skip
    end = START + timedelta(minutes=last)
    # Whoever ends a lease may know its group no more.
    ended = Lease(
        lease_id=lease_id, owner="ann", state=LeaseState.RELEASED, granted_at=lease.granted_at, ended_at=end,
        expires_at=lease.expires_at, ttl_seconds=86400.0, grants=[],
    )  # fmt: skip
    return [
        LeaseEvent(kind=LeaseEventKind.GRANTED, time=lease.granted_at, lease=lease),
        LeaseEvent(kind=LeaseEventKind.RELEASED, time=end, lease=ended),
    ]


LEASES = [
    *story("l1", "lab/vision", 40, 135, {"H100/0": 1, "H100/1": 1, "T4": 0.5}, preemptible=True),
    *story("l2", "lab/nlp", 60, 61, {"H100": 1}),
    *story("l3", "lab/nlp", 119, 120, {"H100": 1}, preemptible=True),
    *story("l4", "", 180, 240, {"H100": 1}),
]


@pytest.fixture(params=["file", pytest.param("lake", marks=pytest.mark.long)])
def history(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """Cursor of a history with these leases."""
    if request.param == "file":
        stored: Any = new_database(tmp_path)
    else:
        lake: lakes.Lake = request.getfixturevalue("lake")
        stored = lakes.LakePart(lake, lakes.prepare(lake, 2), PART)
        stored.resume(PART, "made")
    stored.commit(Batch(stream=PART, sequence=1, leases=LEASES[:1], messages=1))
    stored.commit(Batch(stream=PART, sequence=2, leases=LEASES[1:], messages=1))
    yield stored.cursor()
    stored.close()


def test_groups_have_the_seconds_of_their_leases_in_each_hour_and_in_a_report(history: Any) -> None:
    rows = history.execute(
        "SELECT datepart('hour', hour AT TIME ZONE 'UTC'), * EXCLUDE (hour) FROM group_usage ORDER BY ALL"
    ).fetchall()
    assert rows == ANSWER
    seconds = "SELECT sum(gpus * epoch(ended - started)) FROM lease_spans"
    assert history.execute(seconds).fetchone()[0] == sum(row[4] for row in ANSWER)
    # A report on the month has the same.
    cuts = slices(period_of("2026-01", "UTC", START))
    rows = history.execute(usage_sql.usage(cuts, usage_sql.Filters())).fetchall()
    found = Counter[tuple[str, str]]()
    for _, group, _, model, granted_us, *_ in rows:
        found[group, model] += granted_us
    expected = Counter[tuple[str, str]]()
    for _, group, model, _, gpu_seconds, _ in ANSWER:
        expected[group or "", model] += round(gpu_seconds * 10**6)
    assert found == expected
    assert history.execute(usage_sql.waste(cuts, usage_sql.Filters(), 5)).fetchall() == []
