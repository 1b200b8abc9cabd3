"""From an observed step to health signals; runs outside the training thread.

The health score of a seed's chunk is

    (1 - dead fraction) * (1 - non-finite fraction)
        * variance / (variance + 1e-6 * mean^2) * slope / (slope + 0.05)

a product of four faults that each alone makes a layer useless: units that never answer, numbers
that are none, an output that no longer varies, and an activation that is driven to its bounds, with
slope = 1 - saturation. All terms lie in [0, 1]; the last is left out where there is no bound, and an
unobserved chunk scores 1.
"""

import asyncio

from esper.contracts import HealthBatch, HealthSignal, SeedState
from esper.kasmina.lifecycle import ACTIVE
from esper.kasmina.observation import LayerObservation, Observation

_COLLAPSE = 1e-6  # relative variance at which an output counts as half collapsed
_FLAT = 0.05  # mean slope, over the steepest, at which an activation counts as half saturated
_SMALL = 256  # seeds whose signals are made in about a millisecond


def health_batch(observation: Observation) -> HealthBatch:
    """Return one signal for each seed of each layer that was observed."""
    fields = {name: view.tolist() for name, view in observation.snapshot.fields.items()}
    return HealthBatch(
        signals=tuple(
            _signal(observation, fields, layer, seed_idx)
            for layer in observation.layers
            for seed_idx in range(layer.num_seeds)
        )
    )


async def health_batch_beside(observation: Observation) -> HealthBatch:
    """As :func:`health_batch`; many signals are made in a thread, for the running loop to go on.

    For few of them the way to the thread and back would be the longer part.
    """
    if sum(layer.num_seeds for layer, _ in observation.watched) <= _SMALL:
        return health_batch(observation)
    return await asyncio.to_thread(health_batch, observation)


def _signal(
    observation: Observation,
    fields: dict[str, list[float]],
    layer: LayerObservation,
    seed_idx: int,
) -> HealthSignal:
    rows: list[list[float]] = fields["health_accumulator"]  # type: ignore[assignment]
    index = layer.first_seed + seed_idx
    count, mean, m2, dead, non_finite, energy = (row[index] for row in rows)
    total = count + non_finite
    state = SeedState(int(fields["lifecycle_states"][index]))
    variance = m2 / count if count else 0.0
    dead_fraction = min(1.0, dead / count) if count else 0.0
    # What a kernel adds to an activation keeps to no bounds.
    reach = layer.reach if count and state not in ACTIVE else None
    saturation = None if reach is None else reach.saturation(mean, variance)
    return HealthSignal(
        seed_id=(layer.name, seed_idx),
        health_score=(
            _score(dead_fraction, non_finite / total, mean, variance, saturation) if total else 1.0
        ),
        execution_time_us=layer.execution_time_us,
        lifecycle_state=state,
        epoch=observation.epoch,
        step=observation.step,
        staleness_steps=observation.handed_out_step - observation.step,
        mean=mean,
        variance=variance,
        dead_fraction=dead_fraction,
        saturation=saturation,
        non_finite=int(non_finite),
        gradient_energy=energy / count if count else 0.0,
        error_count=int(fields["error_count"][index]),
    )


def _score(
    dead: float, non_finite: float, mean: float, variance: float, saturation: float | None
) -> float:
    spread = variance + _COLLAPSE * mean * mean
    collapse = variance / spread if spread else 0.0
    slope = 1.0 if saturation is None else (1 - saturation) / (1 - saturation + _FLAT)
    return max(0.0, min(1.0, (1 - dead) * (1 - non_finite) * collapse * slope))
