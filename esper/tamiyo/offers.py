"""Where a kernel could go, which one, and what it may gain for what it costs."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from esper.config import TamiyoSettings
from esper.contracts import (
    CommandKind,
    GraftingStrategy,
    KasminaControlCommand,
    KernelRecord,
    SeedId,
    SeedState,
)
from esper.tamiyo.budget import why_not
from esper.tamiyo.policy import ModelView


@dataclass(frozen=True)
class Offer:
    """One kernel for one seed."""

    seed_id: SeedId
    kernel: KernelRecord
    gain: float  # expected, for its cost; only comparisons mean something


def may_begin(view: ModelView, settings: TamiyoSettings, strategy: GraftingStrategy) -> bool:
    """Say whether the rules on when and how often allow another adaptation."""
    changed = view.last_change_epoch
    return (
        len(view.adapting) < settings.max_concurrent
        and view.num_adaptations < settings.max_adaptations
        and view.epoch >= settings.warmup_epochs
        and (changed is None or view.epoch - changed >= settings.cooldown_epochs)
        and _can_be_judged(view, settings.last_epoch, strategy)
    )


def _can_be_judged(view: ModelView, last_epoch: int | None, strategy: GraftingStrategy) -> bool:
    """Say whether a seed that begins now is evaluated before the last epoch.

    A verdict is obeyed between two steps, so it takes an epoch after the one whose end it follows.
    """
    if last_epoch is None:
        return True
    first, last = view.epochs[0], view.epochs[-1]
    passed = last.epoch - first.epoch
    steps_per_epoch = (last.step - first.step) / passed if passed else last.step / (last.epoch + 1)
    until_evaluated = (
        strategy.training_steps + strategy.grafting_steps + strategy.stabilization_steps
    )
    return until_evaluated < (last_epoch - 1 - view.epoch) * steps_per_epoch


def offers(view: ModelView, settings: TamiyoSettings) -> Iterator[Offer]:
    """Yield every affordable kernel for every free seed, a seed's kernels best first."""
    for seed_id in free_seeds(view, settings):
        for kernel in view.candidates(seed_id):
            tried = kernel.artifact_id in view.failures.get(seed_id, ())
            if not tried and why_not(kernel, view.spent, settings) is None:
                yield Offer(seed_id, kernel, _gain_for_cost(view, seed_id, kernel))


def best_offers(view: ModelView, settings: TamiyoSettings) -> list[Offer]:
    """Return the kernel that the library ranks first for each seed, the largest gain first."""
    first: dict[SeedId, Offer] = {}
    for offer in offers(view, settings):
        first.setdefault(offer.seed_id, offer)
    return sorted(first.values(), key=lambda offer: (-offer.gain, offer.seed_id))


def best_offer(view: ModelView, settings: TamiyoSettings) -> Offer | None:
    """Return the seed with the largest gain, with the kernel that the library ranks first there."""
    return next(iter(best_offers(view, settings)), None)


def free_seeds(view: ModelView, settings: TamiyoSettings) -> list[SeedId]:
    """Return the seeds that were observed, are DORMANT and are under no embargo."""
    return [
        seed_id
        for seed_id in view.health
        if view.states.get(seed_id, SeedState.DORMANT) is SeedState.DORMANT
        and not _is_under_embargo(view, seed_id, settings)
    ]


def _is_under_embargo(view: ModelView, seed_id: SeedId, settings: TamiyoSettings) -> bool:
    failed = view.last_failure_epoch.get(seed_id)
    return failed is not None and view.epoch - failed < settings.embargo_epochs


def germinate(
    view: ModelView, offer: Offer, strategy: GraftingStrategy, reason: str
) -> KasminaControlCommand:
    return KasminaControlCommand(
        kind=CommandKind.GERMINATE,
        layer_name=offer.seed_id[0],
        seed_idx=offer.seed_id[1],
        artifact_id=offer.kernel.artifact_id,
        strategy=strategy,
        epoch=view.epoch,
        reason=reason,
    )


def _gain_for_cost(view: ModelView, seed_id: SeedId, kernel: KernelRecord) -> float:
    """Return how fast the loss would fall if a zero-initialised linear branch started there.

    The branch's gradient is the outer product of the chunk's gradient and the layer's input; for
    inputs of unit variance its squared norm is energy * chunk width * input width. It is divided by
    the geometric mean of the kernel's parameters and FLOPs, so that neither's unit matters. Each
    kernel that was culled at the same layer before makes the hope four times smaller.
    """
    manifest = kernel.manifest
    energy = view.health[seed_id].gradient_energy
    culled = sum(len(ids) for (name, _), ids in view.failures.items() if name == seed_id[0])
    cost = math.sqrt(max(1, manifest.num_parameters) * max(1, manifest.flops_per_sample))
    return energy * manifest.site.act_channels * manifest.site.inp_channels / cost / 4.0**culled
