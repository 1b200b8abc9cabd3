"""When the loss explodes while a seed is being taken in: what to roll back."""

import math

from esper.contracts import CommandKind, EpochEvent, KasminaControlCommand, SeedState
from esper.kasmina.lifecycle import ACTIVE
from esper.tamiyo.history import History

_SAMPLING_ERRORS = 3.0  # of the held-out mean: a smaller rise may be chance
_HEARD = ACTIVE - {SeedState.FOSSILIZED}


def rollbacks(history: History, factor: float) -> list[KasminaControlCommand]:
    """Return an order for each seed that the host hears while its loss explodes.

    A loss has exploded if it is not finite, or has risen by more than ``factor`` times what it was
    at the last epoch's end before the seed was heard.
    """
    now = history.epochs[-1]
    return [
        KasminaControlCommand(
            kind=CommandKind.ROLL_BACK,
            layer_name=seed_id[0],
            seed_idx=seed_id[1],
            epoch=now.epoch,
            reason=reason,
        )
        for seed_id in history.adaptations
        if history.states.get(seed_id) in _HEARD
        and (reason := _explosion(now, history.event_before(seed_id), factor)) is not None
    ]


def _explosion(now: EpochEvent, before: EpochEvent | None, factor: float) -> str | None:
    if not math.isfinite(now.val_loss) or not math.isfinite(now.train_loss):
        return f"the loss is {now.val_loss} held-out and {now.train_loss} in training"
    if before is None:
        return None
    rise = now.val_loss - before.val_loss
    if rise <= factor * abs(before.val_loss):
        return None
    if rise <= _SAMPLING_ERRORS * now.val_loss_standard_error:
        return None
    return f"the held-out loss has exploded from {before.val_loss:.4g} to {now.val_loss:.4g}"
