"""What training costs, in floating-point operations."""

import collections
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

import esper.ops  # noqa: F401 - loads what is counted here
from esper.contracts import EpochEvent
from esper.kasmina.lifecycle import LEARNING, OCCUPIED
from esper.kasmina.model import MorphableModel
from esper.tolaria.evaluation import Batch, LossPerSample, loss_per_sample


# Here and not beside the op, since the counter takes a quarter of a second to import.
@register_flop_formula(torch.ops.esper.bottleneck_)
def _(y: torch.Size, inp: torch.Size, down: torch.Size, *rest: Any, **kwargs: Any) -> int:
    up = rest[1]
    return int(2 * inp[:-1].numel() * (down.numel() + up.numel()))


@register_flop_formula(torch.ops.esper.bottleneck_backward)
def _(*args: Any, **kwargs: Any) -> int:
    inp, down, up, needs_inp, needs_weights = (args[i] for i in (1, 4, 6, -2, -1))
    # Each of the two products is differentiated by its input and by its weight.
    by_inputs = up.numel() + (down.numel() if needs_inp else 0)
    by_weights = up.numel() + down.numel() if needs_weights else 0
    return int(2 * inp[:-1].numel() * (by_inputs + by_weights))


def training_flops(model: nn.Module, batch: Batch, loss_fn: LossPerSample) -> int:
    """Count forward and backward of one step on a copy: products and sums of matmul and conv.

    Elementwise work is not counted, as ``torch.utils.flop_counter`` has it. The random numbers
    that training draws afterwards are the same as without the count.
    """
    twin = copy.deepcopy(model).train()
    gpus = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=gpus), FlopCounterMode(display=False) as counter:
        loss_per_sample(loss_fn, twin(batch[0]), batch[1]).mean().backward()
    return int(counter.get_total_flops())


class FlopMeter:
    """Adds up what training cost: each configuration of seeds is measured once, on a copy."""

    def __init__(self, model: MorphableModel, batch: Batch, loss_fn: LossPerSample):
        self.model = model
        self.batch = batch
        self.loss_fn = loss_fn
        self._steps: collections.Counter[object] = collections.Counter()
        self._flops_per_step: dict[object, int] = {}

    def total(self) -> int:
        return sum(self._flops_per_step[key] * count for key, count in self._steps.items())

    def on_step(self, step: int, epoch: int) -> None:
        kasmina = self.model.kasmina
        key = (tuple(kasmina.seeds_in(OCCUPIED)), tuple(kasmina.seeds_in(LEARNING)))
        if key not in self._flops_per_step:
            self._flops_per_step[key] = training_flops(self.model, self.batch, self.loss_fn)
        self._steps[key] += 1

    def on_epoch(self, event: EpochEvent, step_losses: Sequence[float]) -> None:
        """Nothing to add up at the end of an epoch."""
