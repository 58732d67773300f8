-- question: Who used GPUs without a lease, or beyond it, when and how much?
-- detail: One row for each violation that lasted longer than a collector's grace time (30 s).
-- kind: `process_without_lease` or `lease_memory_exceeded`.
-- severity: `application` if it affects another user, `info` if not: a process on a device that no lease holds.
-- host: host of the device.
-- device: uuid of the device.
-- lease_id: lease whose memory was exceeded, or that the process names; empty if none.
-- owner: owner of that lease; empty if it is not known, or has nothing on the host.
-- name: name of the lease's workload; null without a lease.
-- pid: process id of a process without a lease; null otherwise.
-- user: account that runs the process.
-- process: name of the executable.
-- container: container of the process.
-- since: when it was first seen.
-- until: when it, or its collector, was last seen; null while it lasts.
-- hours: duration so far.
-- memory_used_bytes_peak: maximum; null if the driver hides it.
-- memory_granted_bytes: memory granted to the lease on the device; null for a process without a lease.
-- message: description in one sentence.
WITH behind AS (
    SELECT host, to_seconds(offset_seconds) AS clock FROM host_clocks WHERE until IS NULL AND offset_seconds < 0
), held AS (
    -- A host speaks for the leases that it was given.
    SELECT DISTINCT lease_id, host FROM lease_devices
), told AS (
    SELECT *, data->>'violation' AS violation, data->>'lease' AS lease, try_cast(data->>'since_ns' AS BIGINT) AS since_ns,
        try_cast(data->>'until_ns' AS BIGINT) AS until_ns
    FROM events
    WHERE kind IN ('process_without_lease', 'process_without_lease_ended', 'lease_memory_exceeded',
        'lease_memory_exceeded_ended')
), began AS (
    SELECT * FROM told WHERE NOT suffix(kind, '_ended')
), ended AS (
    SELECT * FROM told WHERE suffix(kind, '_ended')
), stopped AS (
    -- What lasts is told again by a collector that starts anew.
    SELECT agent, max(time) AS time FROM events WHERE kind = 'agent_stopped' GROUP BY agent
), reported AS (
    SELECT host, agent, max(time) AS time FROM agents GROUP BY host, agent
), spans AS (
    SELECT b.*, make_timestamptz(b.since_ns // 1000) AS since,
        CASE
            WHEN e.until_ns IS NOT NULL THEN make_timestamptz(e.until_ns // 1000)
            WHEN s.time IS NOT NULL THEN s.time
            -- A collector that was killed says no end: the last that was heard of it is one.
            WHEN h.agent <> b.agent THEN greatest(a.time, b.time)
            -- A host that says nothing any more does not say either that it has ended.
            WHEN a.time < now() - INTERVAL 10 MINUTES + coalesce(c.clock, INTERVAL 0 SECONDS) THEN greatest(a.time, b.time)
        END AS until,
        coalesce(e.data, b.data) AS last
    FROM began b
    LEFT JOIN ended e ON e.host = b.host AND e.agent = b.agent AND e.violation = b.violation AND e.since_ns = b.since_ns
    LEFT JOIN stopped s ON s.agent = b.agent
    LEFT JOIN hosts h ON h.host = b.host
    LEFT JOIN reported a ON a.host = b.host AND a.agent = b.agent
    LEFT JOIN behind c ON c.host = b.host
)
SELECT s.kind, s.severity, s.host, s.device, s.lease AS lease_id, CASE WHEN h.lease_id IS NULL THEN '' ELSE s.data->>'owner' END AS owner, l.name,
    try_cast(s.data->>'pid' AS BIGINT) AS pid, s.data->>'user' AS "user", s.data->>'name' AS process,
    s.data->>'container' AS container, s.since, s.until,
    (epoch_us(coalesce(s.until, now())) - epoch_us(s.since)) / 3.6e9 AS hours,
    try_cast(s.last->>'memory_used_bytes' AS BIGINT) AS memory_used_bytes_peak,
    try_cast(s.data->>'memory_granted_bytes' AS BIGINT) AS memory_granted_bytes, s.message
FROM spans s LEFT JOIN held h ON h.lease_id = s.lease AND h.host = s.host LEFT JOIN leases l ON l.lease_id = h.lease_id
    LEFT JOIN devices d USING (device)
WHERE (s.kind <> 'lease_memory_exceeded' OR h.lease_id IS NOT NULL) AND (d.host IS NULL OR d.host = s.host)
