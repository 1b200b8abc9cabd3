"""A small model, and what happens to it, for the tests of compiling."""

import json
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from kasmina_library import MemoryLibrary
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import esper
from esper.config import SeedSettings
from esper.contracts import GraftingStrategy, RampCurve
from esper.kasmina import compilation
from esper.kasmina.model import MorphableModel
from esper.worker import Header

STRATEGY = GraftingStrategy(
    training_steps=2,
    grafting_steps=4,
    stabilization_steps=2,
    fine_tuning_steps=2,
    curve=RampCurve.LINEAR,
)
WHOLE_LIFE = 10  # steps from germination to EVALUATING, and one more
FORMS = 3  # isolated, heard and learning, heard and frozen
NEVER = 10**6

# Dynamo asks a block's input, which is no leaf, for its gradient; it hides the warning, but not
# from filters that make an error of it.
asks_for_gradients = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.act = nn.Tanh()
        self.down = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.act(self.up(x)))
        return out


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), Block(), Block(), Block(), nn.Linear(8, 2))


def encoder_layer() -> nn.TransformerEncoderLayer:
    torch.manual_seed(2)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def wrapped(host: nn.Module, library: MemoryLibrary, observe_every: int = NEVER) -> MorphableModel:
    settings = SeedSettings(
        seeds_per_layer=2, deterministic=True, embargo_steps=1, observe_every=observe_every
    )
    model = esper.wrap(host, settings=settings)
    model.connect(library)
    model.attach_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    return model


def batch() -> Tensor:
    return torch.randn(5, 8)


def step(model: MorphableModel, run: Any = None) -> Tensor:
    """Take one step of SGD, through ``run`` where the model is compiled from outside."""
    model.zero_grad()
    out: Tensor = (model if run is None else run)(batch())
    out.square().mean().backward()
    [attachment] = model.kasmina.enrollment.attachments
    attachment.optimizer.step()
    model.step()
    return out.detach()


def germinate(model: MorphableModel, name: str, seed_idx: int, artifact_id: str) -> None:
    model.kasmina_layers[name].request_germination(seed_idx, artifact_id, STRATEGY)


def live(model: MorphableModel, steps: int, run: Any = None) -> list[Tensor]:
    return [step(model, run) for _ in range(steps)]


class HeldCompiler:
    """Stands for the child process: a job is done once the test says so."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Sequence[Header], Future[None]]] = []
        self.closed = False

    def submit(self, graphs: Sequence[Header]) -> "Future[None]":
        json.dumps(graphs)
        self.jobs.append((graphs, Future()))
        return self.jobs[-1][1]

    def is_idle(self) -> bool:
        return all(job.done() for _, job in self.jobs)

    def finish(self, error: Exception | None = None) -> None:
        for _, job in self.jobs:
            if not job.done():
                job.set_result(None) if error is None else job.set_exception(error)

    def close(self) -> None:
        self.closed = True


def compiled_in_background(
    model: MorphableModel,
    counter: CompileCounterWithBackend,
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> None:
    monkeypatch.setattr(compilation, "BACKENDS_ON_DISK", {counter})
    esper.compile(model, on_germination="background", backend=counter, fullgraph=True, **options)
