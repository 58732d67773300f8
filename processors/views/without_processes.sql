-- question: When did a host begin to have no process on any of its GPUs?
-- detail: Of several lists without a process in a row the first alone is stored; all others are in the table `processes`.
-- time: time of the list.
-- host: name of the host.
SELECT time, host FROM store.without_processes
