"""Seeds under autocast, in low precision, in channels-last and with recomputed activations."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from kasmina_library import MemoryLibrary
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import esper
from esper.blueprints.convolutional import ConvBottleneck
from esper.blueprints.gated import Gated
from esper.blueprints.low_rank import LowRank
from esper.blueprints.residual_mlp import ResidualMLP
from esper.config import SeedSettings
from esper.contracts import GraftingStrategy, SeedState
from esper.kasmina.model import MorphableModel

S = SeedState
LIBRARY = MemoryLibrary()
SETTINGS = SeedSettings(seeds_per_layer=2, deterministic=True, telemetry_enabled=False)
STRATEGY = GraftingStrategy(training_steps=2, grafting_steps=4)
STATES = [S.TRAINING, S.GRAFTING, S.FOSSILIZED]
# Of results that were rounded in each of some ten operations; 1 percent in bfloat16 is a rounding.
LIMITS = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-5}


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 1))


def rows() -> Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


def images() -> Tensor:
    return torch.randn(4, 8, 5, 5, generator=torch.Generator().manual_seed(1))


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor], type[nn.Module]]
CASES: dict[str, Case] = {
    "low_rank": (dense, rows, LowRank),
    "residual_mlp": (dense, rows, ResidualMLP),
    "gated": (dense, rows, Gated),
    "conv": (convolutional, images, ConvBottleneck),
}


def grown(
    design: str, state: S, convert: Callable[[nn.Module], Any] = nn.Module.train
) -> MorphableModel:
    """A wrapped model with a kernel on layer "0" that says something, in ``state``, converted."""
    make_host, make_inp, builder = CASES[design]
    model = esper.wrap(make_host(), settings=SETTINGS)
    model.connect(LIBRARY)
    model(make_inp())
    layer = model.kasmina_layers["0"]
    layer.request_germination(0, LIBRARY.add(builder, layer.site(0)), STRATEGY)
    model.step()
    generator = torch.Generator().manual_seed(2)
    kernel = layer.kernel(0)
    assert kernel is not None
    for weight in kernel.weights():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data.copy_(0.3 * noise)
    if state is not S.TRAINING:
        layer.graft(0, STRATEGY)
        for _ in range(2):
            model.kasmina.bank.tick(3)
    if state is S.FOSSILIZED:
        layer.stabilize(0)
        layer.evaluate(0)
        layer.fine_tune(0)
        layer.fossilize(0)
    assert layer.state(0) is state
    converted: MorphableModel = convert(model)
    return converted


Run = Callable[[nn.Module, Tensor], Tensor]


def forward(model: nn.Module, inp: Tensor) -> Tensor:
    return model(inp)


def autocast(dtype: torch.dtype, model: nn.Module, inp: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype):
        return model(inp)


def recomputed(use_reentrant: bool, model: nn.Module, inp: Tensor) -> Tensor:
    return checkpoint(model, inp, use_reentrant=use_reentrant)


def channels_last(model: nn.Module, inp: Tensor) -> Tensor:
    return model(inp.contiguous(memory_format=torch.channels_last) if inp.dim() == 4 else inp)


def as_channels_last(net: nn.Module) -> nn.Module:
    return net.to(memory_format=torch.channels_last)


# name: (what is done to the grown model, how it is run, the dtype of the numbers)
MODES: dict[str, tuple[Callable[[nn.Module], Any], Run, torch.dtype]] = {
    "autocast bfloat16": (nn.Module.train, partial(autocast, torch.bfloat16), torch.bfloat16),
    "autocast float16": (nn.Module.train, partial(autocast, torch.float16), torch.float16),
    "bfloat16": (nn.Module.bfloat16, forward, torch.bfloat16),
    "float16": (nn.Module.half, forward, torch.float16),
    "channels-last": (as_channels_last, channels_last, torch.float32),
    "checkpoint": (nn.Module.train, partial(recomputed, False), torch.float32),
    "checkpoint reentrant": (nn.Module.train, partial(recomputed, True), torch.float32),
}


def gradients(model: nn.Module, run: Run, inp: Tensor) -> dict[str, Tensor]:
    """Return the output, and the gradients of a loss of it for inputs and parameters by name."""
    model.zero_grad()
    inp = inp.detach().requires_grad_()
    out = run(model, inp)
    out.float().square().mean().backward()
    parameters = dict(model.named_parameters())
    if isinstance(model, MorphableModel):
        for seat in model.kasmina.isolated_seats():
            parameters |= {f"isolated {name}": p for name, p in seat.named_parameters()}
    assert inp.grad is not None
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    return {"out": out.detach(), "inp": inp.grad, **found}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("design", CASES)
def test_a_seed_in_training_leaves_the_host_bit_identical(design: str, mode: str) -> None:
    make_host, make_inp, _ = CASES[design]
    convert, run, _ = MODES[mode]
    plain = convert(make_host())
    model = grown(design, S.TRAINING, convert)
    inp = make_inp().to(next(plain.parameters()).dtype)
    expected, found = gradients(plain, run, inp), gradients(model, run, inp)
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype
        assert found[name].stride() == tensor.stride()
        assert torch.equal(found[name], tensor), name
    isolated = {name: grad for name, grad in found.items() if name.startswith("isolated")}
    assert len(isolated) >= 2
    assert all(grad.isfinite().all() and grad.any() for grad in isolated.values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.name)
@pytest.mark.parametrize("design", CASES)
def test_numbers_lie_close_to_float64(design: str, state: S, mode: str) -> None:
    make_host, make_inp, _ = CASES[design]
    convert, run, dtype = MODES[mode]
    model = grown(design, state, convert)
    inp = make_inp().to(next(model.parameters()).dtype)
    found = gradients(model, run, inp)
    reference = gradients(copy.deepcopy(model).double(), forward, inp.double())
    host = gradients(convert(make_host()), run, inp)
    assert found.keys() == reference.keys()
    assert found["out"].dtype is host["out"].dtype
    assert found["out"].stride() == host["out"].stride()
    assert ("0.esper_seeds.0.kernel.up__weight" in found) is (state is S.GRAFTING)
    assert torch.equal(found["out"], host["out"]) is (state is S.TRAINING)
    parameters = dict(model.named_parameters())
    for name, expected in reference.items():
        if name in parameters:
            assert found[name].dtype is parameters[name].dtype
        error = (found[name].double() - expected).norm() / expected.norm()
        assert error <= LIMITS[dtype], f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.name)
def test_an_overflow_that_the_scaler_skips_is_not_booked_on_the_seed(state: S) -> None:
    model = grown("residual_mlp", state)
    layer = model.kasmina_layers["0"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.attach_optimizer(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**80, growth_interval=1000)
    before = [p.detach().clone() for p in model.parameters()]
    num_skipped = 0
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(rows()).square().mean()
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        model.kasmina.bank.tick(3)
        num_skipped += scaler.get_scale() < scale
    assert num_skipped == 6
    for parameter, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, kept)
    assert layer.state_layout.value("error_count", 0) == 0
    assert layer.quarantine_reason(0) is None
