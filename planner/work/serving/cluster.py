"""Devices, links and a model to serve, and a placement of its layers, as plain state.

A node holds one interval of the model's layers. It is one device, or a tensor-parallel group that works as one.
A token of work passes all layers in order, from the source (where requests come from) over nodes to the sink.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

SOURCE = -1
"""The end of a link where requests come from."""
SINK = -2
"""The end of a link where tokens go to."""


class Batch(msgspec.Struct, frozen=True):
    """Seconds that a node computes one layer for one iteration, by the tokens in its batch.

    Attributes:
        tokens: sizes of batches, rising from 1 or more.
        seconds: for each of them the seconds of one layer. Below the first size as for it, between sizes linear,
            beyond the last in proportion to it.
        most_requests: requests in one iteration at most; None: no limit.
    """

    tokens: tuple[float, ...]
    seconds: tuple[float, ...]
    most_requests: int | None = None

    def of(self, tokens: float) -> float:
        """Compute the seconds of one layer for a batch of so many tokens, 0 for none."""
        if tokens <= 0:
            return 0.0
        if tokens >= self.tokens[-1]:
            return self.seconds[-1] * tokens / self.tokens[-1]
        at = bisect_right(self.tokens, tokens)
        if at == 0:
            return self.seconds[0]
        low, high = self.tokens[at - 1], self.tokens[at]
        return self.seconds[at - 1] + (self.seconds[at] - self.seconds[at - 1]) * (tokens - low) / (high - low)


class Kind(msgspec.Struct, frozen=True):
    """Nodes that hold and compute layers alike.

    Attributes:
        tokens_per_second: by number of layers held, from 1: tokens a second. Its length is the most layers that fit.
        kv_cache_tokens: by number of layers held, from 1: tokens × layers of KV cache that fit with them; a request
            with t tokens in a node that computes n layers of it takes t × n. Empty: the cache is no limit.
        prompt: time of iterations over prompts, None where it is only known by `tokens_per_second`.
        decode: time of iterations that generate a token each, None likewise.
        token_seconds: seconds to copy one token's activation in and out, once for all layers.
    """

    tokens_per_second: tuple[float, ...]
    kv_cache_tokens: tuple[float, ...] = ()
    prompt: Batch | None = None
    decode: Batch | None = None
    token_seconds: float = 0.0

    @property
    def most_layers(self) -> int:
        """Number of layers that fit at most."""
        return len(self.tokens_per_second)


class Model(msgspec.Struct, frozen=True):
    """Numbers of a model that decide on traffic.

    Attributes:
        layers: number of layers.
        token_bytes: bytes of a token, sent from the source and to the sink.
        activation_bytes: bytes of the activation of a token, sent with it from node to node.
    """

    layers: int
    token_bytes: float
    activation_bytes: float

    @property
    def carried_bytes(self) -> float:
        """Bytes of a token between two nodes."""
        return self.token_bytes + self.activation_bytes


class Link(msgspec.Struct, frozen=True):
    """A way for traffic in one direction.

    Attributes:
        origin: index of a node, or SOURCE.
        target: index of a node, or SINK.
        bytes_per_second: most traffic.
        latency_seconds: time until the first byte arrives.
    """

    origin: int
    target: int
    bytes_per_second: float
    latency_seconds: float = 0.0


class Cluster(msgspec.Struct, frozen=True):
    """Nodes to serve a model with.

    Attributes:
        model: the model.
        kinds: kinds of nodes.
        nodes: for each node the index of its kind.
        links: links in each direction, at most one from a node to another. Where there is none, nothing is sent.
        nic_bytes_per_second: most traffic into one node, and as much out of it (its network card).
    """

    model: Model
    kinds: tuple[Kind, ...]
    nodes: tuple[int, ...]
    links: tuple[Link, ...]
    nic_bytes_per_second: float

    def kind_of(self, node: int) -> Kind:
        """Return the kind of a node."""
        return self.kinds[self.nodes[node]]


class Interval(NamedTuple):
    """Layers of one node: `layers` of them from `first`; 0 layers leave the node out."""

    first: int
    layers: int

    @property
    def end(self) -> int:
        """The layer after the last."""
        return self.first + self.layers


Placement = Sequence[Interval]
"""For each node of a cluster the interval of layers that it holds."""


class Route(NamedTuple):
    """Traffic from one node to another in the greatest flow.

    Attributes:
        origin: index of a node, or SOURCE.
        target: index of a node, or SINK.
        tokens_per_second: tokens that pass; the share of it in all that leaves `origin` is the weight of this way.
    """

    origin: int
    target: int
    tokens_per_second: float


class Placed(NamedTuple):
    """A placement, with what it carries.

    Attributes:
        placement: layers of each node.
        flow: tokens a second that pass all layers, at most.
        bound: tokens a second that no placement on this cluster exceeds.
        routes: the flow between nodes, in order of `origin` and `target`.
        steps: number of placements evaluated.
    """

    placement: tuple[Interval, ...]
    flow: float
    bound: float
    routes: tuple[Route, ...]
    steps: int

    @property
    def gap(self) -> float:
        """Most that the best flow may exceed this one, as a share of the flow; infinite where nothing flows."""
        return (self.bound - self.flow) / self.flow if self.flow > 0 else float("inf")


class Requirement(msgspec.Struct, frozen=True):
    """Requirements of a placement apart from flow; None: no requirement.

    Attributes:
        enough_flow: tokens a second at which the search ends, since more is not needed.
        kv_cache_tokens: tokens of requests in progress whose KV cache must fit in all layers at once, for example
            concurrent sequences × context length.
        token_seconds: most seconds from one token of a request to its next, with the nodes' links otherwise idle.
        first_token_seconds: most seconds from a request to its first token, likewise, for a prompt of `prompt_tokens`.
        prompt_tokens: length of that prompt.
    """

    enough_flow: float | None = None
    kv_cache_tokens: float | None = None
    token_seconds: float | None = None
    first_token_seconds: float | None = None
    prompt_tokens: int = 1024
