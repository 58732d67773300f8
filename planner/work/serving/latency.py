"""Time of one request alone on a cluster: to its first token, and from one token to the next."""

from __future__ import annotations

from collections.abc import Sequence

from .cluster import SINK, SOURCE, Cluster, Kind, Placement, Requirement, Route


def idle_seconds(cluster: Cluster, placement: Placement, routes: Sequence[Route], prompt_tokens: int | None) -> float:
    """Compute the time from the source to the sink on the slowest of the routes, with nothing else to do.

    Args:
        cluster: nodes with their times of iterations; where they are unknown, tokens divided by tokens a second.
        placement: layers of each node.
        routes: ways with traffic.
        prompt_tokens: length of a prompt; None for one token of the output.
    """
    model = cluster.model
    tokens = prompt_tokens or 1
    links = {(link.origin, link.target): link for link in cluster.links}
    # Seconds until a token may leave, and the layer that comes next. All ways to a node come from ends before its own.
    leaves: dict[int, float] = {SOURCE: 0.0}
    ends = {node: first + layers for node, (first, layers) in enumerate(placement)} | {
        SOURCE: 0,
        SINK: model.layers + 1,
    }
    for route in sorted(routes, key=lambda route: (ends[route.target], ends[route.origin])):
        origin, target = route.origin, route.target
        link = links[origin, target]
        size = model.token_bytes if origin == SOURCE or target == SINK else model.carried_bytes
        seconds = leaves[origin] + link.latency_seconds + tokens * size / link.bytes_per_second
        if target != SINK:
            kind, held = cluster.kind_of(target), placement[target][1]
            seconds += _compute(kind, held, ends[target] - ends[origin], tokens, prompt_tokens is not None)
        leaves[target] = max(leaves.get(target, 0.0), seconds)
    return leaves.get(SINK, float("inf"))


def in_time(cluster: Cluster, placement: Placement, routes: Sequence[Route], required: Requirement) -> bool:
    """Return true if each route meets the limits on latency."""
    token, first = required.token_seconds, required.first_token_seconds
    return (token is None or idle_seconds(cluster, placement, routes, None) <= token) and (
        first is None or idle_seconds(cluster, placement, routes, required.prompt_tokens) <= first
    )


def layer_seconds(kind: Kind, prompt_tokens: int | None) -> float:
    """Compute the time of one layer for a prompt, or for one token of the output if None."""
    layers = kind.most_layers
    return _compute(kind, layers, layers, prompt_tokens or 1, prompt_tokens is not None) / layers


def _compute(kind: Kind, held: int, layers: int, tokens: int, prompt: bool) -> float:
    times = kind.prompt if prompt else kind.decode
    if times is None:
        return tokens * layers / (held * kind.tokens_per_second[held - 1])
    return layers * times.of(tokens) + tokens * kind.token_seconds
