-- question: Who was preempted, for whom and why, and what was lost?
-- detail: One row for each notice. What was done since the holder last said that its work is saved counts as lost.
-- lease_id: id of the lease.
-- owner: who held it.
-- group_name: group of its owner at the grant; null without groups.
-- name: of the workload.
-- gpus: devices of the lease, in whole boards, at its end; see `lease_spans`.
-- notified_at: when its holder got the notice.
-- ends_by: when the lease had to end at the latest.
-- ended_at: when it ended; null while it has not, and if the notice was withdrawn.
-- outcome: `saved` (the holder gave it back once its work was saved), `evicted` (the grace was over), `released`,
--   `expired`, `lost`, `withdrawn` (the notice was), or `pending`.
-- extended: true if the holder has put the end off.
-- reason: why.
-- claimant: id of the request that got the devices; null if an operator preempted.
-- claimant_owner: owner of that request.
-- claimant_group: group of that owner.
-- notice_seconds: from the notice to the end.
-- lost_gpu_seconds: GPU-seconds since the last `saved` of the lease, or since its grant, until it ended.
WITH notices AS (
    SELECT lease_id, preemption_notified_at AS notified_at, any_value(owner) AS owner, any_value(name) AS name,
        max(preemption_ends_at) AS ends_by, bool_or(preemption_extended) AS extended,
        any_value(preemption_reason) AS reason, any_value(preemption_claimant) AS claimant,
        any_value(preemption_claimant_owner) AS claimant_owner,
        any_value(preemption_claimant_group) AS claimant_group,
        bool_or(state <> 'active') AS over, max(time) AS last_at
    FROM lease_events WHERE preemption_notified_at IS NOT NULL GROUP BY ALL
), held AS (
    -- An elastic lease may have given others back before.
    SELECT lease_id, sum(gpus) AS gpus FROM lease_spans
    WHERE lease_id IN (SELECT lease_id FROM notices)
    GROUP BY lease_id, ended QUALIFY ended = max(ended) OVER (PARTITION BY lease_id)
), without AS (
    SELECT lease_id, max(time) AS without_at FROM lease_events
    WHERE preemption_notified_at IS NULL AND lease_id IN (SELECT lease_id FROM notices) GROUP BY lease_id
)
SELECT n.lease_id, n.owner, l.group_name, n.name, coalesce(h.gpus, 0) AS gpus, n.notified_at, n.ends_by,
    CASE WHEN n.over THEN l.ended_at END AS ended_at,
    CASE WHEN NOT n.over THEN CASE WHEN w.without_at > n.last_at OR l.preemption_notified_at <> n.notified_at
            THEN 'withdrawn' ELSE 'pending' END
        WHEN l.state = 'evicted' AND l.saved_at >= n.notified_at AND l.saved_at >= l.ended_at THEN 'saved'
        ELSE l.state END AS outcome,
    n.extended, n.reason, n.claimant, n.claimant_owner, n.claimant_group,
    CASE WHEN n.over THEN (epoch_us(l.ended_at) - epoch_us(n.notified_at)) / 1e6 END AS notice_seconds,
    CASE WHEN n.over
        THEN coalesce(h.gpus, 0) * greatest(0, epoch_us(l.ended_at) - epoch_us(coalesce(l.saved_at, l.granted_at))) / 1e6
        END AS lost_gpu_seconds
FROM notices n JOIN leases l USING (lease_id) LEFT JOIN held h USING (lease_id) LEFT JOIN without w USING (lease_id)
