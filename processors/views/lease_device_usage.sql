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
-- gpu_hours: held, times the share.
-- energy_kwh: used meanwhile, times the share.
-- gpu_utilization_percent_mean: over the time held; null without samples.
-- memory_used_bytes_peak: of the lease's own processes where they are known by lease, else of the whole device.
-- memory_granted_bytes: on the device; 0 where none was asked for.
WITH own AS (
    SELECT lease, device, max(used) AS peak FROM (
        SELECT lease, device, time, sum(memory_used_bytes) AS used FROM processes WHERE lease <> '' GROUP BY ALL
    ) GROUP BY ALL
), used AS (
    SELECT lease_id, device, sum(energy_joules) / 3.6e6 AS energy_kwh, max(memory_used_bytes_max) AS peak,
        sum(gpu_utilization_percent * seconds) / sum(seconds) FILTER (gpu_utilization_percent IS NOT NULL) AS mean
    FROM lease_minutes GROUP BY ALL
)
SELECT s.lease_id, s.owner, s.name, s.state, s.host, s.device, s.share, s.started, s.ended,
    greatest(epoch(s.ended - s.started), 0) / 3600 AS hours,
    s.share * greatest(epoch(s.ended - s.started), 0) / 3600 AS gpu_hours,
    u.energy_kwh, u.mean AS gpu_utilization_percent_mean,
    coalesce(o.peak, u.peak)::BIGINT AS memory_used_bytes_peak, s.memory_granted_bytes
FROM lease_spans s
LEFT JOIN used u USING (lease_id, device)
LEFT JOIN own o ON o.lease = s.lease_id AND o.device = s.device
