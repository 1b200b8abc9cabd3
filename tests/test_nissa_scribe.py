"""The scribe writes an alpha for every step with a kernel in place, and the drop that ends it."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from esper.contracts import SeedId
from esper.nissa.progress import RunProgress
from esper.nissa.record import RunRecorder
from esper.nissa.scribe import Scribe

SEED: SeedId = ("fc1", 0)


class Kasmina:
    """Stands for the execution layer with what the scribe reads of it."""

    def __init__(self) -> None:
        self.alphas: dict[SeedId, float] = {}

    def seeds_in(self, states):
        return list(self.alphas)

    def layer(self, name):
        def value(field, seed_idx):
            return self.alphas[name, seed_idx]

        return SimpleNamespace(state_layout=SimpleNamespace(value=value))


@pytest.fixture
def recorder() -> RunRecorder:
    return RunRecorder(
        "run", network="4-2", command="train", seed=0, machine="here", torch_version="2.13"
    )


def test_alpha_drops_to_0_once_when_a_kernel_is_removed(recorder):
    kasmina = Kasmina()
    progress = RunProgress(1, console=Console(file=io.StringIO()))
    scribe = Scribe(SimpleNamespace(kasmina=kasmina), recorder, progress)
    for step, alphas in enumerate([{}, {SEED: 0.5}, {SEED: 1.0}, {}, {}, {SEED: 0.0}, {SEED: 0.2}]):
        kasmina.alphas = alphas
        scribe.on_step(step, epoch=0)
    (series,) = recorder.record().alphas
    assert series.points == ((1, 0.5), (2, 1.0), (3, 0.0), (5, 0.0), (6, 0.2))
