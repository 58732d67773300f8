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
    SELECT lease, host, device, max(used) AS peak FROM (
        SELECT lease, host, device, time, sum(memory_used_bytes) AS used FROM processes WHERE lease <> '' GROUP BY ALL
    ) GROUP BY ALL
), shared AS (
    SELECT DISTINCT a.lease_id, a.host, a.device FROM lease_spans a JOIN lease_spans b USING (host, device)
    WHERE a.share < 1 AND b.share < 1 AND a.lease_id <> b.lease_id AND a.started < b.ended AND b.started < a.ended
), buckets AS MATERIALIZED (
    SELECT b.lease_id, b.device, b.started, s.series, b.width, b.time, b.seconds
    FROM lease_buckets b JOIN store.series s USING (host, device)
), edges AS MATERIALIZED (
    -- Minutes that are another's, too: before the lease began, or after its end. What a sample of them stands for is
    -- told by the minute, or by the hour where the minute has but one.
    SELECT b.lease_id, b.device, b.series, b.time, b.seconds, epoch_us(l.started) AS first, epoch_us(l.ended) AS last,
        m.energy_millijoules_increase AS energy, m.power_watts_mean AS power, m.gpu_utilization_percent_mean AS util,
        m.gpu_utilization_percent_count AS n, m.power_watts_count / m.samples AS powered, m.samples,
        coalesce(m.known_seconds / m.samples, h.known_seconds / h.samples, 60) AS step
    FROM buckets b JOIN lease_spans l USING (lease_id, device, started)
    JOIN store.series_1m m ON m.series = b.series AND m.time = b.time
    LEFT JOIN store.series_1h h ON h.series = b.series
        AND h.time = make_timestamptz(epoch_us(b.time) // 3600000000 * 3600000000)
    WHERE b.width = 'minute' AND b.seconds < 60
), tens AS MATERIALIZED (
    SELECT e.lease_id, e.device, e.time AS minute, e.energy IS NOT NULL AS counted, e.step,
        greatest(least(e.last, epoch_us(r.time) + 10000000) - greatest(e.first, epoch_us(r.time)), 0) / 1e7 AS part,
        r.samples, r.gpu_utilization_percent_mean AS util, r.gpu_utilization_percent_count AS n,
        r.memory_used_bytes_max AS memory, r.power_watts_mean * r.power_watts_count AS power,
        r.energy_millijoules_increase AS energy
    FROM (SELECT *, unnest(range(0, 60000000, 10000000)) AS ten FROM edges) e
    JOIN store.series_10s r ON r.series = e.series AND r.time = make_timestamptz(epoch_us(e.time) + e.ten)
), pieces AS (
    SELECT b.lease_id, b.device, true AS whole, 1.0 AS part, r.gpu_utilization_percent_mean AS util,
        r.gpu_utilization_percent_count AS n, r.memory_used_bytes_max AS memory,
        coalesce(r.energy_millijoules_increase / 1e3, r.power_watts_mean * r.power_watts_count / r.samples
            * coalesce(r.known_seconds, 60.0 * nullif(bit_count(r.known_minutes_bitmask), 0), 3600)) AS joules
    FROM buckets b JOIN store.series_1h r ON r.series = b.series AND r.time = b.time
    WHERE b.width = 'hour'
    UNION ALL
    SELECT b.lease_id, b.device, true, 1.0, r.gpu_utilization_percent_mean, r.gpu_utilization_percent_count,
        r.memory_used_bytes_max, coalesce(r.energy_millijoules_increase / 1e3, r.power_watts_mean * r.power_watts_count
            * coalesce(r.known_seconds / r.samples, h.known_seconds / h.samples, 60 / r.samples))
    FROM buckets b JOIN store.series_1m r ON r.series = b.series AND r.time = b.time
    LEFT JOIN store.series_1h h ON h.series = b.series
        AND h.time = make_timestamptz(epoch_us(b.time) // 3600000000 * 3600000000)
    WHERE b.width = 'minute' AND b.seconds >= 60
    UNION ALL
    -- Memory and load of ten seconds that are not the lease's alone are another's.
    SELECT lease_id, device, part = 1, part, util, n, CASE WHEN part = 1 THEN memory END,
        part * CASE WHEN counted THEN energy / 1e3 ELSE power * step END
    FROM tens WHERE part > 0
    UNION ALL
    -- Where these are not kept any more, the minute is taken as even.
    SELECT lease_id, device, false, seconds / 60, util, n, NULL,
        seconds / 60 * coalesce(energy / 1e3, power * powered * samples * step)
    FROM edges e ANTI JOIN tens t ON t.lease_id = e.lease_id AND t.device = e.device AND t.minute = e.time
), used AS (
    SELECT lease_id, device, sum(joules) / 3.6e6 AS energy_kwh, max(memory) AS peak,
        coalesce(
            sum(util * n) FILTER (whole) / nullif(sum(n) FILTER (whole AND util IS NOT NULL), 0),
            sum(util * n * part) / nullif(sum(n * part) FILTER (util IS NOT NULL), 0)
        ) AS mean
    FROM pieces GROUP BY ALL
)
SELECT s.lease_id, s.owner, s.name, s.state, s.host, s.device, s.share, s.started, s.ended, s.hours, s.gpu_hours,
    s.share * u.energy_kwh AS energy_kwh, u.mean AS gpu_utilization_percent_mean,
    try_cast(coalesce(o.peak, u.peak) AS BIGINT) AS memory_used_bytes_peak, s.memory_granted_bytes,
    o.peak IS NULL AND m.lease_id IS NOT NULL AS memory_shared
FROM (
    -- An elastic lease may have had it twice.
    SELECT lease_id, any_value(owner) AS owner, any_value(name) AS name, any_value(state) AS state, host, device,
        any_value(share) AS share, any_value(memory_granted_bytes) AS memory_granted_bytes,
        min(started) AS started, max(ended) AS ended,
        sum(greatest(epoch(ended) - epoch(started), 0)) / 3600 AS hours,
        sum(gpus * greatest(epoch(ended) - epoch(started), 0)) / 3600 AS gpu_hours
    FROM lease_spans GROUP BY lease_id, host, device
) s
LEFT JOIN used u USING (lease_id, device)
LEFT JOIN shared m USING (lease_id, host, device)
LEFT JOIN own o ON o.lease = s.lease_id AND o.host = s.host AND o.device = s.device
