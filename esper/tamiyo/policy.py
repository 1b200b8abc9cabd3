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

_BUSY = frozenset(SeedState) - {
    SeedState.DORMANT,
    SeedState.FOSSILIZED,
    SeedState.CULLED,
    SeedState.ROLLED_BACK,
}


@dataclass(frozen=True)
class ModelView:
    """All that a policy may know. ``candidates`` asks the library, best kernel first."""

    epochs: Sequence[EpochEvent]
    health: Mapping[SeedId, HealthSignal]  # the latest signal of each seed
    states: Mapping[SeedId, SeedState]
    failures: Mapping[SeedId, frozenset[str]]  # artifacts that were culled at a seed
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
    loss by less than ``min_relative_improvement`` of it, at the seed with the largest gradient
    energy per unit of attempts already lost there.
    """

    settings: TamiyoSettings = field(default_factory=TamiyoSettings)
    strategy: GraftingStrategy = field(default_factory=GraftingStrategy)

    def decide(self, view: ModelView) -> list[KasminaControlCommand]:
        now = view.epochs[-1]
        verdicts = [self._judge(evaluation, now.epoch) for evaluation in now.evaluations]
        if verdicts or not self._may_grow(view):
            return verdicts
        for seed_id in self._ranked_seeds(view):
            kernel = self._best_kernel(view, seed_id)
            if kernel is not None:
                return [self._germinate(view, seed_id, kernel)]
        return []

    def _judge(self, evaluation: SeedEvaluation, epoch: int) -> KasminaControlCommand:
        needed = self.settings.required_standard_errors * evaluation.standard_error
        keep = evaluation.contribution > needed
        return KasminaControlCommand(
            kind=CommandKind.KEEP if keep else CommandKind.CULL,
            layer_name=evaluation.seed_id[0],
            seed_idx=evaluation.seed_id[1],
            epoch=epoch,
            reason=(
                f"contribution {evaluation.contribution:+.4f} to the held-out loss, "
                f"{'more' if keep else 'not more'} than {needed:.4f} "
                f"({self.settings.required_standard_errors:g} standard errors)"
            ),
        )

    def _may_grow(self, view: ModelView) -> bool:
        settings, epoch = self.settings, view.epochs[-1].epoch
        if any(state in _BUSY for state in view.states.values()):
            return False
        if view.num_adaptations >= settings.max_adaptations or epoch < settings.warmup_epochs:
            return False
        changed = view.last_change_epoch
        if changed is not None and epoch - changed < settings.cooldown_epochs:
            return False
        return self._plateau(view.epochs)

    def _plateau(self, epochs: Sequence[EpochEvent]) -> bool:
        losses = [event.val_loss for event in epochs[-self.settings.window_epochs :]]
        if len(losses) < self.settings.window_epochs:
            return False
        return relative_improvement(losses) < self.settings.min_relative_improvement

    def _ranked_seeds(self, view: ModelView) -> list[SeedId]:
        def score(seed_id: SeedId) -> float:
            attempts = len(view.failures.get(seed_id, ()))
            return view.health[seed_id].gradient_energy / (1 + attempts)

        dormant = [
            seed_id
            for seed_id in view.health
            if view.states.get(seed_id, SeedState.DORMANT) is SeedState.DORMANT
        ]
        return sorted(dormant, key=lambda seed_id: (-score(seed_id), seed_id))

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
        self, view: ModelView, seed_id: SeedId, kernel: KernelRecord
    ) -> KasminaControlCommand:
        losses = [event.val_loss for event in view.epochs[-self.settings.window_epochs :]]
        return KasminaControlCommand(
            kind=CommandKind.GERMINATE,
            layer_name=seed_id[0],
            seed_idx=seed_id[1],
            artifact_id=kernel.artifact_id,
            strategy=self.strategy,
            epoch=view.epochs[-1].epoch,
            reason=(
                f"held-out loss improved by {relative_improvement(losses):.1%} in "
                f"{len(losses)} epochs; gradient energy "
                f"{view.health[seed_id].gradient_energy:.3g} is the largest on offer"
            ),
        )


def relative_improvement(losses: Sequence[float]) -> float:
    """Return by which part of its mean the least-squares line through ``losses`` falls."""
    n = len(losses)
    centre, mean = (n - 1) / 2, sum(losses) / n
    spread = sum((x - centre) ** 2 for x in range(n))
    slope = sum((x - centre) * (y - mean) for x, y in enumerate(losses)) / spread
    return 0.0 - slope * (n - 1) / mean if mean else 0.0
