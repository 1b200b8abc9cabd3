"""What kernels cost, and whether another one can be afforded."""

from dataclasses import dataclass

from esper.config import TamiyoSettings
from esper.contracts import KernelRecord


@dataclass(frozen=True)
class Cost:
    """Of one kernel, or of several together."""

    parameters: int = 0
    flops_per_sample: int = 0  # forward
    memory_bytes: int = 0  # at the peak of forward and backward; 0 where nobody has measured it

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.parameters + other.parameters,
            self.flops_per_sample + other.flops_per_sample,
            self.memory_bytes + other.memory_bytes,
        )


def cost_of(kernel: KernelRecord) -> Cost:
    manifest = kernel.manifest
    return Cost(manifest.num_parameters, manifest.flops_per_sample, kernel.memory_bytes or 0)


def why_not(kernel: KernelRecord, spent: Cost, settings: TamiyoSettings) -> str | None:
    """Return what forbids ``kernel`` when ``spent`` has been spent already, or None.

    What nobody has measured is taken for too much where a limit is set.
    """
    total = spent + cost_of(kernel)
    limits = (
        ("parameters", total.parameters, settings.max_parameters),
        ("FLOPs a sample", total.flops_per_sample, settings.max_flops_per_sample),
        ("bytes of memory", total.memory_bytes, settings.max_memory_bytes),
    )
    for what, needed, limit in limits:
        if limit is not None and needed > limit:
            return f"{needed:,} {what} in all, the budget is {limit:,}"
    if settings.max_memory_bytes is not None and kernel.memory_bytes is None:
        return "its memory was never measured, and there is a budget"
    risk, max_risk = kernel.risk_score, settings.max_risk_score
    if max_risk is not None and (risk is None or risk > max_risk):
        return f"its risk score is {risk}, at most {max_risk} is allowed"
    tags = set(kernel.tags)
    if not settings.required_tags <= tags or settings.excluded_tags & tags:
        return f"its tags {sorted(tags)} are not what is asked for"
    return None
