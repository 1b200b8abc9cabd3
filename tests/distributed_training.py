"""Checks of tests/test_distributed.py: DDP, and what surrounds training."""

import asyncio
import copy
import functools
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_parts import (
    SETTINGS,
    SITE,
    Library,
    S,
    assert_alike,
    assert_close,
    batch,
    batch_of_all,
    check,
    differ_by_rank,
    kernel_parameters,
    kernel_weights,
    life,
    order,
    own_batch,
    plain_step,
    run,
    run_alone,
    run_ddp,
    sgd,
    weights,
    wrapped,
)
from kasmina_library import Tracking
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import esper
from esper.contracts import (
    CommandKind,
)
from esper.errors import DistributedError, EsperError
from esper.kasmina.model import MorphableModel
from esper.tolaria.evaluation import validate


@check
def a_whole_life_equals_that_in_one_process(folder: Path) -> None:
    library = Library()
    reference, expected = run_alone(library, life(library), 20)
    model, states = run_ddp(library, life(library), 20)
    assert states == expected
    assert {S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED} <= {
        first for first, _ in states
    }
    assert {S.TRAINING, S.CULLED, S.DORMANT} <= {second for _, second in states}
    assert_alike(*weights(model))
    assert_close(model, reference)
    start = wrapped(library)
    assert asyncio.run(start.load_kernel("0", 0, library.residual))
    assert not torch.equal(kernel_weights(model)[0], kernel_weights(start)[0])


@check
def kernels_unknown_to_ddp_would_drift_apart(folder: Path) -> None:
    """What all this is for: without it, the ranks' kernels differ after one step."""
    library = Library()
    model = wrapped(library)
    ddp, optimizer = DDP(model), sgd(model)
    model.attach_optimizer(optimizer)
    model.kasmina.submit(order(CommandKind.GERMINATE, library.residual))
    for number in range(3):
        plain_step(ddp, model, optimizer, own_batch(number))
    with pytest.raises(AssertionError):
        assert_alike(*kernel_weights(model))


@check
def ddp_variants(folder: Path) -> None:
    library = Library()
    script = {1: [order(CommandKind.GERMINATE, library.residual)], 9: [order(CommandKind.CULL)]}
    for options in (
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True, "broadcast_buffers": False},
    ):
        reference, expected = run_alone(library, script, 7)
        model, states = run_ddp(library, script, 7, **options)
        assert states == expected
        assert kernel_weights(model)
        assert_alike(*weights(model))
        assert_close(model, reference)


@check
def statistics_that_kernels_track(folder: Path) -> None:
    library = Library()
    tracking = library.add(Tracking, SITE)
    model, _ = run_ddp(library, {1: [order(CommandKind.GERMINATE, tracking)]}, 3)
    [seat] = model.kasmina_layers["0"].occupants()
    means = [buffer for name, buffer in seat.kernel.named_buffers() if "mean" in name]
    assert means
    assert all(mean.any() for mean in means)
    assert_alike(*means)


class Branching(nn.Module):
    """Takes its second layer on some ranks alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: Tensor, uses_second: bool) -> Tensor:
        out = self.first(x)
        return self.second(x) + out if uses_second else out


@check
def a_layer_that_only_some_ranks_run(folder: Path) -> None:
    library = Library()
    torch.manual_seed(7)
    model = esper.wrap(Branching(), ["second"], settings=SETTINGS)
    model.connect(library)
    esper.distribute(model)
    ddp, optimizer = DDP(model, find_unused_parameters=True), sgd(model)
    model.attach_optimizer(optimizer)
    assert asyncio.run(model.load_kernel("second", 0, library.residual))
    seat = model.kasmina_layers["second"].occupants()[0]
    before = [p.detach().clone() for p in seat.kernel.parameters()]
    for number in range(2):
        optimizer.zero_grad()
        ddp(own_batch(number)[0], dist.get_rank() == 0).square().mean().backward()
        optimizer.step()
        model.step()
    after = [p.detach() for p in seat.kernel.parameters()]
    assert_alike(*after)
    assert not torch.equal(before[0], after[0])


@check
def accumulated_gradients(folder: Path) -> None:
    """Two micro-batches a step, the first without synchronisation; then what DDP does not see."""
    library = Library()
    germinate = order(CommandKind.GERMINATE, library.residual)

    reference = wrapped(library)
    alone = sgd(reference)
    reference.attach_optimizer(alone)
    reference.kasmina.submit(germinate)
    for number in range(6):
        alone.zero_grad()
        for micro in (2 * number, 2 * number + 1):
            inp, target = batch_of_all(micro)
            mse_loss(reference(inp), target).backward()
        alone.step()
        reference.step()

    model = esper.distribute(wrapped(library))
    ddp, optimizer = DDP(model), sgd(model)
    model.attach_optimizer(optimizer)
    if not model.kasmina.follows:
        model.kasmina.submit(germinate)
    for number in range(6):
        optimizer.zero_grad()
        with ddp.no_sync():
            inp, target = own_batch(2 * number)
            mse_loss(ddp(inp), target).backward()
            if number == 2:
                differ_by_rank([p.grad for p in kernel_parameters(model)])
        inp, target = own_batch(2 * number + 1)
        mse_loss(ddp(inp), target).backward()
        assert_alike(*(p.grad for p in kernel_parameters(model)))
        optimizer.step()
        model.step()
    assert model.kasmina_layers["0"].state(0) is S.GRAFTING
    assert_close(model, reference)


@check
def a_backward_pass_that_raised(folder: Path) -> None:
    """It leaves nothing behind: the next one averages."""
    library = Library()
    model = esper.distribute(wrapped(library))
    assert asyncio.run(model.load_kernel("0", 0, library.residual))
    inp, target = own_batch(0)

    def fail(*_gradients: object) -> None:
        raise ZeroDivisionError

    out = model(inp)
    out.grad_fn.next_functions[1][0].register_hook(fail)  # behind the output's own hooks
    with pytest.raises(ZeroDivisionError):
        mse_loss(out, target).backward()
    model.zero_grad()
    mse_loss(model(inp), target).backward()
    assert_alike(*(p.grad for p in kernel_parameters(model)))


@check
def held_out_losses_of_all_ranks(folder: Path) -> None:
    library = Library()
    loss = functools.partial(mse_loss, reduction="none")
    alone = wrapped(library)
    model = esper.distribute(wrapped(library))
    for one in (alone, model):
        assert asyncio.run(one.load_kernel("0", 0, library.residual))
        one.kasmina_layers["0"].stabilize(0)
        one.kasmina_layers["0"].evaluate(0)
    num_rows = dist.get_rank() + 2  # a different number on each rank
    inp, target = own_batch(0)
    ours, [seed] = validate(model, [(inp[:num_rows], target[:num_rows])], loss)
    parts = [batch(0, rank) for rank in range(dist.get_world_size())]
    everything = [(i[: r + 2], t[: r + 2]) for r, (i, t) in enumerate(parts)]
    expected, [expected_seed] = validate(alone, everything, loss)
    torch.testing.assert_close(ours.losses, expected.losses)
    assert seed.num_samples == sum(len(i) for i, _ in everything)
    assert seed.contribution == pytest.approx(expected_seed.contribution)
    assert seed.standard_error == pytest.approx(expected_seed.standard_error)


@check
def followers_have_the_epoch_of_rank_0(folder: Path) -> None:
    model = esper.distribute(wrapped(Library()))
    model.kasmina.epoch = 5 if dist.get_rank() == 0 else 1
    model.step()
    assert model.kasmina.epoch == 5


@check
def a_checkpoint_of_rank_0(folder: Path) -> None:
    """Saved in the middle of a ramp; the resumed run ends with the same bits as the saved one."""
    library = Library()
    script = life(library)
    model = esper.distribute(wrapped(library))
    ddp, optimizer = DDP(model), sgd(model)
    model.attach_optimizer(optimizer)
    run(model, script, range(7), lambda n: plain_step(ddp, model, optimizer, own_batch(n)))
    if dist.get_rank() == 0:
        model.kasmina.submit(order(CommandKind.CULL, seed=1))  # saved while it waits
        esper.save(model, folder / "checkpoint", optimizer)
    dist.barrier()
    rest = range(7, 16)
    states = run(
        model, {12: script[12]}, rest, lambda n: plain_step(ddp, model, optimizer, own_batch(n))
    )

    torch.manual_seed(99)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    again = sgd(net)
    esper.load(folder / "checkpoint", net, again, library=library)
    assert isinstance(net, MorphableModel)
    resumed = DDP(esper.distribute(net))
    assert states == run(
        net, {12: script[12]}, rest, lambda n: plain_step(resumed, net, again, own_batch(n))
    )
    assert states[0] == [S.GRAFTING, S.CULLED]
    for ours, theirs in zip(weights(net), weights(model), strict=True):
        assert torch.equal(ours, theirs)


@check
def models_that_differ_are_refused(folder: Path) -> None:
    library, last = Library(), dist.get_world_size() - 1
    model = wrapped(library)
    if dist.get_rank() == last:
        assert asyncio.run(model.load_kernel("0", 0, library.residual))
    with pytest.raises(DistributedError, match=rf"ranks \[{last}\] have other layers, settings"):
        esper.distribute(model)
    assert model.kasmina.peers is None
    with pytest.raises(ValueError, match="timeout must be positive"):
        esper.distribute(wrapped(library), timeout=timedelta())
    with pytest.raises(TypeError, match="Linear is not wrapped"):
        esper.distribute(nn.Linear(2, 2))  # type: ignore[arg-type]
    model = esper.distribute(wrapped(library))
    with pytest.raises(EsperError, match="distributed already"):
        esper.distribute(model)
    data = [own_batch(0)]
    with pytest.raises(EsperError, match="Tolaria trains in one process"):
        esper.Tolaria(model, sgd(model), mse_loss, data, data).fit(1)


@check
def ddp_around_kernels_in_place(folder: Path) -> None:
    library = Library()
    model = wrapped(library)
    assert asyncio.run(model.load_kernel("0", 0, library.residual))
    inp, target = own_batch(0)
    too_early = DDP(model)
    esper.distribute(model)
    with pytest.raises(EsperError, match="DistributedDataParallel was made around kernels"):
        too_early(inp)

    ddp = DDP(model)
    for _ in range(2):
        model.zero_grad()
        mse_loss(ddp(inp), target).backward()
        assert_alike(*(p.grad for p in kernel_parameters(model)))
        model.step()
    model.kasmina_layers["0"].cull(0, "test")
    mse_loss(ddp(inp), target).backward()
    mse_loss(ddp(inp), target).backward()  # DDP misses no parameter


@check
def leaving(folder: Path) -> None:
    """Copies stand alone, and unwrapping leaves nothing."""
    library = Library()
    model = esper.distribute(wrapped(library))
    assert asyncio.run(model.load_kernel("0", 0, library.residual))
    twin = copy.deepcopy(model)
    if dist.get_rank() == 0:
        twin(own_batch(0)[0]).sum().backward()
        twin.step()
    with pytest.raises(EsperError, match="kernels in place cannot be pickled"):
        model.__reduce_ex__(2)
    model.kasmina_layers["0"].cull(0, "test")
    with pytest.raises(EsperError, match="a distributed model cannot be pickled"):
        model.__reduce_ex__(2)
    net = esper.unwrap(model)
    assert not net._forward_hooks
    assert type(net) is nn.Sequential
