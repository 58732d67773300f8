"""What collectors publish: samples as columns, inventory, processes, events, and reports on themselves.

All of it is MessagePack. A field that a reader does not know is ignored and one that is missing takes its default, so
old and new agents live side by side; a change that breaks this rule raises `SCHEMA_VERSION` and the subject's version.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from msgspec import Struct, field

SCHEMA_VERSION: Final = 1


class SampleBatch(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="sample_batch", tag_field="type"):
    """The devices of one host over one or more ticks, as arrays.

    With T ticks and D devices each column holds T·D values, tick by tick (`value[tick * D + device]`), as raw
    little-endian numbers of the type that the catalogue gives for the metric. A receiver joins the bytes of the same
    column over many messages and has the array: no value is touched one by one.

    Attributes:
        host: the host's name, as in the subject.
        agent: id of one run of the collector; new at each start.
        sequence: counts the messages of that run from 1.
        source: `nvml`, `amdsmi`, `simulated` or `replay`.
        devices: the D device uuids.
        times_ns: T·D times of reading, `<i8`, nanoseconds since the epoch, UTC.
        columns: metric name → T·D values. A metric that no device supports is left out.
        nulls: metric name → T·D bytes, 1 where the value is null (its number is then meaningless, by custom 0).
            Left out for a metric without nulls.
        version: of the schema.
    """

    host: str
    agent: str
    sequence: int
    source: str
    devices: list[str]
    times_ns: bytes
    columns: dict[str, bytes]
    nulls: dict[str, bytes] = {}
    version: int = SCHEMA_VERSION


class HostInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a host has beside its devices.

    Attributes:
        name: as in subjects: letters, digits, `-` and `_`.
        address: the name that the operating system gives, for people and ssh.
        cpus: logical cores that work may use.
        memory_bytes: host RAM.
        driver: version of the GPU driver.
        labels: set by the operator (`--label rack=r1`); requests may select by them.
        machine_ids: what names the machine whatever the host is called, hashed: its installation's id and its boot's.
            Two names of one machine have one in common. Empty if unknown, or where the host is not there.
    """

    name: str
    address: str = ""
    cpus: int = 0
    memory_bytes: int = 0
    driver: str = ""
    labels: dict[str, str] = {}
    machine_ids: list[str] = []


class DeviceInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Identity and capabilities of a device; nothing here moves while the device runs.

    Attributes:
        uuid: as the driver gives it, where it is the device's own; names the device everywhere in Corral.
        host: the host's name.
        index: the driver's index on that host.
        name: the product's name, such as `NVIDIA H100 80GB HBM3`.
        vendor: `nvidia`, `amd`, …
        architecture: such as `Hopper`; empty if unknown.
        compute_capability: such as `9.0`; empty if the vendor has no such thing.
        sm_count: streaming multiprocessors (compute units on AMD); 0 if unknown.
        memory_bytes: device memory in all.
        memory_bandwidth_bytes_per_second: the peak, from bus width and memory clock; 0 if unknown.
        sm_clock_max_megahertz: highest clock; 0 if unknown.
        power_limit_max_watts: the highest limit that may be set; 0 if unknown.
        driver: version of its driver.
        pcie_address: such as `00000000:19:00.0`.
        mig_enabled: the device is split into instances and takes no work of its own.
        mig_parent: uuid of the device that this MIG instance is part of; None for a whole device.
        mig_profile: such as `1g.10gb`; empty for a whole device.
        mig_instance: the driver's id of the GPU instance that this MIG instance is in; None for a whole device.
        numa_node: None if unknown.
        cpu_affinity: logical cores near the device; empty if unknown.
        serial: of the board; empty if it has none.
        visible_id: how the vendor's runtime takes it in its variable (`ROCR_VISIBLE_DEVICES`, `CUDA_VISIBLE_DEVICES`):
            an id or a number; empty where that is the uuid.
    """

    uuid: str
    host: str
    index: int
    name: str = ""
    vendor: str = "nvidia"
    architecture: str = ""
    compute_capability: str = ""
    sm_count: int = 0
    memory_bytes: int = 0
    memory_bandwidth_bytes_per_second: int = 0
    sm_clock_max_megahertz: int = 0
    power_limit_max_watts: float = 0.0
    driver: str = ""
    pcie_address: str = ""
    mig_enabled: bool = False
    mig_parent: str | None = None
    mig_profile: str = ""
    mig_instance: int | None = None
    numa_node: int | None = None
    cpu_affinity: list[int] = []
    serial: str = ""
    visible_id: str = ""


class Link(StrEnum):
    """How two devices of a host reach each other, best first."""

    SAME = "same"
    NVLINK = "nvlink"
    PCIE_SWITCH = "pcie_switch"
    PCIE_BRIDGES = "pcie_bridges"
    HOST_BRIDGE = "host_bridge"
    NUMA = "numa"
    SYSTEM = "system"
    UNKNOWN = "unknown"


class Inventory(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="inventory", tag_field="type"):
    """A host with its devices and the links between them. Published at start, on change, every 60 s, and at the end.

    Attributes:
        host: the host.
        agent: id of the collector's run.
        time_ns: when it was read.
        devices: every device, MIG instances included, by index.
        links: D×D, `links[i][j]` between `devices[i]` and `devices[j]`; symmetric, `same` on the diagonal. Empty if
            unknown.
        nvlink_counts: D×D, how many NVLinks join the two (0 without); empty if unknown.
        source: as in `SampleBatch`.
        interval_seconds: how often samples come.
        leaving: the collector ends in order: the devices are the next host's that lists them.
        version: of the schema.
    """

    host: HostInfo
    agent: str
    time_ns: int
    devices: list[DeviceInfo]
    links: list[list[Link]] = []
    nvlink_counts: list[list[int]] = []
    source: str = "nvml"
    interval_seconds: float = 1.0
    leaving: bool = False
    version: int = SCHEMA_VERSION


class ProcessSample(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A process that holds device memory.

    Attributes:
        device: uuid.
        pid: as the host sees it.
        kind: `compute`, `graphics` or `both`.
        memory_used_bytes: None where the driver hides it (in containers, or under MIG).
        sm_utilization_percent: its share of SM time; None before the driver has one.
        memory_utilization_percent: its share of memory time.
        encoder_utilization_percent: its share of the encoder.
        decoder_utilization_percent: its share of the decoder.
        name: of the executable, without arguments.
        user: account name, or the numeric id where there is no name.
        container: id of the container or the cgroup path; empty if none.
        lease: the lease that it works under: by `CORRAL_LEASE` in its environment or an ancestor's where that can be
            read, by descent from the lease's holder, or by its container; empty if none is known. It may have ended.
        started_ns: when it started.
        command: with arguments; published only where the operator asked for it.
    """

    device: str
    pid: int
    kind: str = "compute"
    memory_used_bytes: int | None = None
    sm_utilization_percent: float | None = None
    memory_utilization_percent: float | None = None
    encoder_utilization_percent: float | None = None
    decoder_utilization_percent: float | None = None
    name: str = ""
    user: str = ""
    container: str = ""
    lease: str = ""
    started_ns: int = 0
    command: str = ""


class ProcessBatch(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="process_batch", tag_field="type"):
    """All processes on the devices of a host at one time. An empty list says that there are none.

    Attributes:
        host: the host's name.
        agent: id of the collector's run.
        sequence: counts all of the run's messages, with samples.
        time_ns: when they were read.
        processes: one entry per process and device.
        identified: whose a process is can be told at all. Not in a container with process ids of its own: the driver
            gives those of the host, and only memory and shares of time are known.
        unreadable: devices whose processes can't be listed, or not all of them: nothing is said of those that are
            missing.
    """

    host: str
    agent: str
    sequence: int
    time_ns: int
    processes: list[ProcessSample] = []
    identified: bool = True
    version: int = SCHEMA_VERSION
    unreadable: list[str] = []


class Severity(StrEnum):
    """What an event means for the device that it names."""

    INFO = "info"
    WARNING = "warning"
    """Worth a look; the device goes on."""
    APPLICATION = "application"
    """A fault of the program on it; the device itself is well."""
    RESET = "reset"
    """The device takes no work until it is reset."""
    HARDWARE = "hardware"
    """The device takes no work until someone has looked at the hardware."""
    CLEARED = "cleared"
    """An earlier `reset` or `hardware` no longer holds: the device was reset or came back."""


class DeviceEvent(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="device_event", tag_field="type"):
    """Something that happened on a host or device.

    Attributes:
        host: the host's name.
        agent: id of the collector's run.
        sequence: counts all of the run's messages, with samples.
        time_ns: when it happened.
        kind: `xid`, `ecc`, `clock`, `power`, `device_lost`, `device_returned`, `driver_lost`, `driver_returned`,
            `mig_changed`, `agent_started`, `agent_stopped`, `samples_dropped`, `processes_hidden`,
            `process_without_lease`, `lease_memory_exceeded` (see `AttributionKind`), …
        severity: what it means for the device.
        device: uuid; None for the whole host.
        code: the Xid for `xid`; 0 otherwise.
        message: one sentence for people.
        data: more, by name.
    """

    host: str
    agent: str
    sequence: int
    time_ns: int
    kind: str
    severity: Severity = Severity.INFO
    device: str | None = None
    code: int = 0
    message: str = ""
    data: dict[str, str | int | float | bool | None] = {}
    version: int = SCHEMA_VERSION


class AttributionKind(StrEnum):
    """Kinds of events about who uses a device without a lease, or beyond it. They say nothing of the device's health.

    `data` of each: `violation` and `since_ns` (the same at its begin and its end), `until_ns` (when it was seen last),
    `lease` and `owner` (of the lease, if there is one), `leased` (whether somebody holds the device) and
    `memory_used_bytes` (the greatest so far; None where the driver hides it); of a process also `pid`, `name`, `user`
    and `container`; of memory also `memory_granted_bytes` and `share`.
    """

    LEASE_MEMORY_EXCEEDED = "lease_memory_exceeded"
    """The processes of a lease use more memory of a device that it shares than it was granted; `application`. A device
    that a lease has to itself is its own as a whole."""
    LEASE_MEMORY_EXCEEDED_ENDED = "lease_memory_exceeded_ended"
    """They no longer do; `info`."""
    PROCESS_WITHOUT_LEASE = "process_without_lease"
    """A process is on a device on which it holds no lease: `application` where somebody else holds one, else `info`."""
    PROCESS_WITHOUT_LEASE_ENDED = "process_without_lease_ended"
    """It no longer is; `info`."""


class AgentReport(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="agent_report", tag_field="type"):
    """A collector on itself, every 10 s. Counts are since its start; a duration is over the last 10 s.

    Attributes:
        host: the host's name.
        agent: id of the run.
        sequence: counts all of the run's messages, with samples.
        time_ns: when it was written.
        source: as in `SampleBatch`.
        ticks: ticks read.
        samples: device samples read in them: a device that is off the bus gives none.
        late_ticks: ticks skipped since an earlier one was still being read.
        read_seconds_mean: time to read one tick.
        read_seconds_max: the longest.
        read_errors: NVML calls that failed with anything but "not supported".
        published_messages: messages that the bus has acknowledged.
        buffered_bytes: waiting in memory or in the spill file.
        dropped_messages: lost: the buffer was full, the disk spoilt them, or the bus takes none so large.
        dropped_samples: device samples in them.
        cpu_seconds: user and system time of the process.
        resident_bytes: resident memory of the process.
        corral_version: of the package.
        processes_identified: as in `ProcessBatch`.
    """

    host: str
    agent: str
    sequence: int
    time_ns: int
    source: str = ""
    ticks: int = 0
    samples: int = 0
    late_ticks: int = 0
    read_seconds_mean: float = 0.0
    read_seconds_max: float = 0.0
    read_errors: int = 0
    published_messages: int = 0
    buffered_bytes: int = 0
    dropped_messages: int = 0
    dropped_samples: int = 0
    cpu_seconds: float = 0.0
    resident_bytes: int = 0
    corral_version: str = ""
    processes_identified: bool = True
    version: int = SCHEMA_VERSION


class DeadLetter(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="dead_letter", tag_field="type"):
    """A message that a processor could not store, with the reason.

    Attributes:
        subject: where it was published.
        stream: the stream that it came from.
        stream_sequence: its place there.
        reason: why, with the path of the field.
        code: `undecodable`, `invalid`, `out_of_range`, `unstorable`, …
        payload: the message as it came, cut to 256 KiB.
        time_ns: when it was refused.
    """

    subject: str
    stream: str
    stream_sequence: int
    reason: str
    code: str
    payload: bytes
    time_ns: int = field(default=0)
