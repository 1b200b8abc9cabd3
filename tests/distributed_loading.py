"""Checks of tests/test_distributed.py: kernels that come, or do not, and kernels that fail."""

import asyncio
import concurrent.futures
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_parts import (
    FREE_RUNNING,
    SITE,
    Library,
    S,
    SlowLibrary,
    assert_alike,
    check,
    logged,
    order,
    own_batch,
    plain_step,
    run,
    run_ddp,
    seed_state,
    sgd,
    weights,
    wrapped,
)
from kasmina_library import Root
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import esper
from esper.contracts import (
    CommandKind,
)
from esper.errors import DistributedError
from esper.kasmina.model import MorphableModel


@check
def a_rank_that_lacks_the_kernel(folder: Path) -> None:
    gives_up(lambda library: library.bundles.clear(), "ArtifactNotFoundError: no kernel")


@check
def a_rank_whose_copy_was_tampered_with(folder: Path) -> None:
    def tamper(library: Library) -> None:
        bundle = library.bundles[library.residual]
        files = {**bundle.files, "params.safetensors": bundle.files["params.safetensors"] + b"!"}
        library.bundles[library.residual] = bundle.model_copy(update={"files": files})

    gives_up(tamper, "ArtifactIntegrityError: ")


def gives_up(spoil: Callable[[Library], None], reason: str) -> None:
    """All ranks give up what the last one cannot load, and train on as if nothing had been tried."""
    library, last = Library(), dist.get_world_size() - 1
    germinate = {2: [order(CommandKind.GERMINATE, library.residual)]}
    reference, _ = run_ddp(library, {}, 6)
    if dist.get_rank() == last:
        spoil(library)
    with logged() as lines:
        model, states = run_ddp(library, germinate, 6)
    assert states == [[S.DORMANT, S.DORMANT]] * 6
    for ours, expected in zip(weights(model), weights(reference), strict=True):
        assert torch.equal(ours, expected)
    assert model.kasmina_layers["0"].state_layout.value("error_count", 0) == 1
    [line] = [line for line in lines if "kernel not loaded" in line]
    assert f"seed 0 on '0': kernel not loaded: rank {last}: {reason}" in line


@check
def a_rank_that_loads_slowly(folder: Path) -> None:
    """The others wait for it with the kernel, and not with training."""
    library, slow = SlowLibrary(), dist.get_rank() == 1
    if not slow:
        library.open.set()
    model = esper.distribute(wrapped(library, FREE_RUNNING))
    ddp, optimizer = DDP(model), sgd(model)
    model.attach_optimizer(optimizer)

    def step(number: int) -> None:
        if number == 5:
            library.open.set()
            concurrent.futures.wait([t.prepared for t in model.kasmina.tenancies.values()])
        plain_step(ddp, model, optimizer, own_batch(number))

    script = {1: [order(CommandKind.GERMINATE, library.residual)]}
    states = run(model, script, range(7), step)
    assert [first for first, _ in states] == [S.DORMANT] + [S.LOADING] * 4 + [S.TRAINING] * 2


@check
def a_load_that_rank_0_gives_up(folder: Path) -> None:
    library = SlowLibrary()
    library.open.set()
    model = esper.distribute(wrapped(library, FREE_RUNNING))
    if dist.get_rank() == 0:
        model.kasmina.submit(order(CommandKind.GERMINATE, library.residual))
        library.open.clear()
    model.step()
    assert model.kasmina_layers["0"].state(0) is S.LOADING
    if dist.get_rank() == 0:
        library.open.set()
        model.kasmina.close()
    model.step()
    assert model.kasmina_layers["0"].state(0) is S.DORMANT


@check
def moved_by_hand_on_every_rank(folder: Path) -> None:
    library = Library()
    model = esper.distribute(wrapped(library))
    layer = model.kasmina_layers["0"]
    assert asyncio.run(model.load_kernel("0", 0, library.residual, alpha=0.5))
    assert layer.state(0) is S.GRAFTING
    model.step()
    layer.stabilize(0)
    layer.evaluate(0)
    model.step()
    if dist.get_rank() == 1:
        library.bundles.clear()
        model.kasmina.cache = model.kasmina.cache.__class__(0)
        model.connect(library)
    assert not asyncio.run(model.load_kernel("0", 1, library.irregular))
    assert layer.state(1) is S.DORMANT
    layer.cull(0, "test")
    model.step()
    assert_alike(*seed_state(model))
    with pytest.raises(DistributedError, match="awaited on the training thread of every rank"):
        in_another_thread(lambda: asyncio.run(model.load_kernel("0", 1, library.residual)))
    if dist.get_rank() > 0:
        with pytest.raises(DistributedError, match=r"follows: commands are submitted on rank 0"):
            model.kasmina.submit(order(CommandKind.CULL))


def in_another_thread(function: Callable[[], Any]) -> Any:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@check
def seeds_that_moved_apart(folder: Path) -> None:
    library = Library()
    model = esper.distribute(wrapped(library))
    assert asyncio.run(model.load_kernel("0", 0, library.residual))
    model.step()
    if dist.get_rank() == 1:
        model.kasmina_layers["0"].cull(0, "on this rank alone")
    with pytest.raises(DistributedError, match="step 2: the seeds of the ranks have not gone"):
        model.step()


def germinated(library: Library, artifact_id: str) -> tuple[MorphableModel, nn.Module]:
    model = esper.distribute(wrapped(library))
    ddp = DDP(model)
    model.attach_optimizer(sgd(model))
    assert asyncio.run(model.load_kernel("0", 0, artifact_id, alpha=0.5))
    return model, ddp


@check
def numbers_that_are_not_finite_on_one_rank(folder: Path) -> None:
    library = Library()
    model, ddp = germinated(library, library.add(Root, SITE))
    errors, states = [], []
    for number in range(5):
        inp, target = own_batch(number)
        inp[:, 0] = 1.0 if dist.get_rank() == 0 else -1.0
        model.zero_grad()
        mse_loss(ddp(inp), target).backward()
        model.step()
        assert_alike(*seed_state(model))
        errors.append(model.kasmina_layers["0"].state_layout.value("error_count", 0))
        states.append(model.kasmina_layers["0"].state(0))
    assert errors == [1, 2, 3, 3, 3]
    assert states == [S.GRAFTING] * 3 + [S.CULLED] * 2


@check
def a_kernel_that_raises_on_one_rank(folder: Path) -> None:
    library = Library()
    model, ddp = germinated(library, library.irregular)
    layer = model.kasmina_layers["0"]
    raise_on_rank_1(layer)
    train_briefly(model, ddp)
    assert layer.state(0) is S.CULLED
    assert asyncio.run(model.load_kernel("0", 1, library.irregular))
    layer.stabilize(1)
    layer.evaluate(1)
    layer.fossilize(1)
    raise_on_rank_1(layer)
    with logged() as lines:
        train_briefly(model, ddp)
    assert layer.state(1) is S.FOSSILIZED
    assert layer.is_bypassed(1)
    told = [line for line in lines if "bypassed: its kernel raised an error on another" in line]
    assert len(told) == 1


def raise_on_rank_1(layer: esper.KasminaLayer) -> None:
    def fail(*_arguments: Any) -> Tensor:
        raise ZeroDivisionError

    if dist.get_rank() == 1:
        [seat] = layer.occupants()
        seat.kernel.call = fail  # type: ignore[method-assign]


def train_briefly(model: MorphableModel, ddp: nn.Module) -> None:
    for number in range(3):
        inp, target = own_batch(number)
        model.zero_grad()
        mse_loss(ddp(inp), target).backward()
        model.step()
        assert_alike(*seed_state(model))
