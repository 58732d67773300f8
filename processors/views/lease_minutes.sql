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
-- energy_joules: of the seconds within the lease, times the share; from the energy counter, or from power without one.
WITH minutes AS (
    SELECT *, unnest(generate_series(time_bucket(INTERVAL 1 MINUTE, started), ended, INTERVAL 1 MINUTE)) AS time
    FROM lease_spans WHERE ended > started
), held AS (
    SELECT *, epoch(least(ended, time + INTERVAL 1 MINUTE) - greatest(started, time)) AS seconds FROM minutes
)
SELECT h.lease_id, h.owner, h.name, h.host, h.device, h.share, h.memory_granted_bytes, h.time, h.seconds,
    r.gpu_utilization_percent_mean AS gpu_utilization_percent,
    r.memory_used_bytes_max,
    h.share * h.seconds * coalesce(r.energy_millijoules_increase / 60e3, r.power_watts_mean) AS energy_joules
FROM held h LEFT JOIN rollup_1m r ON r.device = h.device AND r.host = h.host AND r.time = h.time
WHERE h.seconds > 0
