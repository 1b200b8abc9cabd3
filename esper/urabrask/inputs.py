"""What kernels are tried on: random tensors of every shape that the site allows.

Drawn in the evaluator's own process from a generator that is seeded with the settings' seed and
the artifact's id. So a verdict can be repeated, and an artifact cannot know its inputs: they
depend on its digest.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.contracts import KernelManifest
from esper.kasmina.example import example_inputs

_NEIGHBOUR_CHANNELS = 2  # of the layer's output that do not belong to the seed
_PERTURBATION = 0.5
_VECTOR_FAN_IN = 4  # biases and scales have none


@dataclass(frozen=True)
class Case:
    """One way to call the kernel."""

    batch_size: int
    perturbed: bool
    training: bool

    def __str__(self) -> str:
        parameters = "perturbed" if self.perturbed else "initial"
        mode = "training" if self.training else "evaluation"
        return f"batch {self.batch_size}, {parameters} parameters, {mode}"


def cases(batch_sizes: Sequence[int], trains_differently: bool) -> Iterator[Case]:
    for batch_size in batch_sizes:
        yield Case(batch_size, perturbed=False, training=False)
        yield Case(batch_size, perturbed=True, training=False)
        # One sample has no variance, so batch statistics of it are not defined.
        if trains_differently and batch_size > 1:
            yield Case(batch_size, perturbed=False, training=True)
            yield Case(batch_size, perturbed=True, training=True)


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
    manifest: KernelManifest, batch_size: int, random: torch.Generator, *, chunk: bool
) -> Draw:
    """Draw from the standard normal distribution.

    With ``chunk``, ``act`` is laid out as in a layer with several seeds: not contiguous.
    """
    site = manifest.site
    inp, act = example_inputs(site, manifest.dtype, batch_size, generator=random)
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
