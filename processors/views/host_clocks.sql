-- question: Which hosts have or had a wrong clock, and since when?
-- detail: Compared with the bus's clock when messages were stored. A clock that is more than 10 s ahead is detected at
--   once, one that is behind once all messages of the host are late by the same amount. Times that are ahead are
--   corrected when they are stored; times that are behind are kept.
-- host: name of the host.
-- offset_seconds: by how much its clock is ahead; negative if it is behind.
-- since: when this was first detected.
-- until: when the clock was correct again; null while it is off.
SELECT host, offset_seconds, since, until FROM store.clocks
