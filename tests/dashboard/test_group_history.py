"""What groups borrowed and were owed over time, from a real history."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from corral.dashboard import group_history
from corral.processors.storage import Batch
from corral.processors.storage.protocol import Asked
from corral.schemas.request_events import RequestEvent, RequestOutcome, asked
from corral.schemas.requests import Grant, Lease, LeaseEvent, LeaseEventKind, LeaseState, WorkRequest
from corral.schemas.work.groups import Group, GroupStatus
from support.empty_history import new_database

START = datetime(2026, 1, 5, 8, tzinfo=UTC)
HOUR = 3600


def at(minutes: float) -> datetime:
    return START + timedelta(minutes=minutes)


def held(lease_id: str, group: str, first: float, last: float, gpus: int) -> LeaseEvent:
    lease = Lease(
        lease_id=lease_id, owner="ann", group=group, state=LeaseState.RELEASED, granted_at=at(first), ended_at=at(last),
        expires_at=at(6000), ttl_seconds=3600.0,
        grants=[Grant(host="h", device=f"{lease_id}-{number}") for number in range(gpus)],
    )  # fmt: skip
    return LeaseEvent(kind=LeaseEventKind.RELEASED, time=at(last), lease=lease)


def test_what_groups_borrowed_and_were_owed(tmp_path: Path) -> None:
    waited = RequestEvent(
        uid="u", request=asked(WorkRequest(owner="bob", gpus=3)), asked_at=at(90), ended_at=at(150), queued=True,
        outcome=RequestOutcome.GRANTED, group="lab/nlp",
    )  # fmt: skip
    database = new_database(tmp_path)
    leases = [held("l1", "lab/vision", 60, 150, 6), held("l2", "lab/nlp", 150, 180, 3), held("l3", "", 0, 60, 8)]
    database.commit(Batch(stream="S", sequence=1, leases=leases, requests=[Asked(waited, "p")], messages=1))
    # From 8:00 to 10:45: the last hour is not over. Nothing is known of the first, in which there were no groups.
    end = at(165).timestamp()
    rows = database.cursor().execute(group_history.sql(START.timestamp(), end, HOUR)).fetchall()
    database.close()
    first = int(START.timestamp()) // HOUR
    use = group_history.folded(rows, range(first, first + 3), HOUR, end)
    assert use.times == [at(60).timestamp(), at(120).timestamp()]
    assert use.held == {"lab": [6, 5], "lab/vision": [6, 4], "lab/nlp": [0, 1]}
    assert use.waited == {"lab": [1.5, 2], "lab/nlp": [1.5, 2]}
    groups = [
        GroupStatus(group=Group(name=name), gpus_guaranteed=guaranteed)
        for name, guaranteed in (("default", 0), ("lab", 8), ("lab/nlp", 2), ("lab/vision", 4))
    ]
    found = group_history.lending(use, group_history.inside(groups, "lab"))
    assert found.beyond == {"lab/nlp": [-2, -1], "lab/vision": [2, 0]}
    assert found.owed == {"lab/nlp": [1.5, 1], "lab/vision": [0, 0]}
    (outermost,) = group_history.lending(use, group_history.inside(groups, "")).beyond.items()
    assert outermost == ("lab", [-2, -3])
