"""Compiling a kernel in several ways, and finding out which is the fastest, if any is faster."""

from collections.abc import Sequence
from dataclasses import dataclass

from esper.contracts import NativeBuild, Speedup
from esper.kasmina.compiled import PLAN_FILE, CompiledStep, StepPlan
from esper.kasmina.kernel import Kernel
from esper.kasmina.native import native_target
from esper.tezzeret.inductor import Variant, compile_step
from esper.tezzeret.trial import Bench

MIN_SPEEDUP = 1.1  # the least for which machine code is worth its trouble
_MAX_REASON = 300  # characters of what Inductor has to say


@dataclass(frozen=True)
class Native:
    """The machine code that was kept."""

    variant: Variant
    build: NativeBuild
    files: dict[str, bytes]


@dataclass(frozen=True)
class _Candidate:
    """A variant that compiles and computes what it should."""

    variant: Variant
    files: dict[str, bytes]
    step: CompiledStep
    error: float


def compile_fastest(kernel: Kernel, variants: Sequence[Variant]) -> tuple[Native | None, str]:
    """Return the machine code that is fastest, or None if it is not worth it, and what was found.

    Calls with every gradient decide; for other demands it is used where it is faster for them.
    Blocks for minutes. What goes wrong in compiling is said, and no error.
    """
    bench = Bench(kernel)
    demands = bench.demands()
    candidates, findings = _candidates(bench, variants)
    steps = {candidate.variant.name: candidate.step for candidate in candidates}
    speedups = {demand: bench.speedups(steps, demand) for demand in demands} if steps else {}
    findings += [
        f"{name} brings {speedup}" for name, speedup in speedups.get(demands[0], {}).items()
    ]
    faster = [c for c in candidates if _is_faster(speedups[demands[0]][c.variant.name])]
    if not faster:
        return None, f"{'; '.join(findings)}; {MIN_SPEEDUP}x of FAST is needed"
    best = max(faster, key=lambda c: speedups[demands[0]][c.variant.name].median)
    by_demand = {demand: found[best.variant.name] for demand, found in speedups.items()}
    build = NativeBuild(
        target=native_target(kernel.manifest.device),
        variant=best.variant.name,
        options=dict(best.variant.options),
        speedups={demand: found for demand, found in by_demand.items() if _is_faster(found)},
        gradient_error=best.error,
    )
    return Native(best.variant, build, best.files), "; ".join(findings)


def _candidates(bench: Bench, variants: Sequence[Variant]) -> tuple[list[_Candidate], list[str]]:
    """Return what compiles and is right, and why the others are not among them."""
    candidates, reasons = [], []
    for variant in variants:
        try:
            candidates.append(_candidate(bench, variant))
        except Exception as error:
            # Inductor raises whatever its many layers and the C++ compiler raise.
            first_line = str(error).strip().partition("\n")[0]
            reasons.append(f"{variant.name}: {type(error).__name__}: {first_line[:_MAX_REASON]}")
    return candidates, reasons


def _candidate(bench: Bench, variant: Variant) -> _Candidate:
    kernel = bench.kernel
    inp, act = bench.example()
    files = compile_step(kernel, inp, act, variant)
    plan = StepPlan.from_json(files[PLAN_FILE], num_inputs=2 + len(kernel.program.parameters))
    step = CompiledStep(kernel.program, plan, files, bench.demands())
    return _Candidate(variant, files, step, bench.error(step))


def _is_faster(speedup: Speedup) -> bool:
    """Tell whether it is by enough, and not by chance."""
    return speedup.median >= MIN_SPEEDUP and speedup.low >= 1.0
