-- question: How well did each task of a job use what it had asked for?
-- detail: One row for each attempt of a task, as Slurm's `seff` has it, and one for a task that waits for its next
--   attempt. A device's idle minutes and memory are those of its lease, as in `idle_while_leased` and
--   `lease_device_usage`. Suggestions are null where nothing is known.
-- job_id: id of the job.
-- submitted_at: when it was submitted. Together with the id it names one job.
-- task: name of the task, such as `1234_7`.
-- index: of the task in the array; 0 for a job without one.
-- attempt: number of the start, from 1.
-- owner: owner of the job.
-- name: name of the workload.
-- state: of the attempt: `pending`, `starting`, `running`, `completing`, `done`, `failed`, `cancelled`, `preempted` or
--   `lost`.
-- exit_code: of the command; null while it runs, and if a signal ended it.
-- signal: that ended it; null if none did.
-- lease_id: lease of the attempt; null if it has none.
-- hosts: its hosts, in the order of their ranks.
-- pending_seconds: from the time when it was queued to its start, or until now.
-- started_at: when its first process started.
-- seconds: from its start to its end; until now for one that runs, and no later than its lease expires.
-- gpus: number of devices.
-- gpu_hours: hours that its lease held them, times the share, in whole boards.
-- energy_kwh: energy of the devices during the lease.
-- gpu_utilization_percent_mean: mean over its devices and the time held.
-- idle_minutes: minutes below 5% of a device, mean over its devices.
-- idle_gpu_hours: idle hours of its devices, in whole boards.
-- longest_idle_minutes: longest time in which a device was idle without interruption; the shortest of its devices.
-- idle_since: since when all its devices have been idle, until the last known minute; null if they are not.
-- gpu_memory_asked_bytes: memory asked for on each device; 0 if none was.
-- gpu_memory_used_bytes_peak: peak on the device with the largest; null if it is not known, as on a shared device.
-- memory_asked_bytes: host RAM asked for, on each host; 0 if none was.
-- memory_used_bytes_peak: most RAM of its processes together, on the host with the most.
-- cpus_asked: cores asked for, on all hosts; 0 if none were.
-- cpus_used_mean: mean number of busy cores.
-- suggested_gpus: devices that had a minute that was not idle.
-- suggested_gpu_memory_bytes: the peak plus a tenth, rounded up to whole GiB.
-- suggested_memory_bytes: the same of the RAM, on all hosts together.
-- suggested_cpus: the mean number of busy cores, rounded up.
-- suggested_seconds: the time of an attempt that is done plus a tenth, rounded up to whole minutes.
WITH idle AS (
    SELECT lease_id, host, device, sum(idle_hours) AS hours, sum(idle_gpu_hours) AS gpu_hours,
        max(longest_idle_hours) AS longest, max(idle_since) AS since, min(idle_percent) AS percent
    FROM idle_while_leased GROUP BY ALL
), used AS (
    SELECT u.lease_id, count(*) AS devices, sum(u.gpu_hours) AS gpu_hours, sum(u.energy_kwh) AS energy_kwh,
        sum(u.gpu_utilization_percent_mean * u.hours)
            / sum(u.hours) FILTER (u.gpu_utilization_percent_mean IS NOT NULL) AS utilization,
        max(u.memory_used_bytes_peak) FILTER (NOT u.memory_shared) AS memory,
        60 * sum(coalesce(i.hours, 0)) / count(*) AS idle_minutes, sum(coalesce(i.gpu_hours, 0)) AS idle_gpu_hours,
        60 * min(coalesce(i.longest, 0)) AS longest,
        CASE WHEN count(i.since) = count(*) THEN max(i.since) END AS since,
        count(u.gpu_utilization_percent_mean) > 0 AS known,
        count(*) FILTER (i.percent IS NULL OR i.percent < 100 - 1e-6) AS busy
    FROM lease_device_usage u LEFT JOIN idle i USING (lease_id, host, device)
    WHERE u.lease_id IN (SELECT lease_id FROM job_tasks WHERE lease_id IS NOT NULL) GROUP BY u.lease_id
), attempts AS (
    SELECT t.*, j.owner, j.name, j.gpus, greatest(j.hosts, 1) AS on_hosts,
        j.gpu_memory_bytes, j.host_memory_bytes, j.cpus,
        CASE WHEN j.array_indexes IS NULL THEN t.job_id ELSE t.job_id || '_' || t.index END AS task,
        -- How an attempt ended before the next one is only known by its lease if its own last state has not come.
        CASE WHEN t.state IN ('starting', 'running', 'completing')
                AND t.attempt < max(t.attempt) OVER (PARTITION BY t.job_id, t.submitted_at, t.index)
            THEN CASE l.state WHEN 'evicted' THEN 'preempted' WHEN 'released' THEN 'failed' ELSE 'lost' END
            ELSE t.state END AS shown,
        coalesce(t.ended_at, l.ended_at, least(l.expires_at, now())) AS over
    FROM job_tasks t JOIN jobs j USING (job_id, submitted_at) LEFT JOIN leases l USING (lease_id)
), timed AS (
    SELECT *, (epoch_us(over) - epoch_us(started_at)) / 1e6 AS seconds,
        (epoch_us(coalesce(started_at, over)) - epoch_us(pending_since)) / 1e6 AS pending_seconds
    FROM attempts
)
SELECT t.job_id, t.submitted_at, t.task, t.index, t.attempt, t.owner, t.name, t.shown AS state, t.exit_code, t.signal,
    t.lease_id, t.hosts, t.pending_seconds, t.started_at,
    t.seconds, t.gpus, u.gpu_hours, u.energy_kwh, u.utilization AS gpu_utilization_percent_mean,
    u.idle_minutes, u.idle_gpu_hours, u.longest AS longest_idle_minutes, u.since AS idle_since,
    coalesce(t.gpu_memory_bytes, 0) AS gpu_memory_asked_bytes, u.memory AS gpu_memory_used_bytes_peak,
    coalesce(t.host_memory_bytes, 0) // t.on_hosts AS memory_asked_bytes, t.peak_memory_bytes AS memory_used_bytes_peak,
    coalesce(t.cpus, 0) AS cpus_asked, t.cpu_seconds / nullif(t.seconds, 0) AS cpus_used_mean,
    CASE WHEN u.known THEN u.busy END AS suggested_gpus,
    try_cast(ceil(round(1.1 * u.memory / 2**30, 6)) * 2**30 AS BIGINT) AS suggested_gpu_memory_bytes,
    try_cast(ceil(round(1.1 * t.peak_memory_bytes * t.on_hosts / 2**30, 6)) * 2**30 AS BIGINT) AS suggested_memory_bytes,
    ceil(round(t.cpu_seconds / nullif(t.seconds, 0), 2)) AS suggested_cpus,
    CASE WHEN t.shown = 'done' THEN 60 * ceil(round(1.1 * t.seconds / 60, 6)) END AS suggested_seconds
FROM timed t LEFT JOIN used u USING (lease_id)
