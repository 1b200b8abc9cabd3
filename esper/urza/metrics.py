"""What Prometheus is told of Urza's server: its requests, and what the library holds."""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from esper.contracts import ForgeStatus

_UNROUTED = "unrouted"  # a path is the client's to choose, and a label for each would never end


class Metrics:
    """Of one server. ``status`` is asked at each scrape."""

    def __init__(self, status: Callable[[], ForgeStatus]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "urza_requests",
            "Requests answered",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self.durations = Histogram(
            "urza_request_duration_seconds",
            "From the first byte of a request to the last of its answer",
            ("method", "route"),
            registry=self._registry,
        )
        self._registry.register(_Holdings(status))

    def exposition(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)


class Measured:
    """Counts and times every request: middleware, ASGI."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # what the client sees of an exception

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started_s = time.perf_counter()
        try:
            await self._app(scope, receive, note_status)
        finally:
            method, route = scope["method"], _route(scope)
            self._metrics.requests.labels(method, route, status).inc()
            self._metrics.durations.labels(method, route).observe(time.perf_counter() - started_s)


class _Holdings(Collector):
    def __init__(self, status: Callable[[], ForgeStatus]) -> None:
        self._status = status

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Nothing: registering does not ask the library."""
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        status = self._status()
        blueprints = GaugeMetricFamily("urza_blueprints", "Blueprints by status", labels=["status"])
        for name, count in status.blueprints.items():
            blueprints.add_metric([name], count)
        kernels = GaugeMetricFamily("urza_kernels", "Kernels by status", labels=["status"])
        for kernel_status, count in status.kernels.items():
            kernels.add_metric([kernel_status], count)
        yield blueprints
        yield kernels
        yield GaugeMetricFamily("urza_leases", "Blueprints on lease", value=len(status.leases))
        waiting = GaugeMetricFamily("urza_waiting", "What no worker has taken", labels=["what"])
        waiting.add_metric(["blueprint"], status.waiting_blueprints)
        waiting.add_metric(["kernel"], status.waiting_kernels)
        yield waiting
        yield GaugeMetricFamily(
            "urza_forge_throughput_per_hour",
            "Attempts that the forges finished",
            value=status.throughput_per_hour,
        )
        yield GaugeMetricFamily(
            "urza_forge_utilisation", "Forges at work on average", value=status.utilisation
        )


def _route(scope: Scope) -> str:
    route = scope.get("route")
    return _UNROUTED if route is None else str(route.path)
