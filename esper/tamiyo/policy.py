"""What a policy is, and what it may know.

A policy sees a :class:`ModelView` and returns commands. It has no side effects, so the same
history leads to the same decisions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from esper.contracts import (
    EpochEvent,
    HealthSignal,
    KasminaControlCommand,
    KernelRecord,
    SeedId,
    SeedState,
)
from esper.tamiyo.budget import Cost


@dataclass(frozen=True)
class ModelView:
    """All that a policy may know. ``candidates`` asks the library, best kernel first."""

    epochs: Sequence[EpochEvent]
    health: Mapping[SeedId, HealthSignal]  # the latest signal of each seed
    states: Mapping[SeedId, SeedState]  # of every seed of an observed layer, DORMANT ones too
    failures: Mapping[SeedId, frozenset[str]]  # artifacts that were culled at a seed
    last_failure_epoch: Mapping[SeedId, int]  # when the last of them was
    adapting: frozenset[SeedId]  # seeds with an adaptation of the controller's under way
    loss_before: Mapping[SeedId, float]  # held-out, before the host heard a seed that is under way
    num_adaptations: int  # begun so far
    spent: Cost  # of kernels in place or on their way
    last_change_epoch: int | None  # when a seed last settled or was culled
    candidates: Callable[[SeedId], Sequence[KernelRecord]]

    @property
    def epoch(self) -> int:
        """The epoch whose end is decided on."""
        return self.epochs[-1].epoch


class Policy(Protocol):
    """A user's policy is a class with this method."""

    def decide(self, view: ModelView) -> list[KasminaControlCommand]:
        """Return the commands to issue at the end of ``view.epochs[-1]``."""
        ...
