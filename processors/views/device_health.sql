-- question: Which devices are failing, or about to?
-- detail: Counts from an earlier host of a board are included. Growth while no collector read a counter is that of the
--   first sample after it, on the same host. Growth while a board moved is not known.
-- host: host of the device.
-- device: uuid of the device.
-- model: product name of the device.
-- concern: reasons for concern, worst first; empty if there are none, or if another board is in its place.
-- unhealthy: severity of an event (`reset`, `hardware`) that no later one has cleared; null if there is none.
-- xid_events: number of Xid errors in the history.
-- last_xid: code of the newest.
-- last_xid_at: time of the newest.
-- ecc_uncorrected_7d: uncorrectable memory errors in the last 7 days.
-- ecc_corrected_7d: corrected memory errors in the last 7 days.
-- remapped_rows: total, by the last reading.
-- remapped_rows_7d: newly remapped rows in the last 7 days.
-- remapped_rows_per_week: trend, as the slope over the last 90 days.
-- remap_failed: true if a row could not be remapped: the board has no spare rows left.
-- reset_pending: true if a remapping or a retirement waits for a reset.
-- retired_pages: total, by the last reading.
-- pcie_replays_7d: retransmitted PCIe packets in the last 7 days.
-- last_seen: newest hour with samples.
WITH mine AS (
    SELECT r.*, d.host AS host_now FROM rollup_1h r JOIN devices d USING (device)
    WHERE r.time >= now() - INTERVAL 90 DAYS
), hours AS (
    -- A host speaks for its own devices, and for those that were its own before they moved: for hours of which the host
    -- that has a device now says nothing, or leaves room for.
    FROM mine WHERE host = host_now
    UNION ALL
    SELECT m.* FROM mine m ANTI JOIN device_conflicts c ON c.host = m.host AND c.device = m.device
        AND m.time >= c.since - INTERVAL 1 HOUR
    LEFT JOIN mine o ON o.device = m.device AND o.time = m.time AND o.host = m.host_now
    WHERE m.host <> m.host_now AND coalesce(m.known_seconds, 60) + coalesce(o.known_seconds, 0)
        <= 1.02 * greatest(least((epoch_us(now()) - epoch_us(m.time)) / 1e6, 3600), 60)
), counters AS (
    SELECT host_now AS host, device,
        sum(ecc_uncorrected_count_increase) FILTER (time >= now() - INTERVAL 7 DAYS) AS ecc_uncorrected_7d,
        sum(ecc_corrected_count_increase) FILTER (time >= now() - INTERVAL 7 DAYS) AS ecc_corrected_7d,
        arg_max(remapped_rows_corrected_count_last + remapped_rows_uncorrected_count_last, time) AS remapped_rows,
        sum(remapped_rows_corrected_count_increase + remapped_rows_uncorrected_count_increase)
            FILTER (time >= now() - INTERVAL 7 DAYS) AS remapped_rows_7d,
        sum(remapped_rows_uncorrected_count_increase) FILTER (time >= now() - INTERVAL 7 DAYS) AS uncorrected_rows_7d,
        regr_slope(remapped_rows_corrected_count_last + remapped_rows_uncorrected_count_last, epoch(time) / 604800)
            AS remapped_rows_per_week,
        coalesce(arg_max(remapped_rows_failure_last, time) > 0, false) AS remap_failed,
        coalesce(arg_max(remapped_rows_pending_last, time) > 0, false)
            OR coalesce(arg_max(retired_pages_pending_last, time) > 0, false) AS reset_pending,
        arg_max(retired_pages_count_last, time) AS retired_pages,
        sum(pcie_replay_count_increase) FILTER (time >= now() - INTERVAL 7 DAYS) AS pcie_replays_7d,
        max(time) AS last_seen
    FROM hours GROUP BY host_now, device
), told AS (
    -- The bus says in which order, whatever the host's clock said.
    SELECT d.host, device, kind, severity, code, time, coalesce(stored, time) AS told, e.host = d.host AS now
    FROM events e JOIN devices d USING (device)
    WHERE e.host = d.host OR EXISTS (FROM hours h WHERE h.host = e.host AND h.device = e.device
        AND h.time BETWEEN e.time - INTERVAL 1 HOUR AND e.time)
), xids AS (
    SELECT host, device, count(*) AS n, arg_max(code, told) AS last_xid, max(time) AS last_xid_at
    FROM told WHERE kind = 'xid' GROUP BY host, device
), severities AS (
    SELECT host, device, arg_max(severity, told) AS severity
    FROM told WHERE now AND severity IN ('reset', 'hardware', 'cleared') GROUP BY host, device
), replaced AS (
    -- Another board is in its place, or the board is split anew. One that is only gone may have fallen off the bus.
    SELECT DISTINCT d.host, d.device FROM devices d LEFT JOIN devices n
        ON n.host = d.host AND n.device <> d.device AND n.present AND n.mig_parent IS NULL
        AND CASE WHEN coalesce(d.pcie_address, '') = '' THEN n.index = d.index ELSE n.pcie_address = d.pcie_address END
    WHERE NOT d.present AND (d.mig_parent IS NOT NULL OR n.device IS NOT NULL)
), found AS (
    SELECT d.host, d.device, d.name AS model, r.device IS NOT NULL AS replaced,
        CASE WHEN s.severity <> 'cleared' AND r.device IS NULL THEN s.severity END AS unhealthy,
        coalesce(x.n, 0) AS xid_events, x.last_xid, x.last_xid_at, c.* EXCLUDE (host, device)
    FROM devices d LEFT JOIN counters c USING (host, device) LEFT JOIN xids x USING (host, device)
    LEFT JOIN severities s USING (host, device) LEFT JOIN replaced r USING (host, device)
)
SELECT host, device, model, CASE WHEN replaced THEN '' ELSE concat_ws('; ',
        CASE unhealthy WHEN 'hardware' THEN 'hardware fault' WHEN 'reset' THEN 'needs a reset' END,
        CASE WHEN remap_failed THEN 'no spare rows are left' END,
        CASE WHEN uncorrected_rows_7d > 0 THEN 'rows remapped after uncorrectable errors' END,
        CASE WHEN ecc_uncorrected_7d > 0 THEN 'uncorrectable memory errors' END,
        CASE WHEN remapped_rows_7d > 0 AND coalesce(uncorrected_rows_7d, 0) = 0 THEN 'more rows remapped' END,
        CASE WHEN reset_pending THEN 'a remapping waits for a reset' END,
        CASE WHEN last_xid_at >= now() - INTERVAL 7 DAYS THEN 'Xid ' || last_xid END,
        CASE WHEN pcie_replays_7d > 1000 THEN 'PCIe link retries' END
    ) END AS concern,
    unhealthy, xid_events, last_xid, last_xid_at, try_cast(ecc_uncorrected_7d AS BIGINT) AS ecc_uncorrected_7d,
    try_cast(ecc_corrected_7d AS BIGINT) AS ecc_corrected_7d, remapped_rows, try_cast(remapped_rows_7d AS BIGINT) AS remapped_rows_7d,
    remapped_rows_per_week, coalesce(remap_failed, false) AS remap_failed,
    coalesce(reset_pending, false) AS reset_pending, retired_pages, try_cast(pcie_replays_7d AS BIGINT) AS pcie_replays_7d, last_seen
FROM found
