-- question: How good were the forecasts of when a waiting request would start?
-- detail: Granted requests that waited and had a forecast. The forecast is the first one that the planner made which granted the request.
-- request_id: id of the request.
-- owner: who asked.
-- name: of the workload.
-- asked_at: when it was asked.
-- forecast_at: when the forecast was made.
-- expected_start: median of the forecast.
-- earliest_start: 10 % quantile of the forecast.
-- latest_start: 90 % quantile of the forecast; null if there was none.
-- started_at: when it was granted.
-- waited_seconds: from the request to the grant.
-- error_seconds: start less expected start; positive if it started later than expected.
-- error_percent: size of the error as a part of the wait from the forecast on.
-- inside: true if it started within the interval that should hold 80 % of starts.
SELECT request_id, owner, name, asked_at, forecast_at, forecast_start AS expected_start,
    forecast_earliest AS earliest_start, forecast_latest AS latest_start, ended_at AS started_at,
    (epoch_us(ended_at) - epoch_us(asked_at)) / 1e6 AS waited_seconds,
    (epoch_us(ended_at) - epoch_us(forecast_start)) / 1e6 AS error_seconds,
    100 * abs(epoch_us(ended_at) - epoch_us(forecast_start)) / nullif(epoch_us(ended_at) - epoch_us(forecast_at), 0)
        AS error_percent,
    ended_at >= coalesce(forecast_earliest, ended_at) AND ended_at <= coalesce(forecast_latest, ended_at) AS inside
FROM requests WHERE outcome = 'granted' AND queued AND forecast_start IS NOT NULL
