"""Invariant 4: a seed cannot hurt its host. Kernels in their places, sound and broken."""

import asyncio
import copy
import logging
from collections.abc import Callable

import pytest
import torch
from kasmina_library import (
    Doubled,
    InfiniteGradient,
    Irregular,
    MemoryLibrary,
    NotANumber,
    OneBatchOnly,
    Residual,
)
from torch import Tensor, nn

import esper
from esper.config import SeedSettings
from esper.contracts import GraftingStrategy, SeedState
from esper.kasmina.model import MorphableModel

FOREVER = GraftingStrategy(training_steps=10_000)


def tail(name: str) -> nn.Module:
    return {
        "identity": nn.Identity(),
        "relu in place": nn.ReLU(inplace=True),
        "dropout": nn.Dropout(0.5),
        "tanh": nn.Tanh(),
    }[name]


def host(name: str = "tanh") -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), tail(name), nn.Linear(8, 2))


def grown(
    net: nn.Module,
    library: MemoryLibrary,
    artifact_id: str,
    strategy: GraftingStrategy | None = None,
    layer: str = "0",
    **settings: int,
) -> MorphableModel:
    """Wrap ``net`` and germinate seed 1 of 2 of a layer, in TRAINING or, by hand, in GRAFTING."""
    model = esper.wrap(
        net, settings=SeedSettings(seeds_per_layer=2, deterministic=True, **settings)
    )
    assert isinstance(model, MorphableModel)
    model.connect(library)
    if strategy is not None:
        model.kasmina_layers[layer].request_germination(1, artifact_id, strategy)
        model.step()
    else:
        assert asyncio.run(model.load_kernel(layer, 1, artifact_id, alpha=0.5))
    return model


def run(model: nn.Module, parameters: list[nn.Parameter], steps: int) -> list[Tensor]:
    """Train ``parameters`` and return everything that the host shows along the way."""
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    torch.manual_seed(3)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        inp = torch.randn(5, 8, requires_grad=True)
        out = model(inp)
        out.square().mean().backward()
        optimizer.step()
        seen += [out.detach(), inp.grad, *(p.grad.clone() for p in parameters)]
        if isinstance(model, MorphableModel):
            model.step()
    return [*seen, torch.get_rng_state()]


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "bottleneck": Residual,
    "irregular": Irregular,
    "not a number": NotANumber,
    "infinite gradient": InfiniteGradient,
    "raises": OneBatchOnly,
}


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("after", ["identity", "relu in place", "dropout", "tanh"])
def test_in_training_the_host_is_bit_identical(builder: str, after: str) -> None:
    plain = host(after)
    library = MemoryLibrary()
    net = copy.deepcopy(plain)
    ours = list(net.parameters())
    model = grown(net, library, library.add(BUILDERS[builder]), FOREVER)
    assert model.kasmina_layers["0"].state(1) is SeedState.TRAINING
    for found, expected in zip(
        run(model, ours, 4), run(plain, list(plain.parameters()), 4), strict=True
    ):
        assert torch.equal(found, expected)


def test_in_training_random_kernels_leave_the_hosts_random_numbers_alone() -> None:
    plain = host("dropout")
    library = MemoryLibrary()
    net = copy.deepcopy(plain)
    ours = list(net.parameters())
    model = grown(net, library, library.add(Residual, dropout=0.5), FOREVER)
    for found, expected in zip(
        run(model, ours, 4), run(plain, list(plain.parameters()), 4), strict=True
    ):
        assert torch.equal(found, expected)


def test_in_training_the_seed_receives_the_gradient_of_the_output_as_if_alpha_were_one() -> None:
    library = MemoryLibrary()
    net = host()
    model = grown(net, library, library.add(), FOREVER)
    kernel = model.kasmina_layers["0"].kernel(1)
    inp = torch.randn(5, 8)

    model(inp).square().mean().backward()

    # By hand: the gradient at the layer's output, pushed through the kernel alone.
    weights = [w.detach().clone().requires_grad_() for w in kernel.weights()]
    out = nn.functional.linear(inp, net[0].weight, net[0].bias).detach().requires_grad_()
    net[2](net[1](out)).square().mean().backward()
    kernel.call(inp, out.detach()[:, 4:], tuple(weights)).backward(out.grad[:, 4:])
    for weight, by_hand in zip(kernel.weights(), weights, strict=True):
        torch.testing.assert_close(weight.grad, by_hand.grad)


def test_in_training_without_gradients_the_kernel_does_not_run() -> None:
    library = MemoryLibrary()
    model = grown(host(), library, library.add(OneBatchOnly), FOREVER)
    with torch.no_grad():
        model(torch.randn(3, 8))
    assert not model.kasmina.bank.mirror["fault"][1]


def test_a_grafted_kernel_is_blended_by_the_formula() -> None:
    library = MemoryLibrary()
    net = host("identity")
    model = grown(net, library, library.add())
    kernel = model.kasmina_layers["0"].kernel(1)
    inp = torch.randn(5, 8)
    act = nn.functional.linear(inp, net[0].weight, net[0].bias)
    chunk = act[:, 4:] + 0.5 * (kernel(inp, act[:, 4:]) - act[:, 4:])
    expected = nn.functional.linear(torch.cat([act[:, :4], chunk], 1), net[2].weight, net[2].bias)
    torch.testing.assert_close(model(inp), expected)
    assert model.kasmina_layers["0"].state_layout.get_active_seeds() == [1]


@pytest.mark.parametrize("builder", [NotANumber, InfiniteGradient])
def test_non_finite_numbers_of_a_grafted_kernel_reach_neither_host_nor_seed(
    builder: Callable[..., nn.Module],
) -> None:
    library = MemoryLibrary()
    model = grown(host(), library, library.add(builder))
    inp = torch.randn(5, 8, requires_grad=True)
    out = model(inp)
    out.square().mean().backward()
    assert out.isfinite().all()
    assert inp.grad.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.kasmina.bank.mirror["fault"][1] == 1


@pytest.mark.parametrize("strategy", [FOREVER, None])
def test_a_kernel_with_faults_is_quarantined_then_culled(
    strategy: GraftingStrategy | None,
) -> None:
    library = MemoryLibrary()
    plain = host()
    net = copy.deepcopy(plain)
    model = grown(net, library, library.add(NotANumber), strategy, max_errors=2, embargo_steps=2)
    layer = model.kasmina_layers["0"]
    for expected in (layer.state(1), SeedState.CULLED, SeedState.CULLED, SeedState.DORMANT):
        model(torch.randn(5, 8)).square().mean().backward()
        model.step()
        assert layer.state(1) is expected
    assert type(net[0]) is nn.Linear
    assert list(net.state_dict()) == list(plain.state_dict())
    assert model.kasmina.bank.mirror["error_count"][1] == 2
    inp = torch.randn(5, 8)
    assert torch.equal(model(inp), plain(inp))


def test_a_kernel_that_raises_is_bypassed_logged_once_and_culled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    library = MemoryLibrary()
    model = grown(host(), library, library.add(Residual))
    layer = model.kasmina_layers["0"]
    seat = layer._seat(1)
    seat.kernel.down__weight = nn.Parameter(torch.randn(3, 5))  # does not fit the input
    plain = host()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "esper" not in k})
    inp = torch.randn(5, 8)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert torch.equal(model(inp), plain(inp))
    [line] = [r.message for r in caplog.records if r.levelno == logging.ERROR]
    assert line.startswith("seed 1 on '0': kernel ")
    assert "failed and is bypassed: RuntimeError" in line
    model.step()
    assert layer.state(1) is SeedState.CULLED


def test_a_kernel_of_rank_two_serves_a_linear_layer_at_every_rank() -> None:
    library = MemoryLibrary()
    model = grown(host("identity"), library, library.add())
    inp = torch.randn(2, 3, 8)
    torch.testing.assert_close(model(inp).flatten(0, 1), model(inp.flatten(0, 1)))


def test_a_fixed_function_skips_training() -> None:
    library = MemoryLibrary()
    strategy = GraftingStrategy(grafting_steps=4)
    model = grown(host(), library, library.add(Doubled), strategy)
    assert model.kasmina_layers["0"].state(1) is SeedState.GRAFTING


def test_deepcopy_of_a_grown_model_computes_with_its_own_weights_and_alpha() -> None:
    library = MemoryLibrary()
    model = grown(host(), library, library.add())
    twin = copy.deepcopy(model)
    inp = torch.randn(5, 8)
    expected = model(inp)
    assert torch.equal(twin(inp), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.kasmina.bank.set_alpha(1, 0.0)
    assert torch.equal(model(inp), expected)
    assert not torch.equal(twin(inp), expected)


def test_a_seed_inside_an_encoder_layer_is_not_bypassed_by_its_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0.0)
    library = MemoryLibrary()
    model = grown(layer, library, library.add(), layer="linear1").eval()
    inp = torch.randn(2, 3, 8)
    with torch.no_grad():
        with_seed = model(inp)
        with model.kasmina_layers["linear1"].silenced(1):
            without = model(inp)
    assert not torch.equal(with_seed, without)


def test_a_grown_model_can_be_exported() -> None:
    library = MemoryLibrary()
    model = grown(host(), library, library.add()).eval()
    inp = torch.randn(5, 8)
    exported = torch.export.export(model, (inp,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    ops = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    assert not [op for op in ops if op.startswith("esper")]
    more = torch.randn(9, 8)
    torch.testing.assert_close(exported.module()(more), model(more))


def test_a_grown_model_compiles_to_one_graph() -> None:
    library = MemoryLibrary()
    model = grown(host(), library, library.add())
    inp = torch.randn(5, 8)
    expected = model(inp)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inp), expected)
