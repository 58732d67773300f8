-- question: How much memory does each workload need, against what it asks for?
-- detail: By the name of the workload, over devices that were granted memory. Leases under a minute count for nothing, and
--   neither does the memory of a whole device that others held meanwhile.
-- name: of the workload.
-- leases: that the numbers come from.
-- memory_granted_bytes: the median granted on a device.
-- memory_used_bytes_p50: the median of the peaks.
-- memory_used_bytes_p99: 99% of the peaks are no greater.
-- memory_used_bytes_max: the greatest peak.
-- suggested_bytes: the p99 and a tenth, in whole GiB.
-- over_asked_bytes: granted beyond the suggestion; negative where too little was asked for.
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
