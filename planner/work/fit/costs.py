"""Memory and time of runs of layers on a device, or on a group of like devices that works as one.

Times are a roofline (Williams et al. 2009): the longer of reading the weights and the KV cache at memory bandwidth, and
of the operations at their rate. A group divides both by its size, and adds two all-reduces a layer (Shoeybi et al.
2019), each over a ring (Patarasuk and Yuan 2009).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ....schemas.models.description import ModelDescription
from ....schemas.models.serving import ServeWork
from ....schemas.models.sizes import (
    BATCH_TOKENS,
    activation_bytes,
    kv_sequence_bytes,
    kv_token_bytes,
    layer_operations,
    read_bytes,
    sizes,
    working_bytes,
)
from .rates import Rates


class Unit(NamedTuple):
    """A device, or like devices of one host that work as one.

    Attributes:
        devices: indexes of its devices.
        memory: bytes of each of them that may be used.
        rates: of each of them.
        host: its host.
    """

    devices: tuple[int, ...]
    memory: int
    rates: Rates
    host: str

    @property
    def size(self) -> int:
        """Number of its devices."""
        return len(self.devices)


def _alike(model: ModelDescription, layers: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of layers that cost the same: each its first layer, and the one after its last."""
    dense = model.experts.dense_layers if model.experts is not None else 0
    starts = [at for at in range(len(layers)) if not at or layers[at] != layers[at - 1] or at == dense]
    return list(zip(starts, [*starts[1:], len(layers)], strict=True))


class Costs:
    """Costs of a model's layers, computed once for all plans.

    Args:
        work: the model, with what it has to hold.

    Attributes:
        work: the same.
        sizes: bytes of weights.
        kv_layer_bytes: KV cache of all asked sequences in one layer.
        working: bytes of intermediate results on each device.
        runs: runs of layers that cost the same: each its first layer, and the one after its last.
    """

    def __init__(self, work: ServeWork) -> None:
        self.work = work
        self.sizes = sizes(work.model)
        self.kv_layer_bytes = work.sequences * kv_sequence_bytes(work.model, work.context_tokens, work.kv_dtype)
        batch = min(BATCH_TOKENS, max(work.sequences, work.context_tokens))
        self.working = round(working_bytes(work.model, batch, work.sequences))
        self._known: dict[tuple[int, float], float] = {}
        self.runs = _alike(work.model, self.sizes.layers)

    @property
    def model(self) -> ModelDescription:
        """The model."""
        return self.work.model

    @property
    def prompt_tokens(self) -> int:
        """Length of a prompt."""
        return self.work.prompt_tokens or max(1, self.work.context_tokens // 2)

    def kv_parts(self, size: int) -> int:
        """Number of devices over which a group of some size divides the KV cache: heads are not split."""
        attention = self.model.attention
        return 1 if attention.latent is not None else min(size, attention.kv_heads)

    def weights(self, first: int, end: int, size: int = 1) -> int:
        """Bytes of weights that each device of a group holds for the layers `first` to `end`."""
        held = sum(self.sizes.layers[first:end])
        if first == 0 and end:
            held += self.sizes.embedding
        if end == self.model.layers and end > first:
            held += self.sizes.last if first or self.sizes.head else self.sizes.other
        return -(-held // size)

    def kv(self, layers: int, size: int = 1) -> int:
        """Bytes of KV cache of the asked sequences that each device of a group holds."""
        return round(layers * self.kv_layer_bytes / self.kv_parts(size))

    def fits(self, unit: Unit, first: int, end: int) -> bool:
        """True if a unit holds some layers with their KV cache."""
        held = self.weights(first, end, unit.size) + self.kv(end - first, unit.size)
        return held + self.working <= unit.memory

    def held_sequences(self, unit: Unit, first: int, end: int) -> int:
        """Number of sequences of `context_tokens` whose KV cache a unit holds for some layers."""
        free = unit.memory - self.weights(first, end, unit.size) - self.working
        each = (end - first) * self.kv_layer_bytes / self.work.sequences / self.kv_parts(unit.size)
        return max(0, int(free / each)) if each else 2**31

    def decode_seconds(self, unit: Unit, first: int, end: int, batch: float) -> float | None:
        """Time of one iteration that generates a token of each of `batch` sequences; None if a rate is unknown."""
        return self._seconds(unit, first, end, batch, self.work.context_tokens, batch)

    def prompt_seconds(self, unit: Unit, first: int, end: int) -> float | None:
        """Time to compute one prompt; None if a rate is unknown."""
        if not unit.rates.operations_per_second:
            return None
        return self._seconds(unit, first, end, self.prompt_tokens, self.prompt_tokens / 2, 1)

    def _read(self, layer: int, batch: float) -> float:
        found = self._known.get((layer, batch))
        if found is None:
            found = self._known[layer, batch] = read_bytes(self.work.model, layer, batch)
        return found

    def _seconds(
        self, unit: Unit, first: int, end: int, tokens: float, context: float, sequences: float
    ) -> float | None:
        rates = unit.rates
        if not rates.bytes_per_second:
            return None
        total = 0.0
        each_kv = kv_token_bytes(self.model, self.work.kv_dtype) * context * sequences / self.kv_parts(unit.size)
        for start, stop in self.runs:
            alike = min(stop, end) - max(start, first)
            if alike <= 0:
                continue
            read = self._read(start, tokens) / unit.size + each_kv
            seconds = read / rates.bytes_per_second
            if rates.operations_per_second:
                operations = tokens * layer_operations(self.model, start, context) / unit.size
                seconds = max(seconds, operations / rates.operations_per_second)
            total += alike * seconds
        if end == self.model.layers and end > first:
            total += self.head_seconds(unit)
        return total + (end - first) * self._all_reduce(unit, tokens) * 2

    def head_seconds(self, unit: Unit) -> float:
        """Time to read the output head, which the last unit does for each iteration."""
        return self.sizes.last / unit.size / unit.rates.bytes_per_second

    def _all_reduce(self, unit: Unit, tokens: float) -> float:
        """Time to sum the activations of some tokens over a group.

        A ring passes on 2 · (n - 1) times. Where all devices are linked, each reads from all others at once, in two
        steps (two-shot all-reduce, as vLLM's custom kernel does).
        """
        size, links = unit.size, self.work.links
        if size == 1:
            return 0.0
        sent = 2 * (size - 1) / size * tokens * activation_bytes(self.model)
        if unit.rates.link_bytes_per_second:
            return sent / unit.rates.link_bytes_per_second + 2 * links.host_latency_seconds
        return sent / links.host_bytes_per_second + 2 * (size - 1) * links.host_latency_seconds

    def link_seconds(self, origin: Unit, target: Unit, tokens: float) -> float:
        """Time to send the activations of some tokens from one unit to another."""
        links, sent = self.work.links, tokens * activation_bytes(self.model)
        if origin.host == target.host:
            both = min(origin.rates.link_bytes_per_second, target.rates.link_bytes_per_second)
            return sent / (both or links.host_bytes_per_second) + links.host_latency_seconds
        return sent / links.network_bytes_per_second + links.network_latency_seconds

    def item_costs(self, units: Sequence[Unit]) -> tuple[list[float], list[int]]:
        """Costs and sizes of the pieces of a pipeline: each layer, with embedding and head at its ends.

        A cost is the bytes that one iteration reads, so that a unit's speed is its bandwidth.
        """
        batch = max(1.0, self.work.sequences / max(1, len(units)))
        kv = self.kv_layer_bytes
        each = [(self._read(start, batch) + kv * batch / self.work.sequences, end - start) for start, end in self.runs]
        costs = [cost for cost, count in each for _ in range(count)]
        held = [size + round(kv) for size in self.sizes.layers]
        held[0] += self.sizes.embedding
        costs[-1] += self.sizes.last
        held[-1] += self.sizes.last if self.model.layers > 1 or self.sizes.head else self.sizes.other
        return costs, held
