-- question: What did a lease use of each of its devices?
-- lease_id: the lease.
-- owner: who held it.
-- name: of the workload.
-- state: of the lease.
-- host: of the device.
-- device: uuid.
-- share: of the device.
-- started: when it was granted.
-- ended: when it ended; now for an active one.
-- hours: held.
-- gpu_hours: held, times the share, in whole boards: an hour of a MIG instance of one slice of seven is a seventh.
-- energy_kwh: used meanwhile, times the share.
-- gpu_utilization_percent_mean: over the samples of the time held; null without any.
-- memory_used_bytes_peak: of the lease's own processes where they are known by lease, else of the whole device.
-- memory_granted_bytes: on the device; 0 where none was asked for.
WITH own AS (
    SELECT lease, host, device, max(used) AS peak FROM (
        SELECT lease, host, device, time, sum(memory_used_bytes) AS used FROM processes WHERE lease <> '' GROUP BY ALL
    ) GROUP BY ALL
), buckets AS MATERIALIZED (
    SELECT b.lease_id, b.device, s.series, b.width, b.time, b.seconds
    FROM lease_buckets b JOIN store.series s USING (host, device)
), pieces AS (
    SELECT b.lease_id, b.device, b.seconds, b.seconds / 3600 AS part, r.gpu_utilization_percent_mean AS util,
        r.gpu_utilization_percent_count AS n, r.memory_used_bytes_max AS memory, r.power_watts_mean AS power,
        r.energy_millijoules_increase AS energy
    FROM buckets b JOIN store.series_1h r ON r.series = b.series AND r.time = b.time
    WHERE b.width = 'hour'
    UNION ALL
    SELECT b.lease_id, b.device, b.seconds, b.seconds / 60, r.gpu_utilization_percent_mean,
        r.gpu_utilization_percent_count, r.memory_used_bytes_max, r.power_watts_mean, r.energy_millijoules_increase
    FROM buckets b JOIN store.series_1m r ON r.series = b.series AND r.time = b.time
    WHERE b.width = 'minute'
), used AS (
    SELECT lease_id, device, sum(coalesce(energy * part / 1e3, power * seconds)) / 3.6e6 AS energy_kwh,
        max(memory) AS peak, sum(util * n * part) / nullif(sum(n * part) FILTER (util IS NOT NULL), 0) AS mean
    FROM pieces GROUP BY ALL
)
SELECT s.lease_id, s.owner, s.name, s.state, s.host, s.device, s.share, s.started, s.ended,
    greatest(epoch(s.ended) - epoch(s.started), 0) / 3600 AS hours,
    s.gpus * greatest(epoch(s.ended) - epoch(s.started), 0) / 3600 AS gpu_hours,
    s.share * u.energy_kwh AS energy_kwh, u.mean AS gpu_utilization_percent_mean,
    try_cast(coalesce(o.peak, u.peak) AS BIGINT) AS memory_used_bytes_peak, s.memory_granted_bytes
FROM lease_spans s
LEFT JOIN used u USING (lease_id, device)
LEFT JOIN own o ON o.lease = s.lease_id AND o.host = s.host AND o.device = s.device
