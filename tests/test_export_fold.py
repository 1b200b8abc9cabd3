"""Folding: a fossilized linear kernel disappears into its host's weight and bias."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from export_cases import grow, wrapped
from kasmina_library import MemoryLibrary, Residual
from tolerances import RELATIVE_NORM, relative_error
from torch import Tensor, nn

import esper
from esper.blueprints.low_rank import LowRank
from esper.contracts import SeedState, SiteSignature
from esper.kasmina.model import MorphableModel


class Affine(nn.Module):
    """Everything that folds at once: a map of ``inp``, one of ``act``, scales and constants."""

    def __init__(self, site: SiteSignature):
        super().__init__()
        self.down = nn.Linear(site.inp_shape[-1], 3)
        self.up = nn.Linear(3, site.act_channels)
        self.mix = nn.Linear(site.act_channels, site.act_channels)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return 0.5 * (self.up(self.down(inp)) + self.mix(act)) + self.mix(self.mix(act)) * -2.0


class Replacing(nn.Module):
    """Forgets ``act``: the chunk becomes another map of the input."""

    def __init__(self, site: SiteSignature):
        super().__init__()
        self.map = nn.Linear(site.inp_shape[-1], site.act_channels, bias=False)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        out: Tensor = self.map(inp)
        return out


class Sliding(nn.Module):
    """A convolution of the input with a geometry of its own."""

    def __init__(self, site: SiteSignature, kernel_size: int = 3, groups: int = 1, up: int = 1):
        super().__init__()
        padding = kernel_size // 2
        channels = site.inp_shape[1]
        self.conv = nn.Conv2d(channels, 4, kernel_size, padding=padding, groups=groups)
        self.up = nn.Conv2d(4, site.act_channels, up, padding=up // 2)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        out: Tensor = act + self.up(self.conv(inp))
        return out


class Squared(nn.Module):
    """A product of two maps, which is none."""

    def __init__(self, site: SiteSignature):
        super().__init__()
        self.map = nn.Linear(site.inp_channels, site.act_channels)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        out: Tensor = self.map(inp)
        return act + out * out


class Broadcast(nn.Module):
    """One channel for all of them: widths that differ are not read."""

    def __init__(self, site: SiteSignature):
        super().__init__()
        self.map = nn.Linear(site.inp_channels, 1)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        out: Tensor = act + self.map(inp)
        return out


class Weighted(nn.Module):
    """Uses a buffer as its bias, and a sum with a factor: both are left to the kernel."""

    def __init__(self, site: SiteSignature, factor: float = 1.0):
        super().__init__()
        self.factor = factor
        self.map = nn.Linear(site.inp_channels, site.act_channels, bias=False)
        self.register_buffer("shift", torch.ones(site.act_channels))

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        if self.factor != 1:
            return torch.add(act, self.map(inp), alpha=self.factor)
        return act + nn.functional.linear(inp, self.map.weight, self.shift)


Host = Callable[[], nn.Module]
LINEAR = (5, 6)
IMAGE = (2, 4, 9, 9)


def grown(
    host: nn.Module,
    builder: Callable[..., nn.Module],
    shape: tuple[int, ...],
    state: SeedState = SeedState.FOSSILIZED,
    **hparams: float,
) -> MorphableModel:
    library = MemoryLibrary()
    model = wrapped(nn.Sequential(host), torch.randn(shape), library)
    return grow(model, library, "0", builder, state=state, **hparams).eval()


def assert_folded(model: MorphableModel, shape: tuple[int, ...]) -> nn.Module:
    """Assert that the export is a plain host, and within rounding of the model in float64."""
    folded = esper.export(model)
    host = folded[0]
    assert type(host) in {nn.Linear, nn.Conv2d}
    assert set(host._parameters) == {"weight", "bias"}
    assert not list(host.children())
    assert not host._forward_hooks
    inp = torch.randn(shape).to(host.weight.dtype)
    expected = esper.export(model, fold=False).double()(inp.double())
    # Terms cancel each other, and the weights are rounded once before they meet the input.
    assert relative_error(folded(inp), expected) <= 4 * RELATIVE_NORM[inp.dtype]
    return folded


@pytest.mark.parametrize("builder", [LowRank, Affine, Replacing])
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (2, 3, 5, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_designs_fold_into_linear_hosts(
    builder: Callable[..., nn.Module], shape: tuple[int, ...], bias: bool
) -> None:
    model = grown(nn.Linear(6, 7, bias=bias), builder, shape)
    folded = assert_folded(model, shape)
    assert (folded[0].bias is None) == (builder is Replacing and not bias)
    # Another chunk of the output, whose kernel folded as well, shows both are in their places.
    inp = torch.randn(shape)
    torch.testing.assert_close(folded(inp), model(inp), rtol=1e-4, atol=1e-5)


CONVOLUTIONS = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "same", "bias": False},
]


@pytest.mark.parametrize("geometry", CONVOLUTIONS)
def test_low_rank_folds_into_convolutions_of_any_geometry(geometry: dict[str, object]) -> None:
    assert_folded(grown(nn.Conv2d(4, 7, **geometry), LowRank, IMAGE), IMAGE)


@pytest.mark.parametrize("host", [nn.Linear(6, 8), nn.Conv2d(4, 6, 3)])
def test_folding_in_bfloat16_rounds_once(host: nn.Module) -> None:
    shape = LINEAR if isinstance(host, nn.Linear) else IMAGE
    assert_folded(grown(host, LowRank, shape).to(torch.bfloat16), shape)


def test_a_folded_model_is_a_checkpoint_of_the_host(tmp_path: Path) -> None:
    folded = esper.export(grown(nn.Linear(6, 8), LowRank, LINEAR))
    torch.save(folded.state_dict(), tmp_path / "host.pt")
    host = nn.Sequential(nn.Linear(6, 8))
    host.load_state_dict(torch.load(tmp_path / "host.pt", weights_only=True))
    inp = torch.randn(LINEAR)
    assert torch.equal(host(inp), folded(inp))


def test_requires_grad_of_the_host_is_kept() -> None:
    host = nn.Linear(6, 8, bias=False)
    host.weight.requires_grad_(False)
    folded = esper.export(grown(host, LowRank, LINEAR))
    assert not folded[0].weight.requires_grad
    assert not folded[0].bias.requires_grad
    assert not host.weight.requires_grad


def test_one_seed_of_a_layer_folds_and_another_stays() -> None:
    library = MemoryLibrary()
    inp = torch.randn(LINEAR)
    model = wrapped(nn.Sequential(nn.Linear(6, 8)), inp, library)
    grow(model, library, "0", LowRank, (0,))
    grow(model, library, "0", Residual, (1,))
    plain = esper.export(model.eval())
    assert list(plain[0].grown) == ["seed1", "forms"]
    torch.testing.assert_close(plain(inp), model(inp))


KEPT: dict[str, tuple[Host, Callable[..., nn.Module], tuple[int, ...], dict[str, float]]] = {
    "not linear": (lambda: nn.Linear(6, 8), Residual, LINEAR, {}),
    "a product of maps": (lambda: nn.Linear(6, 8), Squared, LINEAR, {}),
    "broadcast": (lambda: nn.Linear(6, 8), Broadcast, LINEAR, {}),
    "a buffer as bias": (lambda: nn.Linear(6, 8), Weighted, LINEAR, {}),
    "a sum with a factor": (lambda: nn.Linear(6, 8), Weighted, LINEAR, {"factor": 3.0}),
    "host without weights": (nn.Tanh, LowRank, LINEAR, {}),
    "host with groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), LowRank, IMAGE, {}),
    "host padded by reflection": (
        lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
        LowRank,
        IMAGE,
        {},
    ),
    "another geometry": (
        lambda: nn.Conv2d(4, 8, 3, padding=1),
        Sliding,
        IMAGE,
        {"kernel_size": 5},
    ),
    "kernel with groups": (lambda: nn.Conv2d(4, 8, 3, padding=1), Sliding, IMAGE, {"groups": 2}),
    "a second convolution": (lambda: nn.Conv2d(4, 8, 3, padding=1), Sliding, IMAGE, {"up": 3}),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_cannot_be_folded_exactly_is_kept(case: str) -> None:
    make_host, builder, shape, hparams = KEPT[case]
    model = grown(make_host(), builder, shape, **hparams)
    plain = esper.export(model)
    assert list(plain[0].grown) == ["seed0", "seed1", "forms"]
    inp = torch.randn(shape)
    torch.testing.assert_close(plain(inp), model(inp))


def test_the_same_geometry_folds_where_another_does_not() -> None:
    assert_folded(grown(nn.Conv2d(4, 8, 3, padding=1), Sliding, IMAGE), IMAGE)


@pytest.mark.parametrize("state", [SeedState.GRAFTING, SeedState.FINE_TUNING])
def test_seeds_that_are_not_fossilized_are_kept(state: SeedState) -> None:
    plain = esper.export(grown(nn.Linear(6, 8), LowRank, LINEAR, state))
    assert list(plain[0].grown) == ["seed0", "seed1", "forms"]


def test_tied_weights_are_left_alone() -> None:
    library = MemoryLibrary()
    inp = torch.randn(5, 8)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    model = grow(wrapped(net, inp, library), library, "0", LowRank).eval()
    plain = esper.export(model)
    assert plain[2].weight is plain[0].weight
    assert list(plain[0].grown) == ["seed0", "seed1", "forms"]
    torch.testing.assert_close(plain(inp), model(inp))


def test_a_module_of_several_names_folds_once() -> None:
    library = MemoryLibrary()
    inp = torch.randn(5, 8)
    layer = nn.Linear(8, 8)
    model = grow(
        wrapped(nn.Sequential(layer, nn.Tanh(), layer), inp, library), library, "0", LowRank
    )
    folded = esper.export(model.eval())
    assert len(list(folded.parameters())) == 2
    torch.testing.assert_close(folded(inp), model(inp), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weights_that_are_computed_are_left_alone() -> None:
    model = grown(nn.utils.weight_norm(nn.Linear(6, 8)), LowRank, LINEAR)
    plain = esper.export(model)
    assert list(plain[0].grown) == ["seed0", "seed1", "forms"]
    inp = torch.randn(LINEAR)
    torch.testing.assert_close(plain(inp), model(inp))


def test_the_rows_of_other_seeds_are_not_touched() -> None:
    library = MemoryLibrary()
    model = wrapped(nn.Sequential(nn.Linear(6, 7)), torch.randn(LINEAR), library, seeds=3)
    grow(model, library, "0", LowRank, (1,))
    folded = esper.export(model)
    changed = (folded[0].weight != model[0].weight).any(1)
    start, length = model.kasmina_layers["0"].chunk(1)
    assert changed.tolist() == [start <= row < start + length for row in range(7)]
    assert list(itertools.compress(range(7), changed)) == [3, 4]
