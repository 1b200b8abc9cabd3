"""What training costs, in floating-point operations."""

import collections
import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from esper.contracts import EpochEvent
from esper.kasmina.lifecycle import LEARNING, OCCUPIED
from esper.kasmina.model import MorphableModel
from esper.tolaria.evaluation import Batch, LossPerSample, loss_per_sample


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
