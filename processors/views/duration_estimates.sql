-- question: How long did work take, against what was expected?
-- detail: Leases that ended by themselves. Expired, lost and evicted ones say only that the work took longer.
-- request_id: id of the request.
-- lease_id: the lease.
-- owner: who held it.
-- name: of the workload.
-- basis: source of the estimate: `request` (its own `expected_seconds`), `owner_name`, `name`, `burst` (others
--   submitted at about the same time), `owner_shape`, `shape`, `all` or `none`.
-- expected_seconds: the request's own, else the planner's estimate.
-- low_seconds: 10 % quantile of the estimate.
-- high_seconds: 90 % quantile of the estimate.
-- actual_seconds: from grant to release.
-- error_seconds: actual less expected.
-- ratio: actual over expected.
-- inside: true if the actual duration is within the interval.
WITH ended AS (
    SELECT r.request_id, r.lease_id, l.owner, l.name, r.estimate_basis AS basis,
        coalesce(r.expected_seconds, r.estimated_seconds) AS expected_seconds, r.estimated_low_seconds AS low_seconds,
        r.estimated_high_seconds AS high_seconds, (epoch_us(l.ended_at) - epoch_us(l.granted_at)) / 1e6 AS actual_seconds
    FROM requests r JOIN leases l USING (lease_id) WHERE l.state = 'released'
)
SELECT *, actual_seconds - expected_seconds AS error_seconds, actual_seconds / nullif(expected_seconds, 0) AS ratio,
    actual_seconds BETWEEN low_seconds AND high_seconds AS inside
FROM ended WHERE expected_seconds IS NOT NULL
