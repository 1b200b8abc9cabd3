"""``esper.export``: a grown model as plain PyTorch computes the same, wherever it goes."""

import copy
import pickle
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from export_cases import grow, wrapped
from kasmina_library import Doubled, MemoryLibrary, NotANumber, OneBatchOnly, Residual
from tolerances import assert_close
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import esper
from esper.blueprints.channel_attention import ChannelAttention
from esper.blueprints.convolutional import ConvBottleneck, Depthwise
from esper.blueprints.gated import Gated
from esper.blueprints.low_rank import LowRank
from esper.blueprints.norm import Norm, Standardize
from esper.blueprints.residual_mlp import ResidualMLP
from esper.blueprints.self_attention import SelfAttention
from esper.contracts import SeedState, SiteSignature
from esper.kasmina import site_types
from esper.kasmina.model import MorphableModel


class Moody(nn.Module):
    """Behaves differently in training, and writes to buffers there."""

    def __init__(self, site: SiteSignature):
        super().__init__()
        self.mix = nn.Linear(site.inp_channels, site.act_channels)
        self.norm = nn.BatchNorm1d(site.act_channels)
        self.dropout = nn.Dropout(0.5)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        out: Tensor = act + self.dropout(self.norm(self.mix(inp)))
        return out


HOSTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear on rows": (lambda: nn.Linear(6, 8), (5, 6)),
    "linear on sequences": (lambda: nn.Linear(6, 8), (5, 3, 6)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 9, 9)),
    "relu in place": (lambda: nn.ReLU(inplace=True), (2, 8, 5, 5)),
    "gelu": (nn.GELU, (2, 5, 8)),
}
ANYWHERE = [LowRank, ResidualMLP, Gated, Norm, Standardize]
ON_SEQUENCES = [*ANYWHERE, ChannelAttention, SelfAttention]
ON_IMAGES = [*ANYWHERE, ChannelAttention, ConvBottleneck, Depthwise]
DESIGNS = {
    "linear on rows": ANYWHERE,
    "linear on sequences": ON_SEQUENCES,
    "conv2d": ON_IMAGES,
    "relu in place": ON_IMAGES,
    "gelu": ON_SEQUENCES,
}


def assert_same(actual: Tensor, expected: Tensor, name: str = "output") -> None:
    assert actual.dtype is expected.dtype
    assert_close(actual, expected.double(), name)


def grown_linear(
    builder: Callable[..., nn.Module] = Residual,
    state: SeedState = SeedState.FOSSILIZED,
    seeds: tuple[int, ...] = (1,),
) -> MorphableModel:
    library = MemoryLibrary()
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
    model = wrapped(net, torch.randn(5, 8), library)
    return grow(model, library, "0", builder, seeds, state).eval()


def uses_nothing_of_esper(net: nn.Module) -> bool:
    return b"esper" not in pickle.dumps(net)


# ------------------------------------------------------------------ the same function


@pytest.mark.parametrize(
    ("host", "builder"), [(host, builder) for host in HOSTS for builder in DESIGNS[host]]
)
@pytest.mark.parametrize("state", [SeedState.GRAFTING, SeedState.FOSSILIZED])
def test_every_design_computes_the_same_in_both_modes_and_learns_the_same(
    host: str, builder: type[nn.Module], state: SeedState
) -> None:
    make_host, shape = HOSTS[host]
    library = MemoryLibrary()
    model = wrapped(nn.Sequential(nn.Identity(), make_host()), torch.randn(shape), library)
    grow(model, library, "1", builder, state=state)
    plain = esper.export(model, fold=False)
    assert uses_nothing_of_esper(plain)
    for training in (False, True):
        gradients = []
        for net in (model.train(training), plain.train(training)):
            inp = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
            out = net(inp.clone())
            out.square().mean().backward()
            gradients.append([out.detach(), inp.grad])
        for name, found, expected in zip(("output", "input"), *reversed(gradients), strict=True):
            assert_same(found, expected, name)


def test_a_host_that_works_in_place_hands_its_kernels_the_input_as_it_came() -> None:
    library = MemoryLibrary()
    inp = torch.randn(2, 8, 3, 3)
    net = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))
    model = grow(wrapped(net, inp.clone(), library), library, "1", ResidualMLP)
    expected = model(inp.clone())
    with torch.no_grad():
        assert_same(esper.export(model)(inp.clone()), expected)


def test_gradients_of_host_and_kernel_are_those_of_the_grown_model() -> None:
    model = grown_linear(state=SeedState.FINE_TUNING)
    plain = esper.export(model)
    inp = torch.randn(5, 8)
    for net in (model, plain):
        net(inp).square().mean().backward()
    kernel = model.kasmina_layers["0"].kernel(1)
    for name in ("down.weight", "down.bias", "up.weight", "up.bias"):
        theirs = dict(kernel.named_parameters())[name.replace(".", "__")]
        ours = plain.get_parameter(f"0.grown.seed1.weights.{name}")
        assert_same(ours.grad, theirs.grad, name)
    for name in ("0.weight", "0.bias", "2.weight"):
        assert_same(plain.get_parameter(name).grad, model.get_parameter(name).grad, name)


def test_kernels_follow_the_mode_of_the_model() -> None:
    model = grown_linear(Moody, SeedState.FINE_TUNING)
    plain = esper.export(model)
    inp = torch.randn(5, 8)
    for training in (True, False):  # training moves the running statistics
        outs = []
        for net in (model.train(training), plain.train(training)):
            torch.manual_seed(7)
            outs.append(net(inp))
        assert_same(outs[1], outs[0])
    buffers = dict(plain.named_buffers())
    assert buffers["0.grown.seed1.weights.norm.num_batches_tracked"] == 1


def test_alpha_is_frozen_in_a_buffer() -> None:
    model = grown_linear(state=SeedState.GRAFTING)
    plain = esper.export(model)
    assert dict(plain.named_buffers())["0.grown.seed1.alpha"] == torch.tensor([0.3])
    layer, inp = model.kasmina_layers["0"], torch.randn(5, 8)
    act = nn.functional.linear(inp, plain[0].weight, plain[0].bias)
    chunk = act[:, 3:] + 0.3 * (layer.kernel(1)(inp, act[:, 3:]) - act[:, 3:])
    assert_same(plain[0](inp), torch.cat([act[:, :3], chunk], 1).detach())
    model.kasmina.bank.set_alpha(layer.first_seed + 1, 0.9)
    assert_same(plain[0](inp), torch.cat([act[:, :3], chunk], 1).detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("state", [SeedState.GRAFTING, SeedState.FOSSILIZED])
def test_models_of_other_dtypes(dtype: torch.dtype, state: SeedState) -> None:
    model = grown_linear(state=state).to(dtype)
    inp = torch.randn(5, 8, dtype=dtype)
    assert_same(esper.export(model)(inp), model(inp))


def test_autocast() -> None:
    model = grown_linear(state=SeedState.GRAFTING)
    plain, inp = esper.export(model), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(plain(inp), model(inp))
        assert not model.kasmina_layers["0"].quarantine_reason(1)


def test_numbers_that_are_not_finite_are_kept_from_the_output_all_the_same() -> None:
    model = grown_linear(NotANumber)
    inp = torch.randn(5, 8)
    out = esper.export(model)(inp)
    assert out.isfinite().all()
    assert_same(out, model(inp))


# ------------------------------------------------------------------ hosts in their models


def test_several_seeds_of_several_layers() -> None:
    library = MemoryLibrary()
    inp = torch.randn(4, 3, 8, 8)
    net = nn.Sequential(
        nn.Conv2d(3, 7, 3), nn.GELU(), nn.Flatten(), nn.Linear(252, 5), nn.Sigmoid()
    )
    model = wrapped(net, inp, library, seeds=3)
    grow(model, library, "0", Depthwise, (0, 2))
    grow(model, library, "0", LowRank, (1,))
    grow(model, library, "1", ChannelAttention, (1,), SeedState.GRAFTING)
    grow(model, library, "3", Residual, (0, 1, 2), SeedState.STABILIZATION)
    model.eval()
    for fold in (True, False):
        torch.testing.assert_close(esper.export(model, fold=fold)(inp), model(inp))


def test_a_module_of_several_names_stays_one() -> None:
    library = MemoryLibrary()
    layer = nn.Linear(8, 8)
    inp = torch.randn(5, 8)
    model = wrapped(nn.Sequential(layer, nn.Tanh(), layer), inp, library)
    plain = esper.export(grow(model, library, "0", Residual).eval())
    assert plain[0] is plain[2]
    assert_same(plain(inp), model(inp))


def test_a_root_that_is_a_site_itself() -> None:
    library = MemoryLibrary()
    inp = torch.randn(5, 8)
    model = grow(wrapped(nn.Linear(8, 6), inp, library), library, "", Residual)
    plain = esper.export(model)
    assert type(plain) is nn.Linear
    assert_same(plain(inp), model(inp))
    assert "grown.seed0.weights.down.weight" in plain.state_dict()


def test_an_activation_that_is_called_with_several_shapes_speaks_at_its_own_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.Tanh()

        def forward(self, *inputs: Tensor) -> list[Tensor]:
            return [self.act(x) for x in inputs]

    library = MemoryLibrary()
    shapes = [(2, 8, 5, 5), (2, 6, 5, 5), (2, 8), (2, 5, 8), (8,)]
    inputs = [torch.randn(shape) for shape in shapes]
    model = grow(wrapped(Net(), inputs[0], library), library, "act", ConvBottleneck).eval()
    outs = esper.export(model)(*inputs)
    for inp, out, expected in zip(inputs, outs, model(*inputs), strict=True):
        assert_same(out, expected, str(inp.shape))
    assert not torch.equal(outs[0], inputs[0].tanh())
    for inp, out in zip(inputs[1:], outs[1:], strict=True):
        assert torch.equal(out, inp.tanh())


def test_a_linear_layer_made_for_rows_serves_every_rank() -> None:
    model = grown_linear()
    plain = esper.export(model)
    for shape in ((8,), (0, 8), (2, 8), (2, 3, 8), (2, 3, 4, 8)):
        inp = torch.randn(shape)
        assert_same(plain(inp), model(inp), str(shape))


def test_layers_may_be_called_by_keyword() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(input=x)
            return out

    library = MemoryLibrary()
    inp = torch.randn(5, 8)
    model = grow(wrapped(Net(), inp, library), library, "layer", Residual)
    assert_same(esper.export(model)(inp), model(inp))


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Paired(nn.Linear):
    def forward(self, inp: Tensor) -> Pair:  # type: ignore[override]
        return Pair(super().forward(inp), inp)


SEVERAL: dict[str, Callable[[], nn.Module]] = {
    "a tuple": lambda: nn.LSTM(6, 8, batch_first=True),
    "a named tuple": lambda: Paired(6, 8),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_of_several_outputs_the_first_has_the_kernels(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_types, "_READERS", dict(site_types._READERS))
    esper.register_site(Paired, channel_dim=-1)
    inp, library = torch.randn(2, 3, 6), MemoryLibrary()
    host = SEVERAL[case]()
    dormant = host(inp)
    model = grow(wrapped(host, inp, library), library, "", LowRank)
    plain = esper.export(model)
    expected = model(inp)
    assert not torch.equal(expected[0], dormant[0])
    for net in (plain, copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        found = net(inp)
        assert type(found) is type(expected) is type(dormant)
        torch.testing.assert_close(found, expected)


def test_hooks_of_the_layer_run_around_its_seeds() -> None:
    library = MemoryLibrary()
    inp = torch.randn(5, 8)
    net = nn.Sequential(nn.Linear(8, 6))
    net[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    net[0].register_forward_hook(lambda module, args, out: out.tanh() + args[0].sum())
    model = grow(wrapped(net, inp, library), library, "0", Residual)
    assert_same(esper.export(model)(inp), model(inp))


def test_an_encoder_layer_does_not_bypass_seeds_by_its_fast_path() -> None:
    library = MemoryLibrary()
    inp = torch.randn(2, 3, 8)
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0.0)
    model = grow(wrapped(layer, inp, library), library, "linear1", Residual).eval()
    plain = esper.export(model)
    with torch.no_grad():
        assert_same(plain(inp), model(inp))


# ------------------------------------------------------------------ an ordinary module


def test_the_host_keeps_its_modules_names_and_mode() -> None:
    model = grown_linear()
    model[1].train()
    plain = esper.export(model)
    assert type(plain) is nn.Sequential
    assert [type(module) for module in plain] == [nn.Linear, nn.Tanh, nn.Linear]
    assert [module.training for module in plain] == [False, True, False]
    assert not any(module.training for module in plain[0].modules())
    assert set(plain.state_dict()) == {
        *("0.weight", "0.bias", "2.weight", "2.bias"),
        *(f"0.grown.seed1.weights.{name}" for name in ("down.weight", "down.bias")),
        *(f"0.grown.seed1.weights.{name}" for name in ("up.weight", "up.bias")),
    }


def test_the_model_is_not_changed() -> None:
    model = grown_linear()
    inp = torch.randn(5, 8)
    expected, weights = model(inp), copy.deepcopy(model.state_dict())
    plain = esper.export(model)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert isinstance(model, MorphableModel)
    assert model.kasmina_layers["0"].state(1) is SeedState.FOSSILIZED
    assert torch.equal(model(inp), expected)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_every_parameter_learns() -> None:
    plain = esper.export(grown_linear()).train()
    plain(torch.randn(5, 8)).square().mean().backward()
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_copies_and_pickles_compute_with_their_own_weights() -> None:
    plain = esper.export(grown_linear(Moody, SeedState.GRAFTING))
    inp = torch.randn(5, 8)
    expected = plain(inp)
    for twin in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert torch.equal(twin(inp), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(plain(inp), expected)
        assert not torch.equal(twin(inp), expected)


def test_parameters_can_be_given_from_outside() -> None:
    plain, inp = esper.export(grown_linear()), torch.randn(5, 8)
    other = {name: torch.randn_like(weight) for name, weight in plain.named_parameters()}
    twin = copy.deepcopy(plain)
    twin.load_state_dict(other)
    assert torch.equal(torch.func.functional_call(plain, other, (inp,)), twin(inp))


def test_hooks_that_are_registered_after_unpickling_do_not_displace_the_seeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = esper.export(grown_linear())
    inp = torch.randn(5, 8)
    expected, data = plain(inp), pickle.dumps(plain)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # as in a new process
    twin = pickle.loads(data)
    taken = next(iter(plain[0]._forward_hooks))
    for _ in range(taken + 1):
        twin[0].register_forward_hook(lambda module, args, out: None)
    assert torch.equal(twin(inp), expected)


def test_an_exported_model_can_be_wrapped_and_grown_again() -> None:
    plain = esper.export(grown_linear())
    inp = torch.randn(5, 8)
    library = MemoryLibrary()
    model = wrapped(plain, inp, library)
    grow(model, library, "0", Doubled, (0,))
    grow(model, library, "0", Residual, (1,))
    for fold in (True, False):
        again = esper.export(model.eval(), fold=fold)
        assert_same(again(inp), model(inp))
        assert "0.grown2.seed1.weights.up.weight" in again.state_dict()


# ------------------------------------------------------------------ what is heard


@pytest.mark.parametrize("state", [s for s in SeedState if 3 <= s <= 8])
def test_states_that_the_output_hears_are_exported(state: SeedState) -> None:
    library = MemoryLibrary()
    inp = torch.randn(5, 8)
    model = wrapped(nn.Sequential(nn.Linear(8, 6)), inp, library)
    if state is SeedState.TRAINING:
        layer = model.kasmina_layers["0"]
        layer.request_germination(0, library.add(Residual, layer.site(0)))
        model.step()
        assert layer.state(0) is state
    else:
        grow(model, library, "0", Residual, (0,), state)
    model.eval()
    plain = esper.export(model)
    assert_same(plain(inp), model(inp))
    assert hasattr(plain[0], "grown") == (state is not SeedState.TRAINING)


def test_a_seed_at_alpha_zero_is_left_out() -> None:
    model = grown_linear(state=SeedState.GRAFTING)
    model.kasmina.bank.set_alpha(model.kasmina_layers["0"].first_seed + 1, 0.0)
    assert set(esper.export(model).state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_quarantined_seed_is_left_out() -> None:
    model = grown_linear(OneBatchOnly)
    layer = model.kasmina_layers["0"]
    layer.kernel(1).rows = nn.Parameter(torch.ones(4, 3))  # fits a batch of 4 alone
    inp = torch.randn(5, 8)
    expected = model(inp)
    assert layer.quarantine_reason(1) is not None
    plain = esper.export(model)
    assert_same(plain(inp), expected)
    assert not hasattr(plain[0], "grown")


def test_dormant_models_come_back_as_they_were() -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.GELU())
    plain = esper.export(esper.wrap(copy.deepcopy(net)))  # GELU's width is still being observed
    inp = torch.randn(5, 8)
    assert torch.equal(plain(inp), net(inp))
    for ours, theirs in zip(plain.modules(), net.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert vars(ours).keys() == vars(theirs).keys()


def test_what_is_not_wrapped_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Linear is not wrapped by esper\.wrap"):
        esper.export(nn.Linear(2, 2))
