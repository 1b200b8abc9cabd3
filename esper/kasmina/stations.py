"""How long a seed stays in a state, and which edge it takes then by itself."""

from esper.config import SeedSettings
from esper.contracts import GraftingStrategy, SeedState
from esper.kasmina.tenancy import Tenancy

_DURATIONS = {  # of GraftingStrategy
    SeedState.TRAINING: "training_steps",
    SeedState.GRAFTING: "grafting_steps",
    SeedState.STABILIZATION: "stabilization_steps",
    SeedState.FINE_TUNING: "fine_tuning_steps",
}


def duration(
    settings: SeedSettings, strategy: GraftingStrategy | None, state: SeedState
) -> int | None:
    """Return the steps in ``state``, or None where the seed waits for somebody's word."""
    if state is SeedState.CULLED:
        return settings.embargo_steps
    if strategy is None:
        return None
    field = _DURATIONS.get(state)
    return None if field is None else int(getattr(strategy, field))


def count_down(tenancy: Tenancy) -> None:
    """Book one step, and take the edge that is due when the state's steps are over."""
    if tenancy.steps_left is None:
        return
    tenancy.steps_left -= 1
    if tenancy.steps_left <= 0:
        _move_on(tenancy)


def _move_on(tenancy: Tenancy) -> None:
    layer, seed_idx = tenancy.layer, tenancy.seed_idx
    state = layer.state(seed_idx)
    if state is SeedState.TRAINING:
        assert tenancy.strategy is not None
        layer.graft(seed_idx, tenancy.strategy)
    elif state is SeedState.GRAFTING:
        layer.stabilize(seed_idx)
    elif state is SeedState.STABILIZATION:
        layer.evaluate(seed_idx)
    elif state is SeedState.FINE_TUNING:
        layer.fossilize(seed_idx, "fine-tuned")
    elif state is SeedState.CULLED:
        layer.revive(seed_idx)
