"""Leases to begin with."""

from __future__ import annotations

from datetime import UTC, datetime

from corral.planner.leases import lifecycle
from corral.planner.leases.lifecycle import LeaseRecord
from corral.schemas.requests import Grant, WorkRequest

START = datetime(2026, 1, 1, tzinfo=UTC)


def granted(lease_id: str = "l1", ttl: float = 100.0, host: str = "a", now: datetime = START) -> LeaseRecord:
    return lifecycle.grant(
        WorkRequest(owner="me", ttl_seconds=ttl, request_id=f"r-{lease_id}"),
        [Grant(host=host, device="GPU-1")],
        lease_id=lease_id,
        now=now,
        digest="d",
        planner="p",
        environment={host: {"CORRAL_LEASE": lease_id}},
        service_seconds=0.0,
    )
