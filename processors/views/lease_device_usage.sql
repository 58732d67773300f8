-- question: What did a lease use of each of its devices?
-- detail: A lease is split into whole hours, whole minutes and, in the minutes in which it begins and ends, ten-second
--   buckets as long as these are kept. So use before and after the lease is not counted.
-- lease_id: id of the lease.
-- owner: owner of the lease.
-- name: name of the workload.
-- state: state of the lease.
-- host: host of the device.
-- device: uuid of the device.
-- share: granted share of the device.
-- started: time from which the lease had it.
-- ended: time up to which it had it; now if it has it.
-- hours: hours held.
-- gpu_hours: hours held, times the share, in whole boards: an hour of a MIG instance with one slice of seven is a
--   seventh.
-- energy_kwh: energy used during the lease, times the share; from the energy counter, or from power over the time with
--   samples.
-- gpu_utilization_percent_mean: mean over the samples during the lease; null without any.
-- memory_used_bytes_peak: peak of the lease's own processes if they are known by lease, else of the whole device in the
--   ten-second buckets that lie wholly within the lease; null if there are none.
-- memory_granted_bytes: memory granted on the device; 0 if none was requested.
-- memory_shared: true if the peak may include other leases: it is that of the whole device, and others held a part of
--   it at the time.
WITH own AS (
    SELECT lease, host, device, max(peak) AS peak FROM store.lease_peaks GROUP BY ALL
), parts AS (
    SELECT * FROM lease_spans WHERE share < 1
), shared AS (
    SELECT DISTINCT a.lease_id, a.host, a.device FROM parts a JOIN parts b USING (host, device)
    WHERE a.lease_id <> b.lease_id AND a.started < b.ended AND b.started < a.ended
), used AS (
    SELECT lease_id, host, device, first, last, joules, peak, whole_load, whole_samples, load, samples
    FROM store.lease_totals
    UNION ALL BY NAME
    FROM store.lease_used
), held AS (
    -- An elastic lease may have had it twice.
    SELECT l.lease_id, any_value(l.owner) AS owner, any_value(l.name) AS name, any_value(l.state) AS state, l.host,
        l.device, any_value(l.share) AS share, any_value(l.memory_granted_bytes) AS memory_granted_bytes,
        min(l.started) AS started, max(l.ended) AS ended,
        sum(greatest(epoch(l.ended) - epoch(l.started), 0)) / 3600 AS hours,
        sum(l.gpus * greatest(epoch(l.ended) - epoch(l.started), 0)) / 3600 AS gpu_hours,
        sum(u.joules) / 3.6e6 AS energy_kwh, max(u.peak) AS peak,
        coalesce(
            sum(u.whole_load) / nullif(sum(u.whole_samples), 0), sum(u.load) / nullif(sum(u.samples), 0)
        ) AS mean
    FROM lease_spans l LEFT JOIN used u ON u.lease_id = l.lease_id AND u.host = l.host AND u.device = l.device
        AND u.first = epoch_us(l.started) AND u.last = epoch_us(l.ended)
    GROUP BY l.lease_id, l.host, l.device
)
SELECT s.lease_id, s.owner, s.name, s.state, s.host, s.device, s.share, s.started, s.ended, s.hours, s.gpu_hours,
    s.share * s.energy_kwh AS energy_kwh, s.mean AS gpu_utilization_percent_mean,
    try_cast(coalesce(o.peak, s.peak) AS BIGINT) AS memory_used_bytes_peak, s.memory_granted_bytes,
    o.peak IS NULL AND m.lease_id IS NOT NULL AS memory_shared
FROM held s
LEFT JOIN shared m USING (lease_id, host, device)
LEFT JOIN own o ON o.lease = s.lease_id AND o.host = s.host AND o.device = s.device
