"""Rates of devices from what servers of the same model have printed in jobs of `corral serve --start`.

vLLM prints its throughput with the number of requests every ten seconds, llama.cpp the speed of each request. Tokens a
second G of R requests in a chain of m stages tell the bandwidth: a token waits until all stages have read their weights
once, for a batch of R / m (at least one). So each of t devices in a group has read weights(R / m) · G / (R · t) bytes a
second. KV cache and links are not counted: devices reach at least this. The best of all intervals counts, since servers
are idle in others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Final, NamedTuple

from msgspec.structs import replace

from ...schemas.models.description import ModelDescription
from ...schemas.models.serving import DeviceRate
from ...schemas.models.sizes import read_bytes, sizes
from ..server_commands.jobs import ServedCopy
from .tables import literal

_VLLM: Final = re.compile(
    r"Avg prompt throughput: ([\d.]+) tokens/s, Avg generation throughput: ([\d.]+) tokens/s, Running: (\d+) reqs"
)
_LLAMA_CPP: Final = re.compile(
    r"(?<!prompt) eval time =\s*[\d.]+ ms /\s*(\d+) tokens \(.*?([\d.]+) tokens per second\)"
)
_LEAST_TOKENS: Final = 16
"""Output of a request below which its speed says little."""


class Throughput(NamedTuple):
    """Output of a server in an interval.

    Attributes:
        tokens_per_second: tokens generated.
        requests: that they were for.
    """

    tokens_per_second: float
    requests: int


def throughputs(output: str) -> list[Throughput]:
    """Intervals in what a server has printed, in which it generated and computed no prompts."""
    found = [
        Throughput(float(generated), int(running))
        for prompt, generated, running in _VLLM.findall(output)
        if float(prompt) == 0 and float(generated) > 0 and int(running)
    ]
    # A request of llama.cpp may have shared the device with others: then it was slower, and another one counts.
    found += [Throughput(float(rate), 1) for tokens, rate in _LLAMA_CPP.findall(output) if int(tokens) >= _LEAST_TOKENS]
    return found


def same_model(one: ModelDescription, other: ModelDescription) -> bool:
    """True if two models have the same layers in the same number format, whatever they are called."""
    return _layers(one) == _layers(other)


def _layers(model: ModelDescription) -> ModelDescription:
    return replace(model, name="", header=None, assumed=[], context_tokens=0, converted_from="")


def bandwidth(copy: ServedCopy, measured: Iterable[Throughput]) -> float | None:
    """Bytes of weights that each device of a copy has read a second, at least; None if nothing was measured."""
    model, stages = copy.work.model, copy.stages
    head = sizes(model).last
    group = len(stages[0].devices)
    found: list[float] = []
    for tokens, requests in measured:
        batch = max(1.0, requests / len(stages))
        read = head + sum(read_bytes(model, layer, batch) for layer in range(model.layers))
        found.append(read * tokens / requests / group)
    return max(found, default=None)


def rate_of(copy: ServedCopy, output: str, job_id: str, when: datetime) -> DeviceRate | None:
    """Rate of the product that a copy was served on; None if nothing was measured, or it had several products.

    Args:
        copy: what was served.
        output: what the server has printed.
        job_id: of its job.
        when: it was submitted.
    """
    products = {device.model for stage in copy.stages for device in stage.devices}
    groups = {len(stage.devices) for stage in copy.stages}
    read = bandwidth(copy, throughputs(output)) if len(products) == len(groups) == 1 else None
    if read is None:
        return None
    source = f"{copy.server} in job {job_id} of {when:%Y-%m-%d}, at least"
    return DeviceRate(device=literal(products.pop()), memory_bytes_per_second=read, source=source)


def best_rates(found: Sequence[DeviceRate]) -> list[DeviceRate]:
    """The greatest rate of each product."""
    best: dict[str, DeviceRate] = {}
    for rate in found:
        if rate.device not in best or rate.memory_bytes_per_second > best[rate.device].memory_bytes_per_second:
            best[rate.device] = rate
    return list(best.values())
