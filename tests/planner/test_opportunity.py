"""What free capacity is worth: prices that are the duals they claim to be, and a mix that is learned from requests."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise

from corral.planner.fleet.fleet import hold
from corral.planner.fleet.state import Ask, ask_key
from corral.planner.placement.decide import Policies, decide
from corral.planner.placement.policies import make
from corral.planner.placement.policies.opportunity.prices import STEPS, Prices, gap_worths, share_credits
from corral.schemas.requests import WorkRequest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.planner_world import GIB, NOW, fleet_of, inventory, placed

demands = st.dictionaries(st.integers(5, STEPS - 1), st.floats(0.01, 100), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(demands)
def test_credits_are_dual_prices_of_packing_shares_on_devices(demand: dict[int, float]) -> None:
    found = share_credits(demand)
    # Feasible: nothing that fits on one device is worth more than a device.
    best = [0.0] * (STEPS + 1)
    for room in range(1, STEPS + 1):
        best[room] = max([best[room - 1]] + [best[room - size] + found[size] for size in demand if size <= room])
    assert best[STEPS] <= 1000 + 1e-6
    # Strong enough: no packing needs fewer devices than the volume, and the LP's optimum is no lower.
    worth = sum(weight * found[size] for size, weight in demand.items()) / 1000
    volume = sum(weight * size for size, weight in demand.items()) / STEPS
    assert worth >= volume - 1e-3 * sum(demand.values())


def test_credits_of_sizes_that_pair() -> None:
    # Alone on a device each, with room beside them that more small shares than there are gaps would fill.
    assert {size: round(worth) for size, worth in share_credits({60: 1.0, 40: 1.0}).items()} in (
        {60: 1000, 40: 0},
        {60: 500, 40: 500},
        {60: 0, 40: 1000},
    )
    many_small = share_credits({60: 1.0, 20: 10.0})
    assert round(many_small[60]) == 600
    assert round(many_small[20]) == 200
    few_small = share_credits({60: 10.0, 20: 1.0})
    assert round(few_small[60]) == 1000
    assert round(few_small[20]) == 0


@settings(max_examples=30, deadline=None)
@given(demands)
def test_a_larger_gap_is_never_worth_less_and_never_more_than_a_device(demand: dict[int, float]) -> None:
    worths = gap_worths(demand, share_credits(demand))
    assert worths[0] == 0
    assert all(a <= b + 1e-6 for a, b in pairwise(worths))
    assert max(worths) <= 1000 + 1e-6


def test_a_gap_is_filled_that_nothing_else_would_fill() -> None:
    fleet = fleet_of(*[inventory(f"h{number}", ["NVIDIA A100-SXM4-40GB"] * 2) for number in range(2)])
    common = {ask_key(WorkRequest(owner="me", gpu_share=share)): 1.0 for share in (0.6, 0.3)}
    policies = Policies()
    policies.use(make("opportunity", common))
    for number, share in enumerate((0.6, 0.6, 0.3, 0.3)):
        got = placed(decide(fleet, WorkRequest(owner="me", gpu_share=share), NOW, policies))
        hold(fleet, f"l{number}", got.grants)
    shares = sorted(device.share_held for device in fleet.devices.values())
    assert shares == [0, 0, 900, 900]
    # A whole host is left for those who need both of its devices.
    assert placed(decide(fleet, WorkRequest(owner="me", gpus=2), NOW, policies)).grants


def test_the_mix_is_learned_from_requests() -> None:
    fleet = fleet_of(*[inventory(f"h{number}", ["Tesla T4"] * 8, cpus=64) for number in range(40)])
    policy = make("opportunity")
    policies = Policies()
    policies.use(policy)
    for number in range(64):
        request = WorkRequest(owner="me", gpu_share=(0.5, 0.25)[number % 2], cpus=4, host_memory_bytes=8 * GIB)
        assert placed(decide(fleet, request, NOW, policies)).grants
    seen = policy.version
    assert seen > 0
    for _ in range(500):
        for share in (0.5, 0.25):
            decide(fleet, WorkRequest(owner="me", gpu_share=share, cpus=4, host_memory_bytes=8 * GIB), NOW, policies)
    # The mix is as it was: what was worked out still holds.
    assert policy.version == seen


def test_many_sizes_of_shares_are_merged_and_none_is_lost() -> None:
    asks = {Ask(ask_key(WorkRequest(owner="me", gpu_share=milli / 1000))): 1.0 for milli in range(1, 1000, 3)}
    prices = Prices(asks)
    model = next(iter(fleet_of(inventory("h0", ["Tesla T4"])).devices.values())).model
    worth = prices.worth(model).gaps
    assert worth[1000] == 1000
    assert all(a <= b + 1e-6 for a, b in combinations_with_replacement(worth[::100], 2))


def test_a_host_with_many_cores_stays_whole_for_a_request_that_fits_nowhere_else() -> None:
    cores = {"h0": 128, "h1": 96, "h2": 96}
    fleet = fleet_of(*[inventory(name, ["NVIDIA A100-SXM4-40GB"] * 8, cpus=count) for name, count in cores.items()])
    small, large = {"gpus": 1, "cpus": 13.0}, {"gpus": 8, "cpus": 120.0}
    common = {ask_key(WorkRequest(owner="me", **small)): 20.0, ask_key(WorkRequest(owner="me", **large)): 1.0}
    policies = Policies()
    policies.use(make("opportunity", common))
    for number in range(14):
        got = placed(decide(fleet, WorkRequest(owner="me", **small), NOW, policies))
        hold(fleet, f"l{number}", got.grants)
    assert placed(decide(fleet, WorkRequest(owner="me", **large), NOW, policies)).grants[0].host == "h0"
