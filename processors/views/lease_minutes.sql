-- question: What did the devices of a lease do, minute by minute?
-- detail: One row for each lease, device and minute. Minutes without samples have nulls, since nothing is known about
--   them.
-- lease_id: id of the lease.
-- owner: owner of the lease.
-- name: name of the workload.
-- host: host of the device.
-- device: uuid of the device.
-- share: granted share of the device.
-- memory_granted_bytes: memory granted on the device.
-- time: start of the minute.
-- seconds: seconds of the minute that are within the lease.
-- gpu_utilization_percent: mean over the minute, of the whole device, including other leases on it.
-- memory_used_bytes_max: maximum in the minute, of the whole device.
-- energy_joules: energy of the seconds within the lease, times the share; from the energy counter, or without one from
--   power over the time with samples.
WITH spans AS (
    -- In whole microseconds: arithmetic on timestamps with time zones costs a calendar each time.
    SELECT *, epoch_us(started) AS first, epoch_us(ended) AS last FROM lease_spans WHERE ended > started
), minutes AS (
    SELECT *, unnest(range(first // 60000000, (last - 1) // 60000000 + 1)) AS minute FROM spans
), held AS (
    SELECT *, make_timestamptz(minute * 60000000) AS time,
        (least(last, (minute + 1) * 60000000) - greatest(first, minute * 60000000)) / 1e6 AS seconds
    FROM minutes
)
SELECT h.lease_id, h.owner, h.name, h.host, h.device, h.share, h.memory_granted_bytes, h.time, h.seconds,
    r.gpu_utilization_percent_mean AS gpu_utilization_percent,
    r.memory_used_bytes_max,
    h.share * h.seconds / 60 * coalesce(r.energy_millijoules_increase / 1e3, r.power_watts_mean * r.power_watts_count
        * coalesce(r.known_seconds / r.samples, u.known_seconds / u.samples, 60 / r.samples)) AS energy_joules
FROM held h LEFT JOIN rollup_1m r ON r.device = h.device AND r.host = h.host AND r.time = h.time
LEFT JOIN rollup_1h u ON u.device = h.device AND u.host = h.host
    AND u.time = make_timestamptz(h.minute // 60 * 3600000000)
