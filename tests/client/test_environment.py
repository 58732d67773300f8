"""The environment of a lease: it shows the lease's devices on this host and no others, of any vendor."""

from __future__ import annotations

import contextlib
import os
from datetime import UTC, datetime

import pytest
from corral.client import SyncClient
from corral.client.leases.environment import NONE_VISIBLE, devices_elsewhere, environment_for, environment_set
from corral.schemas.requests import Grant, Lease, LeaseState
from support.local_cluster import LocalCluster


def lease(**hosts: dict[str, str]) -> Lease:
    now = datetime.now(UTC)
    grants = [Grant(host=host, device=next(iter(values.values()), "")) for host, values in hosts.items()]
    return Lease(
        lease_id="l1", owner="a", state=LeaseState.ACTIVE, granted_at=now, expires_at=now, ttl_seconds=60.0,
        grants=grants, environment={host: values | {"CORRAL_LEASE": "l1"} for host, values in hosts.items()},
    )  # fmt: skip


NVIDIA = {"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2"}
AMD = {"ROCR_VISIBLE_DEVICES": "GPU-0123456789abcdef,GPU-fedcba9876543210"}
NONE = {**NONE_VISIBLE, "CORRAL_LEASE": "l1"}


@pytest.mark.parametrize(
    ("granted", "expected"),
    [
        (NVIDIA, NONE | NVIDIA),
        # HIP and OpenCL number what ROCm's runtime shows, so all of that, whatever was chosen outside.
        (AMD, NONE | AMD | {"HIP_VISIBLE_DEVICES": "0,1", "GPU_DEVICE_ORDINAL": "0,1"}),
        (AMD | {"HIP_VISIBLE_DEVICES": "1"}, NONE | AMD | {"HIP_VISIBLE_DEVICES": "1", "GPU_DEVICE_ORDINAL": "0,1"}),
        (NVIDIA | AMD, NONE | NVIDIA | AMD | {"HIP_VISIBLE_DEVICES": "0,1", "GPU_DEVICE_ORDINAL": "0,1"}),
        ({"CUDA_VISIBLE_DEVICES": ""}, NONE),
        ({}, NONE),
    ],
)
def test_every_variable_is_set_on_the_host_of_the_grant_and_no_gpu_is_visible_elsewhere(
    granted: dict[str, str], expected: dict[str, str]
) -> None:
    made = lease(here=granted, there=NVIDIA)
    assert environment_for(made, "here") == expected
    assert environment_for(made, "elsewhere") == NONE
    # The only host of a grant is no reason to take its devices for those of this one.
    assert environment_for(lease(there=NVIDIA), "here") == NONE


def inside(block: contextlib.AbstractContextManager[object]) -> dict[str, str]:
    with block:
        return {name: os.environ[name] for name in NONE}


def test_what_was_set_outside_does_not_leak_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRAL_HOST", "here")
    for name in NONE_VISIBLE:
        monkeypatch.setenv(name, "7")
    monkeypatch.delenv("CORRAL_LEASE", raising=False)
    with environment_set(lease(here=NVIDIA)):
        assert {name: os.environ[name] for name in NONE} == NONE | NVIDIA
    assert {os.environ[name] for name in NONE_VISIBLE} == {"7"}
    assert "CORRAL_LEASE" not in os.environ
    with pytest.warns(RuntimeWarning, match="are on there: none is visible here, on here"):
        assert inside(environment_set(lease(there=NVIDIA))) == NONE
    assert devices_elsewhere(lease(here=NVIDIA, there=NVIDIA), "here") == ""


@pytest.mark.parametrize("host", ["sim-0001", "sim-0002"])
def test_a_lease_that_sets_the_environment_is_of_this_host_unless_others_are_named(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setenv("CORRAL_HOST", host)
    with SyncClient(cluster.url, owner="here") as client:
        with client.lease(gpus=1, set_environment=True) as held:
            assert held.hosts == [host]
            assert os.environ["CUDA_VISIBLE_DEVICES"] == held.devices[0]
        other = "sim-0002" if host == "sim-0001" else "sim-0001"
        with pytest.warns(RuntimeWarning, match=f"are on {other}"):
            seen = inside(client.lease(gpus=1, hosts=other, set_environment=True))
        assert seen == NONE | {"CORRAL_LEASE": seen["CORRAL_LEASE"]}
        with client.lease(gpus=2, hosts="any", placement="spread", set_environment=True) as held:
            assert sorted(held.hosts) == ["sim-0001", "sim-0002"]
            mine = {grant.device for grant in held.grants if grant.host == host}
            assert set(os.environ["CUDA_VISIBLE_DEVICES"].split(",")) == mine
