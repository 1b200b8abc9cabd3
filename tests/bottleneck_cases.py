"""Shapes, samples and the float64 reference for the tests of bottlenecks, native and Triton."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import esper.bottleneck as fused
from esper import reference

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    leading: tuple[int, ...]
    inputs: int
    channels: int
    rank: int
    chunk: int
    seeds: tuple[int, ...]
    starts: tuple[int, ...]
    has_bias: bool = True
    bank_size: int = 6


CASES = (
    Case((5,), 7, 10, 3, 4, (2,), (5,)),
    Case((32,), 128, 64, 8, 64, (0,), (0,), has_bias=False),
    Case((9,), 33, 64, 8, 16, (0, 1, 2, 3), (0, 16, 32, 48)),
    Case((2, 3), 5, 12, 17, 3, (4, 1, 3), (9, 0, 4)),  # cells and chunks in any order
    Case((), 4, 6, 2, 2, (1, 2), (0, 4)),  # a single row
    Case((1,), 1, 1, 1, 1, (0,), (0,)),
    Case((0,), 4, 6, 2, 3, (0, 1), (0, 3)),  # no rows
    Case((4,), 0, 6, 2, 3, (0, 1), (0, 3)),  # no inputs: the biases alone
    Case((4,), 3, 6, 0, 3, (0, 1), (0, 3)),  # no rank
    Case((4,), 3, 6, 2, 0, (0,), (2,)),  # no channels in the chunk
    Case((70,), 41, 90, 40, 45, (0, 1), (0, 45)),  # several tiles in each direction
)
# Beyond the own loops: BLAS, and several blocks of rows.
LARGE = Case((300,), 200, 260, 70, 130, (3, 0), (130, 0))


@dataclass(frozen=True)
class Bank:
    alpha: Tensor
    non_finite: Tensor
    fault: Tensor


@dataclass(frozen=True)
class Sample:
    case: Case
    activation: str
    y: Tensor
    inp: Tensor
    grad: Tensor
    weights: fused.BottleneckWeights
    bank: Bank

    @property
    def sites(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.case.seeds, self.case.starts

    @property
    def cells(self) -> tuple[Tensor, Tensor]:
        return self.bank.non_finite, self.bank.fault

    @property
    def code(self) -> int:
        return tuple(reference.ACTIVATIONS).index(self.activation)

    def leaves(self) -> list[Tensor]:
        """Parameters that share the memory of the weights, as a caller would have them."""
        rows = (t.tensor_split(len(self.case.seeds)) for t in self.weights if t is not None)
        return [torch.nn.Parameter(part) for parts in zip(*rows, strict=True) for part in parts]

    def double(self) -> "Sample":
        weights = fused.BottleneckWeights(
            *(None if w is None else w.double() for w in self.weights)
        )
        wide = (t.double() for t in (self.y, self.inp, self.grad))
        return Sample(self.case, self.activation, *wide, weights, self.bank)


def make_sample(
    case: Case,
    dtype: torch.dtype = torch.float32,
    activation: str = "gelu",
    device: str = "cpu",
    alpha: float | None = None,
) -> Sample:
    """Return random values; an alpha of its own for each cell unless one is given."""

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(dtype).to(device)

    num_seeds = len(case.seeds)
    hidden, branch = num_seeds * case.rank, num_seeds * case.chunk
    alphas = (
        torch.linspace(0.25, 0.75, case.bank_size) if alpha is None else torch.full((6,), alpha)
    )
    return Sample(
        case,
        activation,
        random(*case.leading, case.channels),
        random(*case.leading, case.inputs),
        random(*case.leading, case.channels),
        fused.BottleneckWeights(
            random(hidden, case.inputs, scale=max(case.inputs, 1) ** -0.5),
            random(hidden) if case.has_bias else None,
            random(branch, case.rank, scale=max(case.rank, 1) ** -0.5),
            random(branch) if case.has_bias else None,
        ),
        Bank(
            alphas.to(device),
            torch.zeros(case.bank_size, device=device),
            torch.zeros(case.bank_size, dtype=torch.uint8, device=device),
        ),
    )


def with_y(sample: Sample, y: Tensor) -> Sample:
    return replace(sample, y=y)


def expected_result(sample: Sample) -> Tensor:
    """Return the reference's result, float64."""
    wide = sample.double()
    num_seeds = len(sample.case.seeds)
    branches = reference.bottleneck_branches(wide.inp, *wide.weights, wide.activation, num_seeds)
    alpha = wide.bank.alpha[list(sample.case.seeds)]
    return reference.bottleneck(wide.y, branches, sample.case.starts, alpha)


def expected_grads(sample: Sample, isolated: bool = False) -> list[Tensor]:
    """Return the gradients of inp and of the given weights by autograd on the reference, float64."""
    wide = sample.double()
    inputs = [t.requires_grad_() for t in (wide.inp, *wide.weights) if t is not None]
    weights = [None if w is None else w for w in wide.weights]
    num_seeds = len(sample.case.seeds)
    branches = reference.bottleneck_branches(wide.inp, *weights, wide.activation, num_seeds)
    alpha = wide.bank.alpha[list(sample.case.seeds)]
    weight = torch.ones_like(alpha) if isolated else alpha
    handed = reference.bottleneck_handed(wide.grad, branches.detach(), sample.case.starts, weight)
    return [*torch.autograd.grad(branches, inputs, handed, materialize_grads=True)]
