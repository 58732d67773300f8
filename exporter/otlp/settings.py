"""Settings of sending over OTLP, from the options of `corral export` and OpenTelemetry's variables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final
from urllib.parse import urlsplit

from msgspec import Struct

from ...schemas.values.units import parse_seconds
from .names import DeviceMetric, choose

INTERVAL_SECONDS: Final = 60.0
"""Default of `OTEL_METRIC_EXPORT_INTERVAL`."""
_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_TEMPORALITY: Final = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
_GRPC_PORT: Final = 4317


class Protocol(StrEnum):
    """Transport of OTLP, by its names in OpenTelemetry."""

    GRPC = "grpc"
    HTTP = "http/protobuf"


class OtlpSettings(Struct, frozen=True, kw_only=True):
    """Target, form and contents of what is sent.

    Attributes:
        endpoint: URL for the protocol's exporter; None to take OpenTelemetry's variables as they are.
        shown: the same for people, without what may be secret in it.
        protocol: transport.
        headers: headers of each request; empty to take those of OpenTelemetry's variables.
        interval_seconds: time between two sendings.
        metrics: metrics of devices.
        lease_ids: True to send ids of leases and jobs.
    """

    endpoint: str | None
    shown: str
    protocol: Protocol
    headers: dict[str, str]
    interval_seconds: float
    metrics: list[DeviceMetric]
    lease_ids: bool


def wanted_by(environment: Mapping[str, str]) -> bool:
    """True if OpenTelemetry's variables name an endpoint and do not disable metrics."""
    off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    none = environment.get("OTEL_METRICS_EXPORTER", "").lower() == "none"
    return not off and not none and any(environment.get(name) for name in _ENDPOINTS)


def read(
    url: str | None,
    protocol: Protocol | None,
    headers: Sequence[str],
    interval: str | None,
    metrics: str,
    environment: Mapping[str, str],
    *,
    lease_ids: bool,
) -> OtlpSettings | None:
    """Combine options and variables; options come first.

    Args:
        url: `--otlp`; None without it.
        protocol: `--otlp-protocol`; None without it.
        headers: `--otlp-header`, each `KEY=VALUE`.
        interval: `--otlp-interval`; None without it.
        metrics: `--otlp-metrics`, words separated by commas.
        environment: variables.
        lease_ids: `--otlp-lease-ids`.

    Returns:
        None if neither an option nor a variable names an endpoint.

    Raises:
        ValueError: an option or variable is wrong; the message says which, and what it takes.
    """
    if url is None and not wanted_by(environment):
        return None
    named = url or next(environment[name] for name in _ENDPOINTS if environment.get(name))
    what = "--otlp" if url is not None else next(name for name in _ENDPOINTS if environment.get(name))
    parts = urlsplit(named)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
        raise ValueError(f"{what} wants a URL such as http://collector:4317, not {named!r}")
    chosen = protocol or _protocol(environment) or (Protocol.GRPC if port == _GRPC_PORT else Protocol.HTTP)
    if environment.get(_TEMPORALITY, "cumulative").lower() != "cumulative":
        raise ValueError(
            f"{_TEMPORALITY} is {environment[_TEMPORALITY]}, but only cumulative counters are sent: "
            "unset it, and let the collector's cumulativetodelta processor convert them"
        )
    return OtlpSettings(
        endpoint=_endpoint(named, chosen) if url is not None else None,
        shown=f"{parts.scheme}://{parts.hostname}{'' if port is None else f':{port}'}",
        protocol=chosen,
        headers=dict(_header(text) for text in headers),
        interval_seconds=_interval(interval, environment),
        metrics=choose([word for word in (part.strip() for part in metrics.split(",")) if word]),
        lease_ids=lease_ids,
    )


def _protocol(environment: Mapping[str, str]) -> Protocol | None:
    for name in _PROTOCOLS:
        if value := environment.get(name):
            try:
                return Protocol(value)
            except ValueError as error:
                raise ValueError(f"{name} is {value!r}: use grpc or http/protobuf") from error
    return None


def _endpoint(url: str, protocol: Protocol) -> str:
    parts = urlsplit(url)
    if protocol is Protocol.GRPC:
        if parts.path.strip("/"):
            raise ValueError(f"--otlp {url}: gRPC has no paths; leave it out, or use --otlp-protocol http/protobuf")
        return url
    # As with OTEL_EXPORTER_OTLP_ENDPOINT, a base URL gets the path of metrics.
    return url if parts.path.strip("/") else f"{url.rstrip('/')}/v1/metrics"


def _header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ValueError("--otlp-header wants KEY=VALUE, such as authorization=token")
    # HTTP/2 has names in lower case only.
    return name.strip().lower(), value.strip()


def _interval(interval: str | None, environment: Mapping[str, str]) -> float:
    milliseconds = environment.get("OTEL_METRIC_EXPORT_INTERVAL")
    if interval is not None:
        seconds, what = parse_seconds(interval), "--otlp-interval"
    elif milliseconds:
        what = "OTEL_METRIC_EXPORT_INTERVAL"
        if not milliseconds.isdigit():
            raise ValueError(f"{what} wants a number of milliseconds, not {milliseconds!r}")
        seconds = int(milliseconds) / 1000
    else:
        return INTERVAL_SECONDS
    if seconds < 1:
        raise ValueError(f"{what} wants at least a second")
    return seconds
