-- question: What did each lease use of what it was given?
-- lease_id: the lease.
-- owner: who held it.
-- name: of the workload.
-- state: of the lease.
-- started: when it was granted.
-- ended: when it ended; now for an active one.
-- devices: how many.
-- gpu_hours: held, times the share of each device.
-- energy_kwh: used meanwhile.
-- gpu_utilization_percent_mean: over all its devices and the time held.
-- gpu_utilization_percent_p95: over all samples of its devices, within 0.5 (from the histograms of the rollups).
-- memory_used_bytes_peak: on the device where it was greatest.
-- memory_granted_bytes: on the device that was granted most.
-- memory_used_percent: the greatest peak of a device as a share of what was granted there; null where none was.
WITH counts AS (
    SELECT lease_id, value, sum(n) AS n FROM (
        SELECT l.lease_id, b.value, b.n
        FROM lease_buckets l JOIN rollup_1h_bins b ON b.device = l.device AND b.host = l.host AND b.time = l.time
        WHERE l.width = 'hour' AND b.metric = 'gpu_utilization_percent'
        UNION ALL
        SELECT l.lease_id, b.value, b.n
        FROM lease_buckets l JOIN rollup_1m_bins b ON b.device = l.device AND b.host = l.host AND b.time = l.time
        WHERE l.width = 'minute' AND b.metric = 'gpu_utilization_percent'
    ) GROUP BY ALL
), ranked AS (
    SELECT lease_id, value, sum(n) OVER (PARTITION BY lease_id ORDER BY value) AS upto,
        sum(n) OVER (PARTITION BY lease_id) AS total
    FROM counts
), quantiles AS (
    SELECT lease_id, min(value) AS p95 FROM ranked WHERE upto >= 0.95 * total GROUP BY lease_id
)
SELECT lease_id, any_value(owner) AS owner, any_value(name) AS name, any_value(state) AS state,
    min(started) AS started, max(ended) AS ended, count(*) AS devices, sum(gpu_hours) AS gpu_hours,
    sum(energy_kwh) AS energy_kwh,
    sum(gpu_utilization_percent_mean * hours) / sum(hours) FILTER (gpu_utilization_percent_mean IS NOT NULL)
        AS gpu_utilization_percent_mean,
    any_value(q.p95) AS gpu_utilization_percent_p95,
    max(memory_used_bytes_peak) AS memory_used_bytes_peak, max(memory_granted_bytes) AS memory_granted_bytes,
    max(100 * memory_used_bytes_peak / nullif(memory_granted_bytes, 0)) AS memory_used_percent
FROM lease_device_usage LEFT JOIN quantiles q USING (lease_id)
GROUP BY lease_id
