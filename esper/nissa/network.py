"""A wrapped model at one moment, as the report draws it."""

from collections.abc import Mapping

from esper.contracts import SeedId
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.lifecycle import ACTIVE
from esper.kasmina.model import MorphableModel
from esper.nissa.record import LayerSummary, SeedSummary


def summarize_network(
    model: MorphableModel, contributions: Mapping[SeedId, float] | None = None
) -> list[LayerSummary]:
    """Return all layers whose shapes are known, with their seeds and kernels."""
    return [
        _summarize_layer(layer, contributions or {})
        for layer in model.kasmina_layers.values()
        if layer.shapes is not None
    ]


def _summarize_layer(layer: KasminaLayer, contributions: Mapping[SeedId, float]) -> LayerSummary:
    assert layer.shapes is not None
    host = layer.default_transform
    return LayerSummary(
        fqn=layer.name,
        type=layer.host_name,
        output_shape=layer.shapes.out,
        channels=layer.shapes.channels,
        host_parameters=sum(p.numel() for p in host.parameters(recurse=False)),
        seeds=tuple(
            _summarize_seed(layer, seed_idx, contributions.get((layer.name, seed_idx)))
            for seed_idx in range(layer.num_seeds)
        ),
    )


def _summarize_seed(layer: KasminaLayer, seed_idx: int, contribution: float | None) -> SeedSummary:
    kernel, state = layer.kernel(seed_idx), layer.state(seed_idx)
    if kernel is None:
        return SeedSummary(index=seed_idx, state=state)
    size = sum(weight.numel() for weight in kernel.weights())
    return SeedSummary(
        index=seed_idx,
        state=state,
        design=kernel.manifest.design.name,
        artifact_id=kernel.artifact_id,
        parameters=size if state in ACTIVE else 0,
        contribution=contribution,
    )
