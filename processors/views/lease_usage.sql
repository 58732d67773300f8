-- question: How much of its grant did each lease use?
-- lease_id: id of the lease.
-- owner: owner of the lease.
-- name: name of the workload.
-- state: state of the lease.
-- started: time of the grant.
-- ended: end of the lease; now for an active one.
-- devices: number of devices.
-- gpu_hours: hours held, times the share of each device, in whole boards.
-- energy_kwh: energy used during the lease.
-- gpu_utilization_percent_mean: mean over all its devices and the time held.
-- gpu_utilization_percent_p95: p95 over all samples of its devices, within 0.5 (from the histograms of the rollups).
-- memory_used_bytes_peak: peak on the device with the largest.
-- memory_granted_bytes: memory granted on the device with the most.
-- memory_used_percent: largest peak of a device as a percentage of the memory granted there; null if none was.
SELECT lease_id, any_value(owner) AS owner, any_value(name) AS name, any_value(state) AS state,
    min(started) AS started, max(ended) AS ended, count(*) AS devices, sum(gpu_hours) AS gpu_hours,
    sum(energy_kwh) AS energy_kwh,
    sum(gpu_utilization_percent_mean * hours) / sum(hours) FILTER (gpu_utilization_percent_mean IS NOT NULL)
        AS gpu_utilization_percent_mean,
    any_value(coalesce(c.p95, q.p95)) AS gpu_utilization_percent_p95,
    max(memory_used_bytes_peak) AS memory_used_bytes_peak, max(memory_granted_bytes) AS memory_granted_bytes,
    max(100 * memory_used_bytes_peak / nullif(memory_granted_bytes, 0)) AS memory_used_percent
FROM lease_device_usage LEFT JOIN store.lease_p95 c USING (lease_id)
LEFT JOIN (SELECT lease_id, any_value(p95) AS p95 FROM store.lease_totals GROUP BY lease_id) q USING (lease_id)
GROUP BY lease_id
