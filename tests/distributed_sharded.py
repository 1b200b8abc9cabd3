"""Checks of tests/test_distributed.py: FSDP2."""

import asyncio
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_parts import (
    Library,
    S,
    assert_alike,
    assert_close,
    batch_of_all,
    check,
    differ_by_rank,
    kernel_parameters,
    kernel_weights,
    life,
    logged,
    order,
    own_batch,
    plain_step,
    run,
    run_alone,
    sgd,
    wrapped,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.functional import mse_loss

import esper
from esper.contracts import (
    CommandKind,
)
from esper.errors import EsperError
from esper.kasmina.model import MorphableModel


def sharded(library: Library) -> MorphableModel:
    model = esper.distribute(wrapped(library))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)


@check
def fsdp_equals_one_process(folder: Path) -> None:
    library = Library()
    script = life(library)
    for make in (sgd, adam):
        reference, expected = run_alone(library, script, 16, make)
        model = sharded(library)
        optimizer = make(model)
        model.attach_optimizer(optimizer)
        states = run(
            model,
            script,
            range(16),
            lambda n, m=model, o=optimizer: plain_step(m, m, o, own_batch(n)),
        )
        assert states == expected
        assert_alike(*kernel_weights(model))
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if dist.get_rank() == 0:
            loaded = wrapped(library)
            loaded.load_state_dict(full)
            assert loaded.kasmina_layers["0"].state(0) is S.FOSSILIZED
            assert_close(loaded, reference)


@check
def fsdp_clipping_and_accumulation(folder: Path) -> None:
    library = Library()
    reference = wrapped(library)
    model = sharded(library)
    for one in (reference, model):
        assert asyncio.run(one.load_kernel("0", 0, library.residual))
    for micro in range(2):
        inp, target = batch_of_all(micro)
        mse_loss(reference(inp), target).backward()
    for micro in range(2):
        model.set_requires_gradient_sync(micro == 1)  # type: ignore[operator]
        inp, target = own_batch(micro)
        mse_loss(model(inp), target).backward()
        if micro == 0:
            differ_by_rank([p.grad for p in kernel_parameters(model)])
    expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    with implicit_replication():
        found = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.testing.assert_close(found.full_tensor(), expected)  # type: ignore[attr-defined]
    for ours, theirs in zip(kernel_parameters(model), kernel_parameters(reference), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@check
def fsdp_goes_on_from_a_full_state_dict(folder: Path) -> None:
    """What was grown sharded is loaded whole, then sharded again but for the kernels."""
    library = Library()
    script = {1: [order(CommandKind.GERMINATE, library.residual)]}
    first = sharded(library)
    optimizer = sgd(first)
    first.attach_optimizer(optimizer)
    run(first, script, range(6), lambda n: plain_step(first, first, optimizer, own_batch(n)))
    full = get_model_state_dict(first, options=StateDictOptions(full_state_dict=True))
    everywhere = [full if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(everywhere)

    reference = wrapped(library)
    reference.load_state_dict(everywhere[0])
    model = wrapped(library)
    model.load_state_dict(everywhere[0])
    esper.distribute(model)
    kernels = set(kernel_parameters(model))
    for layer in (model[0], model[2], model):
        fully_shard(
            layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), ignored_params=kernels
        )
    host = [p for p in model.parameters() if p not in kernels]
    again = torch.optim.AdamW(host, lr=0.01)
    model.attach_optimizer(again)
    alone = torch.optim.AdamW(reference.parameters(), lr=0.01)
    reference.attach_optimizer(alone)
    for number in range(6, 9):
        plain_step(model, model, again, own_batch(number))
        plain_step(reference, reference, alone, batch_of_all(number))
    for ours, theirs in zip(kernel_weights(model), kernel_weights(reference), strict=True):
        torch.testing.assert_close(ours, theirs)
    model.kasmina_layers["0"].cull(0, "test")
    plain_step(model, model, again, own_batch(9))


@check
def fsdp_in_another_dtype_than_the_kernels(folder: Path) -> None:
    library = Library()
    model = esper.distribute(wrapped(library))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with logged() as lines:
        assert asyncio.run(model.load_kernel("0", 0, library.residual))
        model(own_batch(0)[0]).sum().backward()
        model.step()
        model.step()
    assert model.kasmina_layers["0"].state(0) is S.CULLED
    assert any("failed and is bypassed: RuntimeError" in line for line in lines)


@check
def fsdp_refusals(folder: Path) -> None:
    library = Library()
    model = sharded(library)
    with pytest.raises(TypeError, match=r"is sharded, and esper\.save writes what one process has"):
        esper.save(model, folder / "sharded")
    assert not (folder / "sharded").exists()
    grown = wrapped(library)
    assert asyncio.run(grown.load_kernel("0", 0, library.residual))
    fully_shard(grown, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with pytest.raises(EsperError, match="is sharded, but kernels are kept whole"):
        esper.distribute(grown)
