"""Messages of collectors: samples as columns, inventory, processes, events, and reports on themselves.

All of them are MessagePack. A reader ignores fields that it does not know, and a missing field takes its default, so
that old and new agents work together. A change that breaks this rule raises `SCHEMA_VERSION` and the subject's version.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from msgspec import Struct, field

SCHEMA_VERSION: Final = 1


class SampleBatch(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="sample_batch", tag_field="type"):
    """The devices of one host over one or more ticks, as arrays.

    With T ticks and D devices each column holds T·D values, tick by tick (`value[tick * D + device]`), as raw
    little-endian numbers of the type that the catalog gives for the metric. A receiver joins the bytes of the same
    column over many messages and has the array, without decoding values one by one.

    Attributes:
        host: the host's name, as in the subject.
        agent: id of one run of the collector; new at each start.
        sequence: number of the message within that run, from 1.
        source: `nvml`, `amdsmi`, `simulated` or `replay`.
        devices: the D device uuids.
        times_ns: T·D times of reading, `<i8`, nanoseconds since the epoch, UTC.
        columns: metric name → T·D values. A metric that no device supports is left out.
        nulls: metric name → T·D bytes, 1 where the value is null (its number is then meaningless, by custom 0).
            Left out for a metric without nulls.
        version: version of the schema.
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
    """Facts about a host, other than its devices.

    Attributes:
        name: the host's name, as in subjects: letters, digits, `-` and `_`.
        address: the host name that the operating system gives, for people and ssh.
        cpus: number of logical cores that work may use.
        memory_bytes: host RAM.
        driver: version of the GPU driver.
        labels: set by the operator (`--label rack=r1`); requests may select by them. The NVML source adds
            `nvlink_domain`, where the hosts are in one, unless the operator sets it.
        machine_ids: hashed ids of the machine's installation and of its boot, whatever the host is called. Two host
            names of one machine have one of them in common. Empty if unknown, or for a simulated or replayed host.
        kernel: release of the operating system's kernel, such as `6.8.0-60-generic`; empty if unknown.
    """

    name: str
    address: str = ""
    cpus: int = 0
    memory_bytes: int = 0
    driver: str = ""
    labels: dict[str, str] = {}
    machine_ids: list[str] = []
    kernel: str = ""


class DeviceInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Identity and capabilities of a device, which do not change while the device runs.

    Attributes:
        uuid: id of the device everywhere in Corral: the driver's uuid, or one made of host, PCI address and serial
            where the driver's is missing or not unique.
        host: the host's name.
        index: the driver's index on that host.
        name: the product's name, such as `NVIDIA H100 80GB HBM3`.
        vendor: `nvidia`, `amd`, …
        architecture: such as `Hopper`; empty if unknown.
        compute_capability: such as `9.0`; empty if the vendor has no such thing.
        sm_count: streaming multiprocessors (compute units on AMD); 0 if unknown.
        memory_bytes: device memory in all.
        memory_bandwidth_bytes_per_second: peak memory bandwidth, from bus width and memory clock; 0 if unknown.
        sm_clock_max_megahertz: highest clock; 0 if unknown.
        power_limit_max_watts: the highest limit that may be set; 0 if unknown.
        driver: version of its driver.
        pcie_address: such as `00000000:19:00.0`.
        mig_enabled: true if the device is split into MIG instances and takes no work as a whole.
        mig_parent: uuid of the device that this MIG instance is part of; null for a whole device.
        mig_profile: such as `1g.10gb`; empty for a whole device.
        mig_instance: the driver's id of the GPU instance that this MIG instance is in; null for a whole device.
        numa_node: NUMA node of the device; null if unknown.
        cpu_affinity: logical cores near the device; empty if unknown.
        serial: serial number of the board; empty if it has none.
        visible_id: value that selects it in the variable of the vendor's runtime (`ROCR_VISIBLE_DEVICES`,
            `CUDA_VISIBLE_DEVICES`): an id or a number; empty where that is the uuid.
        firmware: versions of its firmware by part: `vbios`, `gsp` (its system processor), `inforom`; those known.
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
    firmware: dict[str, str] = {}


class Link(StrEnum):
    """Kind of connection between two devices of a host, best first."""

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
        time_ns: when it was read, nanoseconds since the epoch.
        devices: every device, MIG instances included, by index.
        links: D×D, `links[i][j]` between `devices[i]` and `devices[j]`; symmetric, `same` on the diagonal. Empty if
            unknown.
        nvlink_counts: D×D, number of NVLinks between the two (0 without); empty if unknown.
        source: as in `SampleBatch`.
        interval_seconds: time between samples.
        leaving: true if the collector stops in order: its devices then go to the next host that lists them.
        version: version of the schema.
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
        device: uuid of the device.
        pid: process id, as the host sees it.
        kind: `compute`, `graphics` or `both`.
        memory_used_bytes: device memory that it holds; null where the driver hides it (in containers, or under MIG).
        sm_utilization_percent: its share of SM time; null before the driver has one.
        memory_utilization_percent: its share of memory time.
        encoder_utilization_percent: its share of the encoder.
        decoder_utilization_percent: its share of the decoder.
        name: name of the executable, without arguments.
        user: account name, or the numeric id where there is no name.
        container: id of the container or the cgroup path; empty if none.
        lease: id of the lease that it works under: by `CORRAL_LEASE` in its environment or an ancestor's where that can
            be read, by descent from the lease's holder, or by its container; empty if none is known. The lease may have
            ended.
        started_ns: when it started, nanoseconds since the epoch; 0 if unknown.
        command: command line with arguments; published only where the operator asked for it.
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
    """All processes on the devices of a host at one time. An empty list means that there are none.

    Attributes:
        host: the host's name.
        agent: id of the collector's run.
        sequence: number of the message among all messages of the run.
        time_ns: when they were read, nanoseconds since the epoch.
        processes: one entry per process and device.
        identified: true if processes can be attributed to users and leases, and false in a container with its own
            process ids: the driver gives those of the host, so that only memory and shares of time are known.
        version: version of the schema.
        unreadable: uuids of devices whose processes can't be listed, or not all of them: one that is missing there may
            still run.
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
    """Consequence of an event for its device."""

    INFO = "info"
    WARNING = "warning"
    """Worth a look; the device goes on."""
    APPLICATION = "application"
    """A fault of the program on it; the device itself is healthy."""
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
        sequence: number of the message among all messages of the run.
        time_ns: when it happened, nanoseconds since the epoch.
        kind: `xid`, `ecc`, `clock`, `power`, `device_lost`, `device_returned`, `driver_lost`, `driver_returned`,
            `mig_changed`, `agent_started`, `agent_stopped`, `samples_dropped`, `processes_hidden`,
            `process_without_lease`, `lease_memory_exceeded` (see `AttributionKind`), …
        severity: consequence for the device.
        device: uuid of the device; null for the whole host.
        code: the Xid for `xid`; 0 otherwise.
        message: one sentence for people.
        data: further facts, by name.
        version: version of the schema.
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
    """Kinds of events about use of a device without a lease, or beyond it. They say nothing about the device's health.

    `data` of each: `violation` and `since_ns` (the same at its begin and its end), `until_ns` (when it was last seen),
    `lease` and `owner` (of the lease, if there is one), `leased` (true if a lease holds the device) and
    `memory_used_bytes` (the greatest so far; null where the driver hides it); for a process also `pid`, `name`, `user`
    and `container`; for memory also `memory_granted_bytes` and `share`.
    """

    LEASE_MEMORY_EXCEEDED = "lease_memory_exceeded"
    """The processes of a lease use more memory of a shared device than it was granted; `application`. A lease on a
    whole device may use all of its memory."""
    LEASE_MEMORY_EXCEEDED_ENDED = "lease_memory_exceeded_ended"
    """They no longer do; `info`."""
    PROCESS_WITHOUT_LEASE = "process_without_lease"
    """A process is on a device on which it holds no lease: `application` where another lease holds it, else `info`."""
    PROCESS_WITHOUT_LEASE_ENDED = "process_without_lease_ended"
    """It no longer is; `info`."""


class AgentReport(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="agent_report", tag_field="type"):
    """Report of a collector on itself, every 10 s. Counts are since its start; durations are over the last 10 s.

    Attributes:
        host: the host's name.
        agent: id of the run.
        sequence: number of the message among all messages of the run.
        time_ns: when it was written, nanoseconds since the epoch.
        source: as in `SampleBatch`.
        ticks: ticks read.
        samples: device samples read in them: a device that has fallen off the PCIe bus gives none.
        late_ticks: ticks skipped since an earlier one was still being read.
        read_seconds_mean: mean time to read one tick.
        read_seconds_max: longest time to read one tick.
        read_errors: readings that failed, and driver calls that failed with anything but "not supported".
        published_messages: messages that the bus has acknowledged.
        buffered_bytes: bytes that wait in memory or in the spill file.
        dropped_messages: messages lost: the buffer was full, the disk spoilt them, or the bus takes none so large.
        dropped_samples: device samples in dropped messages.
        cpu_seconds: user and system time of the process.
        resident_bytes: resident memory of the process.
        corral_version: version of the package.
        processes_identified: as in `ProcessBatch`.
        version: version of the schema.
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
        subject: subject on which the message was published.
        stream: stream that it came from.
        stream_sequence: sequence of the message in that stream.
        reason: why it was refused, with the path of the field.
        code: `undecodable`, `invalid`, `out_of_range`, `unstorable`, …
        payload: the message as it came, cut to 256 KiB.
        time_ns: when it was refused, nanoseconds since the epoch.
    """

    subject: str
    stream: str
    stream_sequence: int
    reason: str
    code: str
    payload: bytes
    time_ns: int = field(default=0)
