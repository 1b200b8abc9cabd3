"""What a forge does next: decisions alone, on what it was told of the library and the machine.

What waits is compiled by FAST at once, whatever the load: somebody wants it, and it is ready in
under a second. The rest is done where nobody waits for the machine, and within a daily budget.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from esper.config import ForgeSettings
from esper.contracts import ForgeStatus, Pipeline, RecompilationProspect


@dataclass(frozen=True)
class Recompilation:
    blueprint_id: str
    pipeline: Pipeline
    reason: str


def recompilations(
    prospects: Iterable[RecompilationProspect],
    available: Collection[Pipeline],
    settings: ForgeSettings,
) -> list[Recompilation]:
    """Return what is worth making anew, most worthwhile first; each blueprint at most once.

    By reason, in the order of :func:`_wishes`, then by interest.
    """
    ranked = [
        (rank, -(prospect.tamiyo_interest + prospect.urabrask_interest), number, wish)
        for number, prospect in enumerate(prospects)
        if (choice := _choose(prospect, available, settings)) is not None
        for rank, wish in [choice]
    ]
    return [wish for _, _, _, wish in sorted(ranked, key=lambda item: item[:3])]


def has_budget(status: ForgeStatus, settings: ForgeSettings) -> bool:
    """Tell whether the forges of the library may recompile another one today."""
    return (
        status.recompilations_today < settings.max_recompilations_per_day
        and status.recompilation_cpu_s_today < settings.max_recompilation_cpu_s_per_day
    )


def is_idle(load_average: float, num_cpus: int, settings: ForgeSettings) -> bool:
    """Tell whether the machine has cores to spare, by its load over the last minute."""
    return load_average / num_cpus <= settings.max_load_per_core


def _choose(
    prospect: RecompilationProspect, available: Collection[Pipeline], settings: ForgeSettings
) -> tuple[int, Recompilation] | None:
    for rank, (pipeline, wanted, reason) in enumerate(_wishes(prospect, settings)):
        if wanted and pipeline in available and pipeline not in prospect.tried:
            return rank, Recompilation(prospect.blueprint_id, pipeline, reason)
    return None


def _wishes(
    prospect: RecompilationProspect, settings: ForgeSettings
) -> tuple[tuple[Pipeline, bool, str], ...]:
    """Return pipelines, whether they are wanted and why, the most worthwhile first."""
    interest, unusual = prospect.tamiyo_interest, prospect.urabrask_interest
    return (
        (
            Pipeline.AGGRESSIVE,
            interest >= settings.aggressive_interest,
            f"the controller's interest is {interest:g}",
        ),
        (
            Pipeline.STANDARD,
            prospect.rejected or unusual > 0,
            "its kernels failed their validation"
            if prospect.rejected
            else f"the evaluator's interest is {unusual:g}",
        ),
        (Pipeline.FAST, True, "there is none for this device and release of torch"),
    )
