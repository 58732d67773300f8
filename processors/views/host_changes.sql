-- question: What changed on each host and when: drivers, firmware, devices, links?
-- detail: From `host_facts`. A device that comes or goes is one row (`index`), whatever else is known of it and of its
--   links. What a host had when it was first seen is no change.
-- time: when the host first said so.
-- host: name of the host.
-- device: uuid of the device; null for the host itself.
-- index: index of the device on its host then; null for the host itself.
-- fact: `driver`, `kernel`, `cpus`, `memory_bytes`, `devices` (their number), `address`, `source`, `label …`; of a device
--   `index`, `model`, `driver` (where it is not the host's), `memory_bytes`, `firmware …`, `power_limit_max_watts`,
--   `sm_clock_max_megahertz`, `pcie_address`, `numa_node`, `serial`, `mig`, and `link to …` for each other device.
-- before: value until then; null if there was none.
-- after: value since then; null if there is none.
WITH begun AS (
    SELECT host, min(valid_from) AS first FROM host_facts GROUP BY host
), changes AS (
    SELECT valid_from AS time, host, device, fact, NULL AS before, value AS after FROM host_facts
    UNION ALL BY NAME
    SELECT valid_to AS time, host, device, fact, value AS before, NULL AS after FROM host_facts WHERE valid_to IS NOT NULL
), merged AS (
    SELECT time, host, device, fact, max(before) AS before, max(after) AS after FROM changes GROUP BY ALL
), moved AS (
    -- Devices that came or went: their index begins or ends.
    SELECT DISTINCT host, device, time FROM merged WHERE fact = 'index' AND (before IS NULL OR after IS NULL)
)
SELECT m.time, m.host, m.device, i.value::INTEGER AS index, m.fact, m.before, m.after
FROM merged m JOIN begun b USING (host) LEFT JOIN moved d USING (host, device, time)
LEFT JOIN moved other ON other.host = m.host AND other.time = m.time AND m.fact = 'link to ' || other.device
LEFT JOIN host_facts i ON i.host = m.host AND i.device = m.device AND i.fact = 'index' AND i.valid_from <= m.time
    AND (i.valid_to IS NULL OR i.valid_to > m.time OR (i.valid_to = m.time AND m.after IS NULL))
WHERE m.time > b.first AND m.before IS DISTINCT FROM m.after
    AND (m.device IS NULL OR m.fact = 'index' OR (d.device IS NULL AND other.device IS NULL))
