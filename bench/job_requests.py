"""Requests of the benchmarks of jobs, and what they ask the kernel of processes."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from corral.schemas import subjects
from nats.aio.client import Client


async def ask(nc: Client, verb: str, body: dict[str, Any]) -> dict[str, Any]:
    """A request to the planner, and its answer."""
    reply = await nc.request(f"{subjects.PLAN}.{verb}", json.dumps(body).encode(), timeout=30)
    answer: dict[str, Any] = json.loads(reply.data)
    if answer["type"] == "error":
        raise RuntimeError(answer["message"])
    return answer


async def submit(nc: Client, **fields: Any) -> str:
    """Submit a job, and return its id."""
    return (await ask(nc, "submit", {"request": {"owner": "bench", "gpus": 1}, "command": ["true"], **fields}))[
        "job_id"
    ]


async def until_ended(nc: Client, job_id: str) -> None:
    """Wait until a job has ended.

    Raises:
        RuntimeError: it has not ended as it should.
    """
    while (state := (await ask(nc, "jobs", {"job_ids": [job_id]}))["jobs"][0]["job"]["state"]) != "done":
        if state in ("failed", "cancelled", "preempted", "lost"):
            raise RuntimeError(f"job {job_id} is {state}")
        await asyncio.sleep(0.02)


def memory_of(pid: int) -> float:
    """Resident memory of a process in MiB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) / 1024


def cpu_seconds_of(pid: int, *, children: bool = False) -> float:
    """CPU time of a process, or that of its children that have ended, with theirs."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    first = 13 if children else 11
    return (int(fields[first]) + int(fields[first + 1])) / os.sysconf("SC_CLK_TCK")


def children_of(pid: int) -> list[int]:
    """Process ids of the children of a process of one thread."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
