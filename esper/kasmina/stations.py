"""How long a seed stays in a state, and which edge it takes then by itself."""

from esper.config import SeedSettings
from esper.contracts import GraftingStrategy, SeedState
from esper.kasmina.tenancy import Tenancy


def duration(
    settings: SeedSettings, strategy: GraftingStrategy | None, state: SeedState
) -> int | None:
    """Return the steps in ``state``, or None where the seed waits for somebody's word."""
    if state is SeedState.CULLED:
        return settings.embargo_steps
    if strategy is None:
        return None
    return {
        SeedState.TRAINING: strategy.training_steps,
        SeedState.GRAFTING: strategy.grafting_steps,
        SeedState.STABILIZATION: strategy.stabilization_steps,
        SeedState.FINE_TUNING: strategy.fine_tuning_steps,
    }.get(state)


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
