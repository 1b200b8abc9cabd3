"""Seeds of one layer that compute together do what each would do alone, and stay themselves."""

import asyncio
import copy
import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from kasmina_library import Irregular, MemoryLibrary, Residual
from torch import Tensor, nn

import esper
from esper.blueprints import registry
from esper.config import SeedSettings
from esper.contracts import GraftingStrategy, SeedState, SiteSignature
from esper.kasmina.bottleneck import Bottleneck
from esper.kasmina.ensemble import Bottlenecks, Individuals
from esper.kasmina.model import MorphableModel
from esper.kasmina.program import Program
from esper.kasmina.seats import Seats, seats_of
from esper.tezzeret.trace import trace

pytestmark = pytest.mark.usefixtures("autograd_language")
SEEDS = 3
SITE = SiteSignature(host="Linear", inp_shape=(None, 8), act_shape=(None, 4), channel_dim=1)
FOREVER = GraftingStrategy(training_steps=10_000)


def host() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 4 * SEEDS), nn.Tanh(), nn.Linear(4 * SEEDS, 2))


def grown(builder: Callable[..., nn.Module], *, training: bool = False) -> MorphableModel:
    """Return a model with a kernel of its own weights in each seed of its first layer."""
    library = MemoryLibrary()
    artifact_id = library.add(builder)
    model = esper.wrap(
        host(), ["0"], settings=SeedSettings(seeds_per_layer=SEEDS, deterministic=True)
    )
    model.connect(library)
    layer = model.kasmina_layers["0"]
    for seed_idx in range(SEEDS):
        if training:
            layer.request_germination(seed_idx, artifact_id, FOREVER)
        else:
            alpha = (seed_idx + 1) / (SEEDS + 1)
            assert asyncio.run(layer.load_kernel(seed_idx, artifact_id, alpha=alpha))
    model.step()
    randomize(model)
    return model


def randomize(model: MorphableModel) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in weights(model):
            weight.copy_(torch.randn(weight.shape, generator=generator) / 2)


def weights(model: MorphableModel) -> list[nn.Parameter]:
    seats = model.kasmina_layers["0"].occupants()
    return [weight for seat in seats for weight in seat.kernel.weights()]


def seats(model: MorphableModel) -> Seats:
    found = seats_of(model.kasmina_layers["0"].default_transform)
    assert found is not None
    return found


def ensembles(model: MorphableModel) -> list[type]:
    return [type(ensemble) for ensemble in [*(seats(model)._heard or []), *seats(model)._unheard]]


def gradients(model: MorphableModel, inp: Tensor) -> Iterator[Tensor]:
    inp = inp.clone().requires_grad_()
    out = model(inp)
    out.square().sum().backward()
    yield from (out.detach(), inp.grad, *(p.grad for p in model.parameters()))
    yield from (weight.grad for weight in weights(model))


@pytest.mark.parametrize("training", [False, True], ids=["grafted", "isolated"])
def test_seeds_together_do_what_each_does_alone(training: bool) -> None:
    together, alone = grown(Residual, training=training), grown(Irregular, training=training)
    alone.load_state_dict(together.state_dict(), strict=False)
    for one, other in zip(weights(alone), weights(together), strict=True):
        one.data.copy_(other)
    inp = torch.randn(6, 8)
    for found, expected in zip(gradients(together, inp), gradients(alone, inp), strict=True):
        torch.testing.assert_close(found, expected)
    assert ensembles(together) == [Bottlenecks]
    assert ensembles(alone) == [Individuals]


def test_parameters_stay_what_they_were_to_everybody_else() -> None:
    model = grown(Residual)
    before = weights(model)
    names = list(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    inp = torch.randn(6, 8)
    model(inp).square().sum().backward()
    values = [weight.clone() for weight in before]
    optimizer.step()
    assert [id(weight) for weight in weights(model)] == [id(weight) for weight in before]
    assert list(model.state_dict()) == names
    assert all(not torch.equal(w, value) for w, value in zip(before, values, strict=True))
    assert all(weight.is_leaf and weight.is_contiguous() for weight in before)
    layer, (first, *_) = model.kasmina_layers["0"], model.kasmina_layers["0"].occupants()
    act = layer.default_transform._parameters
    host_out = nn.functional.linear(inp, act["weight"], act["bias"])
    chunk = host_out[:, :4] + 0.25 * (first.kernel(inp, host_out[:, :4]) - host_out[:, :4])
    torch.testing.assert_close(layer.default_transform(inp)[:, :4], chunk)


@pytest.mark.parametrize("what", ["data", "parameter", "dtype"])
def test_weights_that_move_in_memory_are_found_again(what: str) -> None:
    model = grown(Residual)
    inp = torch.randn(6, 8)
    model(inp)
    kernel = model.kasmina_layers["0"].kernel(1)
    assert kernel is not None
    if what == "data":
        kernel.up__weight.data = torch.zeros_like(kernel.up__weight)
    elif what == "parameter":
        kernel.up__weight = nn.Parameter(torch.zeros_like(kernel.up__weight))
    else:
        with torch.no_grad():
            kernel.up__weight.zero_()
        model, inp = model.double(), inp.double()
    with torch.no_grad():
        kernel.up__bias.zero_()
        linear = model.kasmina_layers["0"].default_transform
        plain = nn.functional.linear(inp, linear.weight, linear.bias)
        out = linear(inp)
    assert torch.equal(out[:, 4:8], plain[:, 4:8])
    assert not torch.equal(out[:, :4], plain[:, :4])
    assert ensembles(model) == [Bottlenecks]


def test_a_seed_that_leaves_takes_nothing_from_the_others() -> None:
    model = grown(Residual)
    inp = torch.randn(6, 8)
    before = model[0](inp)
    kept = [weight.clone() for weight in weights(model)]
    model.kasmina_layers["0"].cull(1, "test")
    after = model[0](inp)
    plain = nn.functional.linear(inp, model[0].weight, model[0].bias)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    torch.testing.assert_close(after[:, 8:], before[:, 8:])
    assert torch.equal(after[:, 4:8], plain[:, 4:8])
    remaining = kept[:4] + kept[8:]
    assert all(torch.equal(w, k) for w, k in zip(weights(model), remaining, strict=True))


def test_a_frozen_seed_among_learning_ones_gets_no_gradient() -> None:
    model = grown(Residual)
    model.kasmina_layers["0"].stabilize(1)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(torch.randn(6, 8)).square().sum().backward()
    frozen = [weight.grad is None for weight in weights(model)]
    assert frozen == [False] * 4 + [True] * 4 + [False] * 4


def test_a_copy_computes_with_its_own_weights() -> None:
    model = grown(Residual)
    inp = torch.randn(6, 8)
    expected = model(inp)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(inp), expected)
    with torch.no_grad():
        for weight in weights(twin):
            weight.add_(1)
    assert torch.equal(model(inp), expected)
    assert not torch.equal(twin(inp), expected)


def test_a_non_finite_weight_of_one_seed_is_its_own_fault() -> None:
    model = grown(Residual)
    kernel = model.kasmina_layers["0"].kernel(1)
    assert kernel is not None
    with torch.no_grad():
        kernel.up__weight.fill_(torch.inf)
    out = model(torch.randn(6, 8))
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert [model.kasmina.bank.mirror["fault"][i] for i in range(SEEDS)] == [0, 1, 0]


def test_the_host_output_is_written_over_only_where_nobody_needs_it() -> None:
    model = grown(Residual)
    linear = model.kasmina_layers["0"].default_transform
    shown: list[Tensor] = []
    linear.register_forward_hook(lambda _module, _args, out: shown.append(out))
    inp = torch.randn(6, 8)
    out = linear(inp)
    assert shown[0] is out
    plain = nn.functional.linear(inp, linear.weight, linear.bias)
    assert not torch.equal(out, plain)
    # Of rank three the layer's own result is a view, whose base autograd would have to copy.
    torch.testing.assert_close(linear(inp.view(2, 3, 8)).flatten(0, 1), out)


def test_seeds_of_another_layer_width_run_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    """A weight that does not fit is found out and charged to the seed that has it."""
    model = grown(Residual)
    kernel = model.kasmina_layers["0"].kernel(1)
    assert kernel is not None
    kernel.down__weight = nn.Parameter(torch.randn(3, 5))
    with caplog.at_level(logging.WARNING):
        out = model(torch.randn(6, 8))
    assert out.isfinite().all()
    assert "seed 1 on '0'" in caplog.text
    model.step()
    states = model.kasmina_layers["0"].state_layout.lifecycle_states()
    assert states == [SeedState.GRAFTING, SeedState.CULLED, SeedState.GRAFTING]


FORMS = {
    "residual_mlp": Bottleneck(0, 1, 2, 3, "gelu"),
    "low_rank": Bottleneck(0, None, 1, 2, "identity"),
    "gated": None,
    "norm": None,
    "standardize": None,
}


@pytest.mark.parametrize("name", FORMS)
def test_bottlenecks_are_recognised(name: str) -> None:
    program = Program.from_json(trace(registry.get(name), SITE, "float32")[1])
    assert program.bottleneck == FORMS[name]
    assert program.keeps_act == (name in ("norm", "standardize"))
