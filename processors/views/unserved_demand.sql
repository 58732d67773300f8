-- question: What was asked for in vain, hour by hour?
-- detail: Requests that ended without devices, by the hour in which they ended. What was invalid does not count.
-- hour: its start.
-- outcome: `rejected`, `timed_out`, `withdrawn` or `gone` (its client was not heard any more).
-- code: of the rejection; null if it was withdrawn or its client left.
-- models: globs asked for; empty for any.
-- requests: number of requests.
-- gpus: devices asked for, in all.
-- owners: number of owners.
-- gpu_hours: devices times the expected or estimated duration, where either is known.
SELECT time_bucket(INTERVAL 1 HOUR, ended_at) AS hour, outcome, code, array_to_string(models, '|') AS models,
    count(*) AS requests, sum(coalesce(gpu_share, gpus)) AS gpus, count(DISTINCT owner) AS owners,
    sum(coalesce(gpu_share, gpus) * coalesce(expected_seconds, estimated_seconds)) / 3600 AS gpu_hours
FROM requests WHERE outcome NOT IN ('granted', 'refused') GROUP BY ALL
