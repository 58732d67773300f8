"""Fragmentation gradient descent, against the formula written out request by request and device by device."""

from __future__ import annotations

from math import exp

from corral.planner.fleet.state import Ask, HostState, ask_key
from corral.planner.placement.policies.fragmentation import TYPICAL, Fragmentation
from corral.planner.simulation.simulate import simulate
from corral.planner.simulation.trace import Arrival, Node, profile_of
from hypothesis import given, settings
from hypothesis import strategies as st

kinds = st.builds(
    lambda cpus, gpus, share, model: Arrival(
        "r", cpus, 1, gpus, (share if gpus == 1 else 1000) if gpus else 0, (model,) if gpus and model else ()
    ),
    st.sampled_from([500, 1000, 4000]),
    st.sampled_from([0, 1, 1, 1, 2, 4]),
    st.sampled_from([100, 190, 460, 500, 810, 1000]),
    st.sampled_from(["", "", "A", "B"]),
)


def typical(profile: dict[Arrival, int]) -> list[tuple[Arrival, float]]:
    """The most frequent requests that together make up so much of all."""
    ordered = sorted(profile.items(), key=lambda entry: (-entry[1], ask_key(entry[0].request())))
    kept: list[tuple[Arrival, int]] = []
    for arrival, count in ordered:
        if sum(count for _, count in kept) >= TYPICAL * sum(profile.values()):
            break
        kept.append((arrival, count))
    total = sum(count for _, count in kept)
    return [(arrival, count / total) for arrival, count in kept]


def fragments(model: str, cpus: int, free: list[int], requests: list[tuple[Arrival, float]]) -> float:
    total = 0.0
    for arrival, weight in requests:
        fitting = [share for share in free if share >= arrival.share_milli]
        allowed = not arrival.models or model in arrival.models
        fits = arrival.gpus > 0 and allowed and arrival.cpus_milli <= cpus and len(fitting) >= arrival.gpus
        total += weight * (sum(free) - sum(fitting) if fits else sum(free))
    return total


def score(state: HostState, arrival: Arrival, chosen: tuple[int, ...], requests: list[tuple[Arrival, float]]) -> int:
    model = state.devices[0].model.name
    free = [device.share_free for device in state.devices]
    before = fragments(model, state.cpus_free, free, requests)
    for at in chosen:
        free[at] -= arrival.share_milli
    gain = before - fragments(model, state.cpus_free - arrival.cpus_milli, free, requests)
    return int(100 / (1 + exp(-round(gain, 9) / 1000)))


@settings(deadline=None, max_examples=50)
@given(st.lists(kinds, min_size=1, max_size=12), st.lists(kinds, max_size=6), kinds, st.sampled_from(["A", "B"]))
def test_the_score_is_the_published_formula_and_its_device_the_best(
    mix: list[Arrival], held: list[Arrival], arrival: Arrival, model: str
) -> None:
    profile: dict[Arrival, int] = {}
    for each in mix:
        profile[each] = profile.get(each, 0) + 1
    policy = Fragmentation(profile_of(mix))
    node = Node("n", 12_000, 100, 4, model)
    # What a host looks like that has some requests on it.
    states: list[HostState] = []

    class Spy(Fragmentation):
        def choose(self, state, ask, candidates):  # pyright: ignore
            states.append(state)
            return super().choose(state, ask, candidates)

    simulate([node], [*held, arrival], Spy(profile_of(mix)))
    if not states:
        return
    state = states[-1]
    ask = Ask(ask_key(arrival.request()))
    usable = [at for at, device in enumerate(state.devices) if device.share_free >= arrival.share_milli]
    if len(usable) < arrival.gpus or state.cpus_free < arrival.cpus_milli:
        return
    requests = typical(profile)
    choice = policy.choose(state, ask, usable if arrival.gpus else [])
    assert len(choice.devices) == arrival.gpus
    assert choice.score == score(state, arrival, choice.devices, requests)
    if arrival.gpus == 1:
        assert choice.score == max(score(state, arrival, (at,), requests) for at in usable)
    parts = policy.parts(state, ask, choice, choice.devices[0] if choice.devices else -1)
    assert sum(parts.values()) == choice.score


def test_a_share_goes_where_it_leaves_no_fragment() -> None:
    nodes = [Node("a", 64_000, 1000, 1, "A"), Node("b", 64_000, 1000, 1, "A")]
    history = [Arrival("h", 1000, 1, 1, 500, ()), Arrival("h", 1000, 1, 1, 1000, ())]
    asked = [Arrival("one", 1000, 1, 1, 500, ()), Arrival("two", 1000, 1, 1, 500, ())]
    known = simulate(nodes, asked, Fragmentation(profile_of(history)))
    assert {placement.node for placement in known.placements} == {"a"}


def test_the_mix_is_learned_from_the_requests_as_they_come() -> None:
    nodes = [Node(f"n{at}", 64_000, 1000, 2, "A") for at in range(4)]
    asked = [Arrival(f"r{at}", 1000, 1, 1, (300, 700)[at % 2], ()) for at in range(20)]
    policy = Fragmentation()
    result = simulate(nodes, asked, policy)
    assert policy.version > 0
    assert result.allocated_percent == 100.0
