"""Decisions and nothing else: what to do, given what is known at the end of an epoch.

A policy sees a :class:`ModelView` and returns commands. It has no side effects, so the same
history leads to the same decisions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from esper.config import TamiyoSettings
from esper.contracts import (
    CommandKind,
    EpochEvent,
    GraftingStrategy,
    HealthSignal,
    KasminaControlCommand,
    KernelRecord,
    SeedEvaluation,
    SeedId,
    SeedState,
)


@dataclass(frozen=True)
class ModelView:
    """All that a policy may know. ``candidates`` asks the library, best kernel first."""

    epochs: Sequence[EpochEvent]
    health: Mapping[SeedId, HealthSignal]  # the latest signal of each seed
    states: Mapping[SeedId, SeedState]
    failures: Mapping[SeedId, frozenset[str]]  # artifacts that were culled at a seed
    adapting: frozenset[SeedId]  # seeds with an adaptation of the controller's under way
    num_adaptations: int  # begun so far
    num_parameters_added: int  # by kernels that are in place
    last_change_epoch: int | None  # when a seed last settled or was culled
    candidates: Callable[[SeedId], Sequence[KernelRecord]]


class Policy(Protocol):
    """A user's policy is a class with this method."""

    def decide(self, view: ModelView) -> list[KasminaControlCommand]:
        """Return the commands to issue at the end of ``view.epochs[-1]``."""
        ...


@dataclass(frozen=True)
class PlateauPolicy:
    """Grow where the gradient asks for it, once the held-out loss no longer falls.

    A seed under evaluation is kept if its contribution (held-out loss without it minus with it)
    exceeds ``required_standard_errors`` of its paired standard error, and culled otherwise. A new
    one is germinated when none is under way and the last ``window_epochs`` lowered the held-out
    loss by less than ``min_relative_improvement`` of it, at the seed with the largest expected
    gain; but not while the held-out loss rises and the training loss falls, since then capacity
    is not what is missing.
    """

    settings: TamiyoSettings = field(default_factory=TamiyoSettings)
    strategy: GraftingStrategy = field(default_factory=GraftingStrategy)

    def decide(self, view: ModelView) -> list[KasminaControlCommand]:
        now = view.epochs[-1]
        verdicts = [self._judge(evaluation, now.epoch) for evaluation in now.evaluations]
        if verdicts or not self._may_grow(view):
            return verdicts
        offers = [
            (self._expected_gain(view, seed_id, kernel), seed_id, kernel)
            for seed_id in _dormant_seeds(view)
            if (kernel := self._best_kernel(view, seed_id)) is not None
        ]
        if not offers:
            return []
        gain, seed_id, kernel = min(offers, key=lambda offer: (-offer[0], offer[1]))
        return [self._germinate(view, seed_id, kernel, gain)]

    def _judge(self, evaluation: SeedEvaluation, epoch: int) -> KasminaControlCommand:
        needed = self.settings.required_standard_errors * evaluation.standard_error
        keep = evaluation.contribution > needed
        return KasminaControlCommand(
            kind=CommandKind.KEEP if keep else CommandKind.CULL,
            layer_name=evaluation.seed_id[0],
            seed_idx=evaluation.seed_id[1],
            epoch=epoch,
            reason=_effect(evaluation.contribution, needed),
        )

    def _may_grow(self, view: ModelView) -> bool:
        settings, epoch = self.settings, view.epochs[-1].epoch
        if view.adapting:
            return False
        if view.num_adaptations >= settings.max_adaptations or epoch < settings.warmup_epochs:
            return False
        changed = view.last_change_epoch
        if changed is not None and epoch - changed < settings.cooldown_epochs:
            return False
        return self._capacity_is_exhausted(view.epochs)

    def _capacity_is_exhausted(self, epochs: Sequence[EpochEvent]) -> bool:
        window = epochs[-self.settings.window_epochs :]
        if len(window) < self.settings.window_epochs:
            return False
        held_out = relative_improvement([event.val_loss for event in window])
        trained = relative_improvement([event.train_loss for event in window])
        overfitting = held_out < 0 < trained
        return held_out < self.settings.min_relative_improvement and not overfitting

    def _expected_gain(self, view: ModelView, seed_id: SeedId, kernel: KernelRecord) -> float:
        """Return how fast the loss would fall if a zero-initialised linear branch started there.

        The branch's gradient is the outer product of the chunk's gradient and the layer's input;
        for inputs of unit variance its squared norm is energy * chunk width * input width. Each
        kernel that was culled at the same layer before makes the hope four times smaller.
        """
        site = kernel.manifest.site
        energy = view.health[seed_id].gradient_energy
        culled = sum(len(ids) for (name, _), ids in view.failures.items() if name == seed_id[0])
        return energy * site.act_channels * site.inp_channels / 4.0**culled

    def _best_kernel(self, view: ModelView, seed_id: SeedId) -> KernelRecord | None:
        budget = self.settings.max_parameters
        for kernel in view.candidates(seed_id):
            if kernel.artifact_id in view.failures.get(seed_id, ()):
                continue
            total = view.num_parameters_added + kernel.manifest.num_parameters
            if budget is None or total <= budget:
                return kernel
        return None

    def _germinate(
        self, view: ModelView, seed_id: SeedId, kernel: KernelRecord, gain: float
    ) -> KasminaControlCommand:
        losses = [event.val_loss for event in view.epochs[-self.settings.window_epochs :]]
        change = relative_improvement(losses)
        return KasminaControlCommand(
            kind=CommandKind.GERMINATE,
            layer_name=seed_id[0],
            seed_idx=seed_id[1],
            artifact_id=kernel.artifact_id,
            strategy=self.strategy,
            epoch=view.epochs[-1].epoch,
            reason=(
                f"the held-out loss {'fell' if change >= 0 else 'rose'} by {abs(change):.1%} in "
                f"{len(losses)} epochs; the expected gain {gain:.3g} is the largest on offer"
            ),
        )


def _effect(contribution: float, needed: float) -> str:
    if not contribution > 0:
        return f"raises the held-out loss by {-contribution:.4f}"
    compared = "more" if contribution > needed else "no more"
    return (
        f"lowers the held-out loss by {contribution:.4f}, "
        f"{compared} than the {needed:.4f} that chance may do"
    )


def _dormant_seeds(view: ModelView) -> list[SeedId]:
    return [
        seed_id
        for seed_id in view.health
        if view.states.get(seed_id, SeedState.DORMANT) is SeedState.DORMANT
    ]


def relative_improvement(losses: Sequence[float]) -> float:
    """Return by which part of their size the least-squares line through ``losses`` falls."""
    n = len(losses)
    centre, mean, size = (n - 1) / 2, sum(losses) / n, sum(map(abs, losses)) / n
    spread = sum((x - centre) ** 2 for x in range(n))
    slope = sum((x - centre) * (y - mean) for x, y in enumerate(losses)) / spread
    return 0.0 - slope * (n - 1) / size if size else 0.0
