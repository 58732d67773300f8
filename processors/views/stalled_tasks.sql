-- question: Which tasks of jobs stalled, with all their GPUs idle?
-- detail: Attempts in which each device was idle for at least ten minutes without interruption (mean utilization below
--   5%). Those that still do so have `stalled_since`.
-- job_id: id of the job.
-- submitted_at: when it was submitted.
-- task: name of the task, such as `1234_7`.
-- index: of the task in the array.
-- attempt: number of the start, from 1.
-- owner: owner of the job.
-- name: name of the workload.
-- state: of the attempt.
-- lease_id: lease of the attempt.
-- hosts: its hosts.
-- stalled_minutes: longest time in which a device was idle without interruption; the shortest of its devices.
-- stalled_since: since when all its devices have been idle, of an attempt that has not ended; else null.
-- idle_gpu_hours: idle hours of its devices, in whole boards.
-- gpu_hours: hours held.
-- progress: 0 to 1, as the task says itself; null if it doesn't.
SELECT s.job_id, s.submitted_at, s.task, s.index, s.attempt, s.owner, s.name, s.state, s.lease_id, s.hosts,
    s.longest_idle_minutes AS stalled_minutes,
    CASE WHEN s.state IN ('starting', 'running', 'completing') THEN s.idle_since END AS stalled_since,
    s.idle_gpu_hours, s.gpu_hours, t.progress
FROM job_summary s JOIN job_tasks t USING (job_id, submitted_at, index, attempt)
WHERE s.longest_idle_minutes >= 10
