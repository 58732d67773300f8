"""Replaying traces: what is placed fits, what is dropped had no place, by sums that know nothing of the planner."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from corral.cli.main import main
from corral.planner.placement.policies import POLICIES, make
from corral.planner.simulation.audit import AuditError, audit
from corral.planner.simulation.bound import upper_bound
from corral.planner.simulation.simulate import Simulation, simulate, write_placements
from corral.planner.simulation.trace import Arrival, Node, profile_of, read_arrivals, read_nodes
from hypothesis import given, settings
from hypothesis import strategies as st

NODES = ("sn", "cpu_milli", "memory_mib", "gpu", "model")
REQUESTS = ("name", "cpu_milli", "memory_mib", "num_gpu", "gpu_milli", "gpu_spec")
PLACEMENTS = ("name", "node", "gpu_indices")


def table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def trace(folder: Path, nodes: Sequence[Node], arrivals: Sequence[Arrival]) -> tuple[Path, Path]:
    hosts = [(n.name, n.cpus_milli, n.memory_mib, n.gpus, n.model) for n in nodes]
    asked = [
        (a.name, a.cpus_milli, a.memory_mib, a.gpus, a.share_milli if a.gpus == 1 else "", "|".join(a.models))
        for a in arrivals
    ]
    return table(folder / "nodes.csv", NODES, hosts), table(folder / "requests.csv", REQUESTS, asked)


# Names of models that would match each other as globs, and cores that are no whole ones.
models = st.sampled_from(["A1", "A[1]", "A*"])
nodes = st.lists(
    st.tuples(st.sampled_from([0, 500, 4000, 8250]), st.sampled_from([0, 1024, 8192]), st.integers(0, 4), models),
    min_size=1,
    max_size=5,
).map(lambda rows: [Node(f"n{at}", *row) for at, row in enumerate(rows)])
arrivals = st.lists(
    st.tuples(
        st.sampled_from([0, 100, 333, 1000, 3000]),
        st.sampled_from([0, 1, 600, 2048]),
        st.sampled_from([0, 1, 1, 1, 2, 4]),
        st.sampled_from([1, 190, 333, 500, 810, 1000]),
        st.lists(models, max_size=2, unique=True),
    ),
    min_size=1,
    max_size=30,
).map(
    lambda rows: [
        Arrival(
            f"r{at}",
            cpus,
            memory,
            gpus,
            (share if gpus == 1 else 1000) if gpus else 0,
            tuple(sorted(names if gpus else ())),
        )
        for at, (cpus, memory, gpus, share, names) in enumerate(rows)
    ]
)


def audited(hosts: Sequence[Node], asked: Sequence[Arrival], result: Simulation) -> None:
    with tempfile.TemporaryDirectory() as folder:
        n, r = trace(Path(folder), hosts, asked)
        out = Path(folder, "placements.csv")
        write_placements(out, result.placements)
        found = audit(n, r, out)
        assert read_nodes(n) == hosts
        assert read_arrivals(r) == asked
    assert (found.placed, found.allocated_milli) == (result.placed, result.allocated_milli)
    assert found.capacity_milli == result.capacity_milli


@settings(deadline=None, max_examples=60)
@given(nodes, arrivals, st.sampled_from(sorted(POLICIES)), st.booleans())
def test_what_is_placed_fits_and_what_is_dropped_had_no_place_and_no_bound_is_exceeded(
    hosts: list[Node], asked: list[Arrival], policy: str, known: bool
) -> None:
    result = simulate(hosts, asked, make(policy, profile=profile_of(asked) if known else None))
    assert sum(result.reasons.values()) == len(asked) - result.placed
    audited(hosts, asked, result)
    bound = upper_bound(hosts, asked)
    assert result.allocated_percent <= bound.percent + 1e-6 <= bound.fluid_percent + 2e-6


def test_the_bound_counts_fillings_and_what_may_not_be_declined() -> None:
    host = [Node("n", 64_000, 64_000, 10, "A1")]
    thirds = [Arrival(f"r{at}", 0, 0, 1, 340, ()) for at in range(40)]
    assert upper_bound(host, thirds).percent == pytest.approx(68.0)  # two to a device
    # Whole devices would fill all of the fleet, but the shares come first and may not be declined.
    shares = [Arrival(f"s{at}", 1000, 10, 1, 810, ()) for at in range(30)]
    whole = [Arrival(f"w{at}", 1000, 10, 1, 1000, ()) for at in range(10)]
    bound = upper_bound(host, shares + whole)
    assert bound.fluid_percent == pytest.approx(100.0)
    assert bound.percent == pytest.approx(81.0)


@pytest.mark.parametrize(
    ("placements", "said"),
    [
        ([("a", "n0", "0"), ("b", "n0", "1")], "right"),
        ([("a", "n0", "0"), ("b", "", "")], "n0 could hold it"),
        ([("a", "n0", "0"), ("b", "n0", "0")], "less than 500 milli free"),
        ([("a", "n1", "0"), ("b", "n0", "0")], "may not use B"),
        ([("a", "n0", "0;1"), ("b", "n0", "1")], "asks for 1"),
        ([("a", "n0", "2"), ("b", "n0", "1")], "device 2"),
        ([("a", "n9", "0"), ("b", "n0", "1")], "no node n9"),
        ([("b", "n0", "0"), ("a", "n0", "1")], "is of b"),
        ([("a", "n0", "0")], "2 requests, but 1"),
    ],
)
def test_the_check_finds_what_is_wrong(tmp_path: Path, placements: list[tuple[str, str, str]], said: str) -> None:
    hosts = [Node("n0", 4000, 100, 2, "A"), Node("n1", 4000, 100, 1, "B")]
    n, r = trace(tmp_path, hosts, [Arrival("a", 2000, 10, 1, 600, ("A",)), Arrival("b", 2000, 10, 1, 500, ("A",))])
    out = table(tmp_path / "p.csv", PLACEMENTS, placements)
    if said == "right":
        assert audit(n, r, out).allocated_milli == 1100
    else:
        with pytest.raises(AuditError, match=said):
            audit(n, r, out)


def test_the_command_replays_checks_and_reports(tmp_path: Path) -> None:
    n = table(tmp_path / "n.csv", NODES, [("b", 8000, 4096, 2, "A100"), ("a", 8000, 4096, 2, "T4")])
    rows = [
        ("one", 1000, 10, 1, 500, ""),
        ("two", 1000, 10, 2, "", "T4|V100"),
        ("cores", "6000.0", 10, 0, "", ""),
        ("nothing", 0, 0, 0, "", ""),
        ("never", 1000, 10, 1, 1000, "V100"),
        ("late", 1000, 10, 2, "", ""),
    ]
    r = table(tmp_path / "r.csv", REQUESTS, rows)
    out = tmp_path / "p.csv"
    arguments = ["simulate", "--nodes", n, "--requests", r, "--profile", r, "--policy", "fragmentation", "--out", out]
    done = subprocess.run(
        [sys.executable, "-m", "corral.cli.main", *map(str, arguments), "--verify", "--bound", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout)
    assert (report["gpus"], report["placed"], report["dropped"]) == (4, 4, 2)
    assert report["reasons"] == {"host_devices": 1, "impossible": 1}
    assert report["allocated_percent"] == 62.5
    assert report["verified"] is True
    assert report["bound_percent"] >= 62.5
    lines = out.read_text().splitlines()
    assert lines[0] == "name,node,gpu_indices"
    assert lines[2] == "two,a,0;1"
    assert lines[4:] == ["nothing,a,", "never,,", "late,,"]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("nodes_text", "requests_text", "arguments", "said"),
    [
        ("", None, [], "nodes.csv is empty"),
        ("sn,cpu_milli\nn,1\n", None, [], "no column gpu (or gpus, num_gpu"),
        ("sn,cpu_milli\nn,1\n", None, [], "names sn, cpu_milli"),
        (None, "name,gpu_milli\nr,500\n", [], "no column num_gpu (or num_gpus, gpu"),
        (None, "name,cpus,num_gpu\nr,many,1\n", [], "cpu_milli is 'many'"),
        ("sn,cpu_milli,memory_mib,gpu,model\n", None, [], "has no rows"),
        ("sn,cpu_milli,memory_mib,gpu,model\nn,1,1,1,A\nn,1,1,1,A\n", None, [], "'n' is there twice"),
        ("sn,cpu_milli,memory_mib,gpu,model\nn,many,1,1,A\n", None, [], "line 2: cpu_milli is 'many'"),
        ("sn,cpu_milli,memory_mib,gpu,model\nn,-1,1,1,A\n", None, [], "cpu_milli is -1"),
        ("sn,cpu_milli,memory_mib,gpu,model\nn,nan,1,1,A\n", None, [], "cpu_milli is 'nan'"),
        (None, "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec\nr,1,1,1,0,\n", [], "gpu_milli is 0"),
        (None, "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec\nr,1,1,0.5,0,\n", [], "num_gpu is '0.5'"),
        (None, None, ["--policy", "nope"], "'nope' is not known"),
        (None, None, ["--profile", "missing.csv"], "missing.csv can't be read"),
        (None, None, ["--out", "missing/p.csv"], "can't be written"),
        (None, None, ["--out", "nodes.csv"], "would overwrite"),
    ],
)
def test_bad_tables_and_options_are_refused_with_what_to_do(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    nodes_text: str | None,
    requests_text: str | None,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    n, r = trace(tmp_path, [Node("n", 4000, 100, 1, "A")], [Arrival("r", 1, 1, 1, 500, ())])
    if nodes_text is not None:
        n.write_text(nodes_text)
    if requests_text is not None:
        r.write_text(requests_text)
    before = n.read_text()
    with pytest.raises(SystemExit) as ended:
        main(["simulate", "--nodes", "nodes.csv", "--requests", "requests.csv", *arguments])
    assert ended.value.code == 2
    words = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert said in words
    assert n.read_text() == before


OPTIONAL = ("name", "cpu_milli", "memory_mib", "gpu_milli", "gpu_spec")


@pytest.mark.parametrize("left_out", [OPTIONAL, *((one,) for one in OPTIONAL)])
@pytest.mark.parametrize("empty", [True, False])
def test_what_a_table_does_not_say_is_not_asked_for(tmp_path: Path, left_out: tuple[str, ...], empty: bool) -> None:
    """A column that is missing, and one whose cells are empty, are alike; the rest is read as ever."""
    whole = Arrival("r", 500, 100, 1, 500, ("A",))
    values = dict(zip(REQUESTS, ("r", 500, 100, 1, 500, "A"), strict=True))
    kept = [name for name in REQUESTS if empty or name not in left_out]
    row = ["" if name in left_out else values[name] for name in kept]
    [read] = read_arrivals(table(tmp_path / "r.csv", [*kept, "qos"], [[*row, "best effort"]]))
    assert read == Arrival(
        name=whole.name if "name" not in left_out else ("" if empty else "1"),
        cpus_milli=0 if "cpu_milli" in left_out else 500,
        memory_mib=0 if "memory_mib" in left_out else 100,
        gpus=1,
        share_milli=1000 if "gpu_milli" in left_out else 500,
        models=() if "gpu_spec" in left_out else ("A",),
    )


def test_tables_of_one_column_each_are_replayed_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "nodes.csv", ["GPUs"], [[4], [2]])
    table(
        tmp_path / "requests.csv", ["num_gpus", "cpus", "memory_gib"], [[4, 1.5, 2], [1, "", ""], [2, 1, 1], [0, 4, 8]]
    )
    with pytest.raises(SystemExit) as ended:
        main(["simulate", "--nodes", "nodes.csv", "--requests", "requests.csv", "--verify", "--json", "--out", "p.csv"])
    assert ended.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["gpus"], report["placed"], report["dropped"], report["verified"]) == (6, 3, 1, True)
    assert Path("p.csv").read_text().splitlines()[1].startswith("1,node-1,")
    [asked, *_] = read_arrivals(tmp_path / "requests.csv")
    assert (asked.cpus_milli, asked.memory_mib) == (1500, 2048)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "policy", "least"), [("default", "fragmentation", 95.1), ("gpuspec33", "opportunity", 96.0)]
)
def test_a_production_trace_is_placed_as_well_as_published(
    tmp_path: Path, shared_data: Path, name: str, policy: str, least: float
) -> None:
    folder = shared_data / "openb"
    n, pods, out = folder / "openb_node_list_gpu_node.csv", folder / f"openb_pod_list_{name}.csv", tmp_path / "r.csv"
    subprocess.run([sys.executable, folder / "arrivals.py", pods, n, "42", out], check=True, capture_output=True)
    result = simulate(read_nodes(n), read_arrivals(out), make(policy, profile=profile_of(read_arrivals(pods))))
    placements = tmp_path / "p.csv"
    write_placements(placements, result.placements)
    found = audit(n, out, placements)
    assert 100 * found.allocated_milli / found.capacity_milli >= least
