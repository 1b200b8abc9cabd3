"""What does a verdict cost, and do its measurements agree? One FAST kernel, judged again and again.

In this process, with a warm sandbox, as the evaluator's worker does it. Processor time is that of
the evaluator and of all candidates, without the start of the server that they are forked from.
"""

import resource
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.cases.forge import LINEAR
from benchmarks.findings import exact
from benchmarks.gate import WrongResultError
from benchmarks.harness import Plan
from benchmarks.kernels import Kernels
from benchmarks.rows import Finding
from esper.config import EvaluatorSettings
from esper.contracts import KernelBundle, KernelStatus, Measurement, Pipeline
from esper.urabrask.gauntlet import Gauntlet
from esper.urabrask.sandbox import Sandbox

DESIGNS = ("residual_mlp", "low_rank", "gated")
MAX_DEVIATION_PERCENT = 5.0
MAX_CORE_S = 5.0
MIN_KERNELS_A_DAY = 400
DAY_S = 86_400


@dataclass(frozen=True)
class Judged:
    measurements: list[Measurement]
    wall_s: float
    core_s: float


def samples(plan: Plan, kernels: Kernels) -> Iterator[Finding]:
    count = 2 if plan.quick else 20
    for design in DESIGNS[:1] if plan.quick else DESIGNS:
        bundle, _ = kernels.compile(design, LINEAR, Pipeline.FAST)
        judged = judge(bundle, count)
        name = f"{design}, {LINEAR.host}, FAST"
        yield deviation(f"{name}: p50 of the forward", judged.measurements)
        row = f"{name}: a verdict"
        yield exact(row, "core time", judged.core_s / count, unit="s", at_most=MAX_CORE_S)
        yield kernels_a_day(f"{name}: verdicts by one worker", judged.wall_s / count)


def judge(bundle: KernelBundle, count: int) -> Judged:
    settings = EvaluatorSettings()
    starting_s = cpu_s_of_starting(settings)
    before_s = cpu_s()
    with Sandbox() as sandbox:
        sandbox.launch(settings).close()
        gauntlet = Gauntlet(settings, sandbox)
        began_s = time.perf_counter()
        reports = [gauntlet.run(bundle.record.manifest, bundle.files) for _ in range(count)]
        wall_s = time.perf_counter() - began_s
    for report in reports:
        if report.status is not KernelStatus.VALIDATED:
            raise WrongResultError(f"{report.status}: {report.checks[-1].reason}")
    measured = [report.measurement for report in reports if report.measurement is not None]
    return Judged(measured, wall_s, cpu_s() - before_s - starting_s)


def cpu_s_of_starting(settings: EvaluatorSettings) -> float:
    before_s = cpu_s()
    with Sandbox() as sandbox:
        sandbox.launch(settings).close()
    return cpu_s() - before_s


def cpu_s() -> float:
    """Return the processor time of this process and of its descendants that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def deviation(row: str, measurements: list[Measurement]) -> Finding:
    """Return how far the farthest measurement lies from their median."""
    medians_us = [measured.forward_p50_us for measured in measurements]
    middle_us = statistics.median(medians_us)
    percent = 100 * max(abs(p50_us - middle_us) for p50_us in medians_us) / middle_us
    row = f"{row}, {len(medians_us)} verdicts around {middle_us:.1f} us"
    return exact(row, "largest deviation", percent, unit="%", at_most=MAX_DEVIATION_PERCENT)


def kernels_a_day(row: str, wall_s: float) -> Finding:
    count = DAY_S / wall_s
    return Finding(
        row=row,
        metric="kernels a day",
        value=count,
        low=count,
        high=count,
        unit="",
        target=f">= {MIN_KERNELS_A_DAY}",
        met=count >= MIN_KERNELS_A_DAY,
    )
