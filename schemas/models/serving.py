"""Serving of a model over devices: what a request asks for, and the plans that answer it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

from .description import ModelDescription, Text

Tokens = Annotated[int, Meta(ge=1, le=2**24)]
PositiveRate = Annotated[float, Meta(gt=0, le=1e18)]
Seconds = Annotated[float, Meta(gt=0, le=86400)]
MAX_PLAN_SECONDS = 10.0
"""Longest time that a planner searches for a placement."""
MAX_RATES = 256
"""Most rates of devices in a question."""


class DeviceRate(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Measured rates of devices, which take the place of those of data sheets.

    Attributes:
        device: glob over the device's name, case-insensitive, such as `*H100*`.
        memory_bytes_per_second: bandwidth that decoding reaches: bytes of weights read, over the time.
        operations_per_second: floating-point operations that prompts reach; null keeps the rate of the data sheet.
        source: where they were measured, in words.
    """

    device: Text
    memory_bytes_per_second: PositiveRate
    operations_per_second: PositiveRate | None = None
    source: Text = ""


class Links(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Rates of the links between devices. Corral does not measure them: the defaults are assumptions.

    Attributes:
        host_bytes_per_second: between two devices of a host; by default 25 GB/s, which PCIe 4.0 x16 reaches.
        host_latency_seconds: until the first byte arrives there.
        network_bytes_per_second: between hosts; by default that of 10 Gbit/s.
        network_latency_seconds: until the first byte arrives there.
    """

    host_bytes_per_second: PositiveRate = 25e9
    host_latency_seconds: Annotated[float, Meta(ge=0, le=10)] = 1e-5
    network_bytes_per_second: PositiveRate = 1.25e9
    network_latency_seconds: Annotated[float, Meta(ge=0, le=10)] = 1e-4


class ServeWork(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A model to serve, with what it has to hold.

    Attributes:
        model: the model.
        context_tokens: longest sequence, prompt and output together.
        sequences: number of sequences at once, each of `context_tokens`.
        prompt_tokens: length of a prompt for the time to the first token; null for half of `context_tokens`.
        kv_dtype: type of the KV cache, such as `float8_e4m3fn`; empty for that of the plain weights.
        max_token_seconds: longest time from a token to the next of the same sequence; null for no limit.
        max_first_token_seconds: longest time to the first token; null for no limit.
        memory_share: part of each device's free memory that may be used, as vLLM's `gpu_memory_utilization`.
        tensor_parallel: true if like devices of one host may work as one.
        rates: measured rates of devices.
        links: rates of links.
        seconds: longest time to search for a placement.
        seed: of the search; the same seed gives the same plan where the time suffices.
    """

    model: ModelDescription
    context_tokens: Tokens = 4096
    sequences: Annotated[int, Meta(ge=1, le=65536)] = 1
    prompt_tokens: Tokens | None = None
    kv_dtype: Text = ""
    max_token_seconds: Seconds | None = None
    max_first_token_seconds: Seconds | None = None
    memory_share: Annotated[float, Meta(ge=0.1, le=1)] = 0.9
    tensor_parallel: bool = True
    rates: Annotated[list[DeviceRate], Meta(max_length=MAX_RATES)] = []
    links: Links = Links()
    seconds: Annotated[float, Meta(gt=0, le=MAX_PLAN_SECONDS)] = 2.0
    seed: Annotated[int, Meta(ge=0, le=2**31)] = 0


class StageDevice(Struct, frozen=True, kw_only=True):
    """A device of a stage, with its memory.

    Attributes:
        host: the host's name.
        device: uuid of the device.
        index: the driver's index on that host.
        model: the device's name.
        memory_bytes: device memory that the plan may use.
        weights_bytes: weights that it holds.
        working_bytes: room for intermediate results: an estimate.
        kv_bytes: KV cache that the asked sequences need.
        left_bytes: what is left for more KV cache.
        total_bytes: all memory of the device, also what is in use by others; 0 if unknown.
        vendor: of the device, such as `nvidia` or `amd`; empty from an earlier planner.
        visible_id: value that selects it in the variable of the vendor's runtime, if its driver reports one.
    """

    host: str
    device: str
    index: int = 0
    model: str = ""
    memory_bytes: int = 0
    weights_bytes: int = 0
    working_bytes: int = 0
    kv_bytes: int = 0
    left_bytes: int = 0
    total_bytes: int = 0
    vendor: str = ""
    visible_id: str = ""


class ServeStage(Struct, frozen=True, kw_only=True):
    """A run of layers on one device, or on several that work as one (a tensor-parallel group).

    Attributes:
        first_layer: its first layer, from 0.
        layers: number of its layers.
        devices: its devices.
        tokens_per_second: tokens that pass it at most; null if a rate is unknown.
        traffic: part of all tokens that pass it, 0 to 1.
    """

    first_layer: int
    layers: int
    devices: list[StageDevice]
    tokens_per_second: float | None = None
    traffic: float = 1.0


class ServeRoute(Struct, frozen=True, kw_only=True):
    """Traffic between two stages.

    Attributes:
        origin: index of a stage; -1 for where requests come from.
        target: index of a stage; -1 for where tokens go to.
        weight: part of what leaves `origin` that takes this way, 0 to 1.
        tokens_per_second: tokens on it; null if a rate is unknown.
    """

    origin: int
    target: int
    weight: float = 1.0
    tokens_per_second: float | None = None


class ExpectedService(Struct, frozen=True, kw_only=True):
    """Service of a plan in an event simulation: as many requests at once as are asked, one after the other.

    Prompts are computed by the stages that decode, requests end at different times, and each waits for its turn. Times
    of layers are those of the plan: upper bounds on speed, unless they were measured.

    Attributes:
        tokens_per_second: tokens generated a second by all requests together.
        token_seconds: median time from a token to the next of a request.
        first_token_seconds: median time from a request to its first token, with waiting.
        prompt_tokens: length of each prompt.
        output_tokens: mean length of outputs, which are of eight lengths up to what the context leaves.
        step_tokens: tokens of a request that each step of the simulation generates: with more than one, to save time,
            tokens per second may be off by a third, and first tokens come too late.
    """

    tokens_per_second: float
    token_seconds: float
    first_token_seconds: float
    prompt_tokens: int
    output_tokens: int
    step_tokens: int = 1


class PlanKind(StrEnum):
    """Shape of a plan."""

    ONE_DEVICE = "one_device"
    """All layers on one device."""
    TENSOR_PARALLEL = "tensor_parallel"
    """All layers on like devices of one host that work as one."""
    PIPELINE = "pipeline"
    """Runs of layers, one after the other."""
    FLOW = "flow"
    """Replicas, or stages that overlap: several ways through the layers."""


class ServePlan(Struct, frozen=True, kw_only=True):
    """A placement of a model's layers.

    Attributes:
        kind: its shape.
        stages: runs of layers with their devices, by first layer.
        routes: ways of the tokens between stages.
        replicas: number of whole copies of the model; 0 where copies share stages.
        tensor_parallel: number of devices in its largest group.
        sequences: sequences of `context_tokens` that its KV cache holds.
        tokens_per_second: tokens generated a second with the asked sequences, at most; null if a rate is unknown.
        token_seconds: time from a token to the next of a sequence; null if a rate is unknown.
        first_token_seconds: time to the first token of a prompt, without waiting; null if a rate is unknown.
        expected: what it serves in a simulation of requests; null if a rate is unknown, or that would take too long.
        rests_on: what these figures rest on, in words.
        warnings: limits that it breaks, in words.
    """

    kind: PlanKind
    stages: list[ServeStage]
    routes: list[ServeRoute] = []
    replicas: int = 1
    tensor_parallel: int = 1
    sequences: int = 0
    tokens_per_second: float | None = None
    token_seconds: float | None = None
    first_token_seconds: float | None = None
    expected: ExpectedService | None = None
    rests_on: list[str] = []
    warnings: list[str] = []

    @property
    def devices(self) -> list[StageDevice]:
        """All its devices, in the order of the stages."""
        return [device for stage in self.stages for device in stage.devices]


class FitVerdict(StrEnum):
    """Verdict on whether a model can be served."""

    ONE_DEVICE = "one_device"
    SEVERAL_DEVICES = "several_devices"
    NO = "no"


class ServeFit(Struct, frozen=True, kw_only=True):
    """Verdict on whether devices can serve a model, with plans.

    Attributes:
        verdict: on how many devices it fits.
        message: the answer in one sentence.
        nearest: what would have to change for it to fit, or to fit on one device; empty if nothing.
        plans: plans that no other beats, the best first; empty if it does not fit.
        bound_tokens_per_second: tokens a second that no placement on the considered devices exceeds, by their rates
            and the asked sequences; null if a rate is unknown.
        weights_bytes: bytes of its weights.
        kv_bytes: KV cache of the asked sequences.
        kv_token_bytes: KV cache of one token in all layers.
        working_bytes: room for intermediate results on each device: an estimate.
        devices: number of devices that were considered.
        usable_bytes: memory of all of them that may be used.
        short_bytes: memory that is missing; 0 if it fits.
    """

    verdict: FitVerdict
    message: str
    nearest: str = ""
    plans: list[ServePlan] = []
    bound_tokens_per_second: float | None = None
    weights_bytes: int = 0
    kv_bytes: int = 0
    kv_token_bytes: float = 0.0
    working_bytes: int = 0
    devices: int = 0
    usable_bytes: int = 0
    short_bytes: int = 0
