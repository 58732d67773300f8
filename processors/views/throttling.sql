-- question: Where and when were GPUs held back by heat or power?
-- detail: From the 10 s rollups: 10 s in which a reason was seen count whole. Reasons are NVML's clock event reasons:
--   heat 0x20 and 0x40, power 0x04 and 0x80, hardware slowdown 0x08 (heat or power, as the board says).
-- hour: its start, UTC.
-- host: of the device.
-- device: uuid.
-- thermal_seconds: held back by heat.
-- power_seconds: held back by the power limit or the power brake.
-- slowdown_seconds: hardware slowdown.
-- throttled_percent: of the time with samples (by the host's interval), for any of the reasons.
-- sm_clock_percent: mean clock while held back, of the highest clock.
-- temperature_celsius_max: the hottest sample of the hour.
-- power_watts_max: the greatest of the hour.
-- power_limit_watts: the last of the hour.
WITH held AS (
    SELECT epoch_us(time) // 3600000000 AS hour, host, device,
        10 * count(*) FILTER ((throttle_reasons_bitmask_any & 96) <> 0) AS thermal_seconds,
        10 * count(*) FILTER ((throttle_reasons_bitmask_any & 132) <> 0) AS power_seconds,
        10 * count(*) FILTER ((throttle_reasons_bitmask_any & 8) <> 0) AS slowdown_seconds,
        10 * count(*) AS seconds,
        avg(100 * sm_clock_megahertz_mean / nullif(sm_clock_max_megahertz_last, 0)) AS sm_clock_percent
    FROM rollup_10s WHERE (throttle_reasons_bitmask_any & 236) <> 0
    GROUP BY 1, 2, 3
)
SELECT u.time AS hour, h.host, h.device, h.thermal_seconds, h.power_seconds, h.slowdown_seconds,
    least(100 * h.seconds / nullif(u.samples * coalesce(o.interval_seconds, 1), 0), 100) AS throttled_percent,
    h.sm_clock_percent, u.temperature_celsius_max, u.power_watts_max, u.power_limit_watts_last AS power_limit_watts
FROM held h
JOIN rollup_1h u ON u.device = h.device AND u.host = h.host AND epoch_us(u.time) // 3600000000 = h.hour
LEFT JOIN hosts o ON o.host = h.host
