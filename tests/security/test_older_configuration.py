"""A server whose configuration is of an earlier version: parts go on without what it does not permit."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from corral.bus.access.roles import Role
from corral.schemas import subjects
from support.secured_bus import SecuredBus

ADDED = re.compile(
    "|".join(
        [
            *(subjects.REQUESTS_STREAM, subjects.JOBS_STREAM, subjects.LOGS_STREAM, subjects.REPORTS_STREAM),
            *(
                re.escape(subject)
                for subject in (
                    *(
                        subjects.REQUEST_EVENTS,
                        subjects.DURATIONS,
                        subjects.JOB_EVENTS,
                        subjects.RUNS,
                        subjects.LOGS,
                        subjects.REPORTS,
                    ),
                    *(subjects.PlanSubject.SUBMIT, subjects.PlanSubject.JOB, subjects.PlanSubject.RUNNER),
                )
            ),
        ]
    )
)


def make_older(config: Path) -> None:
    """Take out of a configuration what came with the streams of requests and of jobs."""
    lines = [
        re.sub(rf'"[^"]*({ADDED.pattern})[^"]*",? ?', "", line)
        for line in config.read_text().splitlines()
        if not (line.lstrip().startswith("{ s") and ADDED.search(line))  # a service or stream of an account
    ]
    text = "\n".join(lines)
    assert not ADDED.search(text)
    config.write_text(f"{text}\n")


@pytest.mark.long
async def test_parts_go_on_without_the_streams_that_were_added(tmp_path: Path) -> None:
    secured = SecuredBus(tmp_path)
    for role, name in ((Role.PLANNER, "p"), (Role.PROCESSOR, "h"), (Role.COLLECTOR, "c"), (Role.OPERATOR, "olga")):
        secured.add(role, name, **({"hosts": ["*"]} if role is Role.COLLECTOR else {}))
    make_older(Path(secured.authority.config))
    secured.server.start()
    try:
        with (
            secured.part("h", "process", "--db", str(tmp_path / "history.duckdb")),
            secured.part("p", "plan"),
            secured.part("c", "collect", "--source", "simulated", "--hosts", "1", "--devices", "2"),
        ):
            nc = await secured.connect("olga")

            async def ask(subject: str, body: dict[str, Any]) -> dict[str, Any]:
                for _ in range(120):
                    try:
                        answer = json.loads((await nc.request(subject, json.dumps(body).encode(), timeout=2)).data)
                    except Exception:  # the parts are starting
                        answer = {"type": "error"}
                    if answer["type"] in ("assignment", "result"):
                        return answer
                    await asyncio.sleep(0.5)
                raise TimeoutError(f"no answer on {subject}: {answer}")

            lease = (await ask(f"{subjects.PlanSubject.REQUEST}.olga", {"gpus": 1, "wait_seconds": 5}))["lease"]
            for _ in range(120):
                rows = (await ask(f"{subjects.QUERY}.olga", {"sql": "SELECT lease_id FROM leases"}))["rows"]
                if rows:
                    break
                await asyncio.sleep(0.25)
            assert rows == [[lease["lease_id"]]]
            await nc.close()
    finally:
        secured.server.kill()
    assert "corral auth apply" in (tmp_path / "p.log").read_text()
    assert "corral auth apply" in (tmp_path / "h.log").read_text()
