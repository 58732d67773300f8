"""An OTLP receiver, by OpenTelemetry's own service definition: keeps what it gets over gRPC or HTTP."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc

Labels = dict[str, Any]


class Point(NamedTuple):
    """A data point with the attributes of its resource."""

    resource: Labels
    attributes: Labels
    value: float
    start_ns: int
    time_ns: int
    count: int


class Kind(NamedTuple):
    """What a metric is said to be."""

    data: str
    unit: str
    monotonic: bool


class Received:
    """All requests that a receiver has got."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self._lock = threading.Lock()

    def take(self, request: Any, headers: dict[str, str]) -> None:
        with self._lock:
            self.requests.append(request)
            self.headers.append(headers)

    def scopes(self) -> Iterator[tuple[Labels, Any]]:
        with self._lock:
            requests = list(self.requests)
        for request in requests:
            for resource in request.resource_metrics:
                for scope in resource.scope_metrics:
                    yield labels(resource.resource.attributes), scope

    def points(self, name: str) -> list[Point]:
        """Points of a metric, in the order of their arrival."""
        return [
            Point(
                resource,
                labels(point.attributes),
                getattr(point, "as_double", 0.0) or getattr(point, "as_int", 0),
                point.start_time_unix_nano,
                point.time_unix_nano,
                getattr(point, "count", 0),
            )
            for resource, scope in self.scopes()
            for metric in scope.metrics
            if metric.name == name
            for point in getattr(metric, metric.WhichOneof("data")).data_points
        ]

    def kinds(self) -> dict[str, Kind]:
        found: dict[str, Kind] = {}
        for _, scope in self.scopes():
            for metric in scope.metrics:
                data = metric.WhichOneof("data")
                found[metric.name] = Kind(data, metric.unit, data == "sum" and metric.sum.is_monotonic)
        return found


def labels(attributes: Any) -> Labels:
    return {found.key: getattr(found.value, found.value.WhichOneof("value")) for found in attributes}


@contextmanager
def over_grpc(port: int = 0) -> Iterator[tuple[str, Received]]:
    """A receiver over gRPC; gives its URL and what it has got."""
    received = Received()

    class Service(metrics_service_pb2_grpc.MetricsServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
            received.take(request, {name: str(value) for name, value in context.invocation_metadata()})
            return metrics_service_pb2.ExportMetricsServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}", received
    finally:
        server.stop(None).wait()


@contextmanager
def over_http() -> Iterator[tuple[str, Received]]:
    """A receiver over HTTP with protocol buffers."""
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Content-Encoding"] == "gzip":
                body = gzip.decompress(body)
            known = self.path == "/v1/metrics" and self.headers["Content-Type"] == "application/x-protobuf"
            if known:
                request = metrics_service_pb2.ExportMetricsServiceRequest()
                request.ParseFromString(body)
                received.take(request, {name.lower(): value for name, value in self.headers.items()})
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        server.server_close()
