-- question: How busy was the fleet, hour by hour?
-- hour: start of the hour.
-- devices: boards with samples in the hour; a board that is split counts once, and its MIG instances are not counted.
-- gpu_utilization_percent: mean over all samples.
-- busy_devices: boards whose mean, or that of one of their instances, was 5% or more.
-- leased_devices: leases in whole boards, as a mean over the hour, or over the part of it that has passed.
-- memory_used_percent: mean memory used as a percentage of the total; a board that is split counts once, and its MIG
--   instances are not counted.
-- power_watts: mean power of all devices together.
-- energy_kwh: energy of all devices; from the energy counters, or without them from power over the time with samples.
-- temperature_celsius_max: maximum of all samples.
WITH leased AS (
    -- A lease that begins or ends within the hour counts for the part that it has of it.
    SELECT hour, sum(gpus * (least(last, (hour + 1) * 3600000000) - greatest(first, hour * 3600000000)) / 1e6)
        / least(3600, greatest(epoch(now()) - hour * 3600, 1)) AS devices
    FROM (
        SELECT gpus, first, last, unnest(range(first // 3600000000, (last - 1) // 3600000000 + 1)) AS hour
        FROM (
            SELECT sum(gpus) AS gpus, epoch_us(started) AS first, epoch_us(ended) AS last FROM lease_spans
            WHERE ended > started GROUP BY ALL
        )
    ) GROUP BY hour
), made_up AS (
    -- A host sends samples of another one's device. Where the host has had another name they share the hour; here they
    -- would have more of the device than there was time for.
    SELECT DISTINCT u.time, u.host, u.device FROM rollup_1h u JOIN devices d ON d.device = u.device AND d.host <> u.host
    JOIN rollup_1h own ON own.time = u.time AND own.device = u.device AND own.host = d.host
    WHERE coalesce(u.known_seconds, 60) + coalesce(own.known_seconds, 60)
        > 1.02 * greatest(least((epoch_us(now()) - epoch_us(u.time)) / 1e6, 3600), 60)
)
SELECT r.time AS hour, count(DISTINCT r.board) AS devices,
    sum(r.gpu_utilization_percent_mean * r.gpu_utilization_percent_count) / sum(r.gpu_utilization_percent_count)
        AS gpu_utilization_percent,
    count(DISTINCT r.board) FILTER (r.gpu_utilization_percent_mean >= 5) AS busy_devices,
    coalesce(any_value(l.devices), 0) AS leased_devices,
    100 * sum(r.memory_used_bytes_mean) FILTER (NOT r.part) / sum(r.memory_total_bytes_last) FILTER (NOT r.part)
        AS memory_used_percent,
    sum(r.power_watts_mean) AS power_watts,
    sum(r.energy_kwh) AS energy_kwh,
    max(r.temperature_celsius_max) AS temperature_celsius_max
FROM (
    -- A device that two hosts list is one device, and so is one whose host has had two names.
    SELECT u.time, u.device,
        sum(u.gpu_utilization_percent_mean * u.gpu_utilization_percent_count)
            / sum(u.gpu_utilization_percent_count) AS gpu_utilization_percent_mean,
        sum(u.gpu_utilization_percent_count) AS gpu_utilization_percent_count,
        sum(u.memory_used_bytes_mean * u.samples) FILTER (u.memory_used_bytes_mean IS NOT NULL)
            / sum(u.samples) FILTER (u.memory_used_bytes_mean IS NOT NULL) AS memory_used_bytes_mean,
        max(u.memory_total_bytes_last) AS memory_total_bytes_last,
        sum(u.power_watts_mean * u.samples) FILTER (u.power_watts_mean IS NOT NULL)
            / sum(u.samples) FILTER (u.power_watts_mean IS NOT NULL) AS power_watts_mean,
        sum(coalesce(u.energy_millijoules_increase / 3.6e9,
            u.power_watts_mean * u.power_watts_count / u.samples / 3.6e6 * coalesce(u.known_seconds,
                60.0 * nullif(bit_count(u.known_minutes_bitmask), 0), least(u.samples * h.interval_seconds, 3600), 60)
        )) AS energy_kwh,
        max(u.temperature_celsius_max) AS temperature_celsius_max,
        any_value(coalesce(i.mig_parent, u.device)) AS board, bool_or(i.mig_parent IS NOT NULL) AS part
    FROM rollup_1h u LEFT JOIN hosts h USING (host)
    LEFT JOIN devices i ON i.device = u.device AND i.host = u.host
    -- A period reaches the hours within a LEFT JOIN, and not those within NOT EXISTS.
    LEFT JOIN made_up m ON m.time = u.time AND m.host = u.host AND m.device = u.device
    WHERE NOT EXISTS (FROM device_conflicts c WHERE c.host = u.host AND c.device = u.device AND u.time >= c.since - INTERVAL 1 HOUR)
        AND m.device IS NULL
    GROUP BY u.time, u.device
) r LEFT JOIN leased l ON l.hour = epoch_us(r.time) // 3600000000
GROUP BY r.time
