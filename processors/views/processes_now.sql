-- question: Which processes are on GPUs now, under which lease, and which of them should not be there?
-- detail: The last list of each host, if it is less than a minute old by the host's clock.
-- time: time of the list.
-- host: host of the device.
-- gpu: the driver's index of the device.
-- device: uuid of the device.
-- model: product name of the device.
-- pid: process id.
-- user: account that runs the process.
-- process: name of the executable.
-- kind: `compute`, `graphics` or `both`.
-- container: container of the process; empty if none.
-- memory_used_bytes: memory used on the device; null if the driver hides it.
-- sm_utilization_percent: the process's share of the device's time; null if the driver does not report it.
-- lease_id: lease under which it runs; empty if none is known.
-- owner: owner of the lease, while it is active.
-- name: name of the lease's workload.
-- memory_granted_bytes: memory granted to the lease on the device; 0 if none was requested.
-- concern: `no lease`, `lease has ended`, `not a device of its lease` or `beyond its lease` (all of the lease's
--   processes together, on a device that it shares). Empty if there is none, for a desktop, and for a process of which
--   only the id is known.
WITH behind AS (
    SELECT host, to_seconds(offset_seconds) AS clock FROM host_clocks WHERE until IS NULL AND offset_seconds < 0
), latest AS (
    -- The newest list of a host may be an empty one.
    SELECT host, max(time) AS time
    FROM (SELECT time, host FROM processes UNION ALL SELECT time, host FROM store.without_processes)
    LEFT JOIN behind b USING (host)
    WHERE time >= now() - INTERVAL 60 SECONDS + coalesce(b.clock, INTERVAL 0 SECONDS)
        AND time >= now() - INTERVAL 60 SECONDS + (SELECT coalesce(min(clock), INTERVAL 0 SECONDS) FROM behind)
    GROUP BY host
), active AS (
    SELECT l.lease_id, l.owner, l.name, d.host, d.device, d.memory_bytes, d.share
    FROM leases l LEFT JOIN (FROM lease_devices WHERE until IS NULL) d USING (lease_id) WHERE l.state = 'active' AND l.expires_at > now()
), holders AS (
    SELECT DISTINCT lease_id, owner, name, host FROM active
), found AS (
    SELECT p.*, h.owner, h.name AS workload, p.lease IN (SELECT lease_id FROM active) AS known, a.memory_bytes AS granted,
        a.share,
        sum(p.memory_used_bytes) OVER (PARTITION BY p.host, p.device, p.lease) AS together
    FROM processes p SEMI JOIN latest USING (host, time)
    LEFT JOIN holders h ON h.lease_id = p.lease AND h.host = p.host
    LEFT JOIN active a ON a.lease_id = p.lease AND a.host = p.host AND a.device = p.device
)
SELECT f.time, f.host, v.index AS gpu, f.device, v.name AS model, f.pid, f."user", f.name AS process, f.kind,
    f.container, f.memory_used_bytes, f.sm_utilization_percent, f.lease AS lease_id, f.owner, f.workload AS name,
    f.granted AS memory_granted_bytes,
    CASE
        WHEN f.granted > 0 AND f.share < 1 AND f.together > f.granted THEN 'beyond its lease'
        WHEN f.granted IS NOT NULL THEN ''
        WHEN f.known THEN 'not a device of its lease'
        WHEN f.lease <> '' THEN 'lease has ended'
        WHEN f.kind = 'graphics' OR (f.name = '' AND f."user" = '') THEN ''
        ELSE 'no lease'
    END AS concern
FROM found f LEFT JOIN devices v ON v.device = f.device AND v.host = f.host
