"""What Prometheus is told of a run; ``docs/observability.md`` lists the metrics.

Counters and histograms are fed from the bus, in the pipeline's thread. All else is read when
Prometheus asks, in the thread that answers it, from the host's memory: the training thread does
nothing for it.
"""

import threading
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from typing import TypeVar
from wsgiref.simple_server import WSGIServer

from esper.contracts import (
    EpochEvent,
    FieldReport,
    KernelCharacterized,
    KernelReady,
    KernelStatus,
    LifecycleEvent,
    OonaMessage,
    Outcome,
    SeedState,
)
from esper.errors import EsperError
from esper.kasmina.model import MorphableModel
from esper.oona import Oona
from esper.oona.bus import TopicStats

try:
    from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        "metrics need prometheus-client: pip install 'esper-torch[metrics]'"
    ) from error

_Registered = TypeVar("_Registered", bound=Collector)

_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
_BUS: dict[
    str,
    tuple[type[CounterMetricFamily] | type[GaugeMetricFamily], str, Callable[[TopicStats], int]],
] = {
    "published": (CounterMetricFamily, "Messages published", lambda topic: topic.published),
    "dropped": (CounterMetricFamily, "Telemetry dropped, the oldest first", lambda t: t.dropped),
    "dead_letters": (
        CounterMetricFamily,
        "Messages given up after the last delivery",
        lambda topic: topic.dead_letters,
    ),
    "waiting": (
        GaugeMetricFamily,
        "Messages not yet acknowledged, over all consumer groups",
        lambda topic: topic.waiting,
    ),
}


class Metrics:
    """The metrics of one wrapped model and its bus, in a registry of their own or in yours.

    :class:`esper.Pipeline` makes one with ``metrics_port``. Raises ``ValueError`` if ``registry``
    holds the metrics of another run already.
    """

    def __init__(
        self, model: MorphableModel, bus: Oona, registry: CollectorRegistry | None = None
    ) -> None:
        self.registry = registry or CollectorRegistry()
        self._registered: list[Collector] = []
        self._server: tuple[WSGIServer, threading.Thread] | None = None
        self._adaptations = self._counter("adaptations", "Adaptations that ended", "outcome")
        self._transitions = self._counter(
            "seed_transitions", "Moves of seeds into a state", "state"
        )
        self._verdicts = self._counter("kernel_verdicts", "Verdicts of the evaluator", "status")
        self._incidents = self._counter(
            "seed_incidents", "Commands refused, and kept kernels taken out of the output", None
        )
        self._compiling = self._histogram("compile_seconds", "Compiling a kernel, wall time")
        self._evaluating = self._histogram("evaluation_seconds", "Judging a kernel, wall time")
        self._begin_at_zero()
        self._readings = self._register(_Readings(model, bus))

    def hear(self, message: OonaMessage) -> None:
        """Take in a message of the bus. Any thread."""
        payload = message.payload
        if isinstance(payload, LifecycleEvent):
            if payload.source is payload.target:
                self._incidents.inc()
            else:
                self._transitions.labels(payload.target.name).inc()
        elif isinstance(payload, FieldReport):
            self._adaptations.labels(payload.outcome).inc()
        elif isinstance(payload, KernelReady):
            _observe(self._compiling, payload.compile_s)
        elif isinstance(payload, KernelCharacterized):
            self._verdicts.labels(payload.status).inc()
            _observe(self._evaluating, payload.evaluation_s)
        elif isinstance(payload, EpochEvent):
            self._readings.latest_epoch = payload

    def serve(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Answer Prometheus at ``http://host:port/metrics`` from threads of its own.

        Raises :class:`EsperError` if the address cannot be had.
        """
        try:
            self._server = start_http_server(port, host, self.registry)
        except (OSError, OverflowError) as error:
            raise EsperError(f"metrics cannot be served at {host}:{port}: {error}") from error

    @property
    def port(self) -> int:
        """Where it serves; raises :class:`EsperError` unless it does."""
        if self._server is None:
            raise EsperError("the metrics are not served: call serve() first")
        return self._server[0].server_port

    def close(self) -> None:
        """Stop serving, and leave the registry."""
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = None
        while self._registered:
            self.registry.unregister(self._registered.pop())

    def _begin_at_zero(self) -> None:
        """A rate is known only of a counter that was seen before its first event."""
        for outcome in Outcome:
            self._adaptations.labels(outcome)
        for state in SeedState:
            self._transitions.labels(state.name)
        for status in KernelStatus:
            self._verdicts.labels(status)

    def _counter(self, name: str, help_: str, label: str | None) -> Counter:
        labels = () if label is None else (label,)
        return self._register(Counter(f"esper_{name}", help_, labels, registry=None))

    def _histogram(self, name: str, help_: str) -> Histogram:
        return self._register(Histogram(f"esper_{name}", help_, buckets=_SECONDS, registry=None))

    def _register(self, collector: _Registered) -> _Registered:
        self.registry.register(collector)
        self._registered.append(collector)
        return collector


class _Readings(Collector):
    """What is read at each scrape."""

    def __init__(self, model: MorphableModel, bus: Oona) -> None:
        self._kasmina = model.kasmina
        self._bus = bus
        self.latest_epoch: EpochEvent | None = None

    def collect(self) -> Iterator[Metric]:
        yield self._seeds()
        yield from self._steps()
        yield from self._cache()
        yield from self._topics()
        if self.latest_epoch is not None:
            yield from _epoch(self.latest_epoch)

    def _seeds(self) -> Metric:
        states = self._kasmina.bank.mirror["lifecycle_states"].tobytes()  # one copy, of one moment
        tally: Tally[int] = Tally()
        for layer in list(self._kasmina.layers.values()):
            tally.update(states[layer.first_seed : layer.first_seed + layer.num_seeds])
        family = GaugeMetricFamily("esper_seeds", "Seeds by state", labels=["state"])
        for state in SeedState:
            family.add_metric([state.name], tally[state])
        return family

    def _steps(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "esper_steps", "Calls of model.step()", value=self._kasmina.step_count
        )
        yield CounterMetricFamily(
            "esper_step_overhead_seconds",
            "Time of the training thread in model.step() when anything was due",
            value=self._kasmina.advance_ns / 1e9,
        )

    def _cache(self) -> Iterator[Metric]:
        stats = self._kasmina.cache.stats()
        for name, value in (
            ("hits", stats.hits),
            ("misses", stats.misses),
            ("evictions", stats.evictions),
        ):
            yield CounterMetricFamily(f"esper_kernel_cache_{name}", f"Kernel cache: {name}", value)
        yield GaugeMetricFamily("esper_kernel_cache_kernels", "Kernels held", stats.num_kernels)
        yield GaugeMetricFamily("esper_kernel_cache_bytes", "Bytes held", stats.held_bytes)

    def _topics(self) -> Iterator[Metric]:
        stats = self._bus.stats()
        for name, (family, help_, value) in _BUS.items():
            metric = family(f"esper_bus_{name}", help_, labels=["topic"])
            for topic, topic_stats in stats.items():
                metric.add_metric([topic], value(topic_stats))
            yield metric


def _epoch(event: EpochEvent) -> Iterator[Metric]:
    yield GaugeMetricFamily("esper_epoch", "The last epoch that ended", event.epoch)
    yield GaugeMetricFamily(
        "esper_train_loss", "Mean training loss of that epoch", event.train_loss
    )
    yield GaugeMetricFamily("esper_validation_loss", "Held-out loss after it", event.val_loss)
    if event.val_accuracy is not None:
        help_ = "Held-out accuracy after it"
        yield GaugeMetricFamily("esper_validation_accuracy_ratio", help_, event.val_accuracy)


def _observe(histogram: Histogram, seconds: float | None) -> None:
    if seconds is not None:  # None of a forge or an evaluator of an earlier version
        histogram.observe(seconds)
