-- Idle minutes of the spans in `store.lease_untotaled`, from the bitmasks of hours; spans without any are left out.
WITH spans AS MATERIALIZED (
    SELECT row_number() OVER () AS number, * FROM store.lease_untotaled
), hours AS (
    SELECT number, series, first, last, unnest(range(first // 3600000000, (last - 1) // 3600000000 + 1)) AS hour
    FROM spans
), cut AS (
    -- The minutes of the hour that the lease touches, as bits.
    SELECT *, (1::BIGINT << (least((last - 1) // 60000000 - hour * 60, 59) + 1)::INTEGER)
        - (1::BIGINT << greatest(first // 60000000 - hour * 60, 0)::INTEGER) AS held
    FROM hours
), bits AS MATERIALIZED (
    SELECT c.number, c.series, c.hour, c.first, c.last, r.known_minutes_bitmask & c.held AS known,
        coalesce(r.idle_minutes_bitmask, 0) & c.held AS idle, r.idle_joules,
        r.idle_joules / (60.0 * bit_count(r.idle_minutes_bitmask)) AS watts,
        c.first <= c.hour * 3600000000 AND c.last >= (c.hour + 1) * 3600000000 AS whole
    FROM cut c JOIN store.series_1h r ON r.series = c.series AND r.time = make_timestamptz(c.hour * 3600000000)
    WHERE r.known_minutes_bitmask & c.held <> 0
), known AS (
    -- Of the minutes in which the lease begins and ends only a part counts.
    SELECT number, max_by(hour * 60 + length(bin(known)), hour) AS newest,
        sum(60.0 * bit_count(known)
            - CASE WHEN first // 3600000000 = hour
                THEN (known >> (first // 60000000 % 60)::INTEGER & 1) * (first % 60000000) / 1e6 ELSE 0 END
            - CASE WHEN (last - 1) // 3600000000 = hour
                THEN (known >> ((last - 1) // 60000000 % 60)::INTEGER & 1) * (59999999 - (last - 1) % 60000000) / 1e6
                ELSE 0 END
        ) AS seconds
    FROM bits GROUP BY number
), runs AS (
    SELECT number, hour, idle & ~(idle << 1) AS begins, idle & ~(idle >> 1) AS ends FROM bits WHERE idle <> 0
), pieces AS (
    -- Minutes in a row within an hour. Mostly there is one such piece, and its bit's place is the bits below it.
    SELECT number, hour * 60 + unnest(CASE WHEN bit_count(begins) = 1 THEN [bit_count(begins - 1)::BIGINT]
            ELSE list_filter(range(60), lambda m: (begins >> m::INTEGER) & 1 = 1) END) AS since,
        hour * 60 + 1 + unnest(CASE WHEN bit_count(ends) = 1 THEN [bit_count(ends - 1)::BIGINT]
            ELSE list_filter(range(60), lambda m: (ends >> m::INTEGER) & 1 = 1) END) AS until
    FROM runs
), stretches AS (
    SELECT number, min(since) AS since, max(until) AS until FROM (
        SELECT *, sum(starts) OVER (PARTITION BY number ORDER BY since) AS stretch FROM (
            SELECT *, (since IS DISTINCT FROM lag(until) OVER (PARTITION BY number ORDER BY since))::INTEGER AS starts
            FROM pieces
        )
    ) GROUP BY number, stretch
), clipped AS (
    SELECT s.number, s.since, s.until, k.newest, k.seconds AS known,
        (least(l.last, s.until * 60000000) - greatest(l.first, s.since * 60000000)) / 1e6 AS seconds
    FROM stretches s JOIN spans l USING (number) JOIN known k USING (number)
), idle AS (
    SELECT number, any_value(known) AS known, sum(seconds) AS seconds, max(seconds) AS longest,
        max(since) FILTER (until = newest) AS since
    FROM clipped GROUP BY number
), edges AS (
    SELECT number, series, first, last, watts,
        hour * 60 + unnest(list_filter(range(60), lambda m: (idle >> m::INTEGER) & 1 = 1)) AS minute
    FROM bits WHERE NOT whole AND idle <> 0
), energy AS (
    -- Whole hours know the energy of their idle minutes. Where minutes are not kept any more, it is taken as even.
    SELECT number, sum(joules) AS joules FROM (
        SELECT number, idle_joules AS joules FROM bits WHERE whole
        UNION ALL
        SELECT e.number, (least(e.last, (e.minute + 1) * 60000000) - greatest(e.first, e.minute * 60000000)) / 1e6
            * coalesce(r.energy_millijoules_increase / 60e3, r.power_watts_mean, e.watts)
        FROM edges e LEFT JOIN store.series_1m r
            ON r.series = e.series AND r.time = make_timestamptz(e.minute * 60000000)
    ) GROUP BY number
)
SELECT l.lease_id, l.host, l.device, l.first, l.last, i.seconds AS idle_seconds, i.known AS idle_known_seconds,
    i.longest AS idle_longest_seconds, i.since AS idle_since_minute, e.joules AS idle_joules
FROM idle i JOIN spans l USING (number) LEFT JOIN energy e USING (number)
