"""A plain training loop that calls ``model.step()`` and tells the pipeline about epochs."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from esper.contracts import EpochEvent
from esper.kasmina.model import MorphableModel
from esper.tolaria.evaluation import Batch, LossPerSample, evaluate, evaluate_seeds


class Callback(Protocol):
    """What may follow a run. Called on the training thread, so keep it short."""

    def on_step(self, step: int, epoch: int) -> None:
        """Called after ``model.step()``."""

    def on_epoch(self, event: EpochEvent, step_losses: Sequence[float]) -> None:
        """Called after validation, with the training losses of the epoch's steps."""


class Tolaria:
    """Trains a wrapped model.

    ``loss_fn(output, target)`` returns one loss per sample, ``(B,)``: training takes the mean,
    and a seed's contribution is judged by pairs of per-sample losses. Loaders are re-iterable and
    give ``(input, target)`` on the model's device.
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
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.callbacks = tuple(callbacks)
        model.attach_optimizer(optimizer)

    def fit(self, epochs: int) -> list[EpochEvent]:
        """Train for so many epochs and return what was measured at the end of each.

        The device is waited for at the ends of epochs only.
        """
        first = self.model.kasmina.epoch
        return [self._epoch(epoch) for epoch in range(first, first + epochs)]

    def _epoch(self, epoch: int) -> EpochEvent:
        self.model.kasmina.epoch = epoch
        self.model.train()
        losses = [self._step(inp, target, epoch) for inp, target in self.train_loader]
        step_losses = torch.stack(losses).tolist()
        event = self._validate(epoch, sum(step_losses) / len(step_losses))
        for callback in self.callbacks:
            callback.on_epoch(event, step_losses)
        self.model.kasmina.epoch = epoch + 1
        return event

    def _step(self, inp: Tensor, target: Tensor, epoch: int) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_fn(self.model(inp), target).mean()
        loss.backward()
        self.optimizer.step()
        self.model.step()
        for callback in self.callbacks:
            callback.on_step(self.model.kasmina.step_count, epoch)
        return loss.detach()

    def _validate(self, epoch: int, train_loss: float) -> EpochEvent:
        held_out = evaluate(self.model, self.val_loader, self.loss_fn)
        return EpochEvent(
            epoch=epoch,
            step=self.model.kasmina.step_count,
            train_loss=train_loss,
            val_loss=held_out.loss,
            val_loss_standard_error=held_out.standard_error,
            val_accuracy=held_out.accuracy,
            evaluations=evaluate_seeds(self.model, self.val_loader, self.loss_fn, held_out),
        )
