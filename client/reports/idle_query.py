"""SQL over the history about idle leases: those that are idle now, and those that a rule would have touched.

A minute of a lease is idle if every sample of all its devices is below the limit, active if any sample is not, and
unknown if samples of a device are missing and none is active. Only whole minutes within the lease count. As in the
planner, unknown time does not count, and more than a minute of it in a row ends a stretch.

Minutes are read only in hours that can have an idle one: in all other hours even the least sample is active, or nothing
is known.

For a rule about processes, a minute of a device is active if a process of the lease, or one that no lease on the device
explains, is in a list of that minute, and idle if there are lists without. The minutes of an hour are bits of a number.
"""

from __future__ import annotations

import math
from typing import Final

from ...schemas.system_processes import SYSTEM_PROCESSES
from ...schemas.work.idle import IdleAction, IdleRule

_MINUTE_US: Final = 60_000_000
_HOUR_US: Final = 3_600_000_000

FIRST_MINUTE: Final = "SELECT epoch(min(time)) AS first FROM rollup_1m"
FIRST_LIST: Final = (
    "SELECT epoch(min(time)) AS first FROM (SELECT min(time) AS time FROM processes UNION ALL "
    "SELECT min(time) FROM without_processes)"
)
"""SQL of the time from which on processes are known, in seconds since the epoch; null if they never were."""

_SPANS: Final = """
WITH spans AS (
    SELECT lease_id, dense_rank() OVER (ORDER BY lease_id) AS lease, host, device, gpus, epoch_us(ended) AS ended,
        epoch_us(greatest(started, make_timestamptz({since}))) AS started
    FROM lease_spans WHERE ended > greatest(started, make_timestamptz({since})) {only}
), held AS (
    SELECT lease, any_value(lease_id) AS lease_id, count(*) AS devices, sum(gpus) AS gpus,
        min(started) AS started, max(ended) AS ended
    FROM spans GROUP BY lease
), hours AS (
    SELECT *, unnest(range(started // {hour}, (ended - 1) // {hour} + 1)) AS hour FROM spans
"""

_ACTIVITY: Final = (
    _SPANS
    + """), seen AS (
    SELECT h.*, r.gpu_utilization_percent_min AS least, r.known_minutes_bitmask AS known
    FROM hours h JOIN rollup_1h r
        ON r.host = h.host AND r.device = h.device AND r.time = make_timestamptz(h.hour * {hour})
    WHERE r.gpu_utilization_percent_count > 0
), readable AS (
    SELECT DISTINCT lease, hour FROM seen WHERE least = 0 OR least < {below}
), wanted AS (
    SELECT s.lease, s.host, s.device, s.started, s.ended, hour * 60 + unnest(range(60)) AS minute
    FROM seen s JOIN readable USING (lease, hour)
), minutes AS (
    SELECT w.lease, w.minute, count(*) AS known, max(r.gpu_utilization_percent_max) AS peak,
        avg(r.gpu_utilization_percent_mean) AS mean
    FROM wanted w JOIN rollup_1m r
        ON r.host = w.host AND r.device = w.device AND r.time = make_timestamptz(w.minute * {minute})
    WHERE r.gpu_utilization_percent_count > 0
        AND w.minute * {minute} >= w.started AND (w.minute + 1) * {minute} <= w.ended
    GROUP BY ALL
), known AS (
    SELECT lease, minute, peak, mean, NOT (peak > 0 AND peak >= {below}) AS idle
    FROM minutes JOIN held USING (lease)
    WHERE known = devices OR (peak > 0 AND peak >= {below})
), all_active AS (
    SELECT lease, hour * 60 AS minute FROM seen WHERE NOT (least = 0 OR least < {below})
)"""
)

_LISTS: Final = """), lists AS MATERIALIZED (
    SELECT host, device, lease AS lease_id, epoch_us(time) // {hour} AS hour,
        lease = '' AND name = '' AND "user" = '' AS hidden, kind = 'graphics' OR name IN ({services}) AS service,
        bit_or(1::BIGINT << (epoch_us(time) // {minute} % 60)::INTEGER) AS minutes
    FROM processes WHERE time >= make_timestamptz({since}) GROUP BY ALL
), listed AS (
    SELECT host, hour, bit_or(minutes) AS minutes FROM lists GROUP BY ALL
), begins AS (
    SELECT DISTINCT host, epoch_us(time) // {minute} AS minute FROM without_processes
), others AS (
    SELECT host, hour * 60 + place AS minute FROM listed SEMI JOIN begins USING (host), range(60) places(place)
    WHERE minutes >> place::INTEGER & 1 = 1
), empty AS (
    -- A host has no process from such a list on to the next list with one, as long as its devices have samples.
    SELECT host, minute // 60 AS hour, bit_or(1::BIGINT << (minute % 60)::INTEGER) AS minutes FROM (
        SELECT b.host, unnest(range(greatest(b.minute, {since} // {minute}),
            coalesce(o.minute, epoch_us(now()) // {minute} + 1))) AS minute
        FROM begins b ASOF LEFT JOIN others o ON o.host = b.host AND o.minute > b.minute
    ) GROUP BY ALL
), explained AS (
    -- A process of a lease that does not hold the device is not explained, and counts for each that does.
    SELECT DISTINCT lease_id, host, device, hour, true AS known FROM hours
), used AS (
    SELECT h.lease, h.host, h.device, h.hour, bit_or(l.minutes) FILTER (NOT l.hidden) AS minutes,
        bit_or(l.minutes) FILTER (l.hidden) AS hidden
    FROM hours h JOIN lists l USING (host, device, hour)
        LEFT JOIN explained e ON e.lease_id = l.lease_id AND e.host = l.host AND e.device = l.device AND e.hour = l.hour
    WHERE l.lease_id = h.lease_id OR (e.known IS NULL AND NOT l.service)
    GROUP BY ALL
), seen AS (
    SELECT h.*, coalesce(u.minutes, 0) AS used, ~coalesce(u.hidden, 0)
        & (coalesce(l.minutes, 0) | (coalesce(e.minutes, 0) & coalesce(r.known_minutes_bitmask, 0))) AS known
    FROM hours h LEFT JOIN used u USING (lease, host, device, hour) LEFT JOIN listed l USING (host, hour)
        LEFT JOIN empty e USING (host, hour)
        LEFT JOIN rollup_1h r ON r.host = h.host AND r.device = h.device AND r.time = make_timestamptz(h.hour * {hour})
"""

_PROCESSES: Final = (
    _SPANS
    + _LISTS
    + """), whole AS (
    SELECT lease, hour, bit_and(known & ~used) & any_value(held) AS idle, bit_or(used) & any_value(held) AS active
    FROM (
        SELECT *, greatest(0, (1::BIGINT << greatest(least(ended // {minute} - hour * 60, 60), 0)::INTEGER)
            - (1::BIGINT << least(greatest((started + {minute} - 1) // {minute} - hour * 60, 0), 60)::INTEGER)) AS held
        FROM seen
    ) GROUP BY lease, hour
), known AS (
    SELECT lease, hour * 60 + place AS minute, NULL::DOUBLE AS peak, NULL::DOUBLE AS mean,
        idle >> place::INTEGER & 1 = 1 AS idle
    FROM whole, range(60) places(place) WHERE idle <> 0 AND (idle | active) >> place::INTEGER & 1 = 1
), all_active AS (
    SELECT lease, hour * 60 + log2(active & -active)::BIGINT AS minute FROM whole WHERE idle = 0 AND active <> 0
)"""
)

_STRETCHES: Final = """, stretches AS (
    -- Minutes that are idle or active have places. Two idle ones are of one stretch if no active one is between them,
    -- and at most one that is unknown.
    SELECT lease, minute, peak, mean, sum(begins) OVER (PARTITION BY lease ORDER BY minute) AS stretch FROM (
        SELECT *, CASE WHEN place - lag(place) OVER w = 1 AND minute - lag(minute) OVER w <= 2 THEN 0 ELSE 1 END
            AS begins
        FROM (SELECT *, row_number() OVER (PARTITION BY lease ORDER BY minute) AS place FROM known) WHERE idle
        WINDOW w AS (PARTITION BY lease ORDER BY minute)
    )
), counted AS (
    SELECT *, row_number() OVER (PARTITION BY lease, stretch ORDER BY minute) AS number FROM stretches
)"""

_WHAT_IF: Final = """, warned AS (
    SELECT lease, count(*) AS warnings, min(minute) + 1 AS minute FROM counted WHERE number = {after}
    GROUP BY lease
), acted AS (
    SELECT lease, min(minute) + 1 AS minute FROM counted WHERE number = {acts} GROUP BY lease
), again AS (
    SELECT lease, min(minute) AS minute FROM (
        SELECT k.lease, k.minute FROM known k JOIN acted a USING (lease) WHERE NOT k.idle AND k.minute >= a.minute
        UNION ALL
        SELECT s.lease, s.minute FROM all_active s JOIN acted a USING (lease) WHERE s.minute >= a.minute
    ) GROUP BY lease
)
SELECT h.lease_id, l.owner, l.name, h.gpus, make_timestamptz(w.minute * {minute}) AS warned_at, w.warnings,
    make_timestamptz(a.minute * {minute}) AS acted_at, make_timestamptz(g.minute * {minute}) AS active_again_at,
    h.gpus * greatest(0, least(h.ended, coalesce(g.minute * {minute}, h.ended)) - a.minute * {minute}) / {hour}
        AS freed_gpu_hours,
    h.gpus * greatest(0, h.ended - g.minute * {minute}) / {hour} AS lost_gpu_hours
FROM warned w JOIN held h USING (lease) JOIN leases l ON l.lease_id = h.lease_id
    LEFT JOIN acted a USING (lease) LEFT JOIN again g USING (lease)
ORDER BY freed_gpu_hours DESC NULLS LAST, 1"""

_NOW: Final = """, newest AS (
    SELECT lease, max(minute) AS minute FROM known GROUP BY lease
)
SELECT h.lease_id, l.owner, l.name, h.gpus, make_timestamptz(min(c.minute) * {minute}) AS since,
    count(*) AS idle_minutes, avg(c.mean) AS mean_percent, max(c.peak) AS peak_percent
FROM counted c JOIN newest n ON n.lease = c.lease
    JOIN stretches s ON s.lease = c.lease AND s.minute = n.minute AND s.stretch = c.stretch
    JOIN held h ON h.lease = c.lease JOIN leases l ON l.lease_id = h.lease_id
WHERE (n.minute + 1 + 3) * {minute} >= h.ended
GROUP BY ALL HAVING count(*) >= {after}
ORDER BY since, 1"""

_LISTED: Final = (
    _SPANS
    + _LISTS
    + """), cut AS (
    SELECT *, (1::BIGINT << (least((ended - 1) // {minute} - hour * 60, 59) + 1)::INTEGER)
        - (1::BIGINT << greatest(started // {minute} - hour * 60, 0)::INTEGER) AS held
    FROM seen
)
SELECT l.owner, count(DISTINCT lease_id) AS leases, sum(gpus * bit_count(held)) / 60 AS held_gpu_hours,
    sum(gpus * bit_count(held & (c.known | c.used))) / 60 AS known_gpu_hours
FROM cut c JOIN leases l USING (lease_id)
GROUP BY l.owner"""
)

_KNOWN: Final = """
WITH spans AS (
    SELECT lease_id, owner, host, device, gpus, epoch_us(ended) AS last,
        epoch_us(greatest(started, make_timestamptz({since}))) AS first
    FROM lease_spans WHERE ended > greatest(started, make_timestamptz({since}))
), hours AS (
    SELECT *, unnest(range(first // {hour}, (last - 1) // {hour} + 1)) AS hour FROM spans
), cut AS (
    SELECT *, (1::BIGINT << (least((last - 1) // {minute} - hour * 60, 59) + 1)::INTEGER)
        - (1::BIGINT << greatest(first // {minute} - hour * 60, 0)::INTEGER) AS held
    FROM hours
)
SELECT owner, count(DISTINCT lease_id) AS leases, sum(gpus * bit_count(held)) / 60 AS held_gpu_hours,
    sum(gpus * bit_count(held & coalesce(r.known_minutes_bitmask, 0))) / 60 AS known_gpu_hours
FROM cut c LEFT JOIN rollup_1h r
    ON r.host = c.host AND r.device = c.device AND r.time = make_timestamptz(c.hour * {hour})
GROUP BY owner"""


def what_if(rule: IdleRule, since: float) -> str:
    """SQL of the leases that a rule would have warned, and acted on; the first action counts, since it ends the lease.

    Args:
        rule: about GPU activity or processes.
        since: from then on, in seconds since the epoch.
    """
    after = _minutes(rule.after_seconds)
    warn = 0 if rule.action is IdleAction.WARN else _minutes(rule.warn_seconds)
    base = _PROCESSES if rule.no_process else _ACTIVITY
    return _filled(base + _STRETCHES + _WHAT_IF, rule, since, after, after + warn)


def idle_now(rule: IdleRule, since: float) -> str:
    """SQL of the active leases that are idle by a rule now, with the begin of that; `since` limits how far back."""
    return _filled(_ACTIVITY + _STRETCHES + _NOW, rule, since, _minutes(rule.after_seconds), 0, "AND state = 'active'")


def held_and_known(since: float) -> str:
    """SQL of the GPU-hours of each owner's leases, and of those for which there are samples."""
    return _KNOWN.format(since=round(since * 1e6), minute=_MINUTE_US, hour=_HOUR_US)


def held_and_listed(since: float) -> str:
    """SQL of the GPU-hours of each owner's leases, and of those for which it is known which processes there were."""
    return _filled(_LISTED, IdleRule(no_process=True), since, 0, 0)


def _minutes(seconds: float) -> int:
    return math.ceil(seconds / 60)


def _filled(sql: str, rule: IdleRule, since: float, after: int, acts: int, only: str = "") -> str:
    return sql.format(
        since=round(since * 1e6),
        below=repr(float(rule.below_percent)),
        after=after,
        acts=acts,
        minute=_MINUTE_US,
        hour=_HOUR_US,
        only=only,
        services=", ".join(f"'{name}'" for name in sorted(SYSTEM_PROCESSES)),
    )
