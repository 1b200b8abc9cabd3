"""From an observed step to health signals: the score's formula, and how old a signal is."""

import math
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from redis_servers import MakeBus
from torch import Tensor, nn

import esper
from esper.config import SeedSettings
from esper.contracts import HealthBatch, HealthSignal, SeedState, Topic
from esper.kasmina.health import health_batch, health_batch_beside
from esper.kasmina.observation import Observation


class Emitting(nn.Module):
    """Gives what it is told to through a layer that can carry seeds."""

    def __init__(self, out: Tensor, act: nn.Module):
        super().__init__()
        self.act = act
        self.scale = nn.Parameter(torch.ones(()))
        self.out = out

    def forward(self, inp: Tensor) -> Tensor:
        return self.act(self.out * self.scale)


def observed(out: Tensor, act: nn.Module | None = None) -> Observation:
    """Return what was seen of the two seeds on the columns of ``act`` of ``out``, (N, 4)."""
    settings = SeedSettings(seeds_per_layer=2, observe_every=2)
    model = esper.wrap(Emitting(out, act or nn.Identity()), ["act"], settings=settings)
    observations: list[Observation] = []
    model.kasmina.emit_observation = observations.append
    for _ in range(4):
        model(torch.zeros(1)).sum().backward()
        model.step()
    return observations[0]


def signals_of(out: Tensor, act: nn.Module | None = None) -> tuple[HealthSignal, ...]:
    return health_batch(observed(out, act)).signals


HEALTHY = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).repeat(4, 1)


def with_a_dead_unit(chunk: Tensor) -> Tensor:
    return chunk * torch.tensor([1.0, 0.0])


def with_a_nan_in_eight(chunk: Tensor) -> Tensor:
    return chunk.index_put((torch.tensor([0, 4]), torch.tensor([0, 0])), torch.tensor(torch.nan))


def collapsed(chunk: Tensor) -> Tensor:
    return 1000 + 0.0 * chunk


CASES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "healthy": (lambda chunk: chunk, 1.0),
    "one unit of two is dead": (with_a_dead_unit, 0.5),
    "one number in eight is none": (with_a_nan_in_eight, 7 / 8),
    "constant": (collapsed, 0.0),
    "half collapsed": (lambda chunk: 1000 + chunk, 0.5),
}

# By name: the activation, and how open an output is, 1 in the middle and 0 at a bound.
BOUNDED: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "Tanh": (nn.Tanh, lambda y: 1 - y.square()),
    "Sigmoid": (nn.Sigmoid, lambda y: 4 * y * (1 - y)),
    "Softsign": (nn.Softsign, lambda y: 1 - y.square()),
    "Hardsigmoid": (nn.Hardsigmoid, lambda y: 4 * y * (1 - y)),
    "Hardtanh": (lambda: nn.Hardtanh(-1, 3), lambda y: (y + 1) * (3 - y) / 4),
    "a clipped ReLU": (lambda: nn.Hardtanh(0, 2), lambda y: 1 - y.square() / 4),
    "ReLU6": (nn.ReLU6, lambda y: 1 - y.square() / 36),
}
# To the upper bound, and to both; a ReLU rests at its lower one.
DRIVEN = [(name, (1, 1)) for name in BOUNDED]
DRIVEN += [(name, (1, -1)) for name in BOUNDED if "ReLU" not in name]


@pytest.mark.parametrize("case", CASES)
def test_each_fault_lowers_the_score_of_its_own_chunk(case: str) -> None:
    spoil, score = CASES[case]
    first, second = signals_of(torch.cat([spoil(HEALTHY), HEALTHY], 1))
    assert first.health_score == pytest.approx(score, abs=0.01)
    assert second.health_score == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("name", BOUNDED)
def test_saturation_is_the_mean_nearness_to_the_bounds(name: str) -> None:
    act, openness = BOUNDED[name]
    inp = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)) * 2 + 1
    chunks = act()(inp).double().chunk(2, 1)
    for signal, chunk in zip(signals_of(inp, act()), chunks, strict=True):
        slope = openness(chunk).mean().item()
        assert signal.saturation == pytest.approx(1 - slope, abs=1e-5)
        assert signal.health_score == pytest.approx(slope / (slope + 0.05), rel=1e-3)


@pytest.mark.parametrize("act", [nn.Tanh, nn.Sigmoid])
def test_saturation_is_what_the_slope_lacks_of_the_steepest(act: Callable[[], nn.Module]) -> None:
    inp = torch.linspace(-4, 3, 256).reshape(64, 4).requires_grad_()
    [slopes] = torch.autograd.grad(act()(inp).sum(), inp)
    steepest = torch.autograd.functional.jacobian(act(), torch.zeros(()))
    for signal, chunk in zip(signals_of(inp.detach(), act()), slopes.chunk(2, 1), strict=True):
        relative = (chunk / steepest).mean().item()
        assert signal.saturation == pytest.approx(1 - relative, abs=1e-5)


@pytest.mark.parametrize(("name", "signs"), DRIVEN)
def test_what_is_driven_to_its_bounds_scores_nothing(name: str, signs: tuple[int, int]) -> None:
    act, _ = BOUNDED[name]
    inp = torch.tensor(signs).repeat(8, 2) * torch.linspace(500, 600, 8)[:, None]
    for signal in signals_of(inp, act()):
        assert signal.saturation == pytest.approx(1.0, abs=0.01)
        assert signal.health_score < 0.1


def test_a_layer_without_bounds_has_no_saturation() -> None:
    for act in (nn.Identity(), nn.ReLU(), nn.GELU()):
        assert all(signal.saturation is None for signal in signals_of(HEALTHY.repeat(1, 2), act))


@pytest.mark.parametrize("bounds", [(-math.inf, 1.0), (0.0, math.inf), (-math.inf, math.inf)])
def test_what_is_clipped_on_one_side_has_no_bounds(bounds: tuple[float, float]) -> None:
    for signal in signals_of(HEALTHY.repeat(1, 2), nn.Hardtanh(*bounds)):
        assert signal.saturation is None
        assert signal.health_score > 0.5


def test_bounds_may_be_as_far_off_as_numbers_go() -> None:
    for bounds in ((0.0, sys.float_info.max), (-1e200, 1e200)):
        for signal in signals_of(HEALTHY.double().repeat(1, 2), nn.Hardtanh(*bounds)):
            assert signal.saturation == 0.0


def test_where_a_kernel_adds_to_an_activation_there_is_no_bound() -> None:
    observation = observed(HEALTHY.repeat(1, 2), nn.Tanh())
    observation.snapshot.fields["lifecycle_states"][1] = SeedState.GRAFTING
    first, second = health_batch(observation).signals
    assert first.saturation is not None
    assert second.saturation is None


def test_a_signal_tells_how_old_it_is_and_what_the_gradient_asked() -> None:
    for signal in signals_of(torch.cat([HEALTHY, HEALTHY], 1)):
        assert signal.step == 2
        assert signal.staleness_steps == 1
        assert signal.gradient_energy == pytest.approx(1.0)  # of a sum


def observation_of(
    layers: list[nn.Linear], inp: Tensor, *, seeds_per_layer: int = 4
) -> Observation:
    settings = SeedSettings(seeds_per_layer=seeds_per_layer, observe_every=2)
    model = esper.wrap(nn.Sequential(*layers), settings=settings)
    observations: list[Observation] = []
    model.kasmina.emit_observation = observations.append
    for _ in range(4):
        model(inp).sum().backward()
        model.step()
    return observations[0]


@pytest.mark.parametrize(("num_layers", "beside"), [(2, False), (100, True)])
async def test_many_signals_are_made_in_a_thread_and_few_in_the_loop(
    num_layers: int, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    observation = observation_of([nn.Linear(4, 4) for _ in range(num_layers)], torch.randn(2, 4))
    threads: list[threading.Thread] = []
    make = esper.kasmina.health.health_batch

    def noted(observation: Observation) -> HealthBatch:
        threads.append(threading.current_thread())
        return make(observation)

    monkeypatch.setattr(esper.kasmina.health, "health_batch", noted)
    batch = await health_batch_beside(observation)
    assert batch == make(observation)
    assert [thread is not threading.current_thread() for thread in threads] == [beside]


async def test_ten_thousand_seeds_are_told_of_in_one_message(make_bus: MakeBus) -> None:
    layers = [nn.Linear(100, 100) for _ in range(100)]
    observation = observation_of(layers, torch.randn(2, 100), seeds_per_layer=100)
    bus = make_bus()
    bus.publish(Topic.SEED_HEALTH, "kasmina", health_batch(observation))
    message = await anext(bus.subscribe(Topic.SEED_HEALTH, "tamiyo"))
    assert isinstance(message.payload, HealthBatch)
    seen = {signal.seed_id for signal in message.payload.signals}
    assert seen == {(str(layer), seed) for layer in range(100) for seed in range(100)}
