"""From an observed step to health signals; runs outside the training thread.

The health score of a seed's chunk is

    (1 - dead fraction) * (1 - non-finite fraction) * variance / (variance + 1e-6 * mean^2)

a product of three faults that each alone makes a layer useless: units that never answer, numbers
that are none, and an output that no longer varies. All terms lie in [0, 1]; an unobserved chunk
scores 1.
"""

from esper.contracts import HealthBatch, HealthSignal, SeedState
from esper.kasmina.observation import Observation

_COLLAPSE = 1e-6  # relative variance at which an output counts as half collapsed


def health_batch(observation: Observation) -> HealthBatch:
    """Return one signal for each seed of each layer that was observed."""
    fields = {name: view.tolist() for name, view in observation.snapshot.fields.items()}
    return HealthBatch(
        signals=tuple(
            _signal(observation, fields, layer.name, seed_idx, layer.first_seed + seed_idx, time_us)
            for layer in observation.layers
            for time_us in (layer.execution_time_us,)
            for seed_idx in range(layer.num_seeds)
        )
    )


def _signal(
    observation: Observation,
    fields: dict[str, list[float]],
    name: str,
    seed_idx: int,
    index: int,
    time_us: float,
) -> HealthSignal:
    rows: list[list[float]] = fields["health_accumulator"]  # type: ignore[assignment]
    count, mean, m2, dead, non_finite, energy = (row[index] for row in rows)
    total = count + non_finite
    variance = m2 / count if count else 0.0
    dead_fraction = min(1.0, dead / count) if count else 0.0
    return HealthSignal(
        seed_id=(name, seed_idx),
        health_score=_score(dead_fraction, non_finite / total, mean, variance) if total else 1.0,
        execution_time_us=time_us,
        lifecycle_state=SeedState(int(fields["lifecycle_states"][index])),
        epoch=observation.epoch,
        step=observation.step,
        staleness_steps=observation.handed_out_step - observation.step,
        mean=mean,
        variance=variance,
        dead_fraction=dead_fraction,
        non_finite=int(non_finite),
        gradient_energy=energy / count if count else 0.0,
        error_count=int(fields["error_count"][index]),
    )


def _score(dead: float, non_finite: float, mean: float, variance: float) -> float:
    spread = variance + _COLLAPSE * mean * mean
    collapse = variance / spread if spread else 0.0
    return max(0.0, min(1.0, (1 - dead) * (1 - non_finite) * collapse))
