-- question: Which hosts and devices were drained, from when to when, by whom and why?
-- detail: A drain by label is a row for each host that had the label, for the time that it had it. Maintenance that was
--   booked ahead is here from its begin. Drains that another overlaps are rows of their own. The table `drains` has them
--   as they were set.
-- host: name of the host.
-- device: uuid of the device; null if all of the host was drained.
-- since: begin of the drain.
-- until: its end, planned for maintenance; null while it lasts.
-- hours: how long it was, up to now if it lasts.
-- active: true if it lasts.
-- reason: why, in the words of the operator.
-- operator: who drained it.
-- ended_by: who undrained it; null while it lasts, if that is not known, and for maintenance.
-- target: what was drained: `host:NAME`, `device:UUID` or `label:K=V`.
-- window_id: id of the booked window, for maintenance; null for a drain.
WITH spans AS (
    SELECT d.*, split_part(target, ':', 1) AS kind, substr(target, strpos(target, ':') + 1) AS named FROM drains d
), found AS (
    SELECT named AS host, NULL AS device, since, until, s.* EXCLUDE (since, until) FROM spans s WHERE kind = 'host'
    UNION ALL BY NAME
    SELECT d.host, s.named AS device, s.* FROM spans s LEFT JOIN devices d ON d.device = s.named WHERE kind = 'device'
    UNION ALL BY NAME
    SELECT f.host, NULL AS device, greatest(s.since, f.valid_from) AS since, least(s.until, f.valid_to) AS until,
        s.* EXCLUDE (since, until)
    FROM spans s JOIN host_facts f ON f.device IS NULL AND s.kind = 'label'
        AND f.fact = 'label ' || split_part(s.named, '=', 1) AND f.value = substr(s.named, strpos(s.named, '=') + 1)
        AND (f.valid_to IS NULL OR f.valid_to > s.since) AND (s.until IS NULL OR f.valid_from < s.until)
)
SELECT host, device, since, until, greatest(epoch_us(least(until, now())) - epoch_us(since), 0) / 3.6e9 AS hours,
    until IS NULL OR until > now() AS active, reason, nullif(operator, '') AS operator, nullif(ended_by, '') AS ended_by,
    target, nullif(window_id, '') AS window_id
FROM found
