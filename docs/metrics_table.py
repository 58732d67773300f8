"""Page of metrics, from the catalog: each metric, its NVML and amdsmi calls, and a comparison with dcgm-exporter."""

from __future__ import annotations

from corral.collectors.nvml.events import NOTICES
from corral.collectors.nvml.links import SUMS
from corral.collectors.nvml.xid import XIDS
from corral.schemas.metrics import METRICS, Metric
from corral.schemas.rows import CADENCE_SECONDS, Cadence, Call, FieldValue, Gpm, Rate, Reading

# What `etc/default-counters.csv` of dcgm-exporter names, in its order; those that it leaves commented out are False.
DCGM_DEFAULTS: list[tuple[str, bool]] = [
    ("DCGM_FI_DEV_SM_CLOCK", True),
    ("DCGM_FI_DEV_MEM_CLOCK", True),
    ("DCGM_FI_DEV_MEMORY_TEMP", True),
    ("DCGM_FI_DEV_GPU_TEMP", True),
    ("DCGM_FI_DEV_POWER_USAGE", True),
    ("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", True),
    ("DCGM_FI_DEV_PCIE_TX_THROUGHPUT", True),
    ("DCGM_FI_DEV_PCIE_RX_THROUGHPUT", True),
    ("DCGM_FI_DEV_PCIE_REPLAY_COUNTER", True),
    ("DCGM_FI_DEV_GPU_UTIL", True),
    ("DCGM_FI_DEV_MEM_COPY_UTIL", True),
    ("DCGM_FI_DEV_ENC_UTIL", True),
    ("DCGM_FI_DEV_DEC_UTIL", True),
    ("DCGM_FI_DEV_XID_ERRORS", True),
    ("DCGM_FI_DEV_POWER_VIOLATION", False),
    ("DCGM_FI_DEV_THERMAL_VIOLATION", False),
    ("DCGM_FI_DEV_SYNC_BOOST_VIOLATION", False),
    ("DCGM_FI_DEV_BOARD_LIMIT_VIOLATION", False),
    ("DCGM_FI_DEV_LOW_UTIL_VIOLATION", False),
    ("DCGM_FI_DEV_RELIABILITY_VIOLATION", False),
    ("DCGM_FI_DEV_FB_FREE", True),
    ("DCGM_FI_DEV_FB_USED", True),
    ("DCGM_FI_DEV_ECC_SBE_VOL_TOTAL", False),
    ("DCGM_FI_DEV_ECC_DBE_VOL_TOTAL", False),
    ("DCGM_FI_DEV_ECC_SBE_AGG_TOTAL", False),
    ("DCGM_FI_DEV_ECC_DBE_AGG_TOTAL", False),
    ("DCGM_FI_DEV_RETIRED_SBE", False),
    ("DCGM_FI_DEV_RETIRED_DBE", False),
    ("DCGM_FI_DEV_RETIRED_PENDING", False),
    ("DCGM_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL", False),
    ("DCGM_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL", False),
    ("DCGM_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL", False),
    ("DCGM_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL", False),
    ("DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL", True),
    ("DCGM_FI_DEV_VGPU_LICENSE_STATUS", True),
    ("DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS", True),
    ("DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS", True),
    ("DCGM_FI_DEV_ROW_REMAP_FAILURE", True),
]

# What its `dcp-metrics-included.csv` has beside these: the profiling metrics, and a few that the default file lacks.
DCGM_DCP: list[tuple[str, bool]] = [
    ("DCGM_FI_DEV_FB_RESERVED", True),
    ("DCGM_FI_DRIVER_VERSION", True),
    ("DCGM_FI_DEV_SERIAL", False),
    ("DCGM_FI_PROF_GR_ENGINE_ACTIVE", True),
    ("DCGM_FI_PROF_SM_ACTIVE", False),
    ("DCGM_FI_PROF_SM_OCCUPANCY", False),
    ("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE", True),
    ("DCGM_FI_PROF_DRAM_ACTIVE", True),
    ("DCGM_FI_PROF_PIPE_FP64_ACTIVE", False),
    ("DCGM_FI_PROF_PIPE_FP32_ACTIVE", False),
    ("DCGM_FI_PROF_PIPE_FP16_ACTIVE", False),
    ("DCGM_FI_PROF_PCIE_TX_BYTES", True),
    ("DCGM_FI_PROF_PCIE_RX_BYTES", True),
]

# Default counters that are no single metric here: where to look instead.
DCGM_ELSEWHERE: dict[str, tuple[str, str, str, str]] = {
    "DCGM_FI_DEV_XID_ERRORS": (
        "event `xid`",
        "`nvmlEventSetWait_v2`",
        "code",
        "an event each, with meaning and severity, not only the last code",
    ),
    "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL": (
        "`nvlink_rx_bytes` + `nvlink_tx_bytes`",
        "field `NVLINK_THROUGHPUT_DATA_RX`, `…_TX`, all links",
        "bytes, as counters and apart by direction",
        "no active NVLink",
    ),
    "DCGM_FI_DRIVER_VERSION": ("`driver` of the inventory", "`nvmlSystemGetDriverVersion`", "text", "never"),
    "DCGM_FI_DEV_SERIAL": ("`serial` of the inventory", "`nvmlDeviceGetSerial`", "text", "empty if it has none"),
    "DCGM_FI_PROF_PCIE_TX_BYTES": (
        "`pcie_tx_bytes_per_second`",
        "GPM `PCIE_TX_PER_SEC`",
        "bytes per second",
        "before Hopper it is read in other ways, see above",
    ),
    "DCGM_FI_PROF_PCIE_RX_BYTES": (
        "`pcie_rx_bytes_per_second`",
        "GPM `PCIE_RX_PER_SEC`",
        "bytes per second",
        "before Hopper it is read in other ways, see above",
    ),
}

ONLY_DCGM: list[tuple[str, str]] = [
    (
        "profiling metrics on Volta, Turing and Ampere (`DCGM_FI_PROF_*`)",
        "NVML has its performance monitor (GPM) from Hopper on. On older devices the counters are reached only through "
        "DCGM's profiling module, which holds the device's performance counters exclusively: while it runs, profilers "
        "such as Nsight can't.",
    ),
    (
        "active health checks and diagnostics (`dcgmi health`, `dcgmi diag`)",
        "They run work on the device, some of them for minutes. A collector only looks. Passive signs (Xid codes, ECC, "
        "row remapping, links, throttling, the driver's recovery action) are all here, as metrics and events.",
    ),
    (
        "NVSwitch and fabric counters, SXid codes",
        "The switches are not NVML devices; they are read through NSCQ/NVSDM by the fabric manager's own tools.",
    ),
    (
        "per-job statistics (`dcgmi stats`)",
        "Not missed: a lease is the job, and the history answers for any time range in SQL.",
    ),
]

COMPUTED = {"nvlink_active_count": "counted from `nvmlDeviceGetNvLinkState` of each link"}
COMPUTED_AMD = {
    "memory_free_bytes": "total less used",
    "energy_millijoules": "`amdsmi_get_energy_count`: counter × resolution",
    "pcie_generation": "`amdsmi_get_pcie_info.pcie_metric.pcie_speed`",
    "throttle_reasons_bitmask": "`amdsmi_get_violation_status`, as the bits that NVML has for the like",
}

LINKS_TEXT = (
    "state, remote end, bytes and errors of each link, as lists by comma aligned with `link`; every 10 min, when a "
    "link goes up or down, and while errors go on at most each minute"
)
SOURCE_EVENTS: list[tuple[str, str, str]] = [
    ("device_lost", "hardware, reset", "the device does not answer, or NVML asks for its reset; the others go on"),
    (
        "device_returned",
        "cleared",
        "a lost device answers again (`reset` in its data: whether it was lost by the driver's word)",
    ),
    ("device_unreachable", "warning", "a place in the driver's list does not answer, so that no uuid is known"),
    (
        "device_started",
        "cleared",
        "the collector has begun to watch the device and found nothing wrong; its data, and that of an Xid, has what "
        "tells a reset from a restart: the boot, and the energy counter",
    ),
    ("mig_changed", "info", "the MIG layout changed; the inventory follows"),
    ("recovery_action", "reset, hardware, cleared", "what the driver asks for has changed, to something or to nothing"),
    ("row_remap_failure", "hardware", "a memory row could not be remapped"),
    ("row_remap_pending", "warning", "memory rows wait for a reset"),
    ("page_retirement_pending", "warning", "memory pages wait for a reset"),
    ("nvlink", "info", LINKS_TEXT),
    ("nvlink_down", "warning", "a link went down"),
    ("nvlink_up", "info", "a link came up"),
    ("driver_lost", "warning", "the driver as a whole can't be read; tried again with backoff"),
    ("driver_returned", "cleared", "the driver can be read again"),
]


def render() -> str:
    """The whole document."""
    lines = [
        "# Metrics",
        "",
        "Generated from the catalog in `schemas/metrics.py` by `make docs`. One row there defines a metric: its column",
        "on the wire and in DuckDB, how often it is read, its line in the exporter and here.",
        "",
        "A metric that a device does not support is null, never 0. So is an [impossible value](#possible-values) (4",
        "MW, NVML's “not available”), and one whose reading failed in that tick.",
        "",
        "- [How often](#how-often)",
        "- [All metrics](#all-metrics)",
        "- [Possible values](#possible-values)",
        "- [dcgm-exporter's default counters](#dcgm-exporters-default-counters)",
        "- [Beyond them](#beyond-them)",
        "- [What only DCGM gives](#what-only-dcgm-gives)",
        "- [Events](#events)",
        "- [Xid codes](#xid-codes)",
        "",
        *_cadences(),
        *_catalogue(),
        *_possible(),
        *_coverage(),
        *_beyond(),
        *_only_dcgm(),
        *_events(),
        *_xids(),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _cadences() -> list[str]:
    words = {
        Cadence.TICK: "each tick (`--interval`, 20 ms to hours)",
        Cadence.SECOND: "at most once a second",
        Cadence.SLOW: "every 10 s",
        Cadence.STATIC: "every 60 s",
    }
    lines = [
        "## How often",
        "",
        "A call that several metrics share is made once; field values of one cadence are one batch. Between two",
        "readings the last value is repeated in each sample. Slow readings of several devices are spread in time.",
        "",
        "| cadence | read | metrics |",
        "| --- | --- | ---: |",
    ]
    for cadence in Cadence:
        count = sum(metric.row.cadence is cadence for metric in METRICS.values())
        lines.append(f"| {cadence.value} | {words[cadence]} | {count} |")
    assert set(words) == set(CADENCE_SECONDS)
    return [
        *lines,
        "",
        "GPM metrics are read at each tick, but at most every 100 ms. `nvmlDeviceGetPcieThroughput` blocks for 20 ms",
        "per direction. It is called only if GPM and 64-bit counters are missing, every 10 s, in a separate thread.",
        "",
    ]


def _catalogue() -> list[str]:
    lines = [
        "## All metrics",
        "",
        "| metric | unit | kind | read | meaning | NVML, first that works | amdsmi | null where | rollups keep |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, metric in METRICS.items():
        row = metric.row
        lines.append(
            f"| `{name}` | {row.unit.name} | {row.kind.value} | {row.cadence.value} | {row.help} | {_nvml(metric)} "
            f"| {_amd(metric)} | {row.null} | {', '.join(row.rollup)} |"
        )
    return [*lines, ""]


def _possible() -> list[str]:
    """The limits, with the metrics that share them."""
    shared: dict[tuple[str, float | None, float | None, str], list[str]] = {}
    for name, metric in METRICS.items():
        key = (metric.row.unit.name, metric.minimum, metric.maximum, metric.limits_from)
        shared.setdefault(key, []).append(f"`{name}`")
    lines = [
        "## Possible values",
        "",
        "A value outside these limits is null and counted by metric (`impossible_values` of collectors and processors,",
        "see [measurements of services](reference/services.md)); the other values of its sample stay. Collectors apply",
        "the limits first. Processors, the planner, the exporter and the client apply them to samples of earlier",
        "versions. The limits are wide on purpose: future boards may draw more power, but not four megawatts. The",
        "limits on the growth of counters are on [a page of their own](counters.md).",
        "",
        "| from | to | unit | reason | metrics |",
        "| ---: | ---: | --- | --- | --- |",
    ]
    for (unit, least, most, why), names in shared.items():
        listed = ", ".join(names)
        lines.append(f"| {limit(least)} | {limit(most)} | {unit} | {why} | {listed} |")
    return [*lines, ""]


def limit(value: float | None) -> str:
    """A limit of a metric's values, in words."""
    powers = {2**32 - 2: "2³² − 2", 2**44: "2⁴⁴", 2**53: "2⁵³", 2**61: "2⁶¹", 2**63 - 1: "2⁶³ − 1"}
    return "–" if value is None else powers.get(int(value), f"{value:,.0f}")


def _coverage() -> list[str]:
    by_dcgm = {metric.row.dcgm[0]: metric for metric in METRICS.values() if metric.row.dcgm}
    lines = [
        "## dcgm-exporter's default counters",
        "",
        "Every counter of its `default-counters.csv`; those commented out there are marked with *. The factor converts",
        "Corral's unit to dcgm-exporter's.",
        "",
        *_COVERAGE_HEAD,
    ]
    lines += [_covered(name, on, by_dcgm) for name, on in DCGM_DEFAULTS]
    lines += [
        "",
        "The additional counters of `dcp-metrics-included.csv`. There the profiling metrics come from DCGM's own",
        "module; here from NVML's performance monitor (GPM), so they are null before Hopper.",
        "",
        *_COVERAGE_HEAD,
    ]
    lines += [_covered(name, on, by_dcgm) for name, on in DCGM_DCP]
    return [*lines, ""]


_COVERAGE_HEAD = [
    "| dcgm-exporter | Corral | NVML | unit | factor | null where |",
    "| --- | --- | --- | --- | --- | --- |",
]


def _covered(name: str, on: bool, by_dcgm: dict[str, Metric]) -> str:
    mark = "" if on else " *"
    if name in DCGM_ELSEWHERE:
        field, call, unit, null = DCGM_ELSEWHERE[name]
        return f"| `{name}`{mark} | {field} | {call} | {unit} | | {null} |"
    metric = by_dcgm[name]
    factor = metric.row.dcgm[1] if metric.row.dcgm else 1
    return (
        f"| `{name}`{mark} | `{metric.name}` | {_nvml(metric)} | {metric.row.unit.name} "
        f"| {_number(factor)} | {metric.row.null} |"
    )


def _beyond() -> list[str]:
    defaults = {name for name, _ in DCGM_DEFAULTS + DCGM_DCP}
    more = [m for m in METRICS.values() if m.row.dcgm is None or m.row.dcgm[0] not in defaults]
    lines = [
        "## Beyond them",
        "",
        "Metrics that are in neither file. If DCGM has a field for one, dcgm-exporter can be configured to add it.",
        "",
        "| metric | DCGM field | meaning |",
        "| --- | --- | --- |",
    ]
    lines += [f"| `{m.name}` | {f'`{m.row.dcgm[0]}`' if m.row.dcgm else '–'} | {m.row.help} |" for m in more]
    return [
        *lines,
        "",
        "In addition to metrics: processes with user, container and lease; links between devices; events as they",
        "happen; MIG instances as devices of their own.",
        "",
    ]


def _only_dcgm() -> list[str]:
    lines = ["## What only DCGM gives", "", "| what | why not here |", "| --- | --- |"]
    return [*lines, *(f"| {what} | {why} |" for what, why in ONLY_DCGM), ""]


def _events() -> list[str]:
    lines = [
        "## Events",
        "",
        "Published at once on `corral.v1.events.<host>`. The severities `reset` and `hardware` take the device out of",
        "placement until `cleared`. If the driver reports a recovery action (R570 and later), that decides: a fault",
        "after which it requests no action is cleared at the next check, within 15 s.",
        "",
        "| kind | severity | what happened |",
        "| --- | --- | --- |",
    ]
    for notice in NOTICES:
        severity = "by code, see below" if notice.kind == "xid" else notice.severity.value
        message = "an Xid of the driver" if notice.kind == "xid" else notice.message
        lines.append(f"| `{notice.kind}` | {severity} | {message} (`{notice.constant}`) |")
    return [*lines, *(f"| `{kind}` | {severity} | {text} |" for kind, severity, text in SOURCE_EVENTS), ""]


def _xids() -> list[str]:
    lines = [
        "## Xid codes",
        "",
        "According to NVIDIA's Xid catalog. `application`: an error of the program; the device continues to work.",
        "",
        "| Xid | severity | meaning |",
        "| ---: | --- | --- |",
    ]
    return [*lines, *(f"| {xid.code} | {xid.severity.value} | {xid.meaning} |" for xid in XIDS.values()), ""]


def _nvml(metric: Metric) -> str:
    if metric.name in COMPUTED:
        return COMPUTED[metric.name]
    ways = [_reading(reading) for reading in metric.row.nvml]
    if metric.name in SUMS.values():
        ways.append("the sum over the links, every 10 s")
    return "<br>".join(ways) or "–"


def _amd(metric: Metric) -> str:
    return COMPUTED_AMD.get(metric.name) or "<br>".join(_call(call) for call in metric.row.amd) or "–"


def _reading(reading: Reading) -> str:
    match reading:
        case Call():
            return _call(reading)
        case FieldValue(field=field):
            return f"field `{field.removeprefix('NVML_FI_DEV_')}`"
        case Rate(field=field):
            return f"growth of field `{field.removeprefix('NVML_FI_DEV_')}`"
        case Gpm(metric=metric):
            return f"GPM `{metric.removeprefix('NVML_GPM_METRIC_')}`"


def _call(call: Call) -> str:
    arguments = f"({', '.join(str(arg).removeprefix('NVML_') for arg in call.args)})" if call.args else ""
    part = f".{call.attribute}" if call.attribute else ""
    return f"`{call.function}{arguments}{part}`"


def _number(value: float) -> str:
    return {2**-20: "2⁻²⁰", 1: "1"}.get(value, f"{value:g}")
