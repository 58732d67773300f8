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
WITH minutes AS MATERIALIZED (
    SELECT lease_id, device, time, seconds, energy_joules, gpu_utilization_percent < 5 AS idle
    FROM lease_minutes WHERE gpu_utilization_percent IS NOT NULL
), known AS (
    SELECT lease_id, device, sum(seconds) AS seconds, max(time) AS newest FROM minutes GROUP BY ALL
), stretches AS (
    -- Minutes in a row have the same difference between their number and their rank.
    SELECT lease_id, device, sum(seconds) AS seconds, sum(energy_joules) AS joules, min(time) AS since, max(time) AS last
    FROM (
        SELECT *, epoch_us(time) // 60000000 - row_number() OVER (PARTITION BY lease_id, device ORDER BY time) AS stretch
        FROM minutes WHERE idle
    ) GROUP BY lease_id, device, stretch
), idle AS (
    SELECT s.lease_id, s.device, any_value(k.seconds) AS known, sum(s.seconds) AS seconds, max(s.seconds) AS longest,
        max(s.since) FILTER (s.last = k.newest) AS since, sum(s.joules) AS joules
    FROM stretches s JOIN known k USING (lease_id, device) GROUP BY s.lease_id, s.device
)
SELECT l.owner, l.name, i.lease_id, l.host, i.device, i.seconds / 3600 AS idle_hours,
    l.share * i.seconds / 3600 AS idle_gpu_hours, 100 * i.seconds / i.known AS idle_percent,
    i.longest / 3600 AS longest_idle_hours, i.since AS idle_since, i.joules / 3.6e6 AS idle_kwh
FROM idle i JOIN lease_spans l USING (lease_id, device)
