"""Seeds of one convolution that are computed side by side do what each would do alone."""

import asyncio
import copy
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from kasmina_library import MemoryLibrary
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import esper
from esper.blueprints.convolutional import ConvBottleneck, Depthwise
from esper.blueprints.low_rank import LowRank
from esper.blueprints.norm import Norm
from esper.blueprints.residual_mlp import ResidualMLP
from esper.channels import (
    Geometry,
    grouped_convolution,
    isolated_convolution,
    shared_convolution,
)
from esper.config import SeedSettings
from esper.contracts import GraftingStrategy, SeedState, SiteSignature
from esper.kasmina.ensemble import Individuals, SideBySide
from esper.kasmina.model import MorphableModel
from esper.kasmina.program import Program
from esper.kasmina.seats import Seats, seats_of

SEEDS = 3
DESIGNS = [LowRank, ConvBottleneck, Depthwise, ResidualMLP, Norm]
FOREVER = GraftingStrategy(training_steps=10_000)


def network(rank: int = 2, **geometry: int) -> nn.Sequential:
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    host = convolution(4, 4 * SEEDS, 3, **{"padding": 1, **geometry})
    return nn.Sequential(nn.Identity(), host, nn.Tanh())


def grown(
    builder: Callable[..., nn.Module],
    net: nn.Module,
    *,
    training: bool = False,
    seeds: tuple[int, ...] = (0, 1, 2),
) -> MorphableModel:
    """Return ``net`` in float64, with a kernel of its own weights in each of the seeds."""
    library = MemoryLibrary()
    settings = SeedSettings(seeds_per_layer=SEEDS, deterministic=True)
    model = esper.wrap(net, ["1"], settings=settings)
    model.connect(library)
    layer = model.kasmina_layers["1"]
    rank = layer.default_transform.weight.dim() - 2
    model(torch.randn(2, 4, *[9] * rank))
    for seed_idx in seeds:
        artifact_id = library.add(builder, layer.site(seed_idx))
        if training:
            layer.request_germination(seed_idx, artifact_id, FOREVER)
        else:
            alpha = (seed_idx + 1) / (SEEDS + 1)
            assert asyncio.run(layer.load_kernel(seed_idx, artifact_id, alpha=alpha))
    model.step()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in weights(model):
            weight.copy_(torch.randn(weight.shape, generator=generator) / 2)
    return model.double()


def weights(model: MorphableModel) -> list[nn.Parameter]:
    occupants = model.kasmina_layers["1"].occupants()
    return [weight for seat in occupants for weight in seat.kernel.weights()]


def seats(model: MorphableModel) -> Seats:
    found = seats_of(model.kasmina_layers["1"].default_transform)
    assert found is not None
    return found


def ensembles(model: MorphableModel) -> list[object]:
    return [*seats(model)._heard, *seats(model)._unheard]


def one_by_one(model: MorphableModel) -> MorphableModel:
    """Return a copy whose seeds run as they did before there were ensembles."""
    twin = copy.deepcopy(model)
    occupied = seats(twin)
    occupied._heard = [Individuals(e.seats) for e in occupied._heard]
    occupied._unheard = [Individuals(e.seats) for e in occupied._unheard]
    return twin


def results(model: MorphableModel, inp: Tensor) -> Iterator[Tensor | None]:
    inp = inp.clone().requires_grad_()
    out = model(inp)
    out.square().sum().backward()
    yield from (out.detach(), inp.grad, *(p.grad for p in model.parameters()))
    yield from (weight.grad for weight in weights(model))
    bank = model.kasmina_layers["1"].occupants()[0].cells
    yield from (bank.non_finite.clone(), bank.fault.clone())


def assert_same_as_alone(model: MorphableModel, inp: Tensor) -> None:
    assert [type(ensemble) for ensemble in ensembles(model)] == [SideBySide]
    alone = one_by_one(model)
    for found, expected in zip(results(model, inp), results(alone, inp), strict=True):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert all(ensemble._usable for ensemble in ensembles(model))


@pytest.mark.parametrize("training", [False, True], ids=["grafted", "isolated"])
@pytest.mark.parametrize("builder", DESIGNS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_seeds_side_by_side_do_what_each_does_alone(
    rank: int, builder: Callable[..., nn.Module], training: bool
) -> None:
    model = grown(builder, network(rank), training=training)
    assert_same_as_alone(model, torch.randn(2, 4, *[6] * rank, dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 2),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.integers(5, 9),
    st.booleans(),
    st.booleans(),
)
def test_whatever_the_geometry_of_the_host(
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    batch: int,
    size: int,
    channels_last: bool,
    training: bool,
) -> None:
    net = network(stride=stride, padding=padding, dilation=dilation, groups=groups)
    model = grown(ConvBottleneck, net, training=training)
    inp = torch.randn(batch, 4, size, size + 1, dtype=torch.float64)
    if channels_last:
        inp = inp.contiguous(memory_format=torch.channels_last)
    assert_same_as_alone(model, inp)


@pytest.mark.parametrize("training", [False, True], ids=["grafted", "isolated"])
@pytest.mark.parametrize("builder", [LowRank, Depthwise])
def test_seeds_that_are_no_neighbours(builder: Callable[..., nn.Module], training: bool) -> None:
    model = grown(builder, network(), training=training, seeds=(2, 0))
    assert_same_as_alone(model, torch.randn(2, 4, 6, 6, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e308])
@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("training", [False, True], ids=["grafted", "isolated"])
def test_a_bad_weight_of_one_seed_spoils_nothing_of_the_others(
    training: bool, position: int, bad: float
) -> None:
    model = grown(LowRank, network(), training=training)
    layer = model.kasmina_layers["1"]
    kernel = layer.kernel(1)
    assert kernel is not None
    with torch.no_grad():
        kernel.weights()[position].fill_(bad)
    inp = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    assert_same_as_alone(model, inp.detach())
    model.zero_grad()
    out = model(inp)
    out.square().sum().backward()
    host = layer.default_transform._parameters.values()
    assert all(t.isfinite().all() for t in (out, inp.grad, *(p.grad for p in host)))
    fault = layer.occupants()[0].cells.fault
    assert fault[0] == fault[2] == 0


def test_a_bad_seed_leaves_the_others_in_the_gradient_of_the_input() -> None:
    """Where the sum of what the seeds send back is bad, the good ones still arrive."""
    model = grown(LowRank, network())
    kernel = model.kasmina_layers["1"].kernel(1)
    assert kernel is not None
    with torch.no_grad():
        kernel.weights()[0].fill_(torch.nan)
    without = copy.deepcopy(model)
    with torch.no_grad():
        for weight in without.kasmina_layers["1"].kernel(1).weights():
            weight.zero_()
    inp = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(net(x).sum(), x)[0]
        for net in (model, without)
        for x in [inp.clone().requires_grad_()]
    )
    torch.testing.assert_close(found, expected)
    assert model.kasmina_layers["1"].occupants()[0].cells.fault.tolist() == [0, 1, 0]


def test_a_sum_of_gradients_that_overflows_does_not_reach_the_host() -> None:
    """Though what each seed sends back is finite."""
    inp = torch.ones(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.full((2, 1, 1, 1), 1e308, dtype=torch.float64)
    counters = [(torch.zeros(1), torch.zeros(1, dtype=torch.uint8)) for _ in range(2)]
    geometry = Geometry((1, 1), (0, 0), (1, 1))
    shared_convolution(inp, weight, None, geometry, counters).sum().backward()
    assert inp.grad is not None
    assert torch.equal(inp.grad, torch.zeros_like(inp.grad))
    assert [(lost.item(), fault.item()) for lost, fault in counters] == [(9, 1), (0, 0)]


def test_a_bad_gradient_of_act_is_charged_to_its_seed() -> None:
    model = grown(Depthwise, network())
    kernel = model.kasmina_layers["1"].kernel(1)
    assert kernel is not None
    with torch.no_grad():
        kernel.weights()[0].fill_(1e308)
        kernel.weights()[2].fill_(1e-308)
    assert_same_as_alone(model, torch.randn(2, 4, 6, 6, dtype=torch.float64))


@pytest.mark.parametrize("builder", [LowRank, Depthwise])
def test_second_derivatives(builder: Callable[..., nn.Module]) -> None:
    model = grown(builder, network())
    inp = torch.randn(1, 4, 5, 5, dtype=torch.float64)

    def second(net: MorphableModel) -> tuple[Tensor, ...]:
        x = inp.clone().requires_grad_()
        inputs = [x, *weights(net)]
        first = torch.autograd.grad(net(x).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    for found, expected in zip(second(model), second(one_by_one(model)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_frozen_seed_among_learning_ones_gets_no_gradient() -> None:
    model = grown(LowRank, network())
    model.kasmina_layers["1"].stabilize(1)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(torch.randn(2, 4, 6, 6, dtype=torch.float64)).square().sum().backward()
    assert [w.grad is None for w in weights(model)] == [False] * 3 + [True] * 3 + [False] * 3


class BackwardGroups(TorchDispatchMode):
    """Notes in how many groups convolutions are differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.seen.append(args[9])
        return func(*args, **(kwargs or {}))


def grouped_arguments(
    groups: int, channels: int, rows: int, kernel: tuple[int, ...]
) -> tuple[tuple[Tensor, Tensor, Tensor], Geometry]:
    rank = len(kernel)
    shapes = ((2, groups * channels, *[7] * rank), (groups * rows, channels, *kernel))
    x, weight, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in (*shapes, (groups * rows,))
    )
    return (x, weight, bias), Geometry((2,) * rank, (1,) * rank, (1,) * rank)


def convolved_by_torch(
    x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, groups: int
) -> Tensor:
    return torch.convolution(x, weight, bias, *geometry, False, [0] * len(geometry.stride), groups)


@pytest.mark.parametrize(
    ("groups", "channels", "rows", "kernel", "computed_in"),
    [
        (4, 4, 4, (3, 3), 1),
        (3, 2, 5, (3,), 1),
        (2, 3, 1, (2, 1, 3), 1),
        (5, 4, 4, (3, 3), 5),  # more channels than one block has
        (2, 8, 4, (3, 3), 2),  # groups that fill one
        (4, 4, 8, (1, 1), 4),
        (4, 1, 2, (3, 3), 4),
        (1, 4, 4, (3, 3), 1),
    ],
)
def test_a_grouped_convolution_is_torchs(
    groups: int, channels: int, rows: int, kernel: tuple[int, ...], computed_in: int
) -> None:
    inputs, geometry = grouped_arguments(groups, channels, rows, kernel)
    out = grouped_convolution(*inputs, geometry, groups)
    expected_out = convolved_by_torch(*inputs, geometry, groups)
    assert torch.equal(out, expected_out)
    grad = torch.randn_like(out)
    with BackwardGroups() as computed:
        found = torch.autograd.grad(out, inputs, grad)
    assert computed.seen == [computed_in]
    expected = torch.autograd.grad(expected_out, inputs, grad)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_grouped_convolution_is_differentiated_twice() -> None:
    inputs, geometry = grouped_arguments(2, 2, 1, (3,))

    def convolve(*inputs: Tensor) -> Tensor:
        return grouped_convolution(*inputs, geometry, 2)

    assert torch.autograd.gradcheck(convolve, inputs)
    assert torch.autograd.gradgradcheck(convolve, inputs)


def test_a_gradient_that_is_not_finite_stays_in_its_group() -> None:
    inputs, geometry = grouped_arguments(4, 4, 4, (3, 3))
    out = grouped_convolution(*inputs, geometry, 4)
    grad = torch.ones_like(out)
    grad[0, 5] = torch.inf
    found = torch.autograd.grad(out, inputs, grad)
    assert not found[0][:, 4:8].isfinite().all()
    assert found[0][:, :4].isfinite().all()
    assert found[0][:, 8:].isfinite().all()
    expected = torch.autograd.grad(convolved_by_torch(*inputs, geometry, 4), inputs, grad)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


class Convolutions(TorchDispatchMode):
    """Counts the convolutions that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("training", "expected"), [(False, 3), (True, 2)])
def test_an_isolated_kernel_is_spared_the_convolution_that_nobody_hears(
    training: bool, expected: int
) -> None:
    model = grown(LowRank, network(), training=training)
    host = model.kasmina_layers["1"].default_transform
    inp = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with Convolutions() as computed:
        host(inp)
    assert computed.count == expected  # the host's own, the shared one, and the last


def test_what_does_not_fit_the_host_is_no_isolated_convolution() -> None:
    y, x, weight = torch.zeros(1, 2, 5, 5), torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 1, 1)
    geometry = Geometry((1, 1), (0, 0), (1, 1))
    with pytest.raises(RuntimeError, match=r"expected a convolution of shape \(1, 2, 5, 5\), got"):
        isolated_convolution(y, x, weight, None, geometry, 1, 0)


def test_an_isolated_host_may_write_over_its_output() -> None:
    net = network()
    net[2] = nn.ReLU(inplace=True)
    model = grown(Depthwise, net, training=True)
    assert_same_as_alone(model, torch.randn(2, 4, 6, 6, dtype=torch.float64))


def test_a_weight_that_does_not_fit_is_charged_to_the_seed_that_has_it() -> None:
    model = grown(LowRank, network())
    layer = model.kasmina_layers["1"]
    kernel = layer.kernel(1)
    assert kernel is not None
    kernel.up__weight = nn.Parameter(torch.randn(4, 5, 1, 1, dtype=torch.float64))
    assert model(torch.randn(2, 4, 6, 6, dtype=torch.float64)).isfinite().all()
    model.step()
    states = layer.state_layout.lifecycle_states()
    assert states == [SeedState.GRAFTING, SeedState.CULLED, SeedState.GRAFTING]


class Branching(nn.Module):
    """Base of designs on a convolution that differ in one operation."""

    def __init__(self, site: SiteSignature) -> None:
        super().__init__()
        self.down = nn.Conv2d(site.inp_channels, 4, 1)
        self.norm = nn.BatchNorm2d(4)


class Dropping(Branching):
    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + F.dropout(self.down(inp), 0.5, self.training)


class Normed(Branching):
    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + self.norm(self.down(inp))


class Reversed(Branching):
    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + self.down(inp).flip(1)


class Broadcast(Branching):
    def __init__(self, site: SiteSignature) -> None:
        super().__init__(site)
        self.down = nn.Conv2d(site.inp_channels, 1, 1)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + self.down(inp)


class ReadTwice(Branching):
    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + self.down(inp) * self.down(inp)


@pytest.mark.parametrize("builder", [Dropping, Normed, Reversed, Broadcast, ReadTwice])
def test_what_cannot_be_done_exactly_runs_one_by_one(builder: Callable[..., nn.Module]) -> None:
    site = SiteSignature(
        host="Conv2d", inp_shape=(None, 6, None, None), act_shape=(None, 4, None, None),
        channel_dim=1,
    )  # fmt: skip
    library = MemoryLibrary()
    artifact_id = library.add(builder, site)
    program = Program.from_json(library.bundles[artifact_id].files["graph.json"])
    assert program.channelwise is None


def test_a_seed_that_stays_behind_computes_alone() -> None:
    model = grown(LowRank, network())
    inp = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    before = model(inp)
    for seed_idx in (0, 1):
        model.kasmina_layers["1"].cull(seed_idx, "test")
    assert [type(ensemble) for ensemble in ensembles(model)] == [Individuals]
    torch.testing.assert_close(model(inp)[:, 8:], before[:, 8:])
