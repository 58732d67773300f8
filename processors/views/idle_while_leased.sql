-- question: Who held GPUs idle, for how long, and at what cost?
-- detail: A minute is idle if the device's mean utilization in it is below 5%. Minutes without samples count neither
--   way.
-- owner: owner of the lease.
-- name: name of the workload.
-- lease_id: id of the lease.
-- host: host of the device.
-- device: uuid of the device.
-- idle_hours: hours in idle minutes.
-- idle_gpu_hours: idle hours, times the share, in whole boards.
-- idle_percent: percentage of the time held with samples.
-- longest_idle_hours: longest uninterrupted idle period.
-- idle_since: start of the idle period that lasts until the last known minute; null if there is none.
-- idle_kwh: energy of the idle minutes, times the share.
WITH idle AS (
    SELECT lease_id, host, device, first, last, idle_seconds, idle_known_seconds, idle_longest_seconds,
        idle_since_minute, idle_joules
    FROM store.lease_totals WHERE idle_seconds IS NOT NULL
    UNION ALL BY NAME
    FROM store.lease_idle
)
SELECT l.owner, l.name, l.lease_id, l.host, l.device, i.idle_seconds / 3600 AS idle_hours,
    l.gpus * i.idle_seconds / 3600 AS idle_gpu_hours, 100 * i.idle_seconds / i.idle_known_seconds AS idle_percent,
    i.idle_longest_seconds / 3600 AS longest_idle_hours,
    -- `greatest` would pass over a null.
    CASE WHEN i.idle_since_minute IS NOT NULL
        THEN greatest(make_timestamptz(i.idle_since_minute * 60000000), l.started) END AS idle_since,
    l.share * i.idle_joules / 3.6e6 AS idle_kwh
FROM lease_spans l JOIN idle i ON i.lease_id = l.lease_id AND i.host = l.host AND i.device = l.device
    AND i.first = epoch_us(l.started) AND i.last = epoch_us(l.ended)
