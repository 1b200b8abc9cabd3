"""From measurements to tags, by rules.

Speed tags follow the clock and may differ between two evaluations.
"""

from collections.abc import Sequence

from esper.contracts import KernelManifest, Measurement
from esper.urabrask.risk import ROUNDING

HIGH_SPEED = 1.1  # times eager; the least for which a compiled variant is worth its trouble
MEDIUM_SPEED = 0.9
LOW_MEMORY = 2.0  # times the bytes of inp, act and the parameters
HIGH_MEMORY = 4.0
ENOUGH_PEERS = 20

# Up to so many roundings a kernel is called stable; the halves keep their sums in float32.
_STABLE_ROUNDINGS = {"float64": 32, "float32": 32, "float16": 4, "bfloat16": 4}


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
    stable = relative_error <= _STABLE_ROUNDINGS[dtype] * ROUNDING[dtype]
    return "numerically_stable" if stable else None
