"""A plain training loop that calls ``model.step()`` and tells the pipeline about epochs."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from esper.contracts import EpochEvent
from esper.errors import EsperError
from esper.kasmina.model import MorphableModel
from esper.tolaria.evaluation import (
    Batch,
    LossPerSample,
    batches_of,
    check_wrapped,
    loss_per_sample,
    measure_epoch,
)


class Callback(Protocol):
    """What may follow a run. Called on the training thread, so keep it short."""

    def on_step(self, step: int, epoch: int) -> None:
        """Called after ``model.step()``."""

    def on_epoch(self, event: EpochEvent, step_losses: Sequence[float]) -> None:
        """Called after validation, with the training losses of the epoch's steps."""


class Tolaria:
    """Trains a wrapped model.

    Args:
        model: what :func:`esper.wrap` returned; anything else raises ``TypeError``.
        optimizer: of the model's parameters. Those of new kernels join it, and leave it again.
        loss_fn: ``loss_fn(output, target)`` returns one loss per sample, ``(B,)``, as torch's
            losses do with ``reduction="none"``: training takes the mean, and a seed's contribution
            is judged by pairs of losses.
        train_loader: gives ``(input, target)`` on the model's device, anew for every epoch: a
            DataLoader or a list, not a generator.
        val_loader: the same for held-out data. It is gone through once an epoch, and may shuffle.
        callbacks: called after every step and every epoch in this order; a
            :class:`esper.Pipeline` is one.
    """

    def __init__(
        self,
        model: MorphableModel,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossPerSample,
        train_loader: Iterable[Batch],
        val_loader: Iterable[Batch],
        callbacks: Sequence[Callback] = (),
    ):
        check_wrapped(model)
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.callbacks = tuple(callbacks)
        model.attach_optimizer(optimizer)

    def fit(self, epochs: int) -> list[EpochEvent]:
        """Train for so many epochs and return what was measured at the end of each.

        The device is waited for at the ends of epochs only. Raises ``ValueError`` for a negative
        number, for a loader that gives no batch, and for a loss that is not one per sample, and
        :class:`EsperError` for a model that is distributed: the model itself is called here, and
        not the ``DistributedDataParallel`` around it.
        """
        if self.model.kasmina.peers is not None:
            raise EsperError(
                "Tolaria trains in one process; a distributed model needs its own loop"
            )
        if epochs < 0:
            raise ValueError(f"epochs must be at least 0, got {epochs}")
        first = self.model.kasmina.epoch
        return [self._epoch(epoch) for epoch in range(first, first + epochs)]

    def _epoch(self, epoch: int) -> EpochEvent:
        self.model.kasmina.epoch = epoch
        self.model.train()
        batches = batches_of(self.train_loader, "training loader")
        losses = [self._step(inp, target, epoch) for inp, target in batches]
        step_losses = torch.stack(losses).tolist()
        event = measure_epoch(
            self.model,
            self.val_loader,
            self.loss_fn,
            epoch=epoch,
            train_loss=sum(step_losses) / len(step_losses),
        )
        for callback in self.callbacks:
            callback.on_epoch(event, step_losses)
        self.model.kasmina.epoch = epoch + 1
        return event

    def _step(self, inp: Tensor, target: Tensor, epoch: int) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss_per_sample(self.loss_fn, self.model(inp), target).mean()
        loss.backward()
        self.optimizer.step()
        self.model.step()
        for callback in self.callbacks:
            callback.on_step(self.model.kasmina.step_count, epoch)
        return loss.detach()
