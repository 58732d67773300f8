-- question: Who held GPUs idle, for how long, and what did it cost?
-- detail: A minute is idle if the device's mean utilisation in it is below 5%. Minutes without samples count neither way.
-- owner: who held it.
-- name: of the workload.
-- lease_id: the lease.
-- host: of the device.
-- device: uuid.
-- idle_hours: in all.
-- idle_gpu_hours: in all, times the share.
-- idle_percent: of the time held with samples.
-- longest_idle_hours: the longest stretch without a break.
-- idle_since: start of the stretch that lasts until the last minute known; null if it does not.
-- idle_kwh: energy of the idle minutes, times the share.
WITH hours AS MATERIALIZED (
    -- An hour whose samples are all below or all above, without a minute missing, needs no look at its minutes.
    SELECT b.lease_id, b.host, b.device, b.time, r.energy_millijoules_increase / 1e3 AS joules,
        r.power_watts_mean AS power, r.gpu_utilization_percent_max < 5 AS idle,
        (r.gpu_utilization_percent_max < 5 OR r.gpu_utilization_percent_min >= 5)
            AND r.gpu_utilization_percent_count * coalesce(o.interval_seconds, 1) > 3540 AS whole
    FROM lease_buckets b
    LEFT JOIN rollup_1h r ON r.device = b.device AND r.host = b.host AND r.time = b.time
    LEFT JOIN hosts o ON o.host = b.host
    WHERE b.width = 'hour'
), minutes AS (
    SELECT lease_id, host, device, time, seconds FROM lease_buckets WHERE width = 'minute'
    UNION ALL
    SELECT lease_id, host, device, make_timestamptz(epoch_us(time) + m.range * 60000000), 60
    FROM hours, range(60) m WHERE whole IS NOT TRUE
), pieces AS MATERIALIZED (
    SELECT lease_id, device, epoch_us(time) // 60000000 AS minute, 60 AS length, 3600.0 AS seconds,
        coalesce(joules, power * 3600) AS joules, idle
    FROM hours WHERE whole
    UNION ALL
    SELECT m.lease_id, m.device, epoch_us(m.time) // 60000000, 1, m.seconds,
        m.seconds * coalesce(r.energy_millijoules_increase / 60e3, r.power_watts_mean),
        r.gpu_utilization_percent_mean < 5
    FROM minutes m JOIN rollup_1m r ON r.device = m.device AND r.host = m.host AND r.time = m.time
    WHERE r.gpu_utilization_percent_mean IS NOT NULL
), known AS (
    SELECT lease_id, device, sum(seconds) AS seconds, max(minute + length) AS newest FROM pieces GROUP BY ALL
), stretches AS (
    -- Pieces that follow each other have the same difference between their start and the length of all before.
    SELECT lease_id, device, sum(seconds) AS seconds, sum(joules) AS joules, min(minute) AS since,
        max(minute + length) AS until
    FROM (
        SELECT *, minute - coalesce(sum(length) OVER (
            PARTITION BY lease_id, device ORDER BY minute ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ), 0) AS stretch
        FROM pieces WHERE idle
    ) GROUP BY lease_id, device, stretch
), idle AS (
    SELECT s.lease_id, s.device, any_value(k.seconds) AS known, sum(s.seconds) AS seconds, max(s.seconds) AS longest,
        max(s.since) FILTER (s.until = k.newest) AS since, sum(s.joules) AS joules
    FROM stretches s JOIN known k USING (lease_id, device) GROUP BY s.lease_id, s.device
)
SELECT l.owner, l.name, i.lease_id, l.host, i.device, i.seconds / 3600 AS idle_hours,
    l.share * i.seconds / 3600 AS idle_gpu_hours, 100 * i.seconds / i.known AS idle_percent,
    i.longest / 3600 AS longest_idle_hours,
    greatest(make_timestamptz(i.since * 60000000), l.started) AS idle_since,
    l.share * i.joules / 3.6e6 AS idle_kwh
FROM idle i JOIN lease_spans l USING (lease_id, device)
