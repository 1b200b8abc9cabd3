"""From an observed step to health signals: the score's formula, and how old a signal is."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.config import SeedSettings
from esper.contracts import HealthSignal
from esper.kasmina.health import health_batch
from esper.kasmina.observation import Observation


class Emitting(nn.Module):
    """Gives out what it is told to, through a layer that can carry seeds."""

    def __init__(self, out: Tensor):
        super().__init__()
        self.act = nn.Identity()
        self.scale = nn.Parameter(torch.ones(()))
        self.out = out

    def forward(self, inp: Tensor) -> Tensor:
        return self.act(self.out * self.scale)


def signals_of(out: Tensor) -> tuple[HealthSignal, ...]:
    """Return the signals of the two seeds on the columns of ``out``, (N, 4)."""
    settings = SeedSettings(seeds_per_layer=2, observe_every=2)
    model = esper.wrap(Emitting(out), ["act"], settings=settings)
    observed: list[Observation] = []
    model.kasmina.emit_observation = observed.append
    for _ in range(4):
        model(torch.zeros(1)).sum().backward()
        model.step()
    return health_batch(observed[0]).signals


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


@pytest.mark.parametrize("case", CASES)
def test_each_fault_lowers_the_score_of_its_own_chunk(case: str) -> None:
    spoil, score = CASES[case]
    first, second = signals_of(torch.cat([spoil(HEALTHY), HEALTHY], 1))
    assert first.health_score == pytest.approx(score, abs=0.01)
    assert second.health_score == pytest.approx(1.0, abs=0.01)


def test_a_signal_tells_how_old_it_is_and_what_the_gradient_asked() -> None:
    for signal in signals_of(torch.cat([HEALTHY, HEALTHY], 1)):
        assert signal.step == 2
        assert signal.staleness_steps == 1
        assert signal.gradient_energy == pytest.approx(1.0)  # of a sum
