"""The legal edges of a seed's life, and nothing else: who takes them is decided elsewhere."""

from esper.contracts import SeedState
from esper.errors import LifecycleError

S = SeedState

EDGES: dict[SeedState, frozenset[SeedState]] = {
    S.DORMANT: frozenset({S.GERMINATED, S.ROLLED_BACK}),
    S.GERMINATED: frozenset({S.LOADING, S.CANCELLED, S.ROLLED_BACK}),
    S.LOADING: frozenset({S.TRAINING, S.GRAFTING, S.CULLED, S.ROLLED_BACK}),
    S.TRAINING: frozenset({S.GRAFTING, S.CULLED, S.CANCELLED, S.ROLLED_BACK}),
    S.GRAFTING: frozenset({S.STABILIZATION, S.CULLED, S.ROLLED_BACK}),
    S.STABILIZATION: frozenset({S.EVALUATING, S.CULLED, S.ROLLED_BACK}),
    S.EVALUATING: frozenset({S.FINE_TUNING, S.FOSSILIZED, S.CULLED, S.ROLLED_BACK}),
    S.FINE_TUNING: frozenset({S.FOSSILIZED, S.CULLED, S.ROLLED_BACK}),
    S.CULLED: frozenset({S.DORMANT, S.ROLLED_BACK}),
    S.CANCELLED: frozenset({S.DORMANT, S.ROLLED_BACK}),
    S.FOSSILIZED: frozenset(),
    S.ROLLED_BACK: frozenset(),
}

# States in which a kernel sits in the layer, and those in which it reaches the layer's output.
OCCUPIED = frozenset(S(value) for value in range(S.TRAINING, S.FOSSILIZED + 1))
ACTIVE = OCCUPIED - {S.TRAINING}
# States in which the optimizer moves the seed's parameters.
LEARNING = frozenset({S.TRAINING, S.GRAFTING, S.FINE_TUNING})


def check_edge(source: SeedState, target: SeedState, seed: str) -> None:
    """Raise :class:`LifecycleError` unless ``source > target`` is an edge; ``seed`` names it."""
    if target in EDGES[source]:
        return
    legal = ", ".join(state.name for state in sorted(EDGES[source])) or "none, the state is final"
    raise LifecycleError(f"{seed}: no edge {source.name} > {target.name} (legal targets: {legal})")
