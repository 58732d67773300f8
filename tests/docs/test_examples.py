"""The examples on a real cluster with authentication; examples whose tool is not installed are skipped."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from corral.schemas.metrics import METRICS
from support.local_cluster import LocalCluster, environment, wait_for

pytestmark = pytest.mark.long

EXAMPLES = Path(__file__).parents[2] / "docs/examples"
torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    cluster = LocalCluster(tmp_path_factory.mktemp("examples") / "data", authenticated=True)
    try:
        wait_for(lambda: cluster.rows("SELECT count(DISTINCT host) FROM samples") == [[2]])
        yield cluster
    finally:
        cluster.stop()


def run(cluster: LocalCluster, *command: str, folder: Path = EXAMPLES) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(CORRAL_NATS_URL=cluster.url, **cluster.credentials),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not cluster.json("leases")["leases"], "it has left a lease behind"
    return done.stdout


def told(printed: str) -> None:
    """What every client in another language shows: devices, a renewal, rows."""
    assert len(re.findall(r"^sim-000[12]:\d NVIDIA .* GPU-", printed, re.MULTILINE)) == 2, printed
    assert "renewed until 20" in printed
    assert len(re.findall(r"^sim-000[12]: [1-9]\d* samples", printed, re.MULTILINE)) == 2, printed


def test_plain_nats(cluster: LocalCluster) -> None:
    printed = run(cluster, sys.executable, "plain_nats.py")
    told(printed)
    assert re.findall(r"event: (\w+)", printed) == ["granted", "renewed", "released"]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the examples in Node, with what they need, beside the published schemas."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("Node and npm are not installed")
    docs = tmp_path_factory.mktemp("docs")
    shutil.copytree(EXAMPLES.parent / "reference/schemas", docs / "reference/schemas")
    folder = shutil.copytree(
        EXAMPLES / "node", docs / "examples/node", ignore=lambda _, names: {"node_modules"} & set(names)
    )
    installed = subprocess.run(
        ["npm", "ci", "--no-audit", "--no-fund"], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    if installed.returncode:
        pytest.skip(f"npm has no registry here: {installed.stderr[-200:]}")
    return folder


def test_the_node_client_holds_devices_renews_and_reads_the_history(cluster: LocalCluster, node: Path) -> None:
    told(run(cluster, "node", "work.mjs", folder=node))


def test_telemetry_is_decoded_by_its_published_schema_as_the_history_has_it(cluster: LocalCluster, node: Path) -> None:
    decoded = [json.loads(line) for line in run(cluster, "node", "telemetry.mjs", "6", folder=node).splitlines()]
    assert len({row["device"] for row in decoded}) == 8
    assert len({row["host"] for row in decoded}) == 2
    names = list(METRICS)
    first, last = (pick(int(row["time_ns"]) for row in decoded) for pick in (min, max))
    among = f"epoch_ns(time) BETWEEN {first - 1000} AND {last}"

    def stored() -> dict[tuple[str, int], list[Any]]:
        found = cluster.rows(f"SELECT device, epoch_us(time), {', '.join(names)} FROM samples WHERE {among}")
        return {(device, time_us): values for device, time_us, *values in found}

    keys = {(row["device"], int(row["time_ns"]) // 1000) for row in decoded}
    wait_for(lambda: keys <= stored().keys())
    history = stored()
    for row in decoded:
        kept = history[row["device"], int(row["time_ns"]) // 1000]
        for name, value in zip(names, kept, strict=True):
            sent = row.get(name)
            if sent is not None and METRICS[name].row.unit.dtype == "<f4":
                # JSON has the few digits that say the same float.
                assert value is not None
                value = struct.unpack("<f", struct.pack("<f", value))[0]
            assert (None if sent is None else type(value)(sent)) == value, (name, row)
    seen = {METRICS[name].row.unit.dtype for row in decoded for name in names if row.get(name) is not None}
    assert seen == {"<f4", "<i4", "<i8"}


@pytest.mark.skipif(not (shutil.which("nats") and shutil.which("jq")), reason="the nats command or jq is not installed")
def test_nats_cli(cluster: LocalCluster) -> None:
    told(run(cluster, "./nats_cli.sh"))


def test_torchrun_is_started_once_a_host_with_the_gpus_of_that_host(cluster: LocalCluster) -> None:
    printed = run(cluster, sys.executable, "torchrun.py", "--gpus", "6", "--start", "print", "--", "train_ddp.py")
    nodes = printed.splitlines()
    assert len(nodes) == 2
    for rank, node in enumerate(nodes):
        visible = re.search(r"CUDA_VISIBLE_DEVICES=(\S+)", node)
        assert visible is not None
        assert f"--nnodes 2 --node-rank {rank} --nproc-per-node {len(visible[1].split(','))} " in node
        assert f"--master-addr {nodes[0].split(':')[0]} " in node


@torch
def test_training_on_a_lease(cluster: LocalCluster) -> None:
    printed = run(cluster, sys.executable, "train.py", "--steps", "50", "--host", "any")
    assert "loss" in printed


@torch
def test_training_over_two_hosts(cluster: LocalCluster) -> None:
    port = str(20_000 + os.getpid() % 20_000)
    command = ("torchrun.py", "--gpus", "6", "--start", "local", "--port", port, "--", "train_ddp.py")
    printed = run(cluster, sys.executable, *command)
    assert printed.count("of 6") == printed.count("in step: True") == 6
