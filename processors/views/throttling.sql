-- question: Where and when were GPUs held back by heat or power?
-- detail: From the 10 s rollups: 10 s in which a reason was seen count whole. Reasons are NVML's clock event reasons:
--   heat 0x20 and 0x40, power 0x04 and 0x80, hardware slowdown 0x08 (heat or power, as the board says).
-- hour: its start, UTC.
-- host: of the device.
-- device: uuid.
-- thermal_seconds: held back by heat.
-- power_seconds: held back by the power limit or the power brake.
-- slowdown_seconds: hardware slowdown.
-- throttled_percent: of the time with samples, for any of the reasons.
-- sm_clock_percent: mean clock while held back, of the highest clock.
-- temperature_celsius_max: the hottest sample of the hour.
-- power_watts_max: the greatest of the hour.
-- power_limit_watts: the last of the hour.
WITH tens AS (
    SELECT *, (throttle_reasons_bitmask_any & 96) <> 0 AS thermal, (throttle_reasons_bitmask_any & 132) <> 0 AS power,
        (throttle_reasons_bitmask_any & 8) <> 0 AS slowdown, (throttle_reasons_bitmask_any & 236) <> 0 AS held
    FROM rollup_10s
)
SELECT time_bucket(INTERVAL 1 HOUR, time) AS hour, host, device,
    10 * count(*) FILTER (thermal) AS thermal_seconds,
    10 * count(*) FILTER (power) AS power_seconds,
    10 * count(*) FILTER (slowdown) AS slowdown_seconds,
    100 * count(*) FILTER (held) / count(*) AS throttled_percent,
    avg(100 * sm_clock_megahertz_mean / nullif(sm_clock_max_megahertz_last, 0)) FILTER (held) AS sm_clock_percent,
    max(temperature_celsius_max) AS temperature_celsius_max, max(power_watts_max) AS power_watts_max,
    arg_max(power_limit_watts_last, time) AS power_limit_watts
FROM tens GROUP BY 1, 2, 3
HAVING bool_or(held)
