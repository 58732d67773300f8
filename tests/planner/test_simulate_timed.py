"""Replaying jobs in time: each runs once, in full, on devices that nobody else has; and the line's promises hold."""

from __future__ import annotations

import csv
import json
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from corral.cli.main import main
from corral.planner.placement.policies import make
from corral.planner.queue.line import Line
from corral.planner.queue.order import RULES, fifo
from corral.planner.simulation.jobs import Job, read_jobs
from corral.planner.simulation.measures import jain, measure
from corral.planner.simulation.preemptive import replay_preemptive
from corral.planner.simulation.tables import write_jobs, write_nodes, write_runs
from corral.planner.simulation.timed import Guessed, Known, Learned, Replay, replay
from corral.planner.simulation.timed_audit import TimedAuditError, audit_runs
from corral.planner.simulation.trace import Node, read_nodes
from hypothesis import given, settings
from hypothesis import strategies as st

nodes = st.lists(
    st.tuples(
        st.sampled_from([4_000, 16_000, 10**9]),
        st.sampled_from([1024, 10**9]),
        st.sampled_from([1, 2, 4, 4, 8]),
        st.sampled_from(["A", "B"]),
        st.sampled_from(["r1", "r1", "r2", ""]),
    ),
    min_size=1,
    max_size=4,
).map(lambda rows: [Node(f"n{at}", *row) for at, row in enumerate(rows)])


def job(number: int, submit: float, duration: float, gpus: int, **more: object) -> Job:
    share = 1000 if gpus else 0
    return Job(
        number=number,
        name=f"j{number}",
        submit_seconds=submit,
        duration_seconds=duration,
        gpus=gpus,
        **{"share_milli": share, **more},
    )


@st.composite
def traces(draw: st.DrawFn) -> list[Job]:
    found: list[Job] = []
    at = 0.0
    for number in range(draw(st.integers(1, 30))):
        at += draw(st.sampled_from([0.0, 0.0, 1.0, 7.5, 60.0]))
        gpus = draw(st.sampled_from([0, 1, 1, 1, 2, 3, 4, 8, 12]))
        found.append(
            job(
                number,
                at,
                draw(st.sampled_from([0.0, 5.0, 33.3, 120.0, 1000.0])),
                gpus,
                share_milli=draw(st.sampled_from([300, 500, 1000])) if gpus == 1 else 1000 if gpus else 0,
                cpus_milli=draw(st.sampled_from([0, 500, 3000])),
                memory_mib=draw(st.sampled_from([0, 100])),
                models=draw(st.sampled_from([(), ("A",), ("A", "B")])) if gpus else (),
                owner=draw(st.sampled_from(["p", "q"])),
                priority=draw(st.sampled_from([0, 0, 3])),
                within=draw(st.sampled_from(["", "rack"])),
            )
        )
    return found


def audited(hosts: Sequence[Node], jobs: Sequence[Job], found: Replay, cost: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tables = [Path(folder, name) for name in ("nodes.csv", "jobs.csv", "runs.csv")]
        write_nodes(tables[0], hosts)
        write_jobs(tables[1], jobs)
        write_runs(tables[2], found)
        assert read_nodes(tables[0]) == hosts
        assert read_jobs(tables[1]) == jobs
        outcome = audit_runs(*tables, cost)
    assert (outcome.jobs, outcome.ran) == (len(jobs), len(found.runs))
    assert outcome.jct_mean == pytest.approx(measure(found).jct_mean)


@settings(deadline=None, max_examples=35)
@given(
    nodes,
    traces(),
    st.sampled_from(sorted(RULES)),
    st.sampled_from(["known", "guess", "learn"]),
    st.sampled_from([0.0, 10.0]),
)
def test_runs_stand_the_audit(hosts: list[Node], jobs: list[Job], rule: str, knows: str, cost: float) -> None:
    knowledge = {"known": Known(), "guess": Guessed(1.0, 1), "learn": Learned()}[knows]
    found = replay(hosts, jobs, RULES[rule], make("best-fit"), start_cost_seconds=cost, knowledge=knowledge)
    assert len(found.runs) + len(found.impossible) == len(jobs)
    audited(hosts, jobs, found, cost)


@settings(deadline=None, max_examples=35)
@given(nodes, traces(), st.sampled_from([(), (30.0,), (20.0, 200.0)]), st.sampled_from([0.0, 10.0]))
def test_preempted_runs_stand_the_audit(
    hosts: list[Node], jobs: list[Job], levels: tuple[float, ...], cost: float
) -> None:
    found = replay_preemptive(hosts, jobs, make("best-fit"), levels=levels, start_cost_seconds=cost)
    assert len(found.runs) + len(found.impossible) == len(jobs)
    audited(hosts, jobs, found, cost)


def test_work_that_has_had_less_takes_the_devices_of_what_has_had_most() -> None:
    hosts = [Node("a", 10**9, 10**9, 2, "A"), Node("b", 10**9, 10**9, 2, "A")]
    jobs = [
        job(0, 0.0, 400.0, 2),  # in the second level from 60 on: 100 device seconds, after the cost of the start
        job(1, 30.0, 400.0, 2),  # likewise from 90 on
        job(2, 200.0, 40.0, 1),  # of the two, the later one in the order gives way
        job(3, 210.0, 40.0, 1),  # beside
        job(4, 300.0, 20.0, 4),  # both do
    ]
    found = replay_preemptive(hosts, jobs, make("pack"), levels=(100.0,))
    when = [[(each.started_at, each.ended_at) for each in run.intervals] for run in found.runs]
    assert when == [
        [(0.0, 300.0), (330.0, 450.0)],
        [(30.0, 200.0), (260.0, 300.0), (330.0, 550.0)],
        [(200.0, 250.0)],
        [(210.0, 260.0)],
        [(300.0, 330.0)],
    ]
    measured = measure(found)
    assert measured.preemptions == 3
    assert measured.wait_mean == pytest.approx((30 + 60 + 30) / 5)


@settings(deadline=None, max_examples=30)
@given(nodes, traces())
def test_a_reservation_is_never_delayed_by_who_passes_with_a_right_estimate(hosts: list[Node], jobs: list[Job]) -> None:
    jobs = [job(each.number, each.submit_seconds, each.duration_seconds, each.gpus) for each in jobs]
    promised: dict[int, float] = {}

    def on_turn(line: Line, now: float) -> None:
        # Of what is promised to the first in line; another's reservation yields to that.
        for held in line.held[:1]:
            promised.setdefault(held.entry.payload.number, held.starts_at)

    found = replay(hosts, jobs, fifo, make("best-fit"), on_turn=on_turn)
    started = {run.job.number: run.started_at for run in found.runs}
    assert all(started[number] <= at + 1e-6 for number, at in promised.items())


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 60.0]), st.sampled_from([1, 4]), st.sampled_from([100.0, 900.0, 5000.0, 9000.0])
        ),
        min_size=4,
        max_size=30,
    ),
    st.sampled_from(["shortest", "fair"]),
    st.randoms(use_true_random=False),
)
def test_permuting_equal_requests_changes_nothing(
    asked: list[tuple[float, int, float]], rule: str, draw: random.Random
) -> None:
    def outcome(order: list[tuple[float, int, float]]) -> Counter[object]:
        jobs = [job(number, submit, length, gpus) for number, (submit, gpus, length) in enumerate(order)]
        found = replay([Node("n", 10**9, 10**9, 4, "A")], jobs, RULES[rule], make("best-fit"))
        return Counter(
            (run.job.submit_seconds, run.job.gpus, run.job.duration_seconds, run.started_at) for run in found.runs
        )

    assert outcome(asked) == outcome(draw.sample(asked, len(asked)))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda rows: rows[:-1], "never ran"),
        (lambda rows: [*rows, rows[0]], "belongs to no job"),
        (lambda rows: [[*rows[0][:4], "99.0"], *rows[1:]], "ran 89.000 s"),
        (lambda rows: [rows[0], [*rows[1][:2], rows[0][2], *rows[1][3:]], *rows[2:]], "taken twice"),
        (lambda rows: [*rows[:1], [*rows[1][:3], "-1.0", "59.0"], *rows[2:]], "before"),
        (lambda rows: [*rows[:2], [*rows[2][:2], "0", *rows[2][3:]], *rows[3:]], "asks for 4"),
    ],
)
def test_the_audit_finds_what_is_wrong(tmp_path: Path, wrong, says: str) -> None:
    hosts = [Node("a", 10**9, 10**9, 2, "A"), Node("b", 10**9, 10**9, 2, "A")]
    jobs = [job(0, 0.0, 100.0, 1), job(1, 0.0, 50.0, 1), job(2, 1.0, 10.0, 4), job(3, 2.0, 10.0, 2)]
    tables = [tmp_path / name for name in ("nodes.csv", "jobs.csv", "runs.csv")]
    write_nodes(tables[0], hosts)
    write_jobs(tables[1], jobs)
    write_runs(tables[2], replay(hosts, jobs, fifo, make("pack")))
    audit_runs(*tables)
    header, *rows = csv.reader(tables[2].open())
    with tables[2].open("w", newline="") as file:
        csv.writer(file).writerows([header, *wrong(rows)])
    with pytest.raises(TimedAuditError, match=says):
        audit_runs(*tables)


def test_the_audit_wants_the_cost_of_each_start(tmp_path: Path) -> None:
    jobs = [job(0, 0.0, 100.0, 1), job(1, 50.0, 20.0, 1)]
    hosts = [Node("a", 10**9, 10**9, 1, "A")]
    found = replay_preemptive(hosts, jobs, make("pack"), levels=(30.0,))
    tables = [tmp_path / name for name in ("nodes.csv", "jobs.csv", "runs.csv")]
    write_nodes(tables[0], hosts)
    write_jobs(tables[1], jobs)
    write_runs(tables[2], found)
    assert tables[2].read_text().splitlines()[1:] == ["j0,a,0,0.0,50.0", "j0,a,0,80.0,150.0", "j1,a,0,50.0,80.0"]
    assert audit_runs(*tables).jct_mean == 90.0
    tables[2].write_text(tables[2].read_text().replace("80.0,150.0", "80.0,140.0"))
    with pytest.raises(TimedAuditError, match="ran 90"):
        audit_runs(*tables)


def test_more_devices_than_a_node_has_take_whole_nodes() -> None:
    hosts = [Node("a", 10**9, 10**9, 4, "A"), Node("b", 10**9, 10**9, 4, "A"), Node("c", 10**9, 10**9, 2, "A")]
    found = replay(hosts, [job(0, 0.0, 50.0, 6), job(1, 1.0, 10.0, 1), job(2, 1.0, 10.0, 4)], fifo, make("pack"))
    both, small, four = found.runs
    assert [(segment.node, len(segment.gpu_indices)) for segment in both.segments] == [("a", 4), ("b", 2)]
    assert (small.segments[0].node, small.started_at) == ("c", 1.0)  # beside
    assert four.started_at == both.ended_at == 60.0


def test_several_nodes_of_a_job_are_of_one_rack() -> None:
    hosts = [Node(f"n{at}", 10**9, 10**9, 4, "A", rack) for at, rack in enumerate(("r1", "r2", "r1", "r2", ""))]
    first = [job(0, 0.0, 100.0, 4), job(1, 0.0, 50.0, 4)]
    both = [job(2, 1.0, 10.0, 8, within="rack"), job(3, 1.0, 10.0, 8), job(4, 2.0, 10.0, 12, within="rack")]
    found = replay(hosts, [*first, *both], fifo, make("best-fit"))
    taken = {run.job.number: sorted(segment.node for segment in run.segments) for run in found.runs}
    assert taken[0] == ["n0"]
    assert taken[1] == ["n1"]
    assert (taken[2], taken[3]) == (["n1", "n3"], ["n2", "n4"])
    assert [job.number for job in found.impossible] == [4]


def test_measures_are_those_of_the_papers() -> None:
    hosts = [Node("a", 10**9, 10**9, 1, "A")]
    jobs = [job(0, 0.0, 90.0, 1, owner="p"), job(1, 0.0, 40.0, 1, owner="q")]
    found = measure(replay(hosts, jobs, fifo, make("pack"), name="fifo"))
    assert (found.jct_mean, found.wait_mean, found.makespan) == (125.0, 50.0, 150.0)
    assert (found.jct_p99, found.wait_p95, found.utilization) == (150.0, 100.0, 1.0)
    assert found.slowdown_mean == pytest.approx((100 / 90 + 150 / 40) / 2)
    assert found.jain == pytest.approx(jain([90 / 100, 40 / 150]))


def command(arguments: list[str]) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


JOBS = """name,submit_seconds,duration_seconds,num_gpu,owner
one,0,100,2,p
two,0,10,1,q
"""


def test_the_command_compares_rules_draws_them_and_writes_what_the_audit_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs.csv").write_text(JOBS)
    asked = ["simulate", "--nodes", "1x2:A", "--requests", str(tmp_path / "jobs.csv"), "--json"]
    chart, out = tmp_path / "chart.svg", tmp_path / "runs.csv"
    assert command([*asked, "--compare", "fifo,shortest", "--plot", str(chart), "--verify"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(each["rule"], each["jct_mean"], each["verified"]) for each in found] == [
        ("fifo", 120.0, True),
        ("shortest", 75.0, True),
    ]
    assert chart.read_text().count("<polyline") == 2
    assert command([*asked, "--rule", "fifo", "--out", str(out), "--start-cost", "0s", "--guess", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["makespan"] == 110.0
    assert out.read_text().splitlines()[1:] == ["one,node-1,0;1,0.0,100.0", "two,node-1,0,100.0,110.0"]
    assert command([*asked, "--rule", "attained", "--verify"]) == 0
    assert json.loads(capsys.readouterr().out)["preemptions"] == 0
    assert command([*asked, "--rule", "nosuch"]) == 2
    assert "fifo, shortest, fair" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("x,0,abc,1,p", "line 4: duration_seconds is 'abc'"),
        ("x,,1,1,p", "line 4: submit_seconds is ''"),
        ("x,0,-1,1,p", "line 4: duration_seconds is -1"),
        ("x,0,nan,1,p", "line 4: duration_seconds is nan"),
        ("x,0,1,1.5,p", "line 4: num_gpu is '1.5'"),
    ],
)
def test_a_table_with_a_wrong_value_is_refused_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, says: str
) -> None:
    (tmp_path / "jobs.csv").write_text(JOBS + line + "\n")
    assert command(["simulate", "--nodes", "1x2", "--requests", str(tmp_path / "jobs.csv")]) == 2
    assert says in capsys.readouterr().err
