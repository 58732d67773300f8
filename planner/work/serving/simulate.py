"""Event simulation of a placement that serves requests: tokens a second and latencies that the flow alone can't tell.

Each node computes iterations with continuous batching: all requests that wait when the last one ends, in the order of
their arrival. Requests that enter at a later layer of the node take part from that layer on. A link sends one request
after another. A request keeps to the route of its prompt, since the KV cache of its layers is there. Routes are chosen
by interleaved weighted round robin among nodes with room for the cache, with the greatest flow as weights: a prompt
counts with its tokens when it starts, and each further token when it is there.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from itertools import count
from random import Random
from typing import Final, NamedTuple

import msgspec

from .cluster import SINK, SOURCE, Cluster, Kind, Placement, Route

_SLIGHT_SHARE: Final = 0.05
"""Ways with less than this share of what leaves a node are not used: Helix's scheduler (ASPLOS 2025) does so."""
_SMOOTHING: Final = 0.8
"""Share of the newest delay in the mean by which ways are chosen: Helix's artifact runs SWARM with it."""


class Load(msgspec.Struct, frozen=True):
    """Requests that are offered, and for how long.

    Attributes:
        lengths: prompt and output lengths in tokens; each request draws a pair.
        concurrency: requests in progress, each replaced when it ends. None: as many as the KV cache holds, see below.
        start_requests: requests at the start without `concurrency`, `start_gap_seconds` apart. One more follows each
            prompt and each request that ends, while the fullest layer uses no more than `feed_share` of its cache.
        start_gap_seconds: gap between requests at the start.
        feed_share: see above.
        cache_share: share of a node's cache up to which it accepts a request, with the prompt and a mean output.
        by_delay: choose ways by their measured delays, as SWARM (ICML 2023, appendix C) does, instead of by weights. A
            delay is the time from the start of the transmission to the end of the node's iteration. The first one is
            the inverse of the route's weight.
        together_seconds: requests of an iteration that arrive at a node within this time of each other arrive as one.
            0: one after the other, so that an idle node begins an iteration with the first one alone.
        warm_seconds: time before the measurement.
        seconds: time of the measurement.
        seed: seed of the lengths.
        pause_seconds: time between two iterations of a node. Requests that come back in it take part in the next
            one, as in a server of one stage, whose iterations have all its requests.
        stride: tokens of a request that each of its decoding steps stands for. More take less time to simulate; a
            prompt waits for the steps in progress, so that first tokens are later by up to their time.
    """

    lengths: Sequence[tuple[int, int]]
    concurrency: int | None = None
    start_requests: int = 20
    start_gap_seconds: float = 0.1
    feed_share: float = 0.8
    cache_share: float = 0.85
    by_delay: bool = False
    together_seconds: float = 0.002
    warm_seconds: float = 60.0
    seconds: float = 600.0
    seed: int = 0
    pause_seconds: float = 0.0
    stride: int = 1


class Simulated(NamedTuple):
    """Measurements of a simulation after its warm-up.

    Attributes:
        decode_tokens_per_second: output tokens.
        prompt_tokens_per_second: prompt tokens.
        first_token_seconds: median time from a request to the end of its prompt, which gives the first token.
        token_seconds: median time from one token to the next.
        concurrency: mean number of requests in progress.
        finished: requests that ended.
        refused: requests that found no route with room for their cache.
    """

    decode_tokens_per_second: float
    prompt_tokens_per_second: float
    first_token_seconds: float
    token_seconds: float
    concurrency: float
    finished: int
    refused: int


class _Request:
    __slots__ = ("at", "begun", "layers", "left", "nodes", "prompt", "prompted", "reserved", "sent", "ways")

    def __init__(
        self,
        prompt: int,
        output: int,
        ways: list[tuple[_Ways, int]],
        nodes: list[int],
        layers: list[int],
        reserved: int,
        now: float,
    ) -> None:
        self.prompt = prompt
        self.left = output
        self.ways = ways
        self.nodes = nodes
        self.layers = layers
        self.reserved = reserved
        self.at = 0
        self.prompted = False
        self.begun = self.sent = now

    @property
    def tokens(self) -> int:
        """Tokens of the iteration in progress."""
        return 1 if self.prompted else self.prompt


class _Node:
    __slots__ = ("busy", "free", "kind", "layers", "size", "waiting")

    def __init__(self, kind: Kind, layers: int) -> None:
        self.kind = kind
        self.layers = layers
        self.size = self.free = kind.kv_cache_tokens[layers - 1] if kind.kv_cache_tokens else float("inf")
        self.waiting: list[_Request] = []
        self.busy = False

    def batch(self, stride: int) -> tuple[list[_Request], float]:
        """Take what the next iteration computes from those that wait; return it with its seconds."""
        kind = self.kind
        prompts = kind.prompt.most_requests if kind.prompt else None
        decodes = kind.decode.most_requests if kind.decode else None
        if prompts is None and decodes is None:
            taken, self.waiting = self.waiting, []
        else:
            taken, rest = [], list[_Request]()
            room = {False: prompts or len(self.waiting), True: decodes or len(self.waiting)}
            for request in self.waiting:
                if room[request.prompted]:
                    room[request.prompted] -= 1
                    taken.append(request)
                else:
                    rest.append(request)
            self.waiting = rest
        # A request that computes fewer of the layers takes part in the last ones.
        by_layers: dict[int, list[int]] = {}
        for request in taken:
            tokens = by_layers.setdefault(request.layers[request.at], [0, 0])
            tokens[request.prompted] += request.tokens
        seconds = 0.0
        prompt = decode = 0
        order = sorted(by_layers, reverse=True)
        for layers, below in zip(order, [*order[1:], 0], strict=True):
            prompt += by_layers[layers][False]
            decode += by_layers[layers][True]
            seconds += (layers - below) * self._layer_seconds(prompt, decode, stride)
        return taken, seconds + kind.token_seconds * (prompt + decode * stride)

    def _layer_seconds(self, prompt: int, decode: int, stride: int) -> float:
        kind = self.kind
        if kind.prompt is None or kind.decode is None:
            return (prompt + decode * stride) / (kind.tokens_per_second[self.layers - 1] * self.layers)
        return kind.prompt.of(prompt) + kind.decode.of(decode) * stride


class _Ways:
    """The nodes that one hands on to, by interleaved weighted round robin.

    Attributes:
        targets: nodes.
        costs: for each the load of a token, the inverse of its weight; or its mean delay.
        loads: for each its load so far.
    """

    __slots__ = ("costs", "loads", "targets")

    def __init__(self, ways: Sequence[Route]) -> None:
        total = sum(way.tokens_per_second for way in ways)
        kept = [way for way in ways if way.tokens_per_second >= _SLIGHT_SHARE * total]
        self.targets = [way.target for way in kept]
        self.costs = [1 / way.tokens_per_second for way in kept]
        self.loads = [0.0] * len(kept)

    def choose(self, work: float, fits: Sequence[bool]) -> int | None:
        """Choose the way with the least load after this work; None if none fits."""
        best: int | None = None
        least = float("inf")
        for at, cost in enumerate(self.costs):
            after = self.loads[at] + work * cost
            if fits[at] and after < least:
                best, least = at, after
        return best

    def delayed(self, target: int, seconds: float) -> None:
        """Take a delay into the mean of a way."""
        at = self.targets.index(target)
        self.costs[at] += _SMOOTHING * (seconds - self.costs[at])


class _Simulation:
    def __init__(self, cluster: Cluster, placement: Placement, routes: Sequence[Route], load: Load) -> None:
        self.cluster = cluster
        self.placement = placement
        self.load = load
        self.count = len(placement)
        self.random = Random(load.seed)
        self.nodes = {
            node: _Node(cluster.kind_of(node), layers) for node, (_, layers) in enumerate(placement) if layers
        }
        by_origin: dict[int, list[Route]] = defaultdict(list)
        for route in routes:
            by_origin[route.origin].append(route)
        self.ways = {origin: _Ways(ways) for origin, ways in by_origin.items()}
        self.links = {(link.origin, link.target): link for link in cluster.links}
        self.link_free: dict[tuple[int, int], float] = defaultdict(float)
        self.output_mean = sum(output for _, output in load.lengths) / len(load.lengths)
        self.numbers = count()
        self.events: list[tuple[float, int, int, list[_Request]]] = []
        self.progress = 0
        self.layer_cache = [0.0] * cluster.model.layers
        for node, state in self.nodes.items():
            first, layers = placement[node]
            for layer in range(first, first + layers):
                self.layer_cache[layer] += state.size / layers
        self.start = load.warm_seconds
        self.end = load.warm_seconds + load.seconds
        self.decoded = self.prompted = self.finished = self.refused = 0
        self.first_waits: list[float] = []
        self.token_waits: list[float] = []
        self.occupied = 0.0
        self.occupied_since = 0.0

    def run(self) -> Simulated:
        load = self.load
        for number in range(load.concurrency or load.start_requests):
            self._push(number * load.start_gap_seconds, SOURCE, [])
        while self.events:
            now, _, place, requests = heapq.heappop(self.events)
            if now >= self.end:
                break
            if place == SOURCE:
                self._admit(now)
            elif place == SINK:
                self._collect(now, requests)
            elif place >= 0:
                node = self.nodes[place]
                node.waiting += requests
                if not node.busy:
                    self._compute(now, place, node)
            elif place > -3 - self.count:
                place = -3 - place
                self._forward(now, place, requests)
                if load.pause_seconds:
                    self._push(now + load.pause_seconds, -3 - self.count - place, [])
                else:
                    self._resume(now, place)
            else:
                self._resume(now, -3 - self.count - place)
        self._occupy(self.end, 0)
        seconds = load.seconds
        return Simulated(
            self.decoded / seconds,
            self.prompted / seconds,
            _median(self.first_waits),
            _median(self.token_waits) / load.stride,
            self.occupied / seconds,
            self.finished,
            self.refused,
        )

    def _resume(self, now: float, place: int) -> None:
        node = self.nodes[place]
        node.busy = False
        if node.waiting:
            self._compute(now, place, node)

    def _push(self, when: float, place: int, requests: list[_Request]) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), place, requests))

    def _occupy(self, now: float, change: int) -> None:
        """Count requests in progress."""
        since = max(self.occupied_since, self.start)
        if now > since:
            self.occupied += self.progress * (now - since)
        self.occupied_since = now
        self.progress += change

    def _admit(self, now: float) -> None:
        prompt, output = self.random.choice(self.load.lengths)
        reserved = int(prompt + self.output_mean)
        # By delay each request counts alike, and the way with the least load before this one is taken.
        by_delay = self.load.by_delay
        work, ahead = (1.0, 0.0) if by_delay else (float(prompt), float(prompt))
        nodes: list[int] = []
        layers: list[int] = []
        chosen: list[tuple[_Ways, int]] = []
        origin, at = SOURCE, 0
        while origin != SINK:
            ways = self.ways.get(origin)
            fits = [] if ways is None else [target == SINK or self._fits(target, reserved) for target in ways.targets]
            way = None if ways is None else ways.choose(ahead, fits)
            if ways is None or way is None:
                self.refused += now >= self.start
                return
            chosen.append((ways, way))
            origin = ways.targets[way]
            if origin != SINK:
                first, held = self.placement[origin]
                nodes.append(origin)
                layers.append(first + held - at)
                at = first + held
        for ways, way in chosen:
            ways.loads[way] += work * ways.costs[way]
        for node, held in zip(nodes, layers, strict=True):
            self.nodes[node].free -= reserved * held
        self._occupy(now, 1)
        request = _Request(prompt, output, [] if by_delay else chosen, nodes, layers, reserved, now)
        self._send(now, SOURCE, nodes[0], [request])

    def _fits(self, node: int, tokens: int) -> bool:
        state = self.nodes[node]
        return state.free - tokens * state.layers >= (1 - self.load.cache_share) * state.size

    def _use(self) -> float:
        """Share of the cache that is in use in the fullest layer."""
        free = [0.0] * len(self.layer_cache)
        for node, state in self.nodes.items():
            first, layers = self.placement[node]
            for layer in range(first, first + layers):
                free[layer] += state.free / layers
        shares = [1 - left / size for left, size in zip(free, self.layer_cache, strict=True) if 0 < size < float("inf")]
        return max(shares, default=0.0)

    def _compute(self, now: float, place: int, node: _Node) -> None:
        requests, seconds = node.batch(self.load.stride)
        node.busy = True
        self._push(now + seconds, -3 - place, requests)

    def _forward(self, now: float, place: int, requests: list[_Request]) -> None:
        targets: dict[int, list[_Request]] = {}
        for request in requests:
            if self.load.by_delay:
                origin = request.nodes[request.at - 1] if request.at else SOURCE
                self.ways[origin].delayed(place, now - request.sent)
            request.at += 1
            target = request.nodes[request.at] if request.at < len(request.nodes) else SINK
            targets.setdefault(target, []).append(request)
        for target, group in targets.items():
            self._send(now, place, target, group)

    def _send(self, now: float, origin: int, target: int, requests: list[_Request]) -> None:
        model = self.cluster.model
        size = model.token_bytes if origin == SOURCE or target == SINK else model.carried_bytes
        link = self.links[origin, target]
        rate, latency = link.bytes_per_second, link.latency_seconds
        sent = max(now, self.link_free[origin, target])
        group: list[_Request] = []
        first = sent
        stride, together = self.load.stride, self.load.together_seconds
        for request in requests:
            request.sent = sent
            # Each token of a step is sent when it is there: the time of the last and the latency count for all.
            steps = stride if request.prompted else 1
            end = sent + size * request.tokens * steps / rate
            if group and end - first >= together:
                self._push(sent + latency * self._steps(group), target, group)
                group = []
            if not group:
                first = end
            group.append(request)
            sent = end
        self._push(sent + latency * self._steps(group), target, group)
        self.link_free[origin, target] = sent

    def _steps(self, group: Sequence[_Request]) -> int:
        """Times that a latency counts for requests that travel together."""
        return 1 if self.load.stride == 1 or any(not request.prompted for request in group) else self.load.stride

    def _collect(self, now: float, requests: list[_Request]) -> None:
        measured, stride = now >= self.start, self.load.stride
        again: dict[int, list[_Request]] = {}
        for request in requests:
            ended = False
            if measured:
                (self.token_waits if request.prompted else self.first_waits).append(now - request.begun)
            if request.prompted:
                generated = min(stride, request.left)
                request.left -= generated
                for ways, at in request.ways:
                    ways.loads[at] += generated * ways.costs[at]
                self.decoded += measured * generated
                ended = request.left <= 0
            else:
                self.prompted += request.prompt * measured
            launch = ended if self.load.concurrency else ended or not request.prompted
            request.prompted = True
            if ended:
                self._occupy(now, -1)
                self.finished += measured
                for node, held in zip(request.nodes, request.layers, strict=True):
                    self.nodes[node].free += request.reserved * held
            else:
                request.at = 0
                request.begun = now
                again.setdefault(request.nodes[0], []).append(request)
            if launch and (self.load.concurrency or self._use() <= self.load.feed_share):
                self._push(now + self.load.start_gap_seconds, SOURCE, [])
        for node, group in again.items():
            self._send(now, SOURCE, node, group)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else float("nan")


def simulate(cluster: Cluster, placement: Placement, routes: Sequence[Route], load: Load) -> Simulated:
    """Serve a load in virtual time; the same arguments give the same result.

    Args:
        cluster: nodes with their times of iterations and links. Without times an iteration takes its tokens divided by
            the node's tokens a second.
        placement: layers of each node.
        routes: traffic between nodes, as weights.
        load: requests.
    """
    return _Simulation(cluster, placement, routes, load).run()
