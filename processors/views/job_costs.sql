-- question: What did each job cost, and which of its tasks stalled?
-- detail: Over all attempts of all tasks. A task stalled if one of its attempts is in `stalled_tasks`.
-- job_id: id of the job.
-- submitted_at: when it was submitted. Together with the id it names one job.
-- owner: owner of the job.
-- name: name of the workload.
-- group_name: group of its owner; null without groups.
-- state: of all tasks together.
-- ended_at: when its last task ended; null before.
-- tasks: number of tasks.
-- tasks_done: number of tasks that are done.
-- tasks_failed: number of tasks that failed, were lost, or preempted and not queued again.
-- attempts: number of starts.
-- gpu_hours: hours held, times the share, in whole boards.
-- idle_gpu_hours: GPU-hours with the device below 5%.
-- idle_percent: percentage of the GPU-hours.
-- unfinished_gpu_hours: GPU-hours of attempts that ended without being done.
-- energy_kwh: energy used.
-- gpu_utilization_percent_mean: mean over the time held.
-- cpu_hours: CPU time of its processes.
-- pending_seconds_mean: mean time until the start of an attempt.
-- stalled: number of tasks that stalled.
-- stalled_indexes: their indexes, in ascending order.
WITH attempts AS (
    SELECT s.job_id, s.submitted_at, s.index, s.attempt, s.state, s.lease_id, s.gpu_hours, s.idle_gpu_hours,
        s.energy_kwh, s.gpu_utilization_percent_mean, s.pending_seconds, s.started_at, s.cpus_used_mean * s.seconds AS cpu_seconds,
        s.longest_idle_minutes >= 10 AS stalled,
        s.attempt = max(s.attempt) OVER (PARTITION BY s.job_id, s.submitted_at, s.index) AS latest
    FROM job_summary s
), summed AS (
    SELECT job_id, submitted_at, count(*) FILTER (latest AND state = 'done') AS tasks_done,
        count(*) FILTER (latest AND state IN ('failed', 'lost', 'preempted')) AS tasks_failed,
        count(lease_id) AS attempts, sum(gpu_hours) AS gpu_hours, sum(idle_gpu_hours) AS idle_gpu_hours,
        sum(gpu_hours) FILTER (state IN ('failed', 'lost', 'preempted', 'cancelled')) AS unfinished_gpu_hours,
        sum(energy_kwh) AS energy_kwh,
        sum(gpu_utilization_percent_mean * gpu_hours)
            / nullif(sum(gpu_hours) FILTER (gpu_utilization_percent_mean IS NOT NULL), 0) AS utilization,
        sum(cpu_seconds) / 3600 AS cpu_hours, avg(pending_seconds) FILTER (started_at IS NOT NULL) AS pending_seconds,
        list(DISTINCT index ORDER BY index) FILTER (stalled) AS stalled_indexes
    FROM attempts GROUP BY ALL
)
SELECT j.job_id, j.submitted_at, j.owner, j.name, j.group_name, j.state, j.ended_at, j.tasks,
    coalesce(s.tasks_done, 0) AS tasks_done, coalesce(s.tasks_failed, 0) AS tasks_failed,
    coalesce(s.attempts, 0) AS attempts, coalesce(s.gpu_hours, 0) AS gpu_hours,
    coalesce(s.idle_gpu_hours, 0) AS idle_gpu_hours,
    100 * coalesce(s.idle_gpu_hours, 0) / nullif(s.gpu_hours, 0) AS idle_percent,
    coalesce(s.unfinished_gpu_hours, 0) AS unfinished_gpu_hours, s.energy_kwh,
    s.utilization AS gpu_utilization_percent_mean, s.cpu_hours, s.pending_seconds AS pending_seconds_mean,
    len(coalesce(s.stalled_indexes, [])) AS stalled, coalesce(s.stalled_indexes, []) AS stalled_indexes
FROM jobs j LEFT JOIN summed s USING (job_id, submitted_at)
