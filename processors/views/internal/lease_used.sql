-- Energy, load and memory of the spans in `store.lease_untotaled`, from whole hours, whole minutes and ten seconds.
WITH spans AS MATERIALIZED (
    SELECT row_number() OVER () AS number, * FROM store.lease_untotaled
), whole AS (
    SELECT *, (first + 3599999999) // 3600000000 AS from_hour, last // 3600000000 AS to_hour,
        first // 60000000 AS from_minute, (last - 1) // 60000000 + 1 AS to_minute
    FROM spans
), hours AS (
    SELECT number, series, make_timestamptz(unnest(range(from_hour, to_hour)) * 3600000000) AS time FROM whole
), minutes AS MATERIALIZED (
    SELECT number, series, first, last, minute, make_timestamptz(minute * 60000000) AS time,
        (least(last, (minute + 1) * 60000000) - greatest(first, minute * 60000000)) / 1e6 AS seconds
    FROM (
        SELECT number, series, first, last, unnest(CASE
            WHEN from_hour < to_hour
            THEN range(from_minute, from_hour * 60) || range(to_hour * 60, to_minute)
            ELSE range(from_minute, to_minute) END) AS minute
        FROM whole
    )
), edges AS MATERIALIZED (
    -- Minutes that are another's, too: before the lease began, or after its end. What a sample of them stands for is
    -- told by the minute, or by the hour where the minute has but one.
    SELECT b.number, b.series, b.time, b.seconds, b.first, b.last,
        m.energy_millijoules_increase AS energy, m.power_watts_mean AS power, m.gpu_utilization_percent_mean AS util,
        m.gpu_utilization_percent_count AS n, m.power_watts_count / m.samples AS powered, m.samples,
        coalesce(m.known_seconds / m.samples, h.known_seconds / h.samples, 60) AS step
    FROM minutes b JOIN store.series_1m m ON m.series = b.series AND m.time = b.time
    LEFT JOIN store.series_1h h ON h.series = b.series AND h.time = make_timestamptz(b.minute // 60 * 3600000000)
    WHERE b.seconds < 60
), tens AS MATERIALIZED (
    SELECT e.number, e.time AS minute, e.energy IS NOT NULL AS counted, e.step,
        greatest(least(e.last, epoch_us(r.time) + 10000000) - greatest(e.first, epoch_us(r.time)), 0) / 1e7 AS part,
        r.samples, r.gpu_utilization_percent_mean AS util, r.gpu_utilization_percent_count AS n,
        r.memory_used_bytes_max AS memory, r.power_watts_mean * r.power_watts_count AS power,
        r.energy_millijoules_increase AS energy
    FROM (SELECT *, unnest(range(0, 60000000, 10000000)) AS ten FROM edges) e
    JOIN store.series_10s r ON r.series = e.series AND r.time = make_timestamptz(epoch_us(e.time) + e.ten)
), pieces AS (
    SELECT b.number, true AS whole, 1.0 AS part, r.gpu_utilization_percent_mean AS util,
        r.gpu_utilization_percent_count AS n, r.memory_used_bytes_max AS memory,
        coalesce(r.energy_millijoules_increase / 1e3, r.power_watts_mean * r.power_watts_count / r.samples
            * coalesce(r.known_seconds, 60.0 * nullif(bit_count(r.known_minutes_bitmask), 0), 60)) AS joules
    FROM hours b JOIN store.series_1h r ON r.series = b.series AND r.time = b.time
    UNION ALL
    SELECT b.number, true, 1.0, r.gpu_utilization_percent_mean, r.gpu_utilization_percent_count,
        r.memory_used_bytes_max, coalesce(r.energy_millijoules_increase / 1e3, r.power_watts_mean * r.power_watts_count
            * coalesce(r.known_seconds / r.samples, h.known_seconds / h.samples, 60 / r.samples))
    FROM minutes b JOIN store.series_1m r ON r.series = b.series AND r.time = b.time
    LEFT JOIN store.series_1h h ON h.series = b.series AND h.time = make_timestamptz(b.minute // 60 * 3600000000)
    WHERE b.seconds >= 60
    UNION ALL
    -- Memory and load of ten seconds that are not the lease's alone are another's.
    SELECT number, part = 1, part, util, n, CASE WHEN part = 1 THEN memory END,
        part * CASE WHEN counted THEN energy / 1e3 ELSE power * step END
    FROM tens WHERE part > 0
    UNION ALL
    -- Where these are not kept any more, the minute is taken as even.
    SELECT number, false, seconds / 60, util, n, NULL,
        seconds / 60 * coalesce(energy / 1e3, power * powered * samples * step)
    FROM edges e ANTI JOIN tens t ON t.number = e.number AND t.minute = e.time
), used AS (
    SELECT number, sum(joules) AS joules, max(memory) AS peak,
        sum(util * n) FILTER (whole) AS whole_load, sum(n) FILTER (whole AND util IS NOT NULL) AS whole_samples,
        sum(util * n * part) AS load, sum(n * part) FILTER (util IS NOT NULL) AS samples
    FROM pieces GROUP BY number
)
SELECT s.lease_id, s.host, s.device, s.first, s.last, u.* EXCLUDE (number) FROM used u JOIN spans s USING (number)
