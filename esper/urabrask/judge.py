"""When a result is right: comparison with float64, within tolerances that have reasons.

A result may stray from the float64 reference by its dtype's tolerance, and beyond that by twice
what plain PyTorch strays when it interprets the same graph on the same inputs in the same dtype
(the yardstick). Rounding grows with the length of sums, with cancellation, and where an
activation has a kink; the yardstick meets all of that too, so no rule for each is needed, and a
well-conditioned kernel is judged as strictly as an elementwise one.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.contracts import Check

_SMALLEST_RMS = 1e-3  # below this, a relative error would measure noise around zero


@dataclass(frozen=True)
class Tolerance:
    """What is allowed without regard to the yardstick.

    ``rtol`` and ``atol`` bound each element. ``norm`` bounds the error of a tensor as a whole,
    relative to its norm. ``scale`` bounds how much a tensor may come out too large or too small
    as a whole: rounding averages out there, so that 1 percent shows even in bfloat16, where it
    drowns in the other two. ``ceiling`` bounds the relative norm with the yardstick included:
    what strays further is unstable, whoever computes it. ``yardsticks`` is how many times the
    yardstick's own error is allowed beyond the rest.
    """

    rtol: float
    atol: float
    norm: float
    scale: float
    ceiling: float
    yardsticks: float = 2.0


# rtol and atol are those of torch.testing.assert_close, float16 and bfloat16 included.
TOLERANCES: dict[str, Tolerance] = {
    "float64": Tolerance(rtol=1e-7, atol=1e-7, norm=1e-9, scale=1e-9, ceiling=1e-6),
    "float32": Tolerance(rtol=1.3e-6, atol=1e-5, norm=2e-6, scale=1e-6, ceiling=1e-3),
    "float16": Tolerance(rtol=1e-3, atol=1e-5, norm=1e-3, scale=5e-4, ceiling=5e-2),
    "bfloat16": Tolerance(rtol=1.6e-2, atol=1e-5, norm=8e-3, scale=1e-3, ceiling=1e-1),
}


@dataclass(frozen=True)
class Triple:
    """One result under its name: what came, what float64 gives, and what plain PyTorch gives."""

    name: str
    got: Tensor
    reference: Tensor
    yardstick: Tensor


def compare(check: str, case: str, triples: Iterable[Triple], tolerance: Tolerance) -> Check:
    """Judge results of equal shape; the first that is out of bounds makes the reason."""
    worst = 0.0
    for triple in triples:
        fault, relative_error = _deviation(triple, tolerance)
        worst = max(worst, relative_error)
        if fault:
            reason = f"{triple.name} {fault} ({case})"
            return Check(name=check, passed=False, reason=reason, numbers={"relative_error": worst})
    return Check(
        name=check,
        passed=True,
        reason="agrees with the float64 reference",
        numbers={"relative_error": worst},
    )


def _deviation(triple: Triple, tolerance: Tolerance) -> tuple[str | None, float]:
    """Return what is wrong, if anything, and the relative error of the tensor as a whole."""
    reference = triple.reference.double()
    error = triple.got.double() - reference
    own = triple.yardstick.double() - reference
    faults = (
        _elementwise(error, own, reference, tolerance),
        _as_a_whole(error, own, reference, tolerance),
        _in_scale(error, own, reference, tolerance),
    )
    return next(filter(None, faults), None), relative_norm(error, reference)


def relative_norm(error: Tensor, reference: Tensor) -> float:
    smallest = _SMALLEST_RMS * math.sqrt(max(1, reference.numel()))
    return float(error.norm()) / max(float(reference.norm()), smallest)


def _elementwise(error: Tensor, own: Tensor, reference: Tensor, tolerance: Tolerance) -> str | None:
    allowed = (
        tolerance.atol + tolerance.rtol * reference.abs() + tolerance.yardsticks * _largest(own)
    )
    excess = error.abs() > allowed
    if not excess.any():
        return None
    worst = int((error.abs() - allowed).argmax())
    by, limit = float(error.flatten()[worst].abs()), float(allowed.flatten()[worst])
    return (
        f"is wrong at {int(excess.sum())} of {error.numel()} elements, "
        f"by up to {by:.2e} where {limit:.1e} is allowed"
    )


def _largest(error: Tensor) -> float:
    return float(error.abs().max()) if error.numel() else 0.0


def _as_a_whole(error: Tensor, own: Tensor, reference: Tensor, tolerance: Tolerance) -> str | None:
    norm = float(reference.norm())
    floor = tolerance.atol * math.sqrt(error.numel())
    allowed = floor + tolerance.norm * norm + tolerance.yardsticks * float(own.norm())
    allowed = min(allowed, floor + tolerance.ceiling * norm)
    if float(error.norm()) <= allowed:
        return None
    return (
        f"is off by {float(error.norm()):.2e} in norm where {allowed:.1e} is allowed, "
        f"at a norm of {norm:.2e}"
    )


def _in_scale(error: Tensor, own: Tensor, reference: Tensor, tolerance: Tolerance) -> str | None:
    square = float(reference.square().sum())
    if square <= _SMALLEST_RMS**2 * reference.numel():
        return None
    scale = float((error * reference).sum()) / square
    own_scale = float((own * reference).sum()) / square
    averaged = tolerance.rtol / math.sqrt(reference.numel())
    allowed = tolerance.scale + averaged + tolerance.yardsticks * abs(own_scale)
    if abs(scale) <= allowed:
        return None
    return f"is scaled by {1 + scale:.5f} where 1 +- {allowed:.1e} is allowed"


def first_difference(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that is missing or not the same bit for bit."""
    for name, tensor in expected.items():
        if name not in got or not _identical(got[name], tensor):
            return name
    return None


def _identical(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
