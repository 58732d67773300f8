"""Plans to serve a model: what they hold, what they promise, and what is said where there is none."""

from __future__ import annotations

from typing import Any

import pytest
from corral.planner.work.distribute import distribute
from corral.planner.work.fit.chain import chain, pace
from corral.planner.work.fit.costs import Costs
from corral.planner.work.fit.plans import fit
from corral.planner.work.fit.rates import data_sheet
from corral.planner.work.fit.units import Candidate, singles
from corral.schemas.models.description import Attention, ModelDescription
from corral.schemas.models.serving import DeviceRate, FitVerdict, PlanKind, ServePlan, ServeWork
from corral.schemas.requests import Distribution, Grant, Method
from corral.schemas.telemetry import DeviceInfo
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

GIB = 2**30
KINDS = {
    "NVIDIA H100 80GB HBM3": (80, 3352, 132, 1980, "9.0"),
    "NVIDIA A100-PCIE-40GB": (40, 1555, 108, 1410, "8.0"),
    "NVIDIA A10": (24, 600, 72, 1695, "8.6"),
    "Tesla T4": (16, 320, 40, 1590, "7.5"),
}
H100, A100, A10, T4 = KINDS
LLAMA_8B = ModelDescription(
    layers=32,
    hidden_size=4096,
    vocabulary=128256,
    intermediate_size=14336,
    attention=Attention(heads=32, kv_heads=8, head_dim=128),
)
LLAMA_70B = ModelDescription(
    layers=80,
    hidden_size=8192,
    vocabulary=128256,
    intermediate_size=28672,
    attention=Attention(heads=64, kv_heads=8, head_dim=128),
)


def asked(**fields: Any) -> ServeWork:
    """A question with little time to search for flows."""
    return ServeWork(seconds=0.02, **fields)


def device(host: str, index: int, kind: str) -> Candidate:
    memory, bandwidth, units, clock, capability = KINDS[kind]
    info = DeviceInfo(
        uuid=f"{host}-{index}",
        host=host,
        index=index,
        name=kind,
        memory_bytes=memory * GIB,
        memory_bandwidth_bytes_per_second=bandwidth * 10**9,
        sm_count=units,
        sm_clock_max_megahertz=clock,
        compute_capability=capability,
    )
    return Candidate(info, memory * GIB)


def hosts(**kinds: list[str]) -> list[Candidate]:
    return [device(host, index, kind) for host, held in kinds.items() for index, kind in enumerate(held)]


def check(work: ServeWork, plan: ServePlan, devices: list[Candidate]) -> None:
    """A plan covers all layers on each way, and no device twice or beyond its memory."""
    free = {candidate.info.uuid: candidate.memory_bytes for candidate in devices}
    uuids = [one.device for one in plan.devices]
    assert len(set(uuids)) == len(uuids)
    for one in plan.devices:
        assert one.weights_bytes + one.kv_bytes + one.working_bytes + one.left_bytes == one.memory_bytes
        assert one.memory_bytes <= work.memory_share * free[one.device] + 1
    layers = work.model.layers
    if plan.kind is PlanKind.FLOW:
        assert sum(stage.traffic * stage.layers for stage in plan.stages) == pytest.approx(layers)
    else:
        ends = [0]
        for stage in plan.stages:
            assert stage.first_layer == ends[-1]
            ends.append(stage.first_layer + stage.layers)
        assert ends[-1] == layers
    assert plan.sequences >= work.sequences
    assert plan.tokens_per_second
    assert plan.token_seconds
    assert sum(route.weight for route in plan.routes if route.origin < 0) == pytest.approx(1)


@settings(max_examples=10)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(list(KINDS))), min_size=1, max_size=9),
    st.sampled_from([LLAMA_8B, LLAMA_70B]),
    st.sampled_from([1, 3, 16]),
    st.sampled_from([512, 8192]),
)
def test_plans_keep_within_memory_and_cover_the_model(
    kinds: list[tuple[str, str]], model: ModelDescription, sequences: int, context: int
) -> None:
    devices = [device(host, index, kind) for index, (host, kind) in enumerate(kinds)]
    work = asked(model=model, sequences=sequences, context_tokens=context)
    found = fit(work, devices)
    for plan in found.plans:
        check(work, plan, devices)
        if found.bound_tokens_per_second is not None:
            assert (plan.tokens_per_second or 0) <= found.bound_tokens_per_second * (1 + 1e-9)
    if found.verdict is FitVerdict.NO:
        assert found.plans == []
        assert "does not fit" in found.message
        assert found.nearest
    else:
        least = min(len(plan.devices) for plan in found.plans)
        assert (least == 1) == (found.verdict is FitVerdict.ONE_DEVICE)


def test_one_device_several_or_none() -> None:
    assert fit(asked(model=LLAMA_8B), hosts(a=[T4, A10])).verdict is FitVerdict.ONE_DEVICE
    several = fit(asked(model=LLAMA_70B), hosts(a=[A100] * 4))
    assert several.verdict is FitVerdict.SEVERAL_DEVICES
    assert "on none alone" in several.message
    none = fit(asked(model=LLAMA_70B), hosts(a=[T4] * 4))
    assert none.verdict is FitVerdict.NO
    assert none.short_bytes == pytest.approx(
        131.4 * GIB + 1.25 * GIB - 4 * (0.9 * 16 * GIB - none.working_bytes), rel=0.01
    )
    assert none.nearest == "6 more Tesla T4"
    assert fit(asked(model=LLAMA_70B), hosts(a=[T4] * 4, **{f"b{at}": [T4] for at in range(6)})).plans
    assert not fit(asked(model=LLAMA_70B), hosts(a=[T4] * 4, **{f"b{at}": [T4] for at in range(5)})).plans
    assert "no device may take it" in fit(asked(model=LLAMA_8B), []).message


def test_the_nearest_context_that_fits_does_fit() -> None:
    work = asked(model=LLAMA_8B, context_tokens=131072)
    found = fit(work, hosts(a=[A10]))
    assert found.verdict is FitVerdict.NO
    assert found.nearest.startswith("a context of ")
    most = int(found.nearest.split()[3])
    assert fit(asked(model=LLAMA_8B, context_tokens=most), hosts(a=[A10])).plans
    assert not fit(asked(model=LLAMA_8B, context_tokens=most + 64), hosts(a=[A10])).plans


def test_a_token_of_one_sequence_takes_the_time_to_read_all_weights() -> None:
    work = asked(model=LLAMA_8B, context_tokens=1, prompt_tokens=1, rates=[
        DeviceRate(device="*A10", memory_bytes_per_second=100e9, source="test"),
    ])  # fmt: skip
    found = fit(work, hosts(a=[A10, A10]))
    one = next(plan for plan in found.plans if plan.kind is PlanKind.ONE_DEVICE)
    assert one.token_seconds
    # All but the embedding, of which a token reads one row.
    assert one.token_seconds == pytest.approx((16060522496 - 128256 * 4096 * 2) / 100e9, rel=0.001)
    assert one.rests_on[0] == "NVIDIA A10: measured (test)"
    # A chain of two reads the same, one after the other, and its slowest stage is half of it.
    costs = Costs(work)
    both = chain(costs, singles(work, hosts(a=[A10, A10])))
    assert both is not None
    paced = pace(costs, both)
    assert paced is not None
    assert paced.token_seconds == pytest.approx(one.token_seconds, rel=0.01)


def test_data_sheets_give_the_published_rates() -> None:
    # NVIDIA's data sheets: 16-bit tensor cores without sparsity; clocks of the boards at their boost.
    for kind, teraflops in ((A100, 312), (A10, 125), (T4, 65)):
        assert data_sheet(device("a", 0, kind).info).operations_per_second == pytest.approx(teraflops * 1e12, rel=0.01)


def test_like_devices_of_a_host_work_as_one_and_others_do_not() -> None:
    work = asked(model=LLAMA_70B, sequences=4)
    found = fit(work, hosts(a=[A100] * 4))
    assert found.plans[0].tensor_parallel == 4
    apart = fit(work, hosts(a=[A100] * 2, b=[A100] * 2, c=[A10, T4]))
    assert max(plan.tensor_parallel for plan in apart.plans) == 2
    alone = fit(asked(model=LLAMA_70B, sequences=4, tensor_parallel=False), hosts(a=[A100] * 4))
    assert {plan.tensor_parallel for plan in alone.plans} == {1}


def test_limits_on_latency_put_plans_that_keep_them_first() -> None:
    devices = hosts(a=[A10] * 2, b=[H100])
    free = fit(asked(model=LLAMA_8B, sequences=64), devices)
    limit = min(plan.token_seconds or 9.0 for plan in free.plans) * 1.01
    bound = fit(asked(model=LLAMA_8B, sequences=64, max_token_seconds=limit), devices)
    assert bound.plans[0].warnings == []
    assert (bound.plans[0].token_seconds or 9.0) <= limit
    none = fit(asked(model=LLAMA_8B, sequences=64, max_token_seconds=1e-6), devices)
    assert all("over the limit" in plan.warnings[0] for plan in none.plans)


def test_the_bound_is_near_where_few_sequences_share_many_devices() -> None:
    # A sequence is on one device at a time: without that, the bound is 5 times the best plan here.
    fleet = hosts(a=[A100] * 4, b=[A10] * 4, c=[A10] * 4, d=[T4] * 4, e=[T4] * 4, f=[T4] * 4)
    found = fit(asked(model=LLAMA_70B, sequences=16), fleet)
    most = max(plan.tokens_per_second or 0.0 for plan in found.plans)
    assert most <= (found.bound_tokens_per_second or 0.0) <= 1.4 * most


def test_copies_share_the_sequences_that_there_are() -> None:
    # Of 3 sequences on two copies, one copy has 2 and the other 1.
    work = asked(model=LLAMA_8B, sequences=3, tensor_parallel=False)
    [copies] = [plan for plan in fit(work, hosts(a=[A10], b=[A10])).plans if plan.replicas == 2]
    full = fit(asked(model=LLAMA_8B, sequences=2), hosts(a=[A10])).plans[0]
    assert copies.tokens_per_second == pytest.approx(2 * (full.tokens_per_second or 0.0) * 3 / 4)


def test_a_simulation_expects_what_is_computed_by_hand() -> None:
    work = ServeWork(model=LLAMA_8B, sequences=1, context_tokens=2048, prompt_tokens=1792, seconds=1.0)
    [plan] = fit(work, hosts(a=[A10])).plans
    assert plan.expected is not None
    # Outputs of 32, 64, … 256 tokens: 144 in the mean, one after the other, each after its prompt.
    token, first = plan.expected.token_seconds, plan.expected.first_token_seconds
    assert (plan.expected.prompt_tokens, plan.expected.output_tokens) == (1792, 144)
    assert first == pytest.approx(plan.first_token_seconds, rel=0.01)
    assert 0.95 * (plan.token_seconds or 0.0) < token < 1.02 * (plan.token_seconds or 0.0)
    assert plan.expected.tokens_per_second == pytest.approx(144 / (first + 144 * token), rel=0.15)
    # Long prompts of many cost tokens, and wait for each other.
    [many] = fit(replace(work, sequences=8), hosts(a=[A10])).plans
    assert many.expected is not None
    assert many.expected.tokens_per_second < 0.7 * (many.tokens_per_second or 0.0)
    assert many.expected.first_token_seconds > first
    # Too many requests for the time are not simulated.
    assert fit(replace(work, sequences=8, seconds=0.001), hosts(a=[A10])).plans[0].expected is None


def test_unknown_rates_are_not_made_up() -> None:
    bare = DeviceInfo(uuid="x", host="h", index=0, name="Unknown", memory_bytes=48 * GIB)
    [plan] = fit(asked(model=LLAMA_8B), [Candidate(bare, 48 * GIB)]).plans
    assert (plan.tokens_per_second, plan.token_seconds, plan.first_token_seconds) == (None, None, None)


def test_layers_are_the_items_of_a_request_with_method_serve() -> None:
    devices = hosts(a=[A10, T4])
    grants = [Grant(host="a", device=one.info.uuid, memory_bytes=one.memory_bytes) for one in devices]
    work = Distribution(method=Method.SERVE, serve=asked(model=LLAMA_8B, sequences=8))
    outcome = distribute(work, grants, [one.info for one in devices])
    assert outcome.report.plan is not None
    assert {layer for grant in outcome.grants for layer in grant.items} == set(range(32))
    large = Distribution(method=Method.SERVE, serve=asked(model=LLAMA_70B))
    outcome = distribute(large, grants, [one.info for one in devices])
    assert outcome.report.plan is None
    assert [item.id for item in outcome.unassigned] == list(range(80))
    assert "does not fit" in outcome.unassigned[0].reason
