"""The fleet over OTLP: OpenTelemetry's conventions for hardware where they have a name, `corral.…` elsewhere.

`names` defines the metrics, `devices` and `services` make data points of the live state, `starts` gives counters their
start times, `settings` reads options and `OTEL_…` variables, `push` sends. Import it only where OTLP is wanted: the
libraries need `corral[otlp]`.
"""
