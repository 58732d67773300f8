"""The variables that show a program its devices and hide the others, as each vendor's runtime takes them."""

from __future__ import annotations

import pytest
from corral.planner.placement.visible import visible
from corral.schemas.telemetry import DeviceInfo


def amd(index: int, visible_id: str = "") -> tuple[str, DeviceInfo]:
    uuid = f"{index:02x}ff74a1-0000-1000-8000-2f01a4e5bb8c"
    return uuid, DeviceInfo(uuid=uuid, host="h", index=index, vendor="amd", visible_id=visible_id)


def nvidia(index: int, visible_id: str = "") -> tuple[str, DeviceInfo]:
    uuid = f"GPU-{index}"
    return uuid, DeviceInfo(uuid=uuid, host="h", index=index, visible_id=visible_id)


@pytest.mark.parametrize(
    ("held", "around", "expected"),
    [
        ([nvidia(2), nvidia(0)], {"nvidia"}, {"CUDA": "GPU-2,GPU-0"}),
        ([], {"nvidia"}, {"CUDA": ""}),
        ([("GPU-gone", None)], set[str](), {"CUDA": "GPU-gone"}),
        # HIP counts what ROCr leaves, in the order of ROCr's list.
        (
            [amd(5, "GPU-00092f01a4e5bb8c"), amd(2, "2")],
            {"amd"},
            {"ROCR": "GPU-00092f01a4e5bb8c,2", "HIP": "0,1", "CUDA": "0,1"},
        ),
        ([amd(3)], {"amd"}, {"ROCR": "3", "HIP": "0", "CUDA": "0"}),
        ([], {"amd"}, {"ROCR": "", "HIP": "", "CUDA": ""}),
        # On a host of both, nothing of the other vendor is left to see.
        ([amd(1, "1")], {"amd", "nvidia"}, {"ROCR": "1", "HIP": "0", "CUDA": ""}),
        ([nvidia(1)], {"amd", "nvidia"}, {"ROCR": "", "HIP": "", "CUDA": "GPU-1"}),
        ([amd(1, "1"), nvidia(4)], {"amd", "nvidia"}, {"ROCR": "1", "HIP": "0", "CUDA": "GPU-4"}),
        ([], {"amd", "nvidia"}, {"ROCR": "", "HIP": "", "CUDA": ""}),
    ],
)
def test_each_runtime_sees_what_is_held_alone(
    held: list[tuple[str, DeviceInfo | None]], around: set[str], expected: dict[str, str]
) -> None:
    assert visible(held, around) == {f"{name}_VISIBLE_DEVICES": value for name, value in expected.items()}


def test_nvidia_devices_that_share_a_uuid_are_shown_by_number() -> None:
    found = visible([nvidia(3, "3"), nvidia(1)], {"nvidia"})
    assert found == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "3,1"}
