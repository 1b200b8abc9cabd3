"""From measurements to tags, risk and confidence, by rules.

Speed tags follow the clock and may differ between two evaluations. The verdict, the risk score
(by which the library ranks) and the confidence do not: they follow from what is deterministic.
"""

import math
from collections.abc import Mapping, Sequence

from esper.contracts import Confidence, KernelManifest, Measurement, Pipeline

HIGH_SPEED = 1.1  # times eager; the least for which a compiled variant is worth its trouble
MEDIUM_SPEED = 0.9
LOW_MEMORY = 2.0  # times the bytes of inp, act and the parameters
HIGH_MEMORY = 4.0
ENOUGH_PEERS = 20

# Largest relative error of one rounding.
_ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Up to so many of them a kernel is called stable; the halves keep their sums in float32.
_STABLE_ROUNDINGS = {"float64": 32, "float32": 32, "float16": 4, "bfloat16": 4}

_LARGEST_PARAMETERS = 10_000_000
_COMPLEXITY = {Pipeline.FAST: 0.0, Pipeline.STANDARD: 0.5, Pipeline.AGGRESSIVE: 1.0}


def tags(
    manifest: KernelManifest, measurement: Measurement, relative_error: float, given_bytes: int
) -> tuple[str, ...]:
    """Return the tags of a validated kernel, beginning with the name of its design.

    ``given_bytes`` are those of its inputs and parameters.
    """
    found = [
        manifest.design.name,
        speed_tag(measurement.eager_forward_p50_us / measurement.forward_p50_us),
        memory_tag(measurement.memory_bytes / given_bytes),
        stability_tag(manifest.dtype, relative_error),
    ]
    return tuple(tag for tag in found if tag is not None)


def speed_tag(speedup: float) -> str:
    if speedup >= HIGH_SPEED:
        return "high_speed"
    return "medium_speed" if speedup >= MEDIUM_SPEED else "low_speed"


def memory_tag(ratio: float) -> str | None:
    if ratio <= LOW_MEMORY:
        return "low_memory"
    return "high_memory" if ratio >= HIGH_MEMORY else None


def among_peers(
    found: Sequence[str], peers: Sequence[Measurement], own: Measurement
) -> tuple[str, ...]:
    """Replace the tags of speed and memory by the kernel's place among its peers.

    ``peers`` are what was measured of other kernels for the same site on the same machine; with
    fewer than :data:`ENOUGH_PEERS` the fixed thresholds stand. The fastest 20 percent are
    ``high_speed``, up to 70 percent ``medium_speed``, the rest ``low_speed``; the 25 percent that
    take least memory are ``low_memory``, the 25 percent that take most ``high_memory``.
    """
    if len(peers) < ENOUGH_PEERS:
        return tuple(found)
    faster = sum(peer.forward_p50_us < own.forward_p50_us for peer in peers) / len(peers)
    smaller = sum(peer.memory_bytes < own.memory_bytes for peer in peers) / len(peers)
    larger = sum(peer.memory_bytes > own.memory_bytes for peer in peers) / len(peers)
    speed = "high_speed" if faster < 0.2 else "medium_speed" if faster < 0.7 else "low_speed"
    memory = ["low_memory"] if smaller < 0.25 else ["high_memory"] if larger < 0.25 else []
    kept = [tag for tag in found if not tag.endswith(("_speed", "_memory"))]
    return (*kept[:1], speed, *memory, *kept[1:])


def stability_tag(dtype: str, relative_error: float) -> str | None:
    stable = relative_error <= _STABLE_ROUNDINGS[dtype] * _ROUNDING[dtype]
    return "numerically_stable" if stable else None


def risk_score(components: Mapping[str, float]) -> float:
    """Return how much could go wrong with a validated kernel, in [0, 1], to two decimals."""
    return round(sum(components.values()), 2)


def risk_components(manifest: KernelManifest, relative_error: float) -> dict[str, float]:
    """Return what the risk is the sum of: ``error``, ``size`` and ``complexity``.

    Up to 0.5, 0.3 and 0.2: the logarithm of the relative
    error between one rounding (0) and 1 (1); the logarithm of the number of parameters, up to ten
    million; and 0, 0.5 or 1 for the pipelines FAST, STANDARD and AGGRESSIVE, the last two of
    which run machine code of their own. A rejected kernel has risk 1.
    """
    least = _ROUNDING[manifest.dtype]
    error = math.log(max(relative_error, least) / least) / math.log(1 / least)
    size = math.log1p(manifest.num_parameters) / math.log1p(_LARGEST_PARAMETERS)
    complexity = _COMPLEXITY[manifest.pipeline]
    return {
        "error": 0.5 * min(error, 1.0),
        "size": 0.3 * min(size, 1.0),
        "complexity": 0.2 * complexity,
    }


def confidence(manifest: KernelManifest, random_training: bool) -> Confidence:
    """Return how far a positive verdict reaches.

    HIGH: every output and gradient, in training and evaluation, was compared at a precision that
    shows an error of 1 percent in any element. MODERATE: training is random (dropout) and could
    only be checked for shape and finiteness, or the dtype is a half precision.
    """
    exact = manifest.dtype in ("float32", "float64") and not random_training
    return Confidence.HIGH if exact else Confidence.MODERATE
