-- question: Which requests wait for devices now, since when, and what do they ask for?
-- detail: A request is listed about a second after it began to wait. `corral queue` has the positions and forecasts of this
--   moment; the table `requests` has those that have ended.
-- request_id: id of the request.
-- owner: who asks.
-- name: name of the workload.
-- group_name: group of the owner; null without groups.
-- asked_at: since when it waits.
-- waiting_seconds: how long it has waited.
-- until: when it is rejected at the latest.
-- position: position in the queue at its arrival.
-- gpus: number of devices; of an elastic request the fewest.
-- gpus_max: the most devices of an elastic request; null for any other.
-- gpu_share: share of each device, in (0, 1]; null for whole devices.
-- gpu_memory_bytes: memory on each device; null if none was asked for.
-- cpus: cores.
-- host_memory_bytes: memory of the host.
-- models: patterns of models; empty for any.
-- hosts: patterns of hosts; empty for any.
-- host_labels: labels that the host must have.
-- mig: profile of a MIG instance, `*` for any; null for none.
-- priority: of the request.
-- expected_seconds: how long it will run, as its owner said; null if nothing was said.
-- estimated_seconds: how long it is estimated to run.
-- max_seconds: how long it may run; null for any time.
-- within: label of which all hosts must have the same value; null for none.
-- preemptible: true if its lease may be preempted.
-- labels: of the request.
-- planner: id of the planner that has it.
SELECT request_id, owner, name, group_name, asked_at,
    greatest(epoch_us(now()) - epoch_us(asked_at), 0) / 1e6 AS waiting_seconds, until, position, gpus, gpus_max, gpu_share,
    gpu_memory_bytes, cpus, host_memory_bytes, models, hosts, host_labels, mig, priority,
    expected_seconds, estimated_seconds, max_seconds, within, preemptible, labels, planner
FROM store.waiting_requests
WHERE until > now()
