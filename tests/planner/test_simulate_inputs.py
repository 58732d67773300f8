"""What `corral simulate` replays besides tables: Slurm's accounting, and Corral's own history."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from corral.cli.main import main
from corral.planner.simulation.recorded import added, read_history
from corral.planner.simulation.sacct import read_sacct
from corral.planner.simulation.trace import Node, TraceError


def command(arguments: list[str]) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


SACCT = """JobID|JobName|User|Submit|Start|Elapsed|State|AllocTRES
101|train|ann|2026-11-01T00:00:10|2026-11-01T00:01:00|1-02:03:04|COMPLETED|billing=8,cpu=8,gres/gpu:a100=4,gres/gpu=4,mem=64G,node=1
101.batch|batch||2026-11-01T00:01:00|2026-11-01T00:01:00|1-02:03:04|COMPLETED|cpu=8,gres/gpu:a100=4,mem=64G,node=1
102_7|a|b|ann|2026-11-01T00:00:00|2026-11-01T00:00:00|00:10:00|TIMEOUT|cpu=2,gres/gpu=1,mem=512M,node=1
103|cores|bob|2026-11-01T00:00:20|2026-11-01T00:00:20|00:00:05|CANCELLED by 5|cpu=64,mem=1T,node=1
104|never|bob|2026-11-01T00:00:30|Unknown|00:00:00|PENDING|
105|mixed|bob|2026-11-01T00:00:40|2026-11-01T00:00:41|00:01:00.500|FAILED|gres/gpu:a100=2,gres/gpu:h100=1
"""


def test_slurms_accounting_is_read_without_steps_and_what_never_started(tmp_path: Path) -> None:
    path = tmp_path / "jobs.txt"
    path.write_text(SACCT)
    array, train, cores, mixed = read_sacct(path)
    assert (array.name, array.owner, array.gpus, array.models, array.submit_seconds) == ("a|b", "ann", 1, (), 0.0)
    assert (train.gpus, train.models, train.cpus_milli, train.memory_mib) == (4, ("a100",), 8000, 65536)
    assert (train.submit_seconds, train.duration_seconds) == (10.0, 93784.0)
    assert (cores.gpus, cores.cpus_milli, cores.memory_mib) == (0, 64_000, 2**20)
    assert (mixed.gpus, mixed.models, mixed.duration_seconds) == (3, (), 60.0)
    assert [job.number for job in (array, train, cores, mixed)] == [0, 1, 2, 3]


def test_jobs_without_gpus_are_left_out_where_nodes_do_not_tell_their_cores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "jobs.txt"
    path.write_text(SACCT.replace("a100", "A").replace("h100", "A"))
    assert command(["simulate", "--nodes", "1x4:A", "--requests", str(path), "--json", "--verify"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["jobs"] == 3
    assert "1 jobs without GPUs" in said.err
    (tmp_path / "nodes.csv").write_text("sn,cpu_milli,memory_mib,gpu,model\na,128000,2097152,4,A\n")
    assert command(["simulate", "--nodes", str(tmp_path / "nodes.csv"), "--requests", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["jobs"] == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("JobID|Elapsed|AllocTRES\n1|00:00:01|cpu=1\n", "lacks submit"),
        ("JobID|Submit|AllocTRES\n1|2026-11-01T00:00:00|cpu=1\n", "lacks elapsedraw"),
        ("JobID|Submit|Elapsed|AllocTRES\n1|yesterday|00:00:01|cpu=1\n", "line 2: Submit is 'yesterday'"),
        ("JobID|Submit|Elapsed|AllocTRES\n1|2026-11-01T00:00:00|soon|cpu=1\n", "line 2: elapsed time is 'soon'"),
        ("JobID|Submit|Elapsed|AllocTRES\n1|2026-11-01T00:00:00|00:01:00|gres/gpu=x\n", "line 2: gres/gpu is 'x'"),
        ("JobID|Submit|Elapsed|AllocTRES\n1|2026-11-01T00:00:00|00:01:00\n", "line 2: 3 cells"),
        ("JobID|Submit|Elapsed|AllocTRES\n1.0|2026-11-01T00:00:00|00:01:00|cpu=1\n", "no job that has started"),
    ],
)
def test_what_is_no_accounting_is_refused_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "jobs.txt"
    path.write_text(text)
    with pytest.raises(TraceError, match=says):
        read_sacct(path)


def history(path: Path, *more: str) -> Path:
    import duckdb
    from corral.processors.storage.schema import TABLES

    with duckdb.connect(str(path)) as database:
        for name in ("devices", "hosts", "leases", "lease_devices"):
            database.execute(f"CREATE TABLE {name} ({TABLES[name]})")
        for device in range(2):
            database.execute(
                "INSERT INTO devices (device, host, index, name, present) "
                f"VALUES ('d{device}', 'a', {device}, 'NVIDIA H100', true)"
            )
        database.execute("INSERT INTO hosts (host, cpus, memory_bytes) VALUES ('a', 16, 68719476736)")
        for number, (start, end, gpus) in enumerate([(0, 100, 2), (10, 60, 1), (-9 * 86400, 50, 1)]):
            database.execute(
                "INSERT INTO leases (lease_id, owner, name, state, granted_at, ended_at) "
                f"VALUES ('l{number}', 'ann', 'train', 'released', to_timestamp({1.7e9 + start}), "
                f"to_timestamp({1.7e9 + end}))"
            )
            for index in range(gpus):
                database.execute(
                    "INSERT INTO lease_devices VALUES "
                    f"('l{number}', 'a', 'd{index}', {index}, 'NVIDIA H100', 0, 1.0, 2.0, 1048576, 0, NULL, NULL)"
                )
        for statement in more:
            database.execute(statement)
    return path


def test_a_weeks_leases_are_replayed_on_the_fleets_devices_and_on_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = history(tmp_path / "corral.duckdb")
    nodes, jobs = read_history(path, 7 * 86400.0)
    assert nodes == [Node("a", 16_000, 65_536, 2, "NVIDIA H100")]
    assert [(job.gpus, job.submit_seconds, job.duration_seconds, job.cpus_milli) for job in jobs] == [
        (2, 0.0, 100.0, 4000),
        (1, 10.0, 50.0, 2000),
    ]
    asked = ["simulate", "--history", str(path), "--since", "7d", "--json", "--start-cost", "0s", "--verify"]
    assert command(asked) == 0
    assert json.loads(capsys.readouterr().out)["wait_mean"] == 45.0
    assert command([*asked, "--add", "1xH100"]) == 0
    assert json.loads(capsys.readouterr().out)["wait_mean"] == 0.0


def test_what_requests_asked_counts_where_the_history_has_it(tmp_path: Path) -> None:
    path = history(
        tmp_path / "corral.duckdb",
        "CREATE TABLE requests (lease_id VARCHAR, asked_at TIMESTAMPTZ, priority INTEGER, expected_seconds DOUBLE)",
        "INSERT INTO requests VALUES ('l1', to_timestamp(1.7e9 - 40), 7, 33)",
    )
    _, jobs = read_history(path, 7 * 86400.0)
    assert [(job.submit_seconds, job.priority, job.expected_seconds) for job in jobs] == [
        (0.0, 7, 33.0),
        (40.0, 0, None),
    ]


def test_what_is_no_history_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.duckdb").write_text("no database")
    for path, says in ((tmp_path / "none.duckdb", "no such file"), (tmp_path / "text.duckdb", "text.duckdb")):
        with pytest.raises(TraceError, match=says):
            read_history(path, 1.0)


def test_added_devices_are_like_those_of_their_model() -> None:
    like = Node("a", 16_000, 65_536, 4, "NVIDIA H100 80GB")
    assert added("6xH100", [like], 1) == [
        Node("added-1-1", 16_000, 65_536, 4, "NVIDIA H100 80GB"),
        Node("added-1-2", 8_000, 32_768, 2, "NVIDIA H100 80GB"),
    ]
    assert added("1xB300", [like], 2)[0].model == "B300"
    with pytest.raises(TraceError, match="8xH100"):
        added("H100", [like], 1)
