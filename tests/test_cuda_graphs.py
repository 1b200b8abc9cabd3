"""Recorded once, run many times: CUDA graphs of wrapped models, and that nothing synchronises.

A CUDA graph needs a GPU. On the CPU the same tests run the same steps eagerly or, where nothing
but the forward is recorded, as code that is compiled once.
"""

import asyncio
import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from kasmina_library import MemoryLibrary
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.profiler import ProfilerActivity, profile

import esper
from esper.config import SeedSettings
from esper.contracts import GraftingStrategy, RampCurve, SeedState
from esper.kasmina.model import MorphableModel
from esper.kasmina.observation import Observation

S = SeedState
STATES = (S.DORMANT, S.TRAINING, S.GRAFTING)
NUM_SEEDS = 2
WARMUPS = 3
RAMP_STEPS = 4

Work = Callable[[], Tensor]


def net(device: str) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).to(device)


def batch(device: str) -> Tensor:
    return torch.randn(5, 8, device=device)


def grown(
    host: nn.Module, state: SeedState, device: str, *, observe_every: int = 2**31
) -> MorphableModel:
    """Wrap ``host`` and bring both seeds of both of its Linears into ``state``."""
    library = MemoryLibrary()
    settings = SeedSettings(
        seeds_per_layer=NUM_SEEDS, deterministic=True, observe_every=observe_every
    )
    model = esper.wrap(host, [nn.Linear], settings=settings)
    model.connect(library)
    artifact_id = library.add(device=device)
    for layer in model.kasmina_layers.values():
        for seed_idx in range(NUM_SEEDS):
            if state is S.TRAINING:
                forever = GraftingStrategy(training_steps=10_000)
                layer.request_germination(seed_idx, artifact_id, forever)
            elif state is S.GRAFTING:
                assert asyncio.run(layer.load_kernel(seed_idx, artifact_id, alpha=0.5))
    model.step()
    assert model.kasmina.seeds_in(frozenset({state}))
    return model


def start_ramps(model: MorphableModel) -> None:
    for index in range(model.kasmina.bank.num_seeds):
        model.kasmina.bank.start_ramp(index, 1.0, RAMP_STEPS, RampCurve.LINEAR)


def training_step(model: nn.Module, inp: Tensor) -> Work:
    """Return a whole training step: forward, backward and optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if isinstance(model, MorphableModel):
        model.attach_optimizer(optimizer)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = model(inp).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def recorded(work: Work, device: str) -> Work:
    """Return ``work`` as a CUDA graph, after some runs of it; on the CPU after as many as it is."""
    if device == "cpu":
        for _ in range(WARMUPS):
            work()
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUPS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@contextlib.contextmanager
def synchronisation_forbidden(device: str) -> Iterator[None]:
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------ capture and replay


@pytest.mark.parametrize("state", [S.DORMANT, S.TRAINING])
def test_a_recorded_forward_computes_what_the_host_does(state: SeedState, device: str) -> None:
    host = net(device)
    model, inp = grown(copy.deepcopy(host), state, device), batch(device)
    replay = recorded(lambda: model(inp), device)
    for _ in range(2):
        inp.normal_()
        assert torch.equal(replay(), host(inp))


@pytest.mark.parametrize("grad", [True, False])
def test_alpha_moves_between_replays(grad: bool, device: str) -> None:
    model, inp = grown(net(device), S.GRAFTING, device), batch(device)
    with torch.set_grad_enabled(grad):
        replay = recorded(lambda: model(inp), device)
        start_ramps(model)
        seen = []
        for _ in range(RAMP_STEPS):
            model.kasmina.bank.tick(3)
            seen.append(replay().detach().clone())
            torch.testing.assert_close(seen[-1], model(inp).detach())
    assert all(not torch.equal(seen[i], seen[i + 1]) for i in range(RAMP_STEPS - 1))
    assert model.kasmina.bank.fields["alpha_blend"][: NUM_SEEDS * 2].tolist() == [1.0] * 4


def test_alpha_moves_between_runs_of_code_that_is_compiled_once(fresh_compiler: None) -> None:
    model, inp = grown(net("cpu"), S.GRAFTING, "cpu"), batch("cpu")
    counter = CompileCounter()
    run = torch.compile(model, backend=counter, fullgraph=True)
    run(inp)
    start_ramps(model)
    seen = []
    for _ in range(RAMP_STEPS):
        model.kasmina.bank.tick(3)
        seen.append(run(inp).detach())
        torch.testing.assert_close(seen[-1], model(inp).detach())
    assert all(not torch.equal(seen[i], seen[i + 1]) for i in range(RAMP_STEPS - 1))
    assert counter.frame_count == 1


@pytest.mark.parametrize("state", STATES)
def test_a_recorded_training_step_trains_as_an_eager_one(state: SeedState, device: str) -> None:
    eager = grown(net(device), state, device)
    model, inp = copy.deepcopy(eager), batch(device)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    replay = recorded(training_step(model, inp), device)
    step = training_step(eager, inp)
    for _ in range(WARMUPS):
        step()
    for _ in range(3):
        torch.testing.assert_close(replay(), step())
    trained = dict(eager.named_parameters())
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, trained[name])
        assert not torch.equal(value, start[name]), name


def test_a_recorded_training_step_leaves_the_host_alone_while_seeds_train(device: str) -> None:
    host = net(device)
    model, inp = grown(copy.deepcopy(host), S.TRAINING, device), batch(device)
    kernel = model.kasmina_layers["0"].kernel(1)
    before = [weight.detach().clone() for weight in kernel.weights()]
    runs = [recorded(training_step(module, inp), device) for module in (model, host)]
    for _ in range(3):
        for run in runs:
            run()
    for ours, theirs in zip(model.parameters(), host.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(not torch.equal(a, b) for a, b in zip(before, kernel.weights(), strict=True))


# ------------------------------------------------------------------ nothing waits


@pytest.mark.parametrize("state", STATES)
def test_nothing_synchronises(state: SeedState, device: str) -> None:
    model, inp = grown(net(device), state, device, observe_every=2), batch(device)
    observed: list[Observation] = []
    model.kasmina.emit_observation = observed.append
    step = training_step(model, inp)
    step()  # compiles Triton kernels, which does wait
    with synchronisation_forbidden(device):
        for _ in range(20):
            step()
            model.step()
    if device == "cuda":
        torch.cuda.synchronize()
    model.step()
    assert observed
    assert observed[-1].snapshot.fields["health_accumulator"][0, :4].tolist() == [20.0] * 4
    assert all(layer.execution_time_us > 0 for layer in observed[-1].layers)


# ------------------------------------------------------------------ dormant is free


def operations(work: Work, device: str) -> Counter[str]:
    """Return how often each operator ran, memory was taken or given back, and each kernel ran."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    work()
    with profile(activities=activities, profile_memory=True) as profiled:
        work()
        if device == "cuda":
            torch.cuda.synchronize()
    return Counter(event.name for event in profiled.events())


def allocations(work: Work) -> int:
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    work()
    return int(torch.cuda.memory_stats()["allocation.all.allocated"] - before)


@pytest.mark.parametrize("train", [True, False])
def test_a_dormant_model_runs_the_same_kernels_and_takes_the_same_memory(
    train: bool, device: str
) -> None:
    host, inp = net(device), batch(device)
    model = grown(copy.deepcopy(host), S.DORMANT, device)

    def work_of(module: nn.Module) -> Work:
        step = training_step(module, inp) if train else lambda: module(inp)

        def work() -> Tensor:
            result = step()
            if isinstance(module, MorphableModel):
                module.step()
            return result

        return work

    ours, theirs = operations(work_of(model), device), operations(work_of(host), device)
    assert ours == theirs
    assert ours["aten::linear"] == 2
    if device == "cuda":
        assert allocations(work_of(model)) == allocations(work_of(host))


def test_an_active_model_is_seen_to_run_more() -> None:
    host, inp = net("cpu"), batch("cpu")
    model = grown(copy.deepcopy(host), S.GRAFTING, "cpu")
    ours = operations(lambda: model(inp), "cpu")
    assert ours != operations(lambda: host(inp), "cpu")
