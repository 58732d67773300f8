-- question: What did the devices of a lease do, minute by minute?
-- detail: One row for each lease, device and minute. Minutes without samples are there, with nulls: nobody knows.
-- lease_id: the lease.
-- owner: who held it.
-- name: of the workload.
-- host: of the device.
-- device: uuid.
-- share: of the device.
-- memory_granted_bytes: on the device.
-- time: start of the minute.
-- seconds: of the minute that lie within the lease.
-- gpu_utilization_percent: mean over the minute; of the whole device, whoever shares it.
-- memory_used_bytes_max: greatest in the minute; of the whole device.
-- energy_joules: of the seconds within the lease, times the share; from the energy counter, or from power over the
--   time with samples without one.
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
