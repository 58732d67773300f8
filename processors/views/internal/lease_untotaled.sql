-- Spans of leases that `store.lease_totals` does not have: those of active leases, and of leases that ended lately.
SELECT s.lease_id, s.host, s.device, n.series, epoch_us(s.started) AS first, epoch_us(s.ended) AS last
FROM main.lease_spans s JOIN store.series n USING (host, device)
ANTI JOIN store.lease_totals t ON t.lease_id = s.lease_id AND t.host = s.host AND t.device = s.device
    AND t.first = epoch_us(s.started) AND t.last = epoch_us(s.ended)
WHERE s.ended > s.started
