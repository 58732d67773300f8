"""Processes on devices: NVML's part through the fake library, the operating system's part from real processes."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from corral.bus.process_identity import lineage, own_name
from corral.collectors.nvml.source import NvmlSource
from corral.collectors.processes.proc import ProcessTable, container, cpu_list, sysfs_address
from corral.schemas.limits import LEASE_VARIABLE
from support.fake_nvml import UNKNOWN, FakeInstance, FakeNvml

NOT_AVAILABLE = 2**64 - 1


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[bytes]]:
    """A real process with a lease in its parent's environment only: the shell passes an emptied one on."""
    script = "import subprocess, sys, os; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'], env={})"
    process = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, LEASE_VARIABLE: "lease-42"}, start_new_session=True
    )
    yield process
    os.killpg(process.pid, 9)
    process.wait()


def child_of(pid: int) -> int:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        children = Path(f"/proc/{pid}/task/{pid}/children")
        text = children.read_text() if children.exists() else ""
        found = [int(c) for c in text.split() if Path(f"/proc/{c}/cmdline").read_bytes().endswith(b"time.sleep(60)\0")]
        if found:
            return found[0]
        time.sleep(0.01)
    raise AssertionError("the child did not start")


def test_processes_with_memory_shares_and_what_the_system_knows(
    nvml: FakeNvml, worker: subprocess.Popen[bytes]
) -> None:
    child = child_of(worker.pid)
    first, second = nvml.devices
    first.compute = [(child, 3 * 2**30), (worker.pid, NOT_AVAILABLE)]
    first.graphics = [(child, 2**20)]
    first.shares = [(100, child, 10, 5, 0, 0), (200, child, 61, 33, 2, 1), (150, 1, 9, 9, 9, 9)]
    second.compute = [(child, 2**30)]
    source = NvmlSource("h")
    source.open(lambda _event: None)
    processes = source.processes()["h"]
    by = {(p.device, p.pid): p for p in processes}
    assert by.keys() == {(first.uuid, child), (first.uuid, worker.pid), (second.uuid, child)}
    one = by[first.uuid, child]
    assert (one.kind, one.memory_used_bytes) == ("both", 3 * 2**30)
    assert (one.sm_utilization_percent, one.memory_utilization_percent) == (61, 33)
    assert (one.encoder_utilization_percent, one.decoder_utilization_percent) == (2, 1)
    assert one.lease == "lease-42", "the lease is in an ancestor's environment"
    assert one.user == pwd.getpwuid(os.getuid()).pw_name
    assert one.name.startswith("python")
    assert abs(one.started_ns / 1e9 - time.time()) < 60
    assert one.command == ""
    other = by[first.uuid, worker.pid]
    assert (other.kind, other.memory_used_bytes, other.sm_utilization_percent) == ("compute", None, None)
    # Nothing new since: no share is known, and that is no error.
    again = {(p.device, p.pid): p for p in source.processes()["h"]}
    assert again[first.uuid, child].sm_utilization_percent is None
    assert source.read_errors == 0
    source.close()


def test_command_lines_only_when_asked_for(nvml: FakeNvml, worker: subprocess.Popen[bytes]) -> None:
    child = child_of(worker.pid)
    nvml.devices[0].compute = [(child, 1)]
    source = NvmlSource("h", with_commands=True)
    source.open(lambda _event: None)
    (process,) = source.processes()["h"]
    assert process.command.endswith("import time; time.sleep(60)")
    source.close()


def test_processes_of_a_split_device_are_those_of_its_instances(nvml: FakeNvml) -> None:
    whole = nvml.devices[0]
    whole.mig_mode = (1, 1)
    whole.instances = [FakeInstance(whole, 0, "1g.10gb", 10, 16)]
    whole.compute, whole.instances[0].compute = [(os.getpid(), 7)], [(os.getpid(), 7)]
    source = NvmlSource("h")
    source.open(lambda _event: None)
    (process,) = source.processes()["h"]
    assert process.device == whole.instances[0].uuid
    source.close()


def test_a_lost_device_does_not_hide_the_processes_of_the_others(nvml: FakeNvml) -> None:
    nvml.devices[1].compute = [(os.getpid(), 7)]
    source = NvmlSource("h")
    source.open(lambda _event: None)
    nvml.devices[0].dead = 15
    (process,) = source.processes()["h"]
    assert process.device == nvml.devices[1].uuid
    source.close()


def test_a_process_that_is_gone_has_no_facts() -> None:
    table = ProcessTable()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert table.facts(gone.pid).name == ""
    assert table.facts(os.getpid()).name.startswith("python")


@pytest.mark.parametrize(
    ("cgroup", "expected"),
    [
        ("0::/system.slice/docker-" + "ab" * 32 + ".scope", "ab" * 32),
        ("12:devices:/kubepods/burstable/pod1/" + "0f" * 32 + "\n0::/", "0f" * 32),
        ("0::/kubepods.slice/kubepods-pod3.slice/cri-containerd-" + "12" * 32 + ".scope", "12" * 32),
        ("0::/system.slice/slurmstepd.scope/job_77/step_0/user/task_0", None),
        ("0::/user.slice/user-1000.slice/session-2.scope", ""),
        ("0::/", ""),
        ("", ""),
    ],
)
def test_container_of_a_cgroup(cgroup: str, expected: str | None) -> None:
    assert container(cgroup) == (cgroup.split("::")[1] if expected is None else expected)


def test_lists_and_addresses_of_linux() -> None:
    assert cpu_list("0-3,8,10-11\n") == [0, 1, 2, 3, 8, 10, 11]
    assert cpu_list("") == []
    assert sysfs_address("00000000:AF:00.0") == "0000:af:00.0"


NOBODY = """
import os, sys
from corral.collectors.processes.proc import ProcessTable
from corral.bus.process_identity import lineage
os.setgroups([]); os.setgid(65534); os.setuid(65534)
pid = int(sys.argv[1])
print(ProcessTable().facts(pid).lease or "unreadable", *lineage(pid))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_descent_is_seen_where_environments_are_not(worker: subprocess.Popen[bytes]) -> None:
    """A collector without privileges reads no environment of another account, and still knows whose child is whose."""
    child = child_of(worker.pid)
    done = subprocess.run([sys.executable, "-c", NOBODY, str(child)], capture_output=True, text=True, check=True)
    lease, *names = done.stdout.split()
    assert lease == "unreadable"
    assert names == list(lineage(child))
    assert names[1:3] == [next(lineage(worker.pid)), own_name()]
    assert len(set(names)) == len(names)


def test_a_name_of_a_process_is_the_same_from_inside_of_its_namespace() -> None:
    script = "from corral.bus.process_identity import own_name; print(own_name(), flush=True); input()"
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces here")
    process = subprocess.Popen(
        [*unshare, sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    assert name.split("/")[1] == "1", "it is the first of its namespace"
    [inside] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert next(lineage(int(inside))) == name
    assert len(list(lineage(int(inside)))) > 2
    process.communicate("\n", timeout=20)


def test_a_device_is_unreadable_once_whatever_calls_fail(nvml: FakeNvml) -> None:
    for function in ("ComputeRunningProcesses", "GraphicsRunningProcesses"):
        for version in ("", "_v2", "_v3"):
            nvml.errors[f"nvmlDeviceGet{function}{version}"] = UNKNOWN
    source = NvmlSource("h")
    source.open(lambda _event: None)
    source.processes()
    assert list(source.unreadable) == [device.uuid for device in nvml.devices]
    source.close()
