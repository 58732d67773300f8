-- question: How long does one wait for each model?
-- detail: Granted requests count for the model that they got, others for what they asked for.
-- model: the product's name; for requests without a grant the globs asked for, `any` without one.
-- gpus: number of devices asked for.
-- requests: number of requests.
-- granted: of them, granted.
-- wait_seconds_p50: median wait of those that were granted.
-- wait_seconds_p95: 95 % quantile of the same.
-- unserved_gpu_requests: devices asked for by requests that ended without any.
WITH got AS (SELECT lease_id, min(model) AS model FROM lease_devices WHERE model <> '' GROUP BY lease_id),
    timed AS (SELECT *, (epoch_us(ended_at) - epoch_us(asked_at)) / 1e6 AS waited_seconds FROM requests)
SELECT coalesce(g.model, nullif(array_to_string(r.models, '|'), ''), 'any') AS model, r.gpus, count(*) AS requests,
    count(*) FILTER (outcome = 'granted') AS granted,
    quantile_cont(waited_seconds, 0.5) FILTER (outcome = 'granted') AS wait_seconds_p50,
    quantile_cont(waited_seconds, 0.95) FILTER (outcome = 'granted') AS wait_seconds_p95,
    coalesce(sum(r.gpus) FILTER (outcome NOT IN ('granted', 'refused')), 0)::BIGINT AS unserved_gpu_requests
FROM timed r LEFT JOIN got g USING (lease_id) WHERE r.gpus > 0 GROUP BY ALL
