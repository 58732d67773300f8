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
WITH minutes AS (
    SELECT *, gpu_utilization_percent < 5 AS idle, max(time) OVER (PARTITION BY lease_id, device) AS newest,
        time - INTERVAL 1 MINUTE * row_number() OVER (
            PARTITION BY lease_id, device, gpu_utilization_percent < 5 ORDER BY time
        ) AS stretch
    FROM lease_minutes WHERE gpu_utilization_percent IS NOT NULL
), stretches AS (
    SELECT owner, name, lease_id, host, device, share, idle, sum(seconds) AS seconds, sum(energy_joules) AS joules,
        min(time) AS since, max(time) = any_value(newest) AS lasting
    FROM minutes GROUP BY owner, name, lease_id, host, device, share, idle, stretch
)
SELECT owner, name, lease_id, host, device,
    sum(seconds) FILTER (idle) / 3600 AS idle_hours,
    share * sum(seconds) FILTER (idle) / 3600 AS idle_gpu_hours,
    100 * sum(seconds) FILTER (idle) / sum(seconds) AS idle_percent,
    max(seconds) FILTER (idle) / 3600 AS longest_idle_hours,
    max(since) FILTER (idle AND lasting) AS idle_since,
    sum(joules) FILTER (idle) / 3.6e6 AS idle_kwh
FROM stretches GROUP BY owner, name, lease_id, host, device, share
HAVING bool_or(idle)
