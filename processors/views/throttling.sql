-- question: Where and when were GPUs throttled by heat or power?
-- detail: From counts of samples in the rollups of hours, exact to the sample. Reasons are NVML's clock event reasons:
--   heat 0x20 and 0x40, power 0x04 and 0x80, hardware slowdown 0x08 (heat or power, depending on the board). A sample
--   counts for the usual time between two samples of the hour.
-- hour: start of the hour.
-- host: host of the device.
-- device: uuid of the device.
-- thermal_seconds: time throttled by heat.
-- power_seconds: time throttled by the power limit or the power brake.
-- slowdown_seconds: time in hardware slowdown.
-- throttled_percent: percentage of the samples throttled for any of the reasons.
-- sm_clock_percent: mean clock of the throttled samples, as a percentage of the highest clock.
-- temperature_celsius_max: maximum of the hour.
-- power_watts_max: maximum of the hour.
-- power_limit_watts: last value of the hour.
SELECT u.time AS hour, u.host, u.device,
    try_cast(round(u.throttled_thermal_samples * u.step) AS BIGINT) AS thermal_seconds,
    try_cast(round(u.throttled_power_samples * u.step) AS BIGINT) AS power_seconds,
    try_cast(round(u.throttled_slowdown_samples * u.step) AS BIGINT) AS slowdown_seconds,
    100 * u.throttled_samples / u.samples AS throttled_percent,
    u.throttled_sm_clock_percent_sum / nullif(u.throttled_sm_clock_percent_count, 0) AS sm_clock_percent,
    u.temperature_celsius_max, u.power_watts_max, u.power_limit_watts_last AS power_limit_watts
FROM (
    SELECT *, coalesce(known_seconds, 60.0 * nullif(bit_count(known_minutes_bitmask), 0), 60.0) / samples AS step
    FROM rollup_1h WHERE throttled_samples > 0
) u
