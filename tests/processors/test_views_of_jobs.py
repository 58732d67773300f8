"""What jobs cost and what their tasks used, over samples whose answers are known by arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from corral.client.jobs import summary as job_summary
from corral.processors import views
from corral.processors.storage.embedded import rollups
from corral.processors.storage.embedded.database import Database
from corral.processors.storage.protocol import Batch
from corral.schemas.requests import WorkRequest
from corral.schemas.work.jobs import JobState
from support.empty_history import new_database
from support.job_events import JobHistory, lease_of
from support.known_samples import BASE, GIB, samples

HALF = 1800.0


def sweep() -> JobHistory:
    """Four tasks: one busy, one that hung and then was tried again, one cancelled in the queue, one that runs."""
    job = JobHistory("7", 4, WorkRequest(owner="ann", name="sweep", gpu_memory_bytes=40 * GIB, cpus=4.0), BASE)
    job.run(0, 1, (0, 0, HALF), JobState.DONE, peak_memory_bytes=3 * GIB, cpu_seconds=HALF)
    job.run(1, 1, (-60, 0, 2 * HALF), JobState.FAILED)
    job.wait_again(1, 1, 2 * HALF)
    job.run(1, 2, (2 * HALF, 2 * HALF, 2 * HALF + 300), JobState.DONE)
    job.run(3, 1, (0, 3 * HALF), JobState.RUNNING)
    return job


LEASES = (
    # Task, attempt, device, from and to in seconds; None for a lease that is active.
    (0, 1, "g0", 0.0, HALF),
    (1, 1, "g1", 0.0, 2 * HALF),
    (1, 2, "g0", 2 * HALF, 2 * HALF + 300),
    (3, 1, "g2", 3 * HALF, None),
)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    database: Database = new_database(tmp_path_factory.mktemp("jobs"))
    lonely = JobHistory("8", 1, WorkRequest(owner="ben", gpus=0), BASE)
    database.commit(Batch(stream="S", sequence=1, samples=samples(database)))
    database.commit(Batch(stream="J", sequence=1, jobs=[*sweep().events, *lonely.events]))
    cursor = database.cursor()
    for level in rollups.LEVELS:
        rollups.refresh(cursor, level, sorted(database.days))
    for index, attempt, device, since, until in LEASES:
        ended = None if until is None else BASE + timedelta(seconds=until)
        cursor.execute(
            "INSERT INTO leases BY NAME SELECT ? AS lease_id, 'ann' AS owner, ? AS state, ?::TIMESTAMPTZ AS "
            "granted_at, now() + INTERVAL 1 HOUR AS expires_at, ?::TIMESTAMPTZ AS ended_at",
            [
                lease_of("7", index, attempt),
                "released" if ended else "active",
                BASE + timedelta(seconds=since),
                ended,
            ],
        )
        cursor.execute(
            "INSERT INTO lease_devices BY NAME SELECT ? AS lease_id, 'h1' AS host, ? AS device, 1.0 AS share, "
            "40 * 2::BIGINT ** 30 AS memory_bytes",
            [lease_of("7", index, attempt), device],
        )
    yield cursor
    database.close()


def ask(cursor: Any, sql: str) -> list[dict[str, Any]]:
    result = cursor.execute(sql)
    names = [column[0] for column in result.description]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def test_each_attempt_is_compared_with_what_was_asked_for(history: Any) -> None:
    rows = {(row["task"], row["attempt"]): row for row in ask(history, "FROM job_summary")}
    assert {key: row["state"] for key, row in rows.items()} == {
        ("7_0", 1): "done", ("7_1", 1): "failed", ("7_1", 2): "done", ("7_3", 1): "running",
    }  # fmt: skip
    busy = rows["7_0", 1]
    assert {name: busy[name] for name in busy if name not in ("submitted_at", "started_at", "hosts")} == {
        "job_id": "7", "task": "7_0", "index": 0, "attempt": 1, "owner": "ann", "name": "sweep", "state": "done",
        "exit_code": 0, "signal": None, "lease_id": lease_of("7", 0, 1), "pending_seconds": 0, "seconds": HALF,
        "gpus": 1, "gpu_hours": 0.5, "energy_kwh": pytest.approx(0.15), "gpu_utilization_percent_mean": 80,
        "idle_minutes": 0, "idle_gpu_hours": 0, "longest_idle_minutes": 0, "idle_since": None,
        "gpu_memory_asked_bytes": 40 * GIB, "gpu_memory_used_bytes_peak": 20 * GIB, "memory_asked_bytes": 0,
        "memory_used_bytes_peak": 3 * GIB, "cpus_asked": 4, "cpus_used_mean": 1, "suggested_gpus": 1,
        "suggested_gpu_memory_bytes": 22 * GIB, "suggested_memory_bytes": 4 * GIB, "suggested_cpus": 1,
        "suggested_seconds": 1980,
    }  # fmt: skip
    hung = rows["7_1", 1]
    # 60 s in the queue; no minute of it was busy, so no GPU would have done.
    assert (hung["pending_seconds"], hung["exit_code"], hung["idle_minutes"], hung["suggested_gpus"]) == (60, 1, 60, 0)
    assert hung["suggested_seconds"] is None
    # Nothing is known of the device of the one that runs.
    runs = rows["7_3", 1]
    assert runs["suggested_gpus"] is None
    assert runs["longest_idle_minutes"] == 0


def test_what_a_sweep_cost_and_which_tasks_stalled_is_one_statement(history: Any) -> None:
    [found] = ask(
        history,
        "SELECT tasks, tasks_done, tasks_failed, attempts, gpu_hours - running AS gpu_hours, idle_gpu_hours, "
        "unfinished_gpu_hours, energy_kwh, stalled_indexes FROM job_costs, (SELECT gpu_hours AS running FROM "
        "job_summary WHERE task = '7_3') WHERE job_id = '7'",
    )
    five_minutes = 300 / 3600
    assert found == {
        "tasks": 4, "tasks_done": 2, "tasks_failed": 0, "attempts": 4,
        "gpu_hours": pytest.approx(1.5 + five_minutes), "idle_gpu_hours": pytest.approx(1 + five_minutes),
        "unfinished_gpu_hours": 1, "energy_kwh": pytest.approx((300 * 0.5 + 100 + 60 * five_minutes) / 1000),
        "stalled_indexes": [1],
    }  # fmt: skip
    assert ask(history, "SELECT attempts, gpu_hours, stalled FROM job_costs WHERE owner = 'ben'") == [
        {"attempts": 0, "gpu_hours": 0, "stalled": 0}
    ]


def test_a_stall_says_how_long_it_lasted(history: Any) -> None:
    rows = ask(history, "SELECT task, attempt, state, stalled_minutes, stalled_since FROM stalled_tasks")
    assert rows == [{"task": "7_1", "attempt": 1, "state": "failed", "stalled_minutes": 60, "stalled_since": None}]


def test_an_attempt_without_an_end_has_that_of_its_lease(history: Any) -> None:
    """The planner may say of a preempted task only that it waits again."""
    history.execute("BEGIN TRANSACTION")
    try:
        history.execute("UPDATE job_tasks SET state = 'running', ended_at = NULL WHERE index = 1 AND attempt = 1")
        history.execute("UPDATE leases SET state = 'evicted' WHERE lease_id = ?", [lease_of("7", 1, 1)])
        [row] = ask(history, "SELECT state, seconds FROM job_summary WHERE task = '7_1' AND attempt = 1")
        assert row == {"state": "preempted", "seconds": 2 * HALF}
    finally:
        history.execute("ROLLBACK")


def summarized(history: Any, task: str) -> job_summary.JobSummary:
    found = job_summary.summary_of(task, ask(history, job_summary.statement(task)))
    assert found is not None
    return found


def test_a_job_has_a_summary_in_words(history: Any) -> None:
    assert job_summary.lines(summarized(history, "7_0")) == [
        ("time", "30m"),
        ("in the queue", "0s"),
        ("GPUs", "0.50 GPU-hours, 80% active"),
        ("GPU memory", "20.0 GiB at most, 50% of 40.0 GiB asked for"),
        ("RAM", "3.0 GiB at most"),
        ("cores", "1.0 busy on average of 4 asked for"),
        ("energy", "0.15 kWh"),
        ("would have done", "--memory 22GiB --cpus 1"),
    ]
    hung = summarized(history, "7_1")
    assert (hung.state, hung.attempts, hung.tasks) == (JobState.DONE, 2, 1)
    words = dict(job_summary.lines(hung))
    assert words["tasks"] == "2 attempts"
    assert words["time"] == "32m (median), 60m at most, 65m in all"
    assert words["GPUs"].endswith("65 min idle (1.08 GPU-hours), 1.00 GPU-hours in attempts that were not done")
    assert "--gpus 0" in words["would have done"]
    whole = summarized(history, "7")
    assert (whole.tasks, whole.tasks_done, whole.attempts, whole.stalled_indexes) == (4, 2, 4, [1])
    words = dict(job_summary.lines(whole))
    assert words["tasks"] == "4: 2 done"
    assert words["stalled"] == "1 task: 1"
    # One that runs may still need more.
    assert "would have done" not in words
    assert summarized(history, "8").gpu_hours is None
    assert job_summary.summary_of("9", ask(history, job_summary.statement("9"))) is None
    for wrong in ("7'; --", "7_x", ""):
        with pytest.raises(ValueError, match="is no job"):
            job_summary.statement(wrong)


def test_its_documents_are_in_the_questions(history: Any) -> None:
    rows = dict(history.execute("FROM questions").fetchall())
    assert rows["job_costs"] == views.VIEWS["job_costs"].question
