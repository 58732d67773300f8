"""Device nodes and CDI names of granted GPUs, from files as drivers and container tools write them."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from corral.runners.accounts import Account
from corral.runners.executors.containers import may_enter
from corral.runners.executors.devices import cdi_names, device_nodes
from corral.runners.executors.systemd import keeps_devices
from corral.schemas.requests import Grant

# As NVIDIA's driver 570 writes it; the number of the node is not that of NVML.
INFORMATION = """Model: \t\t NVIDIA H200
IRQ:   \t\t 139
GPU UUID: \t {uuid}
Video BIOS: \t 96.00.a5.00.01
Bus Type: \t PCIe
Device Minor: \t {minor}
GPU Excluded:\t No
"""
# As `nvidia-ctk cdi generate` writes it.
YAML = """---
cdiVersion: 0.5.0
containerEdits:
  deviceNodes:
  - path: /dev/nvidiactl
  hooks:
  - args: [nvidia-cdi-hook, create-symlinks]
    hookName: createContainer
devices:
- containerEdits:
    deviceNodes:
    - path: /dev/nvidia0
  name: "0"
- containerEdits:
    deviceNodes:
    - path: /dev/nvidia1
  name: GPU-b
kind: nvidia.com/gpu
"""


def grant(device: str, index: int = 0, mig_parent: str = "") -> Grant:
    return Grant(host="node-7", device=device, index=index, mig_parent=mig_parent)


def test_a_unit_gets_the_nodes_of_its_devices_and_no_others(tmp_path: Path) -> None:
    for slot, (uuid, minor) in enumerate((("GPU-a", 3), ("GPU-b", 1))):
        folder = tmp_path / "proc/driver/nvidia/gpus" / f"0000:{slot:02x}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(INFORMATION.format(uuid=uuid, minor=minor))
    (tmp_path / "dev/nvidia-caps").mkdir(parents=True)
    for name in ("nvidia0", "nvidia1", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    common = ["/dev/nvidiactl", "/dev/nvidia-uvm"]
    assert device_nodes([grant("GPU-a")], tmp_path) == ["/dev/nvidia3", *common]
    assert device_nodes([grant("MIG-1", mig_parent="GPU-b")], tmp_path) == ["/dev/nvidia1", *common, "char-nvidia-caps"]
    assert device_nodes([], tmp_path) == device_nodes([grant("")], tmp_path) == []
    (tmp_path / "dev/kfd").touch()
    assert device_nodes([grant("amd-1")], tmp_path) == ["/dev/kfd", "char-drm"]


@pytest.mark.parametrize(
    ("mounts", "kept"),
    [
        (["/sys/fs/cgroup/devices rw - cgroup cgroup rw,devices", "/sys/fs/cgroup/memory rw - cgroup cgroup rw"], True),
        (["/sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"], True),
        # Both hierarchies, without the controller.
        (["/sys/fs/cgroup rw - tmpfs tmpfs rw", "/sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"], False),
    ],
)
def test_a_kernel_without_a_controller_for_devices_is_known(mounts: list[str], kept: bool, tmp_path: Path) -> None:
    file = tmp_path / "mountinfo"
    file.write_text("".join(f"{number} 1 0:{number} / {line}\n" for number, line in enumerate(mounts, 30)))
    assert keeps_devices(file) is kept


def test_a_container_gets_its_devices_by_name_or_number(tmp_path: Path) -> None:
    (tmp_path / "nvidia.yaml").write_text(YAML)
    amd = {"kind": "amd.com/gpu", "devices": [{"name": "amd-uuid", "containerEdits": {}}]}
    (tmp_path / "amd.json").write_text(json.dumps(amd))
    grants = [grant("GPU-a", 0), grant("GPU-b", 1), grant("amd-uuid", 5), grant("")]
    assert cdi_names(grants, [tmp_path]) == ["nvidia.com/gpu=0", "nvidia.com/gpu=GPU-b", "amd.com/gpu=amd-uuid"]
    for wrong in (grant("amd-2", 0), grant("MIG-1", 0, mig_parent="GPU-a")):
        with pytest.raises(ValueError, match="no CDI file"):
            cdi_names([wrong], [tmp_path])
    with pytest.raises(ValueError, match="names GPU-c"):
        cdi_names([grant("GPU-c", 2)], [tmp_path / "missing", tmp_path])


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another account")
def test_a_container_mounts_no_directory_that_its_account_may_not_enter() -> None:
    private = Path(tempfile.mkdtemp(dir="/tmp"))  # 0700, with what anybody may read inside
    (private / "inside").mkdir(mode=0o755)
    account = Account("alice", 1234, 1234, [1234], "/", "/bin/sh", switched=True)
    assert [may_enter(account, str(path)) for path in (private / "inside", Path("/tmp"))] == [False, True]
    (private / "inside").rmdir()
    private.rmdir()
