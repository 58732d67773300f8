-- question: Which lease held which device, and from when to when?
-- detail: The basis of the other lease views. An active lease ends now, and no later than it expires. An elastic lease
--   has a device from one change of its devices to another, and may have it twice.
-- lease_id: id of the lease.
-- owner: owner of the lease.
-- name: name of the workload.
-- state: `active`, `released`, `expired`, `lost` or `evicted`.
-- host: host of the device.
-- device: uuid of the device.
-- share: granted share of the device, in (0, 1].
-- memory_granted_bytes: memory granted on the device; 0 if none was requested.
-- started: time from which the lease had the device: that of its grant, unless it got it later.
-- ended: time up to which it had it: the end of the lease, unless it gave it back.
-- gpus: share in whole boards. For a MIG instance it is multiplied by its compute slices over those of its board, so
--   1g.10gb of an H100 is 1/7.
SELECT l.lease_id, l.owner, l.name, l.state, d.host, d.device, coalesce(d.share, 1) AS share,
    d.memory_bytes AS memory_granted_bytes, coalesce(d.since, l.granted_at) AS started,
    coalesce(d.until, l.ended_at, least(l.expires_at, now())) AS ended,
    coalesce(d.share, 1) * CASE WHEN p.slices IS NULL THEN 1
        -- Boards with four slices (A30) have a quarter of their multiprocessors in each, those with seven an eighth.
        ELSE least(1, p.slices / CASE WHEN p.sm_count / p.slices BETWEEN 0.2 * b.sm_count AND 0.27 * b.sm_count THEN 4 ELSE 7 END) END AS gpus
FROM leases l JOIN lease_devices d USING (lease_id)
LEFT JOIN (
    SELECT device, host, mig_parent, sm_count,
        greatest(coalesce(try_cast(regexp_extract(mig_profile, '([0-9]+)[cg][.]', 1) AS INTEGER), 1), 1) AS slices
    FROM devices WHERE mig_parent IS NOT NULL
) p ON p.device = d.device AND p.host = d.host
LEFT JOIN devices b ON b.device = p.mig_parent AND b.host = p.host AND b.sm_count > 0
WHERE d.device IS NOT NULL
