"""What kernels are tried on: random tensors of every shape that the site allows.

Drawn in the evaluator's own process from a generator that is seeded with the settings' seed and
the artifact's id. So a verdict can be repeated, and an artifact cannot know its inputs: they
depend on its digest. Code that works out its own digest could; therefore some cases are hidden,
drawn from a seed that is made anew for each evaluation and told afterwards, in the report.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from esper.contracts import KernelManifest
from esper.kasmina.example import example_inputs

_NEIGHBOUR_CHANNELS = 2  # of the layer's output that do not belong to the seed
_PERTURBATION = 0.5
_VECTOR_FAN_IN = 4  # biases and scales have none
_PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43)


class Band(StrEnum):
    """How large the numbers are."""

    ORDINARY = "ordinary"  # standard normal
    DENORMAL = "denormal"
    SMALL = "small"
    LARGE = "large"
    SPARSE = "sparse"  # half of them zero, a few far out


_FACTORS = {Band.SMALL: 1e-3, Band.LARGE: 1e3}
_OUTLIERS = 30.0
_HIDDEN_FLOPS = 10**10
_LARGE_BATCH = 150  # at the least, and less than as much again


@dataclass(frozen=True)
class Case:
    """One way to call the kernel.

    The numbers of a report come from the cases that are not ``hidden``: those are the same every
    time, the hidden ones are drawn anew by each evaluation.
    """

    batch_size: int
    perturbed: bool
    training: bool
    band: Band = Band.ORDINARY
    strided: bool = False
    hidden: bool = False

    def __str__(self) -> str:
        parameters = "perturbed" if self.perturbed else "initial"
        mode = "training" if self.training else "evaluation"
        extra = [f"{self.band} numbers"] if self.band is not Band.ORDINARY else []
        extra += ["input not contiguous"] if self.strided else []
        return ", ".join((f"batch {self.batch_size}", f"{parameters} parameters", mode, *extra))


def cases(batch_sizes: Sequence[int], trains_differently: bool) -> Iterator[Case]:
    for batch_size in batch_sizes:
        yield Case(batch_size, perturbed=False, training=False)
        yield Case(batch_size, perturbed=True, training=False)
        # One sample has no variance, so batch statistics of it are not defined.
        if trains_differently and batch_size > 1:
            yield Case(batch_size, perturbed=False, training=True)
            yield Case(batch_size, perturbed=True, training=True)


def hidden_cases(
    random: torch.Generator, flops_per_sample: int, *, training: bool
) -> Iterator[Case]:
    """Yield what no kernel can prepare for: other shapes, layouts and magnitudes.

    A batch is only so large that the reference is computed within seconds.
    """
    prime = _PRIMES[_below(len(_PRIMES), random)]
    large = _LARGE_BATCH + _below(_LARGE_BATCH, random)
    affordable = _HIDDEN_FLOPS // max(1, flops_per_sample)
    case = Case(prime, perturbed=True, training=training, hidden=True)
    yield replace(case, batch_size=0, training=False)  # of which no batch norm has a variance
    yield replace(case, strided=True)
    yield replace(case, batch_size=min(large, max(affordable, _PRIMES[-1] + 1)))
    for band in (Band.SPARSE, Band.SMALL, Band.LARGE, Band.DENORMAL):
        yield replace(case, band=band)


def _below(limit: int, random: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=random))


@dataclass(frozen=True)
class Draw:
    """The tensors of one call. ``act`` is the first channels of ``wide_act``."""

    inp: Tensor
    wide_act: Tensor
    act: Tensor
    grad_out: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return what a candidate is given, under the names that it knows."""
        return {"inp": self.inp, "act": self.wide_act, "grad_out": self.grad_out}


def generator(seed: int, artifact_id: str, purpose: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {artifact_id} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def draw(
    manifest: KernelManifest,
    batch_size: int,
    random: torch.Generator,
    *,
    chunk: bool,
    band: Band = Band.ORDINARY,
) -> Draw:
    """Draw from the standard normal distribution, scaled to the band.

    With ``chunk``, ``act`` is laid out as in a layer with several seeds: not contiguous.
    """
    site = manifest.site
    inp, act = example_inputs(site, manifest.dtype, batch_size, generator=random)
    inp, act = (_scaled(tensor, band, random) for tensor in (inp, act))
    wide_act = act
    if chunk:
        neighbours = list(act.shape)
        neighbours[site.channel_dim] = _NEIGHBOUR_CHANNELS
        others = torch.randn(neighbours, generator=random).to(act.dtype)
        wide_act = torch.cat((act, others), site.channel_dim)
    return Draw(
        inp=inp,
        wide_act=wide_act,
        act=wide_act.narrow(site.channel_dim, 0, site.act_channels),
        grad_out=torch.randn(act.shape, generator=random).to(act.dtype),
    )


def _scaled(tensor: Tensor, band: Band, random: torch.Generator) -> Tensor:
    if band is Band.ORDINARY or not tensor.is_floating_point():
        return tensor
    if band is Band.DENORMAL:
        return (tensor.double() * torch.finfo(tensor.dtype).tiny / 4).to(tensor.dtype)
    if band is not Band.SPARSE:
        return tensor * _FACTORS[band]
    fate = torch.rand(tensor.shape, generator=random)
    return tensor * torch.where(fate < 0.5, 0.0, torch.where(fate > 0.95, _OUTLIERS, 1.0)).to(
        tensor.dtype
    )


def perturbed(
    state: Mapping[str, Tensor], parameters: Collection[str], random: torch.Generator
) -> dict[str, Tensor]:
    """Move every parameter away from its initial value, by about one over the root of its fan-in.

    Residual designs start as the identity, because their last layer starts at zero: at the
    initial parameters whatever stands before it could compute anything.
    """
    moved = dict(state)
    for name in parameters:
        value = state[name]
        fan_in = max(1, value[0].numel()) if value.dim() > 1 else _VECTOR_FAN_IN
        noise = torch.randn(value.shape, generator=random) * _PERTURBATION / fan_in**0.5
        moved[name] = (value + noise).to(value.dtype)
    return moved
