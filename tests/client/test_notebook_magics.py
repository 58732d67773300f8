"""`%load_ext corral` and `%%gpu` in a real IPython, as a person starts it, on a real cluster."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.local_cluster import LocalCluster, environment, wait_for

pytest.importorskip("IPython")
START = """
import os
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_line_magic("load_ext", "corral")
def cell(text):
    return shell.run_cell(text).success
"""


def python(cluster: LocalCluster, text: str, tmp_path: Path) -> subprocess.Popen[str]:
    script = tmp_path / "notebook.py"
    script.write_text(START + text)
    values = environment(
        CORRAL_NATS_URL=cluster.url, CORRAL_OWNER="nb", CORRAL_HOST="sim-0001", IPYTHONDIR=str(tmp_path), NO_COLOR="1"
    )
    return subprocess.Popen(
        [sys.executable, "-u", str(script)], env=values, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def leases(cluster: LocalCluster) -> list[str]:
    return [found["lease_id"] for found in cluster.json("leases")["leases"] if found["owner"] == "nb"]


def test_a_cell_runs_under_a_lease_that_ends_with_it(cluster: LocalCluster, tmp_path: Path) -> None:
    text = r"""
os.environ["CUDA_VISIBLE_DEVICES"] = "before"
assert cell("%%gpu 2x1GiB --name cell\nseen = os.environ['CUDA_VISIBLE_DEVICES'], os.environ['CORRAL_LEASE']\n6 * 7")
visible, lease = shell.user_ns["seen"]
assert len(visible.split(",")) == 2, visible
assert shell.user_ns["_"] == 42
assert os.environ["CUDA_VISIBLE_DEVICES"] == "before" and "CORRAL_LEASE" not in os.environ
# An error ends it, is shown once, and counts as the cell's own.
assert not cell("%%gpu\nraise LookupError('no such thing')")
assert os.environ["CUDA_VISIBLE_DEVICES"] == "before"
assert cell("%%gpu --share 0.25 --quiet\npass")
assert not cell("%%gpu 2 cats\npass")
assert not cell("%%gpu 100\nprint('never')")
assert cell("%%gpu 1 --model MODEL --quiet\npass")
assert not cell("%%gpu 1 --model H9000\nprint('never')")
assert not cell("%%gpu 2x20\nprint('never')")
assert not cell("%%gpu 1 --wait soon\nprint('never')")
os.environ["CORRAL_HOST"] = "laptop"
assert not cell("%%gpu\nprint('never')")
print("LEASE", lease)
"""
    # A part of a name is a model, as on the command line.
    model = cluster.json("devices", "--host", "sim-0001")["devices"][0]["model"].split()[-1]
    text = text.replace("MODEL", model).replace("os.environ['", "__import__('os').environ['")
    process = python(cluster, text, tmp_path)
    said, _ = process.communicate(timeout=100)
    said = re.sub(r"\x1b\[[\d;]*m", "", said)
    assert process.returncode == 0, said
    assert said.count("LookupError: no such thing") == 1
    assert "never" not in said
    assert "say 2x20GiB" in said
    assert "%%gpu: --wait: 'soon' is no duration" in said
    assert "this kernel runs on laptop, which has no devices in the fleet" in said
    lease = said.rpartition("LEASE ")[2].strip()
    assert f"lease {lease}: sim-0001/" in said
    assert leases(cluster) == []


def test_an_interrupt_releases_the_lease(cluster: LocalCluster, tmp_path: Path) -> None:
    text = r"""
assert not cell("%%gpu 1 --quiet\nimport time\nprint('ready', flush=True)\ntime.sleep(60)")
assert "CORRAL_LEASE" not in os.environ
print("goes on")
"""
    process = python(cluster, text, tmp_path)
    stuck = threading.Timer(90, process.kill)
    stuck.start()
    try:
        assert process.stdout is not None
        assert next(line for line in process.stdout if "ready" in line)
        assert len(leases(cluster)) == 1
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
    finally:
        stuck.cancel()
        process.wait(10)
    assert process.returncode == 0, said
    assert "KeyboardInterrupt" in said
    assert "goes on" in said
    wait_for(lambda: leases(cluster) == [])
