-- question: Which lease held which device, and from when to when?
-- detail: The base of the other lease views. A lease that is active ends now, and no later than it expires.
-- lease_id: the lease.
-- owner: who held it.
-- name: of the workload.
-- state: `active`, `released`, `expired`, `lost` or `evicted`.
-- host: of the device.
-- device: uuid.
-- share: of the device, in (0, 1].
-- memory_granted_bytes: on the device; 0 where none was asked for.
-- started: when it was granted.
-- ended: when it ended.
SELECT l.lease_id, l.owner, l.name, l.state, d.host, d.device, coalesce(d.share, 1) AS share,
    d.memory_bytes AS memory_granted_bytes, l.granted_at AS started,
    coalesce(l.ended_at, least(l.expires_at, now())) AS ended
FROM leases l JOIN lease_devices d USING (lease_id)
WHERE d.device IS NOT NULL
