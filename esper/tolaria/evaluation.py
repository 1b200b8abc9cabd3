"""Held-out losses, and the counterfactual of a seed.

All functions restore the model's mode and leave parameters, buffers and gradients as they were.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.contracts import SeedEvaluation, SeedState
from esper.kasmina.model import MorphableModel

Batch = tuple[Tensor, Tensor]  # input, target
LossPerSample = Callable[[Tensor, Tensor], Tensor]  # output, target -> (B,)


@dataclass(frozen=True)
class Evaluation:
    """Losses of a model on a data set, one for each sample in the loader's order."""

    losses: Tensor  # (N,) float64 on the CPU
    accuracy: float | None  # of the arg max, where targets are class indices

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def standard_error(self) -> float:
        return _standard_error(self.losses)


def evaluate(model: nn.Module, loader: Iterable[Batch], loss_fn: LossPerSample) -> Evaluation:
    """Run ``model`` over ``loader`` in eval mode. Reads the losses at the end, so it waits."""
    losses, hits = [], []
    with _eval_mode(model):
        for inp, target in loader:
            output = model(inp)
            losses.append(loss_fn(output, target))
            if not target.is_floating_point() and output.dim() == target.dim() + 1:
                hits.append(output.argmax(dim=1) == target)
    accuracy = float(torch.cat(hits).double().mean()) if hits else None
    return Evaluation(torch.cat(losses).double().cpu(), accuracy)


def evaluate_seeds(
    model: MorphableModel, loader: Iterable[Batch], loss_fn: LossPerSample, with_all: Evaluation
) -> tuple[SeedEvaluation, ...]:
    """Measure each seed in EVALUATING: the held-out loss without it minus with it, per sample."""
    results = []
    for layer_name, seed_idx in model.kasmina.seeds_in(frozenset({SeedState.EVALUATING})):
        with model.kasmina.layer(layer_name).silenced(seed_idx):
            without = evaluate(model, loader, loss_fn)
        gains = without.losses - with_all.losses
        results.append(
            SeedEvaluation(
                seed_id=(layer_name, seed_idx),
                loss_with=with_all.loss,
                loss_without=without.loss,
                contribution=float(gains.mean()),
                standard_error=_standard_error(gains),
                num_samples=len(gains),
            )
        )
    return tuple(results)


def _standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
