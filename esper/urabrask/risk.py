"""How much could go wrong with a validated kernel, by rules.

The score is a sum of components, and the library ranks by it. So each follows from what is the
same every time, or from what the library knows; but for the spread, which counts only where it is
wide enough to doubt the measurement.
"""

import math
from dataclasses import dataclass

from esper.contracts import (
    Confidence,
    KernelManifest,
    KernelStatus,
    Pipeline,
    UrabraskValidationReport,
)

# The most that each component can be; together 1.
WEIGHTS = {
    "drift": 0.35,
    "size": 0.2,
    "field": 0.15,
    "complexity": 0.1,
    "spread": 0.1,
    "novelty": 0.1,
}
HIGH_CONFIDENCE_BELOW = 0.4
MODERATE_CONFIDENCE_BELOW = 0.7

# Largest relative error of one rounding.
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

_LARGEST_PARAMETERS = 10_000_000
_COMPLEXITY = {Pipeline.FAST: 0.0, Pipeline.STANDARD: 0.5, Pipeline.AGGRESSIVE: 1.0}
_NARROW_SPREAD = 0.25
_WIDE_SPREAD = 0.5
_FROM_MOST = (Confidence.HIGH, Confidence.MODERATE, Confidence.SPECULATIVE)


@dataclass(frozen=True)
class Experience:
    """What a library knows of a kernel's design."""

    kernels: int = 0  # validated ones, for the same site, dtype and device
    adaptations: int = 0  # that ended one way or the other, at any site
    failures: int = 0  # those of them that did not last

    @property
    def novelty(self) -> float:
        """1 for the first kernel of its design, then a half, a third, ..."""
        return 1 / (1 + self.kernels)

    @property
    def failure_rate(self) -> float:
        """Laplace's rule of succession: a half where nothing is known."""
        return (self.failures + 1) / (self.adaptations + 2)


def assessed(
    report: UrabraskValidationReport, manifest: KernelManifest, experience: Experience
) -> UrabraskValidationReport:
    """Return the report with its risk by the rules, and the confidence that follows.

    A rejected kernel's risk stays 1.
    """
    if report.status is KernelStatus.REJECTED:
        return report
    parts = components(report, manifest, experience)
    judged = scored(report, sum(parts.values()), report.confidence)
    return judged.model_copy(update={"risk_components": parts})


def scored(
    report: UrabraskValidationReport, risk: float, reach: Confidence
) -> UrabraskValidationReport:
    """Return the report with that risk; what the checks could not reach limits the confidence."""
    risk_score = round(risk, 2)
    confidence = max(reach, _by_risk(risk_score), key=_FROM_MOST.index)
    return report.model_copy(update={"risk_score": risk_score, "confidence": confidence})


def components(
    report: UrabraskValidationReport, manifest: KernelManifest, experience: Experience
) -> dict[str, float]:
    """Return what the risk is the sum of; ``docs/evaluation.md`` has the formulas."""
    measured = report.measurement
    shares = {
        "drift": _drift(manifest.dtype, report.max_relative_error or 0.0),
        "size": math.log1p(manifest.num_parameters) / math.log1p(_LARGEST_PARAMETERS),
        "field": experience.failure_rate,
        "complexity": _COMPLEXITY[manifest.pipeline],
        "spread": _doubt((measured.spread if measured else None) or 0.0),
        "novelty": experience.novelty,
    }
    return {name: WEIGHTS[name] * min(1.0, share) for name, share in shares.items()}


def reach(manifest: KernelManifest, random_training: bool) -> Confidence:
    """Return how far a positive verdict reaches, whatever the risk.

    HIGH: every output and gradient, in training and evaluation, was compared at a precision that
    shows an error of 1 percent in any element. MODERATE: training is random (dropout) and could
    only be checked for shape and finiteness, or the dtype is a half precision.
    """
    exact = manifest.dtype in ("float32", "float64") and not random_training
    return Confidence.HIGH if exact else Confidence.MODERATE


def _by_risk(risk_score: float) -> Confidence:
    if risk_score < HIGH_CONFIDENCE_BELOW:
        return Confidence.HIGH
    return Confidence.MODERATE if risk_score < MODERATE_CONFIDENCE_BELOW else Confidence.SPECULATIVE


def _drift(dtype: str, relative_error: float) -> float:
    """Return the logarithmic way of the error from one rounding (0) to 1 (1)."""
    least = ROUNDING[dtype]
    return math.log(max(relative_error, least) / least) / math.log(1 / least)


def _doubt(spread: float) -> float:
    return max(0.0, (spread - _NARROW_SPREAD) / (_WIDE_SPREAD - _NARROW_SPREAD))
