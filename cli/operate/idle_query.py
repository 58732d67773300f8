"""SQL over the history about idle leases: those that are idle now, and those that a rule would have touched.

A minute of a lease is idle if every sample of all its devices is below the limit, active if any sample is not, and
unknown if samples of a device are missing and none is active. Only whole minutes within the lease count. As in the
planner, unknown time does not count, and more than a minute of it in a row ends a stretch.

Minutes are read only in hours that can have an idle one: in all other hours even the least sample is active, or nothing
is known.
"""

from __future__ import annotations

import math
from typing import Final

from ...schemas.idle import IdleAction, IdleRule

_MINUTE_US: Final = 60_000_000
_HOUR_US: Final = 3_600_000_000

_BASE: Final = """
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
), seen AS (
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
), stretches AS (
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
        SELECT s.lease, s.hour * 60 FROM seen s JOIN acted a USING (lease)
        WHERE NOT (s.least = 0 OR s.least < {below}) AND s.hour * 60 >= a.minute
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
        rule: about GPU activity, not about processes.
        since: from then on, in seconds since the epoch.
    """
    after = _minutes(rule.after_seconds)
    warn = 0 if rule.action is IdleAction.WARN else _minutes(rule.warn_seconds)
    return _filled(_BASE + _WHAT_IF, rule, since, after, after + warn)


def idle_now(rule: IdleRule, since: float) -> str:
    """SQL of the active leases that are idle by a rule now, with the begin of that; `since` limits how far back."""
    return _filled(_BASE + _NOW, rule, since, _minutes(rule.after_seconds), 0, "AND state = 'active'")


def held_and_known(since: float) -> str:
    """SQL of the GPU-hours of each owner's leases, and of those for which there are samples."""
    return _KNOWN.format(since=round(since * 1e6), minute=_MINUTE_US, hour=_HOUR_US)


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
    )
