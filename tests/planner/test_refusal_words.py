"""What a refusal says: every device under one reason, the nearest miss, and what would have to change."""

from __future__ import annotations

import corral.planner.fleet.fleet as fold
import msgspec
import pytest
from corral.planner.placement.decide import InvalidRequest, Placed, Policies, decide, environment, explain
from corral.schemas.operations import Addition, Drains
from corral.schemas.requests import Placement, Rejection, RejectionCode, WorkRequest
from support.planner_world import GIB, NOW, ask, fleet_of, inventory, placed, samples

H100 = "NVIDIA H100 80GB HBM3"
A100 = "NVIDIA A100-SXM4-40GB"
T4 = "Tesla T4"


def refused(fleet: fold.Fleet, **fields: object) -> Rejection:
    decision = ask(fleet, **fields)
    assert isinstance(decision, Rejection), decision
    return decision


def test_the_sentence_counts_every_device_once_with_the_nearest_miss() -> None:
    fleet = fold.Fleet()
    for n in range(2):
        fold.apply(fleet, inventory(f"h{n}", [H100] * 4 + [T4] * 2), NOW)
        uuids = [f"GPU-h{n}-{i}" for i in range(6)]
        used = [73 * GIB, 74 * GIB, 75 * GIB, 79 * GIB, 0, 0]
        fold.apply(fleet, samples(f"h{n}", uuids, NOW, used=used), NOW)
    answer = refused(fleet, models=["*h100*"], gpu_memory_bytes=20 * GIB)
    assert answer.message == "0/12 devices: 8 too little free memory (largest 7.0 GiB), 4 wrong model"
    assert [(reason.code, reason.devices) for reason in answer.reasons] == [("memory", 8), ("model", 4)]
    assert answer.code is RejectionCode.NO_CAPACITY
    assert answer.could_ever_fit
    assert answer.nearest == "ask for at most 7.0 GiB of device memory"


def test_a_host_that_is_too_small_says_what_it_lacks() -> None:
    fleet = fleet_of(inventory("h0", [H100] * 4, cpus=16, memory=64 * GIB), inventory("h1", [H100] * 2, cpus=64))
    fold.hold(fleet, "l1", placed(ask(fleet, gpus=1, cpus=4, hosts=["h0"])).grants)
    answer = refused(fleet, gpus=4)
    assert answer.message == "0/6 devices: 5 too few together (most on one host: 3 of 4), 1 leased"
    assert answer.nearest == "3 of 4 devices are free on one host; placement fewest_hosts may use several"
    answer = refused(fleet, gpus=3, cpus=13)
    assert "3 on hosts with too few free cores (most 12, needed 13)" in answer.message
    assert answer.could_ever_fit
    answer = refused(fleet, gpus=3, host_memory_bytes=65 * GIB)
    assert "3 on hosts with too little free RAM (most 64.0 GiB, needed 65.0 GiB)" in answer.message
    assert answer.code is RejectionCode.IMPOSSIBLE
    assert answer.message.endswith("this fleet could not hold it even when idle")
    answer = refused(fleet, gpus=0, cpus=100)
    assert answer.message.startswith("0/2 hosts: 2 on hosts with too few free cores (most 64, needed 100)")


def test_several_hosts_together_may_still_be_too_few() -> None:
    fleet = fleet_of(*(inventory(f"h{n}", [T4] * 2) for n in range(3)))
    answer = refused(fleet, gpus=7, placement=Placement.FEWEST_HOSTS)
    assert answer.message.startswith("0/6 devices: 6 could be used, but the request needs 7")
    assert answer.code is RejectionCode.IMPOSSIBLE
    answer = refused(fleet, gpus=4, placement=Placement.SPREAD)
    assert answer.message.startswith("0/6 devices: 6 could be used, but the request needs 4 hosts")
    fold.apply(fleet, Drains(drains={"host:h0": "x"}))
    answer = refused(fleet, gpus=3, placement=Placement.SPREAD)
    assert answer.could_ever_fit
    assert {reason.code: reason.devices for reason in answer.reasons} == {"devices": 4, "drained": 2}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"min_compute_capability": "10.0"}, "3 compute capability below 10.0 (highest 9.0)"),
        ({"vendors": ["amd"]}, "3 wrong vendor"),
        ({"hosts": ["h9*"]}, "3 on hosts that the request does not allow"),
        ({"host_labels": {"rack": "r2"}}, "3 on hosts that the request does not allow"),
        ({"gpu_memory_bytes": 500 * GIB}, "3 too little free memory (largest 80.0 GiB)"),
    ],
)
def test_what_no_device_has_is_impossible(fields: dict[str, object], words: str) -> None:
    fleet = fleet_of(inventory("h0", [H100, A100, T4], labels={"rack": "r1"}))
    answer = refused(fleet, **fields)
    assert answer.message.startswith(f"0/3 devices: {words}")
    assert answer.code is RejectionCode.IMPOSSIBLE
    assert not answer.could_ever_fit


def test_shares_tell_the_largest_that_is_free() -> None:
    fleet = fleet_of(inventory("h0", [H100]))
    fold.hold(fleet, "l1", placed(ask(fleet, gpu_share=0.6)).grants)
    answer = refused(fleet, gpu_share=0.5)
    assert answer.message == "0/1 devices: 1 too little free share (largest 0.4)"
    assert answer.nearest == "ask for a share of at most 0.4"
    assert refused(fleet).message == "0/1 devices: 1 leased"
    assert placed(ask(fleet, gpu_share=0.4)).grants[0].share == 0.4


def test_a_planner_that_knows_nothing_says_so() -> None:
    answer = refused(fold.Fleet())
    assert answer.code is RejectionCode.NO_DEVICES
    answer = refused(fleet_of(inventory("h0", [])))
    assert answer.code is RejectionCode.NO_DEVICES


def test_compute_capabilities_compare_as_numbers_and_models_in_any_case() -> None:
    info = inventory("h0", [H100])
    newer = msgspec.structs.replace(info, devices=[msgspec.structs.replace(info.devices[0], compute_capability="10.0")])
    fleet = fleet_of(newer)
    assert placed(ask(fleet, min_compute_capability="9.0", models=["nvidia h100*"]))
    assert placed(ask(fleet, min_compute_capability="10"))
    assert refused(fleet, min_compute_capability="10.1")


def test_what_if_adds_devices_for_the_question_alone() -> None:
    fleet = fleet_of(inventory("h0", [H100] * 2, cpus=32), inventory("h1", [T4]), live=True)
    request = WorkRequest(owner="me", gpus=8, cpus=64, models=["*H100*"])
    before = (dict(fleet.idle), list(fleet.hosts), list(fleet.devices), fleet.index.devices.copy())
    told = explain(fleet, request, NOW, Policies(), [Addition(model=H100.lower(), devices=8)])
    assert told.granted
    assert len({grant.host for grant in told.grants}) == 1
    assert told.grants[0].host.startswith("what-if-1-")
    assert (dict(fleet.idle), list(fleet.hosts), list(fleet.devices), fleet.index.devices) == before
    # Their hosts have as many cores per device as the model has in the fleet: 16, so that 4 a host are not enough.
    told = explain(fleet, request, NOW, Policies(), [Addition(model=H100, devices=8, per_host=4)])
    assert not told.granted
    assert "most on one host: 4 of 8" in told.message
    assert isinstance(decide(fleet, request, NOW, Policies()), Rejection)
    with pytest.raises(InvalidRequest, match=r"no model of the fleet is called 'H200': there are NVIDIA H100"):
        explain(fleet, request, NOW, Policies(), [Addition(model="H200", devices=1)])


def test_an_explanation_speaks_of_every_host_and_device() -> None:
    fleet = fleet_of(inventory("h0", [H100, T4], cpus=4), inventory("h1", [H100, H100], cpus=64))
    fold.hold(fleet, "l1", placed(ask(fleet, hosts=["h1"])).grants)
    told = explain(fleet, WorkRequest(owner="me", cpus=8, models=["*H100*"]), NOW, Policies())
    assert told.granted
    assert told.message == "1 device on h1"
    assert told.hosts == {"h0": "4 of 8 cores are free"}
    by_device = {verdict.device: verdict for verdict in told.verdicts}
    assert told.verdicts[0].selected
    assert (by_device["GPU-h1-1"].selected, by_device["GPU-h1-1"].feasible) == (True, True)
    assert by_device["GPU-h1-0"].reason == "leased"
    assert by_device["GPU-h0-0"].reason == "4 of 8 cores are free"
    assert by_device["GPU-h0-1"].reason == "wrong model"
    assert told.grants[0].score_parts == by_device["GPU-h1-1"].score_parts


def test_the_environment_names_devices_by_vendor_and_host() -> None:
    fleet = fleet_of(inventory("h0", [T4, T4]), inventory("h1", ["AMD Instinct MI300X"]))
    grants = placed(ask(fleet, gpus=2, hosts=["h0"])).grants + placed(ask(fleet, hosts=["h1"])).grants
    assert environment(fleet, grants, "l1") == {
        "h0": {"CORRAL_LEASE": "l1", "CUDA_VISIBLE_DEVICES": "GPU-h0-0,GPU-h0-1"},
        "h1": {
            "CORRAL_LEASE": "l1",
            "ROCR_VISIBLE_DEVICES": "0",
            "HIP_VISIBLE_DEVICES": "0",
            "CUDA_VISIBLE_DEVICES": "0",
        },
    }
    alone = placed(ask(fleet, gpus=0, cpus=1)).grants
    nothing = dict.fromkeys(("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"), "")
    assert environment(fleet, alone, "l2") == {"h1": {"CORRAL_LEASE": "l2"} | nothing}


def test_hot_busy_throttled_and_warned_devices_come_last() -> None:
    fleet = fold.Fleet()
    fold.apply(fleet, inventory("h0", [H100] * 5), NOW)
    uuids = [f"GPU-h0-{n}" for n in range(5)]
    fold.apply(
        fleet,
        samples(
            "h0",
            uuids,
            NOW,
            used=[30 * GIB, 0, 0, 0, 0],
            utilization=[0.0, 100.0, 0.0, 0.0, 0.0],
            temperature=[30.0, 30.0, 95.0, 30.0, 30.0],
            throttle=[0, 0, 0, 0x40, 0x04],
        ),
        NOW,
    )
    for policy in ("best-fit", "pack", "spread", "score"):
        fleet.cache.clear()
        decision = decide(fleet, WorkRequest(owner="me", policy=policy), NOW, Policies())
        assert isinstance(decision, Placed)
        assert decision.grants[0].device == "GPU-h0-4", policy


def test_the_random_policy_is_repeatable_and_reaches_every_host() -> None:
    fleet = fleet_of(*(inventory(f"h{n}", [T4] * 2) for n in range(4)))
    request = WorkRequest(owner="me", policy="random")

    def run() -> list[str]:
        policies = Policies()
        decisions = [decide(fleet, request, NOW, policies) for _ in range(60)]
        return [decision.grants[0].device for decision in decisions if isinstance(decision, Placed)]

    first = run()
    assert first == run()
    assert len(set(first)) == 8
