-- question: How much did each group use, hour by hour?
-- detail: A lease counts for the group that its owner was in at the grant, and for the hours that it lasted. Groups
--   within a group are not added up: `lab` and those within it are `group_name = 'lab' OR group_name LIKE 'lab/%'`.
-- hour: its start.
-- group_name: name of the group; null for leases that were granted while there were no groups.
-- model: product name of the devices.
-- leases: number of leases that held such devices within the hour.
-- gpu_seconds: seconds that they were held, times the devices in whole boards; see `lease_spans`.
-- preemptible_gpu_seconds: those of leases that could be preempted.
WITH held AS (
    -- Most devices of a lease are held for the same time.
    SELECT s.lease_id, d.model, sum(s.gpus) AS gpus, epoch_us(s.started) AS first, epoch_us(s.ended) AS last
    FROM lease_spans s JOIN (SELECT DISTINCT lease_id, host, device, model FROM lease_devices) d
        USING (lease_id, host, device)
    WHERE s.ended > s.started GROUP BY ALL
), cut AS (
    SELECT *, unnest(range(first // 3600000000, (last - 1) // 3600000000 + 1)) * 3600000000 AS hour FROM held
), used AS (
    SELECT *, gpus * (least(last, hour + 3600000000) - greatest(first, hour)) / 1e6 AS gpu_seconds FROM cut
)
SELECT make_timestamptz(u.hour) AS hour, l.group_name, u.model, count(DISTINCT u.lease_id) AS leases, sum(u.gpu_seconds) AS gpu_seconds,
    coalesce(sum(u.gpu_seconds) FILTER (l.preemptible), 0) AS preemptible_gpu_seconds
FROM used u JOIN leases l USING (lease_id) GROUP BY ALL
