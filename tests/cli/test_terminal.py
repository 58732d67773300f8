"""Output on a terminal and in a pipe: colors, and progress of long operations."""

import os
import pty
import re
import subprocess
from pathlib import Path

from support.local_cluster import CORRAL, LocalCluster, environment

ESCAPE = "\x1b["


def on_terminal(cluster: LocalCluster, *arguments: str, **values: str) -> str:
    """What a command prints where stdout and stderr are a terminal; it must end well."""
    main, terminal = pty.openpty()
    child = subprocess.Popen(
        [*CORRAL, *arguments],
        env=environment(CORRAL_NATS_URL=cluster.url, TERM="xterm-256color", COLUMNS="120", LINES="40", **values),
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    printed = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # Linux says so where the other end is closed
            break
        if not piece:
            break
        printed += piece
    os.close(main)
    assert child.wait(60) == 0, printed
    return printed.decode()


def test_colors_are_for_terminals_that_want_them(cluster: LocalCluster) -> None:
    assert "\x1b[3" in on_terminal(cluster, "devices")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", on_terminal(cluster, "devices", NO_COLOR="1"))
    assert ESCAPE not in cluster.corral("devices").stdout


def test_the_copy_of_a_history_shows_how_far_it_is(cluster: LocalCluster, tmp_path: Path) -> None:
    assert "copying" in on_terminal(cluster, "snapshot", str(tmp_path / "a.duckdb"))
    done = cluster.corral("snapshot", str(tmp_path / "b.duckdb"))
    assert done.returncode == 0
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "b.duckdb").stat().st_size > 0


def test_a_simulation_shows_how_far_it_is(cluster: LocalCluster, tmp_path: Path) -> None:
    nodes, requests = tmp_path / "nodes.csv", tmp_path / "requests.csv"
    nodes.write_text("sn,cpu_milli,memory_mib,gpu,model\nn1,64000,262144,8,T4\n")
    requests.write_text(
        "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec\n"
        + "".join(f"r{number},1000,1024,1,250,\n" for number in range(40))
    )
    arguments = ("simulate", "--nodes", str(nodes), "--requests", str(requests))
    assert "40/40" in on_terminal(cluster, *arguments)
    done = cluster.corral(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
