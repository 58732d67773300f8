-- question: How much did each owner use, and how much of it was idle?
-- owner: name of the owner.
-- leases: number of leases.
-- gpu_hours: GPU-hours held, in whole boards.
-- idle_gpu_hours: GPU-hours with the device below 5%.
-- idle_percent: percentage of the GPU-hours.
-- energy_kwh: energy used.
-- gpu_utilization_percent_mean: mean over the time held.
WITH held AS (
    SELECT owner, count(DISTINCT lease_id) AS leases, sum(gpu_hours) AS gpu_hours, sum(energy_kwh) AS energy_kwh,
        sum(gpu_utilization_percent_mean * hours) / sum(hours) FILTER (gpu_utilization_percent_mean IS NOT NULL) AS mean
    FROM lease_device_usage GROUP BY owner
), idle AS (
    SELECT owner, sum(idle_gpu_hours) AS idle_gpu_hours FROM idle_while_leased GROUP BY owner
)
SELECT owner, leases, gpu_hours, coalesce(idle_gpu_hours, 0) AS idle_gpu_hours,
    100 * coalesce(idle_gpu_hours, 0) / nullif(gpu_hours, 0) AS idle_percent, energy_kwh,
    mean AS gpu_utilization_percent_mean
FROM held LEFT JOIN idle USING (owner)
