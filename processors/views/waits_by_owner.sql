-- question: How long does each owner wait for devices?
-- detail: Requests of all time. Those that left the queue without devices count with the time until they left.
-- owner: who asked.
-- requests: number of requests.
-- granted: of them, granted.
-- waited: of them, those that waited in the queue.
-- wait_seconds_mean: over the requests that were granted, those that did not wait included.
-- wait_seconds_p50: median of the same.
-- wait_seconds_p95: 95 % quantile of the same.
-- wait_seconds_max: longest wait of any request.
-- unserved: requests that ended without devices: rejected, timed out, withdrawn, or left by their client.
WITH timed AS (SELECT *, (epoch_us(ended_at) - epoch_us(asked_at)) / 1e6 AS waited_seconds FROM requests)
SELECT owner, count(*) AS requests, count(*) FILTER (outcome = 'granted') AS granted,
    count(*) FILTER (queued) AS waited,
    avg(waited_seconds) FILTER (outcome = 'granted') AS wait_seconds_mean,
    quantile_cont(waited_seconds, 0.5) FILTER (outcome = 'granted') AS wait_seconds_p50,
    quantile_cont(waited_seconds, 0.95) FILTER (outcome = 'granted') AS wait_seconds_p95,
    max(waited_seconds) AS wait_seconds_max,
    count(*) FILTER (outcome NOT IN ('granted', 'refused')) AS unserved
FROM timed GROUP BY owner
