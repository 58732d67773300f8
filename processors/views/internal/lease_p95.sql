-- The p95 of the load of the leases in `store.lease_untotaled`, from the counts in bins of whole hours and minutes.
WITH spans AS MATERIALIZED (
    SELECT dense_rank() OVER (ORDER BY lease_id) AS number, *,
        (first + 3599999999) // 3600000000 AS from_hour, last // 3600000000 AS to_hour,
        first // 60000000 AS from_minute, (last - 1) // 60000000 + 1 AS to_minute
    FROM store.lease_untotaled
), hours AS (
    SELECT number, series, make_timestamptz(unnest(range(from_hour, to_hour)) * 3600000000) AS time FROM spans
), minutes AS (
    SELECT number, series, make_timestamptz(unnest(CASE
        WHEN from_hour < to_hour
        THEN range(from_minute, from_hour * 60) || range(to_hour * 60, to_minute)
        ELSE range(from_minute, to_minute) END) * 60000000) AS time
    FROM spans
), counts AS (
    -- A bin of a percentage is its value. Counts as doubles are exact, and added up faster than integers that grow wide.
    SELECT number, value, sum(n::DOUBLE) AS n FROM (
        SELECT l.number, b.bin AS value, b.n
        FROM hours l JOIN store.series_1h_bins b ON b.series = l.series AND b.time = l.time
        WHERE b.metric = 'gpu_utilization_percent'
        UNION ALL
        SELECT l.number, b.bin AS value, b.n
        FROM minutes l JOIN store.series_1m_bins b ON b.series = l.series AND b.time = l.time
        WHERE b.metric = 'gpu_utilization_percent'
    ) GROUP BY ALL
), ranked AS (
    SELECT number, value, sum(n) OVER (PARTITION BY number ORDER BY value) AS upto,
        sum(n) OVER (PARTITION BY number) AS total
    FROM counts
), quantiles AS (
    SELECT number, min(value) AS p95 FROM ranked WHERE upto >= 0.95 * total GROUP BY number
)
SELECT DISTINCT s.lease_id, q.p95 FROM quantiles q JOIN spans s USING (number)
