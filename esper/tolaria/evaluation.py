"""Held-out losses, the counterfactuals of seeds, and the event that an epoch ends with.

All functions restore the model's mode and leave parameters, buffers and gradients as they were.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.contracts import EpochEvent, SeedEvaluation, SeedId, SeedState
from esper.kasmina.model import MorphableModel

Batch = tuple[Tensor, Tensor]  # input, target
LossPerSample = Callable[[Tensor, Tensor], Tensor]  # output, target -> (B,)
Gather = Callable[[Tensor], Tensor]  # (N,) of this process -> (M,) of all that measure together
Variant = Callable[[], AbstractContextManager[None]]  # within it the model is another one


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
    [result] = _evaluate_variants(
        model, batches_of(loader, "loader"), loss_fn, [contextlib.nullcontext], _own
    )
    return result


def validate(
    model: MorphableModel, loader: Iterable[Batch], loss_fn: LossPerSample
) -> tuple[Evaluation, tuple[SeedEvaluation, ...]]:
    """Evaluate ``model``, and each seed in EVALUATING by the held-out loss without it minus with.

    In a distributed run every rank calls this with its own part of the held-out data, and all get
    the result on all of it.

    Every batch is seen with all seeds and then without each of them, in one pass, so the losses
    are paired per sample also where the loader shuffles or augments.
    """
    check_wrapped(model)
    peers = model.kasmina.peers
    seed_ids = model.kasmina.seeds_in(frozenset({SeedState.EVALUATING}))
    silenced = [
        functools.partial(model.kasmina.layer(layer_name).silenced, seed_idx)
        for layer_name, seed_idx in seed_ids
    ]
    with_all, *without_one = _evaluate_variants(
        model,
        batches_of(loader, "validation loader"),
        loss_fn,
        [contextlib.nullcontext, *silenced],
        _own if peers is None else peers.control.concatenated,
    )
    contributions = map(functools.partial(_contribution, with_all), seed_ids, without_one)
    return with_all, tuple(contributions)


def measure_epoch(
    model: MorphableModel,
    loader: Iterable[Batch],
    loss_fn: LossPerSample,
    *,
    epoch: int,
    train_loss: float,
) -> EpochEvent:
    """Validate ``model`` in one pass over ``loader`` and return what the end of an epoch tells.

    Measures only: nothing is published, and the model's own ``epoch`` stays as it is.
    """
    held_out, evaluations = validate(model, loader, loss_fn)
    return EpochEvent(
        epoch=epoch,
        step=model.kasmina.step_count,
        train_loss=train_loss,
        val_loss=held_out.loss,
        val_loss_standard_error=held_out.standard_error,
        val_accuracy=held_out.accuracy,
        evaluations=evaluations,
    )


def loss_per_sample(loss_fn: LossPerSample, output: Tensor, target: Tensor) -> Tensor:
    """Return ``loss_fn``'s losses, ``(B,)``; raise ``ValueError`` if it gives anything else.

    Losses with more dimensions, such as one per token, are averaged over them.
    """
    losses = loss_fn(output, target)
    if losses.dim() == 0 or losses.size(0) != target.size(0):
        shape = f"shape {tuple(losses.shape)}" if losses.dim() else "a scalar"
        raise ValueError(
            f"loss_fn must return one loss per sample, shape ({target.size(0)},), got {shape}; "
            "use reduction='none'"
        )
    return losses if losses.dim() == 1 else losses.flatten(1).mean(1)


def batches_of(loader: Iterable[Batch], name: str) -> Iterator[Batch]:
    """Go through a loader once.

    Raises ``TypeError`` with its name for batches that are none, and ``ValueError`` if there was
    nothing in it.
    """
    _check_kind(loader, isinstance(loader, Iterable) and not isinstance(loader, Tensor), name)
    empty = True
    for batch in loader:
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        _check_kind(batch, pair and isinstance(batch[1], Tensor) and batch[1].dim() > 0, name)
        empty = False
        yield batch
    if empty:
        raise ValueError(
            f"the {name} gave no batch: it must be non-empty, and re-iterable as a DataLoader "
            "or a list is and a generator is not"
        )


def _check_kind(found: object, is_right: bool, name: str) -> None:
    if not is_right:
        raise TypeError(
            f"the {name} must give pairs of an input and a tensor of targets, (B, ...), as a "
            f"DataLoader of a Dataset does; found {_described(found)}"
        )


def _described(found: object) -> str:
    kind = type(found).__name__
    if isinstance(found, Tensor):
        return f"{kind} {tuple(found.shape)}"
    if isinstance(found, tuple | list):
        return f"{kind} of {', '.join(type(part).__name__ for part in found) or 'nothing'}"
    return kind


def check_wrapped(model: nn.Module) -> None:
    if not isinstance(model, MorphableModel):
        raise TypeError(f"{type(model).__name__} is not wrapped; call esper.wrap first")


class _Tally:
    """What one variant of the model has scored so far, still on the device."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._hits: list[Tensor] = []

    def add(self, output: Tensor, target: Tensor, loss_fn: LossPerSample) -> None:
        self._losses.append(loss_per_sample(loss_fn, output, target))
        if not target.is_floating_point() and output.dim() == target.dim() + 1:
            self._hits.append((output.argmax(dim=1) == target).flatten())

    def result(self, gather: Gather) -> Evaluation:
        losses = gather(torch.cat(self._losses).double().cpu())
        hits = gather(torch.cat(self._hits).double().cpu()) if self._hits else None
        return Evaluation(losses, None if hits is None else float(hits.mean()))


def _evaluate_variants(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossPerSample,
    variants: Sequence[Variant],
    gather: Gather,
) -> list[Evaluation]:
    """Give each batch to the model in every variant before the next one is drawn.

    Each gets a copy, since a model may normalise its input in place.
    """
    tallies = [_Tally() for _ in variants]
    with _eval_mode(model):
        for inp, target in batches:
            for variant, tally in zip(variants, tallies, strict=True):
                with variant():
                    tally.add(model(copy.deepcopy(inp)), target, loss_fn)
    return [tally.result(gather) for tally in tallies]


def _own(rows: Tensor) -> Tensor:
    return rows


def _contribution(with_all: Evaluation, seed_id: SeedId, without: Evaluation) -> SeedEvaluation:
    gains = without.losses - with_all.losses
    return SeedEvaluation(
        seed_id=seed_id,
        loss_with=with_all.loss,
        loss_without=without.loss,
        contribution=float(gains.mean()),
        standard_error=_standard_error(gains),
        num_samples=len(gains),
    )


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
