-- question: What is each device doing right now?
-- detail: The newest 10 s of each device, if they are within the last 15 minutes by its host's clock.
-- host: host of the device.
-- index: the driver's index on the host.
-- device: uuid of the device.
-- model: product name of the device.
-- time: start of the newest 10 s.
-- gpu_utilization_percent: mean.
-- memory_used_bytes: last value.
-- memory_total_bytes: total memory.
-- temperature_celsius: last value.
-- power_watts: mean.
-- owner: owners of active leases, separated by commas.
-- lease_id: active leases, separated by commas.
-- in_use: true if it is used without a lease: by a process without one, or, if no lease holds it, by load or by more
--   memory than drivers take (512 MiB, a sixteenth of a small device). For a board that is split, its MIG instances
--   decide.
WITH behind AS (
    SELECT host, to_seconds(offset_seconds) AS clock FROM host_clocks WHERE until IS NULL AND offset_seconds < 0
), newest AS (
    SELECT host, device, max(time) AS time,
        arg_max(gpu_utilization_percent_mean, time) AS gpu_utilization_percent,
        arg_max(memory_used_bytes_last, time) AS memory_used_bytes,
        arg_max(memory_total_bytes_last, time) AS memory_total_bytes,
        arg_max(temperature_celsius_last, time) AS temperature_celsius,
        arg_max(power_watts_mean, time) AS power_watts
    FROM rollup_10s LEFT JOIN behind b USING (host)
    WHERE time >= now() - INTERVAL 15 MINUTES + coalesce(b.clock, INTERVAL 0 SECONDS)
        -- By itself, so that older ones are not looked at.
        AND time >= now() - INTERVAL 15 MINUTES + (SELECT coalesce(min(clock), INTERVAL 0 SECONDS) FROM behind)
    GROUP BY host, device
), held AS (
    SELECT host, device, string_agg(DISTINCT owner, ', ' ORDER BY owner) AS owner,
        string_agg(lease_id, ', ' ORDER BY lease_id) AS lease_id
    FROM lease_spans WHERE state = 'active' AND ended >= now() GROUP BY host, device
), strangers AS (
    SELECT DISTINCT host, device FROM processes_now
    WHERE concern IN ('no lease', 'lease has ended', 'not a device of its lease')
)
SELECT n.host, d.index, n.device, d.name AS model, n.time, n.gpu_utilization_percent, n.memory_used_bytes,
    n.memory_total_bytes, n.temperature_celsius, n.power_watts, h.owner, h.lease_id,
    NOT coalesce(d.mig_enabled, false) AND (s.device IS NOT NULL OR (h.lease_id IS NULL AND (
        coalesce(n.memory_used_bytes > least(512 * 2**20, n.memory_total_bytes / 16), false)
        OR coalesce(n.gpu_utilization_percent > 5, false)
    ))) AS in_use
FROM newest n LEFT JOIN devices d USING (device) LEFT JOIN held h ON h.host = n.host AND h.device = n.device
LEFT JOIN strangers s ON s.host = n.host AND s.device = n.device
-- A device is on one host: what another one says of it does not count.
WHERE d.host IS NULL OR d.host = n.host
-- Of one that no inventory has named yet the newest word counts.
QUALIFY row_number() OVER (PARTITION BY n.device ORDER BY n.time DESC, n.host) = 1
