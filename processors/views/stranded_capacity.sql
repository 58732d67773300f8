-- question: Which capacity is free but not usable, and why?
-- detail: As of the newest 10 s. A device may be listed for several reasons.
-- host: host of the device.
-- device: uuid of the device.
-- model: product name of the device.
-- reason: `unhealthy`, `silent` (no sample for a minute), `memory_full` (share is free, but under a tenth of the
--   memory), `share_full` (memory is free, but all of the share is leased), `foreign` (memory held without a lease) or
--   `no_cores` (all cores of the host are leased).
-- stranded_share: unusable share of the device.
-- stranded_memory_bytes: unusable memory on the device.
-- leased_share: leased share of the device.
-- leased_memory_bytes: leased memory on the device.
WITH behind AS (
    SELECT host, to_seconds(offset_seconds) AS clock FROM host_clocks WHERE until IS NULL AND offset_seconds < 0
), held AS (
    SELECT d.host, d.device, sum(coalesce(d.share, 1)) AS share, sum(d.memory_bytes) AS memory, bool_or(d.share < 1) AS shared
    FROM leases l JOIN lease_devices d USING (lease_id)
    WHERE l.state = 'active' AND l.expires_at > now() AND d.device IS NOT NULL AND d.until IS NULL
    GROUP BY d.host, d.device
), cores AS (
    SELECT h.host, h.cpus > 0 AND coalesce(sum(d.cpus), 0) >= h.cpus - 1e-6 AS all_leased
    FROM hosts h LEFT JOIN (
        SELECT d.* FROM lease_devices d JOIN leases l USING (lease_id) WHERE l.state = 'active' AND l.expires_at > now()
            AND d.until IS NULL
    ) d USING (host)
    GROUP BY h.host, h.cpus
), state AS (
    SELECT d.host, d.device, d.name AS model, coalesce(n.memory_total_bytes, d.memory_bytes) AS total,
        n.memory_used_bytes AS used, n.time, coalesce(h.share, 0) AS share, coalesce(h.memory, 0) AS memory,
        coalesce(h.shared, false) AS shared,
        -- Thirds and tenths add up to no whole number: what three of them leave is nothing.
        CASE WHEN coalesce(h.share, 0) > 1 - 1e-6 THEN 0 ELSE 1 - coalesce(h.share, 0) END AS share_free,
        greatest(
            coalesce(n.memory_total_bytes, d.memory_bytes) - greatest(coalesce(h.memory, 0), coalesce(n.memory_used_bytes, 0)),
            0
        ) AS memory_free,
        x.unhealthy, c.all_leased, coalesce(b.clock, INTERVAL 0 SECONDS) AS clock
    FROM devices d
    LEFT JOIN devices_now n USING (host, device) LEFT JOIN held h USING (host, device)
    LEFT JOIN behind b ON b.host = d.host
    LEFT JOIN device_health x ON x.device = d.device AND x.host = d.host LEFT JOIN cores c ON c.host = d.host
    WHERE NOT d.mig_enabled AND d.present
), reasons AS (
    SELECT *, unnest([
        {'reason': 'unhealthy', 'holds': unhealthy IS NOT NULL, 'share': share_free, 'memory': memory_free},
        {'reason': 'silent', 'holds': time IS NULL OR time < now() - INTERVAL 70 SECONDS + clock, 'share': share_free,
            'memory': memory_free},
        {'reason': 'memory_full', 'holds': share > 0 AND share_free > 0 AND memory_free < total / 10,
            'share': share_free, 'memory': 0},
        {'reason': 'share_full', 'holds': share_free = 0 AND (memory > 0 OR shared) AND memory_free >= total / 10,
            'share': 0, 'memory': memory_free},
        {'reason': 'foreign', 'holds': share = 0 AND used > total / 20, 'share': share_free, 'memory': used},
        {'reason': 'no_cores', 'holds': share_free > 0 AND all_leased, 'share': share_free, 'memory': memory_free}
    ], recursive := false) AS r
    FROM state
)
SELECT host, device, model, r.reason AS reason, r.share AS stranded_share, r.memory::BIGINT AS stranded_memory_bytes,
    share AS leased_share, memory::BIGINT AS leased_memory_bytes
FROM reasons WHERE r.holds
