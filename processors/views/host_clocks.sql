-- question: Which hosts have a wrong clock, or had one, and since when?
-- detail: By the bus's clock, as messages were stored: ahead by more than 10 s at once, behind once all messages of the
--   host are late by the same. Times that lie ahead are set right as they are stored; times behind stay as they are.
-- host: the host.
-- offset_seconds: by how much its clock is ahead; negative where it is behind.
-- since: when that was seen first.
-- until: when the clock was right again; null while it is off.
SELECT host, offset_seconds, since, until FROM store.clocks
