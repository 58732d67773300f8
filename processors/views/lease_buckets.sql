-- question: Which hours lie wholly within a lease, and which minutes around them?
-- detail: Splits a lease into as few buckets as the rollups allow, so that a long lease is as cheap to sum as a short
--   one.
-- lease_id: id of the lease.
-- host: host of the device.
-- device: uuid of the device.
-- started: time from which the lease had it, as in `lease_spans`.
-- width: `hour` or `minute`: the rollup of the bucket.
-- time: start of the bucket.
-- seconds: seconds of the bucket that are within the lease.
WITH spans AS (
    SELECT *, epoch_us(started) AS first, epoch_us(ended) AS last FROM lease_spans WHERE ended > started
), whole AS (
    SELECT *, (first + 3599999999) // 3600000000 AS from_hour, last // 3600000000 AS to_hour,
        first // 60000000 AS from_minute, (last - 1) // 60000000 + 1 AS to_minute
    FROM spans
), pieces AS (
    SELECT lease_id, host, device, started, first, last, 'hour' AS width, 3600000000 AS length,
        unnest(range(from_hour, to_hour)) AS number
    FROM whole
    UNION ALL
    SELECT lease_id, host, device, started, first, last, 'minute', 60000000, unnest(CASE
        WHEN from_hour < to_hour
        THEN range(from_minute, from_hour * 60) || range(to_hour * 60, to_minute)
        ELSE range(from_minute, to_minute) END)
    FROM whole
)
SELECT lease_id, host, device, started, width, make_timestamptz(number * length) AS time,
    (least(last, (number + 1) * length) - greatest(first, number * length)) / 1e6 AS seconds
FROM pieces
