"""SQL of a usage report. All sums are over whole numbers, so that no order of rows or threads changes them.

Leases are cut at the ends of the period. Of each hour that a lease held a device, `rollup_1h` says which minutes are
known and which of these were idle. The energy of a whole hour is the hour's; that of others is the sum of its minutes,
each by the part within the lease, or, once minutes are no longer kept, the hour's by its known minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final

from msgspec import Struct

from .periods import Slice

MINUTE_US: Final = 60_000_000
HOUR_US: Final = 3_600_000_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class By(StrEnum):
    """Column that the rows of a report are by."""

    GROUP = "group"
    OWNER = "owner"
    MODEL = "model"


_COLUMNS: Final = {By.GROUP: "group_name", By.OWNER: "owner", By.MODEL: "model"}


class Filters(Struct, frozen=True, kw_only=True):
    """Restriction of a report; null for none.

    Attributes:
        owner: name of the owner.
        group: name of the group, with those within it.
        model: pattern of the model's name, or a part of it; in any case.
        host: part of a host's name, in any case. Requests and preemptions are of no host: with it, ask only for usage.
    """

    owner: str | None = None
    group: str | None = None
    model: str | None = None
    host: str | None = None


def usage(cuts: Sequence[Slice], filters: Filters) -> str:
    """SQL of what leases used, by slice, group, owner and model.

    Its columns are GPU-microseconds (`granted_us`, `known_us`, `idle_us`), and `energy_mj` in millijoules, null if
    nothing is known of it.
    """
    return f"""{pieces(cuts, filters)}
SELECT slice, group_name, owner, model, sum(round(gpus * (b - a))::BIGINT)::HUGEINT AS granted_us,
    sum(round(gpus * known_us)::BIGINT)::HUGEINT AS known_us, sum(round(gpus * idle_us)::BIGINT)::HUGEINT AS idle_us,
    sum(round(share * energy_mj)::BIGINT)::HUGEINT AS energy_mj
FROM pieces GROUP BY ALL ORDER BY ALL"""


def leases(start: datetime, end: datetime, by: Sequence[By], filters: Filters) -> str:
    """SQL of the number of leases that held devices in a period: by the columns, and in all (`total` is 1)."""
    keys, sets, total = _grouped(by)
    return f"""WITH {_spans(start, end, filters)}
SELECT {keys}{total} AS total, count(DISTINCT lease_id) AS leases FROM spans GROUP BY GROUPING SETS ({sets})"""


def requests(start: datetime, end: datetime, by: Sequence[By], filters: Filters) -> str:
    """SQL of the requests that ended in a period, with `total` as in `leases`.

    Granted requests count for the model that they got, others for the patterns asked for. `asked_us` is in
    GPU-microseconds, waits in microseconds.
    """
    keys, sets, total = _grouped(by)
    seconds = "coalesce(r.expected_seconds, r.estimated_seconds, r.max_seconds)"
    return f"""WITH got AS (
    SELECT lease_id, min(model) AS model FROM lease_devices WHERE model <> '' GROUP BY lease_id
), asked AS (
    SELECT coalesce(r.group_name, '') AS group_name, r.owner, r.outcome,
        coalesce(g.model, nullif(array_to_string(r.models, '|'), ''), 'any') AS model, {seconds} AS seconds,
        round(coalesce(r.gpu_share, r.gpus) * {seconds} * 1e6)::BIGINT AS gpu_us,
        epoch_us(r.ended_at) - epoch_us(r.asked_at) AS wait_us
    FROM requests r LEFT JOIN got g USING (lease_id)
    WHERE r.gpus > 0 AND r.outcome <> 'refused' AND r.ended_at >= {_at(start)} AND r.ended_at < {_at(end)}
)
SELECT {keys}{total} AS total, count(*) AS requests, count(*) FILTER (outcome = 'granted') AS granted,
    count(*) FILTER (outcome = 'rejected') AS rejected, count(*) FILTER (outcome = 'timed_out') AS timed_out,
    count(*) FILTER (outcome NOT IN ('granted', 'rejected', 'timed_out')) AS withdrawn,
    sum(gpu_us)::HUGEINT AS asked_us, count(*) FILTER (seconds IS NULL) AS open_ended,
    sum(wait_us) FILTER (outcome = 'granted')::HUGEINT AS waits_us,
    quantile_disc(wait_us, 0.5) FILTER (outcome = 'granted') AS wait_p50_us,
    quantile_disc(wait_us, 0.95) FILTER (outcome = 'granted') AS wait_p95_us
FROM asked WHERE {_where(filters)} GROUP BY GROUPING SETS ({sets})"""


def preemptions(start: datetime, end: datetime, by: Sequence[By], filters: Filters) -> str:
    """SQL of the preempted leases that ended in a period, with `total` as in `leases`; `lost_us` as GPU-time."""
    keys, sets, total = _grouped(by)
    return f"""WITH got AS (
    SELECT lease_id, min(model) AS model FROM lease_devices GROUP BY lease_id
), ended AS (
    SELECT coalesce(p.group_name, '') AS group_name, p.owner, coalesce(g.model, '') AS model,
        round(p.lost_gpu_seconds * 1e6)::BIGINT AS lost_us
    FROM preemptions p LEFT JOIN got g USING (lease_id) WHERE p.ended_at >= {_at(start)} AND p.ended_at < {_at(end)}
)
SELECT {keys}{total} AS total, count(*) AS preemptions, sum(lost_us)::HUGEINT AS lost_us
FROM ended WHERE {_where(filters)} GROUP BY GROUPING SETS ({sets})"""


def waste(cuts: Sequence[Slice], filters: Filters, limit: int) -> str:
    """SQL of the leases with the most idle GPU-time within the period: a row for each of them and model.

    A device is busy if a known minute of it was not idle. The memory is that of whole devices in hours and minutes
    within the lease, null where others may have held a part of one.
    """
    return f"""{pieces(cuts, filters)}, devices AS (
    SELECT lease_id, host, device, any_value(group_name) AS group_name, any_value(owner) AS owner,
        any_value(name) AS name, any_value(model) AS model, max(memory_granted_bytes) AS memory_granted,
        bool_or(share < 1) AS shared, sum(round(gpus * (b - a))::BIGINT) AS granted_us,
        sum(round(gpus * idle_us)::BIGINT) AS idle_us,
        coalesce(sum(known_us), 0) > 0 AS known, coalesce(sum(known_us - idle_us), 0) > 0 AS busy,
        max(memory) AS memory
    FROM pieces GROUP BY lease_id, host, device
), top AS (
    SELECT lease_id FROM devices GROUP BY lease_id HAVING sum(idle_us) > 0
    ORDER BY sum(idle_us) DESC, lease_id LIMIT {limit}
)
SELECT lease_id, any_value(group_name) AS group_name, any_value(owner) AS owner, any_value(name) AS name, model,
    count(*) AS devices, count(*) FILTER (busy) AS busy, count(*) FILTER (known) AS known,
    sum(granted_us)::HUGEINT AS granted_us, sum(idle_us)::HUGEINT AS idle_us,
    max(memory_granted) AS memory_granted, CASE WHEN NOT bool_or(shared) THEN max(memory) END AS memory
FROM devices JOIN top USING (lease_id) GROUP BY lease_id, model ORDER BY lease_id, model"""


def _spans(start: datetime, end: datetime, filters: Filters) -> str:
    """Spans of leases on devices within a period, with group and model."""
    return f"""of_devices AS (
    SELECT lease_id, host, device, max(model) AS model FROM lease_devices GROUP BY ALL
), models AS (
    SELECT device, max(name) AS name FROM devices GROUP BY device
), spans AS (
    SELECT s.lease_id, s.host, s.device, s.owner, s.name, s.share, s.gpus, s.memory_granted_bytes,
        greatest(epoch_us(s.started), {_us(start)}) AS first, least(epoch_us(s.ended), {_us(end)}) AS last,
        coalesce(l.group_name, '') AS group_name, coalesce(nullif(d.model, ''), m.name, '') AS model
    FROM lease_spans s JOIN leases l USING (lease_id) LEFT JOIN of_devices d USING (lease_id, host, device)
    LEFT JOIN models m ON m.device = s.device
    WHERE s.started < {_at(end)} AND s.ended > {_at(start)} AND s.ended > s.started AND {_where(filters, "l", "s")}
)"""


def pieces(cuts: Sequence[Slice], filters: Filters) -> str:
    """Beginning of a statement, whose last part `pieces` has the use in each hour, or part of one, of each span.

    A row is from `a` to `b` in microseconds, and has the columns of `lease_spans`, the number of its `slice`,
    `group_name`, `model`, `known_us`, `idle_us` and `energy_mj`; the latter three are of the whole device.
    """
    values = ", ".join(f"({at}, {_us(cut.start)}, {_us(cut.end)})" for at, cut in enumerate(cuts))
    begins = f"(a // {MINUTE_US} - 60 * hour)::INTEGER"
    ends = f"((b - 1) // {MINUTE_US} - 60 * hour)::INTEGER"
    even = "(60e6 * bit_count(h.known_minutes_bitmask))"
    power = "{0}.power_watts_mean * {0}.power_watts_count"
    return f"""WITH slices AS (
    SELECT * FROM (VALUES {values}) AS v(slice, opens, closes)
), {_spans(cuts[0].start, cuts[-1].end, filters)}, cut AS (
    SELECT s.* EXCLUDE (first, last), slice, greatest(first, opens) AS first, least(last, closes) AS last
    FROM spans s JOIN slices ON first < closes AND last > opens
), hours AS (
    SELECT *, unnest(range(first // {HOUR_US}, (last - 1) // {HOUR_US} + 1)) AS hour FROM cut
), parts AS (
    SELECT * EXCLUDE (first, last), greatest(first, hour * {HOUR_US}) AS a, least(last, (hour + 1) * {HOUR_US}) AS b
    FROM hours
), minutes AS (
    SELECT *, unnest(range(a // {MINUTE_US}, (b - 1) // {MINUTE_US} + 1)) AS minute
    FROM parts WHERE b - a < {HOUR_US}
), in_minutes AS (
    SELECT p.lease_id, p.host, p.device, p.a, sum(round((least(b, (minute + 1) * {MINUTE_US})
            - greatest(a, minute * {MINUTE_US})) / {MINUTE_US} * coalesce(m.energy_millijoules_increase, 1e3
            * {power.format("m")} * coalesce(m.known_seconds / m.samples, h.known_seconds / h.samples, 60 / m.samples)
        ))::BIGINT) AS energy_mj,
        max(m.memory_used_bytes_max) FILTER (a <= minute * {MINUTE_US} AND b >= (minute + 1) * {MINUTE_US}) AS memory
    FROM minutes p
    JOIN rollup_1m m ON m.host = p.host AND m.device = p.device AND m.time = make_timestamptz(minute * {MINUTE_US})
    LEFT JOIN rollup_1h h ON h.host = p.host AND h.device = p.device AND h.time = make_timestamptz(hour * {HOUR_US})
    GROUP BY ALL
), seen AS (
    SELECT p.*, h.known_minutes_bitmask & mask AS known, coalesce(h.idle_minutes_bitmask, 0) & mask AS idle,
        h.known_minutes_bitmask, h.memory_used_bytes_max, coalesce(h.energy_millijoules_increase, 1e3
            * {power.format("h")} / h.samples
            * coalesce(h.known_seconds, 60.0 * nullif(bit_count(h.known_minutes_bitmask), 0), 60)) AS hour_mj
    FROM (SELECT *, (1::BIGINT << ({ends} + 1)) - (1::BIGINT << {begins}) AS mask FROM parts) p
    LEFT JOIN rollup_1h h ON h.host = p.host AND h.device = p.device AND h.time = make_timestamptz(hour * {HOUR_US})
), counted AS (
    SELECT *, {_microseconds("known", begins, ends)} AS known_us, {_microseconds("idle", begins, ends)} AS idle_us
    FROM seen
), pieces AS (
    SELECT h.* EXCLUDE (known, idle), CASE WHEN b - h.a = {HOUR_US} THEN hour_mj
            ELSE coalesce(i.energy_mj, hour_mj * known_us / nullif({even}, 0)) END AS energy_mj,
        CASE WHEN b - h.a = {HOUR_US} THEN h.memory_used_bytes_max ELSE i.memory END AS memory
    FROM counted h LEFT JOIN in_minutes i
        ON i.lease_id = h.lease_id AND i.host = h.host AND i.device = h.device AND i.a = h.a
)"""


def _microseconds(bits: str, begins: str, ends: str) -> str:
    """Microseconds of minutes, as bits of an hour, that are within the piece from `a` to `b`."""
    return (
        f"({MINUTE_US}::BIGINT * bit_count({bits}) - ({bits} >> {begins} & 1) * (a % {MINUTE_US})"
        f" - ({bits} >> {ends} & 1) * ({MINUTE_US - 1} - (b - 1) % {MINUTE_US}))"
    )


def _grouped(by: Sequence[By]) -> tuple[str, str, str]:
    """Columns to select, grouping sets, and the expression that is 1 in the row over all."""
    names = [_COLUMNS[one] for one in by]
    keys = "".join(f"{name}, " for name in names)
    return keys, f"({', '.join(names)}), ()" if names else "()", f"grouping({names[0]})" if names else "1"


def _where(filters: Filters, leases: str = "", spans: str = "") -> str:
    """Condition of filters; on columns of tables with these names."""
    lease, span = (f"{name}." if name else "" for name in (leases, spans))
    found: list[str] = ["true"]
    if filters.owner is not None:
        found.append(f"{span}owner = {_text(filters.owner)}")
    if filters.group is not None:
        group = f"coalesce({lease}group_name, '')"
        found.append(f"({group} = {_text(filters.group)} OR starts_with({group}, {_text(filters.group + '/')}))")
    if filters.model is not None:
        model = "coalesce(nullif(d.model, ''), m.name, '')" if spans else "model"
        pattern = filters.model if any(sign in filters.model for sign in "*?[") else f"*{filters.model}*"
        found.append(f"lower({model}) GLOB lower({_text(pattern)})")
    if filters.host is not None and spans:
        found.append(f"contains(lower({span}host), lower({_text(filters.host)}))")
    return " AND ".join(found)


def _us(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(microseconds=1)


def _at(at: datetime) -> str:
    return f"make_timestamptz({_us(at)})"


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
