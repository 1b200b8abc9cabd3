"""Policies that do not look at the loss to know when to grow: by schedule, by chance, by hand."""

import random
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from esper.config import TamiyoSettings
from esper.contracts import CommandKind, GraftingStrategy, KasminaControlCommand, SeedId
from esper.tamiyo.offers import best_offer, germinate, may_begin, offers
from esper.tamiyo.policy import ModelView
from esper.tamiyo.verdict import verdicts


@dataclass(frozen=True)
class ScheduledPolicy:
    """Grow at the ends of the given epochs, at the seed with the largest gain for its cost.

    An epoch at which an adaptation is still under way, or no kernel is on offer, is made up for as
    soon as that is over. Seeds are judged as by :class:`PlateauPolicy`.
    """

    epochs: Collection[int]
    settings: TamiyoSettings = field(default_factory=TamiyoSettings)
    strategy: GraftingStrategy = field(default_factory=GraftingStrategy)

    def decide(self, view: ModelView) -> list[KasminaControlCommand]:
        commands = verdicts(view, self.settings.required_standard_errors)
        due = sum(epoch <= view.epoch for epoch in self.epochs)
        if (
            commands
            or view.num_adaptations >= due
            or not may_begin(view, self.settings, self.strategy)
        ):
            return commands
        offer = best_offer(view, self.settings)
        if offer is None:
            return []
        reason = f"number {view.num_adaptations + 1} of {len(self.epochs)} that are scheduled"
        return [germinate(view, offer, self.strategy, reason)]


@dataclass(frozen=True)
class RandomPolicy:
    """The baseline: any affordable kernel at any free seed, with a chance of ``rate`` an epoch.

    The same ``seed`` and history give the same draws. Limits, budgets and the judgement of seeds
    are those of :class:`PlateauPolicy`; when, where and with what are left to chance.
    """

    seed: int = 0
    rate: float = 0.25
    settings: TamiyoSettings = field(default_factory=TamiyoSettings)
    strategy: GraftingStrategy = field(default_factory=GraftingStrategy)

    def decide(self, view: ModelView) -> list[KasminaControlCommand]:
        commands = verdicts(view, self.settings.required_standard_errors)
        draws = random.Random(f"{self.seed}:{view.epoch}")
        if (
            commands
            or draws.random() >= self.rate
            or not may_begin(view, self.settings, self.strategy)
        ):
            return commands
        on_offer = sorted(
            offers(view, self.settings), key=lambda o: (o.seed_id, o.kernel.artifact_id)
        )
        if not on_offer:
            return []
        return [germinate(view, draws.choice(on_offer), self.strategy, "by chance")]


class ManualPolicy:
    """Nothing but what is asked for, at the end of the epoch. Any thread may ask.

    A seed in EVALUATING stays there until :meth:`keep` or :meth:`cull` is called. Limits on when
    and where do not hold; the controller's budgets do.
    """

    def __init__(self) -> None:
        self._wishes: deque[tuple[CommandKind, SeedId, str | None, GraftingStrategy]] = deque()

    def germinate(
        self,
        layer_name: str,
        seed_idx: int,
        artifact_id: str,
        strategy: GraftingStrategy | None = None,
    ) -> None:
        self._wish(CommandKind.GERMINATE, layer_name, seed_idx, artifact_id, strategy)

    def keep(self, layer_name: str, seed_idx: int) -> None:
        self._wish(CommandKind.KEEP, layer_name, seed_idx)

    def cull(self, layer_name: str, seed_idx: int) -> None:
        self._wish(CommandKind.CULL, layer_name, seed_idx)

    def roll_back(self, layer_name: str, seed_idx: int) -> None:
        """The host's weights go back to where they were before it heard the seed."""
        self._wish(CommandKind.ROLL_BACK, layer_name, seed_idx)

    def decide(self, view: ModelView) -> list[KasminaControlCommand]:
        wishes = [self._wishes.popleft() for _ in range(len(self._wishes))]
        return [
            KasminaControlCommand(
                kind=kind,
                layer_name=name,
                seed_idx=seed_idx,
                artifact_id=artifact_id,
                strategy=strategy,
                epoch=view.epoch,
                reason="by hand",
            )
            for kind, (name, seed_idx), artifact_id, strategy in wishes
        ]

    def _wish(
        self,
        kind: CommandKind,
        layer_name: str,
        seed_idx: int,
        artifact_id: str | None = None,
        strategy: GraftingStrategy | None = None,
    ) -> None:
        strategy = strategy or GraftingStrategy()
        self._wishes.append((kind, (layer_name, seed_idx), artifact_id, strategy))
