"""What the ranks of tests/test_distributed.py have in common: models, batches, runs, comparisons.

Each check builds its own models; references are computed by each rank for itself, in one process,
on the batches of all ranks.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from kasmina_library import Irregular, MemoryLibrary, Residual
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import esper
from esper.config import SeedSettings
from esper.contracts import (
    CommandKind,
    GraftingStrategy,
    KasminaControlCommand,
    KernelBundle,
    SeedState,
    SiteSignature,
)
from esper.kasmina.model import MorphableModel
from esper.urza.signing import EvaluatorKey

S = SeedState
ROWS = 6  # of a rank's batch
SITE = SiteSignature(host="Linear", inp_shape=(None, 8), act_shape=(None, 4), channel_dim=1)
STRATEGY = GraftingStrategy(
    training_steps=3, grafting_steps=4, stabilization_steps=2, fine_tuning_steps=3
)
SETTINGS = SeedSettings(seeds_per_layer=2, deterministic=True, embargo_steps=3, observe_every=4)
FREE_RUNNING = SETTINGS.model_copy(update={"deterministic": False})


Script = dict[int, list[KasminaControlCommand]]  # what is submitted before which step
CHECKS: dict[str, Callable[[Path], None]] = {}


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CHECKS[function.__name__] = function
    return function


class Library(MemoryLibrary):
    """The same library on every rank: one key, and designs that trace to the same bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.key = EvaluatorKey(Ed25519PrivateKey.from_private_bytes(bytes(32)))
        self.residual = self.add(Residual, SITE)
        self.irregular = self.add(Irregular, SITE)


class SlowLibrary(Library):
    """Hands nothing out until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()

    def fetch_kernel(self, artifact_id: str) -> KernelBundle:
        assert self.open.wait(30)
        return super().fetch_kernel(artifact_id)


def wrapped(library: MemoryLibrary, settings: SeedSettings = SETTINGS) -> MorphableModel:
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    model = esper.wrap(net, ["0"], settings=settings)
    model.connect(library)
    return model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(ROWS, 8, generator=generator), torch.randn(ROWS, 2, generator=generator)


def batch_of_all(step: int) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(
        *(batch(step, rank) for rank in range(dist.get_world_size())), strict=True
    )
    return torch.cat(inputs), torch.cat(targets)


def own_batch(step: int) -> tuple[Tensor, Tensor]:
    return batch(step, dist.get_rank())


def order(
    kind: CommandKind, artifact_id: str | None = None, seed: int = 0
) -> KasminaControlCommand:
    return KasminaControlCommand(
        command_id=f"{kind} {seed}",
        kind=kind,
        layer_name="0",
        seed_idx=seed,
        artifact_id=artifact_id,
        strategy=STRATEGY,
        epoch=0,
        reason="test",
    )


def life(library: Library) -> Script:
    """Seed 0 is germinated and fossilised, seed 1 germinated and culled; one each in the same step."""
    return {
        1: [order(CommandKind.GERMINATE, library.residual)],
        3: [order(CommandKind.GERMINATE, library.irregular, 1)],
        8: [order(CommandKind.CULL, seed=1)],
        12: [order(CommandKind.KEEP)],
    }


def plain_step(
    callee: nn.Module,
    model: MorphableModel,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
) -> None:
    optimizer.zero_grad()
    mse_loss(callee(data[0]), data[1]).backward()
    optimizer.step()
    model.step()


def run(
    model: MorphableModel,
    script: Script,
    steps: range,
    step: Callable[[int], None],
) -> list[list[S]]:
    """Take ``steps``; return the seeds' states after each."""
    states = []
    for number in steps:
        for command in script.get(number, ()):
            if not model.kasmina.follows:
                model.kasmina.submit(command)
        step(number)
        if model.kasmina.peers is not None:
            assert_alike(*seed_state(model))
        states.append(model.kasmina_layers["0"].state_layout.lifecycle_states())
    return states


def run_alone(
    library: Library,
    script: Script,
    num_steps: int,
    make: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
) -> tuple[MorphableModel, list[list[S]]]:
    """Return the run of one process on the batches of all ranks."""
    model = wrapped(library)
    optimizer = make(model)
    model.attach_optimizer(optimizer)
    states = run(
        model,
        script,
        range(num_steps),
        lambda number: plain_step(model, model, optimizer, batch_of_all(number)),
    )
    return model, states


def run_ddp(
    library: Library, script: Script, num_steps: int, **options: Any
) -> tuple[MorphableModel, list[list[S]]]:
    model = esper.distribute(wrapped(library))
    ddp = DDP(model, **options)
    optimizer = sgd(model)
    model.attach_optimizer(optimizer)
    states = run(
        model,
        script,
        range(num_steps),
        lambda number: plain_step(ddp, model, optimizer, own_batch(number)),
    )
    return model, states


def seed_state(model: MorphableModel) -> list[Tensor]:
    """Return what the host's mirror and the kernels say, in TRAINING or not."""
    fields = ("lifecycle_states", "alpha_blend", "error_count", "fallback_active", "fault")
    mirror = [torch.tensor(model.kasmina.bank.mirror[field].tolist()) for field in fields]
    left = [t.steps_left or -1 for t in model.kasmina.tenancies.values()]
    return [*mirror, torch.tensor([*left, model.kasmina.num_transitions, model.kasmina.epoch])]


def kernel_weights(model: MorphableModel) -> list[Tensor]:
    layer = model.kasmina_layers["0"]
    return [p.detach() for seat in layer.occupants() for p in seat.kernel.parameters()]


def weights(model: MorphableModel) -> list[Tensor]:
    host = [p.detach() for name, p in model.named_parameters() if "esper_seeds" not in name]
    return [*host, *kernel_weights(model)]


def assert_alike(*tensors: Tensor) -> None:
    """All ranks have the same bits."""
    for tensor in tensors:
        shared = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(shared, tensor)
        for other in shared:
            torch.testing.assert_close(tensor, other, rtol=0, atol=0, equal_nan=True)


def assert_close(model: MorphableModel, reference: MorphableModel) -> None:
    assert len(weights(model)) == len(weights(reference))
    for ours, theirs in zip(weights(model), weights(reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("esper").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("esper").removeHandler(handler)


def kernel_parameters(model: MorphableModel) -> list[nn.Parameter]:
    return [p for seat in model.kasmina_layers["0"].occupants() for p in seat.parameters()]


def differ_by_rank(tensors: list[Tensor]) -> None:
    with pytest.raises(AssertionError):
        assert_alike(*tensors)
