"""Metrics: fed from the bus, read from host memory, and the dashboard names no other."""

import json
import re
import urllib.request
from pathlib import Path

import pytest
import torch
from nissa_sample import EPOCH, KEPT, field_report, kernel, sample_record
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

import esper
import esper.oona as oona
from esper.contracts import (
    HealthBatch,
    KernelCharacterized,
    KernelReady,
    KernelStatus,
    LifecycleEvent,
    OonaMessage,
    SeedState,
    Topic,
)
from esper.errors import EsperError
from esper.nissa.metrics import Metrics

DOCS = Path(__file__).parent.parent / "docs"
ARTIFACT = kernel("low_rank").kernel.artifact_id


@pytest.fixture
def model():
    return esper.wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), seeds_per_layer=2)


@pytest.fixture
def bus():
    bus = oona.connect()
    yield bus
    bus.close()


@pytest.fixture
def metrics(model, bus):
    metrics = Metrics(model, bus)
    yield metrics
    metrics.close()


def hear(metrics, topic, payload):
    metrics.hear(OonaMessage(topic=topic, sender_id="test", payload=payload))


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"esper_{name}", labels)


def test_a_run_is_counted(metrics):
    for event in sample_record().lifecycle:
        hear(metrics, Topic.LIFECYCLE, event)
    hear(metrics, Topic.FIELD_REPORTS, field_report())
    culls = [e for e in sample_record().lifecycle if e.target is SeedState.CULLED]
    assert value(metrics, "seed_transitions_total", state="CULLED") == len(culls) == 1
    assert value(metrics, "seed_transitions_total", state="ROLLED_BACK") == 0
    assert value(metrics, "adaptations_total", outcome="FOSSILIZED") == 1
    assert value(metrics, "adaptations_total", outcome="CULLED") == 0


def test_an_event_that_leads_nowhere_is_an_incident_and_no_move(metrics):
    stays = {"source": SeedState.FOSSILIZED, "target": SeedState.FOSSILIZED}
    event = LifecycleEvent(seed_id=KEPT, epoch=1, step=1, reason="bypassed: nan", **stays)
    hear(metrics, Topic.LIFECYCLE, event)
    assert value(metrics, "seed_incidents_total") == 1
    assert value(metrics, "seed_transitions_total", state="FOSSILIZED") == 0


def test_compile_and_evaluation_times_are_those_that_the_workers_tell(metrics):
    hear(metrics, Topic.KERNEL_READY, KernelReady(artifact_id=ARTIFACT, compile_s=1.5))
    hear(metrics, Topic.KERNEL_READY, KernelReady(artifact_id=ARTIFACT))
    verdict = KernelCharacterized(
        artifact_id=ARTIFACT, status=KernelStatus.REJECTED, evaluation_s=0.25
    )
    hear(metrics, Topic.KERNEL_CHARACTERIZED, verdict)
    assert value(metrics, "compile_seconds_sum") == 1.5
    assert value(metrics, "compile_seconds_count") == 1
    assert value(metrics, "evaluation_seconds_sum") == 0.25
    assert value(metrics, "kernel_verdicts_total", status="REJECTED") == 1


def test_losses_are_those_of_the_latest_epoch_and_unknown_before_one(metrics):
    assert value(metrics, "validation_loss") is None
    hear(metrics, Topic.EPOCH, EPOCH)
    hear(metrics, Topic.EPOCH, EPOCH.model_copy(update={"epoch": 2, "val_accuracy": None}))
    assert value(metrics, "epoch") == 2
    assert (value(metrics, "train_loss"), value(metrics, "validation_loss")) == (0.5, 0.6)
    assert value(metrics, "validation_accuracy_ratio") is None


def test_seeds_are_counted_where_they_are(model, metrics):
    model(torch.zeros(1, 4))
    assert value(metrics, "seeds", state="DORMANT") == 6
    model.kasmina_layers["0"].germinate(1, ARTIFACT, "a test")
    assert value(metrics, "seeds", state="DORMANT") == 5
    assert value(metrics, "seeds", state="GERMINATED") == 1


def test_steps_and_what_they_cost(model, metrics):
    assert value(metrics, "step_overhead_seconds_total") == 0
    for _ in range(64):  # the last one begins an observation
        model.step()
    assert value(metrics, "steps_total") == 64
    overhead_s = value(metrics, "step_overhead_seconds_total")
    assert overhead_s == model.kasmina.advance_ns / 1e9 > 0


def test_the_cache_and_the_bus(model, bus, metrics):
    assert model.kasmina.cache.get(ARTIFACT) is None
    stream = bus.subscribe(Topic.SEED_HEALTH, "nobody")
    bus.publish(Topic.SEED_HEALTH, "test", HealthBatch(signals=()))
    assert value(metrics, "kernel_cache_misses_total") == 1
    assert value(metrics, "kernel_cache_hits_total") == 0
    for name, expected in (("published_total", 1), ("waiting", 1), ("dropped_total", 0)):
        assert value(metrics, f"bus_{name}", topic=Topic.SEED_HEALTH) == expected
    del stream


def test_it_is_served_in_prometheus_own_format(metrics):
    metrics.serve()
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}/metrics") as answer:
        families = {f.name for f in text_string_to_metric_families(answer.read().decode())}
    assert {"esper_seeds", "esper_steps", "esper_bus_waiting"} <= families
    with pytest.raises(EsperError, match=f"metrics cannot be served at 127.0.0.1:{metrics.port}"):
        Metrics(esper.wrap(nn.Linear(4, 4)), oona.connect()).serve(port=metrics.port)


def test_a_registry_holds_one_run_and_is_left_as_it_was(model, bus):
    registry = CollectorRegistry()
    first = Metrics(model, bus, registry)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        Metrics(model, bus, registry)
    first.close()
    Metrics(model, bus, registry).close()
    assert not list(registry.collect())


def test_a_port_is_known_only_while_it_serves(metrics):
    with pytest.raises(EsperError, match="the metrics are not served"):
        _ = metrics.port


def test_a_pipeline_serves_what_it_does_and_stops(model, tmp_path):
    with esper.Pipeline(model, tmp_path, metrics_port=0, local_workers=False) as pipeline:
        address = f"http://127.0.0.1:{pipeline.metrics.port}/metrics"
        pipeline.bus.publish(Topic.EPOCH, "test", EPOCH)
        pipeline.drain()
        text = urllib.request.urlopen(address).read().decode()
    assert "\nesper_epoch 1.0\n" in text
    assert 'esper_seeds{state="DORMANT"} ' in text
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address)


def exposed(metrics):
    hear(metrics, Topic.EPOCH, EPOCH)
    return {sample.name for family in metrics.registry.collect() for sample in family.samples}


def test_the_dashboard_names_only_metrics_and_labels_that_exist(metrics):
    board = json.loads((DOCS / "grafana.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries = [v["query"]["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    named = set(re.findall(r"esper_\w+", " ".join(expressions + queries)))
    assert len(named) > 15
    assert named <= exposed(metrics)
    labels = {
        label
        for family in metrics.registry.collect()
        for sample in family.samples
        for label in sample.labels
    } | {"job", "instance"}
    used = set(re.findall(r"(\w+)(?:=~|=|!=)\"", " ".join(expressions)))
    used |= {label for legend in re.findall(r"{{(\w+)}}", json.dumps(board)) for label in [legend]}
    assert used <= labels


def test_the_dashboard_shows_every_metric_and_no_panel_twice(metrics):
    text = (DOCS / "grafana.json").read_text()
    families = {family.name for family in metrics.registry.collect() if exposed(metrics)}
    left_out = {name for name in families if name not in text}
    assert left_out == {"esper_kernel_cache_evictions", "esper_kernel_cache_kernels"}
    board = json.loads(text)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_documentation_lists_every_metric(metrics):
    hear(metrics, Topic.EPOCH, EPOCH)
    text = (DOCS / "observability.md").read_text()
    for family in metrics.registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        assert f"`{name}`" in text
