-- question: Which hours lie wholly within a lease, and which minutes around them?
-- detail: A lease in as few pieces as the rollups allow, so that a long one is as cheap to add up as a short one.
-- lease_id: the lease.
-- host: of the device.
-- device: uuid.
-- width: `hour` or `minute`: the rollup that the piece is in.
-- time: start of the piece.
-- seconds: of it that lie within the lease.
WITH spans AS (
    SELECT *, epoch_us(started) AS first, epoch_us(ended) AS last FROM lease_spans WHERE ended > started
), whole AS (
    SELECT *, (first + 3599999999) // 3600000000 AS from_hour, last // 3600000000 AS to_hour,
        first // 60000000 AS from_minute, (last - 1) // 60000000 + 1 AS to_minute
    FROM spans
), pieces AS (
    SELECT lease_id, host, device, first, last, 'hour' AS width, 3600000000 AS length,
        unnest(range(from_hour, to_hour)) AS number
    FROM whole
    UNION ALL
    SELECT lease_id, host, device, first, last, 'minute', 60000000, unnest(CASE
        WHEN from_hour < to_hour
        THEN range(from_minute, from_hour * 60) || range(to_hour * 60, to_minute)
        ELSE range(from_minute, to_minute) END)
    FROM whole
)
SELECT lease_id, host, device, width, make_timestamptz(number * length) AS time,
    (least(last, (number + 1) * length) - greatest(first, number * length)) / 1e6 AS seconds
FROM pieces
