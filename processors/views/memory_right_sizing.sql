-- question: How much memory does each workload need, compared with its requests?
-- detail: By the name of the workload, over devices that were granted memory. Leases under a minute are left out, and
--   so is the memory of a whole device that other leases held a part of.
-- name: name of the workload.
-- leases: number of leases behind the numbers.
-- memory_granted_bytes: median of the memory granted on a device.
-- memory_used_bytes_p50: median of the peaks.
-- memory_used_bytes_p99: 99% of the peaks are no larger.
-- memory_used_bytes_max: largest peak.
-- suggested_bytes: the p99 plus a tenth, rounded up to whole GiB.
-- over_asked_bytes: granted memory minus the suggestion; negative if too little was requested.
SELECT name, count(DISTINCT lease_id) AS leases,
    quantile_disc(memory_granted_bytes, 0.5) AS memory_granted_bytes,
    quantile_disc(memory_used_bytes_peak, 0.5) AS memory_used_bytes_p50,
    quantile_disc(memory_used_bytes_peak, 0.99) AS memory_used_bytes_p99,
    max(memory_used_bytes_peak) AS memory_used_bytes_max,
    try_cast(ceil(1.1 * quantile_disc(memory_used_bytes_peak, 0.99) / 2**30) * 2**30 AS BIGINT) AS suggested_bytes,
    quantile_disc(memory_granted_bytes, 0.5)
        - try_cast(ceil(1.1 * quantile_disc(memory_used_bytes_peak, 0.99) / 2**30) * 2**30 AS BIGINT) AS over_asked_bytes
FROM lease_device_usage
WHERE memory_granted_bytes > 0 AND memory_used_bytes_peak IS NOT NULL AND NOT memory_shared AND hours >= 1 / 60
GROUP BY name
