"""What does the training thread pay when a prepared kernel takes its seat?

The kernel is ready when ``model.step()`` is timed, by the thread's CPU clock. That step makes the
layer active, lays out the seed's state, and lets the optimizer know the parameters. It is the first
of its kind in a model of its own, so that all that it touches is new to the core's caches.

A step also counts down and ticks, as does each step with a seed in place. So the model's next step
is timed as well: what the one takes above the other is the swap's own.
"""

import time
from collections.abc import Iterator
from concurrent.futures import wait

import torch
from torch import nn

from benchmarks.gate import WrongResultError
from benchmarks.harness import Plan
from benchmarks.kernels import FOR_EVER, Kernels
from benchmarks.rows import Finding
from benchmarks.tails import quantile
from esper import KasminaLayer, MorphableModel
from esper.contracts import GraftingStrategy, SeedState

DESIGN = "residual_mlp"
STRATEGY = GraftingStrategy(training_steps=FOR_EVER)


def samples(plan: Plan, kernels: Kernels) -> Iterator[Finding]:
    count = 5 if plan.quick else 200
    steps_ns = [two_steps_ns(plan, kernels) for _ in range(count)]
    row = f"step in which a cached kernel ({DESIGN}, Linear(128, 64)) is swapped in"
    for name, times_ns in (
        (row, [swap for swap, _ in steps_ns]),
        (f"{row}, above the next step", [swap - following for swap, following in steps_ns]),
    ):
        yield quantile(name, times_ns, 50)
        yield quantile(name, times_ns, 99, at_most=10)


def two_steps_ns(plan: Plan, kernels: Kernels) -> tuple[int, int]:
    """Return the nanoseconds of the step that seats a kernel, in a model of its own, and the next."""
    prepared = None
    while prepared is None:  # a loader may be done within the very step that began it
        model, layer = germinated(plan, kernels)
        (tenancy,) = model.kasmina.tenancies.values()
        prepared = tenancy.prepared
    wait([prepared])
    start = time.thread_time_ns()
    model.step()
    seated = time.thread_time_ns()
    model.step()
    end = time.thread_time_ns()
    model.kasmina.close()
    if layer.state(0) is not SeedState.TRAINING:
        raise WrongResultError(f"the kernel was not swapped in, the seed is {layer.state(0).name}")
    return seated - start, end - seated


def germinated(plan: Plan, kernels: Kernels) -> tuple[MorphableModel, KasminaLayer]:
    """Return a model whose kernel is being prepared, after one step as long as any other."""
    net = nn.Sequential(nn.Linear(128, 64)).to(plan.device)
    model = kernels.wrapped(net, torch.randn(32, 128, device=plan.device), seeds_per_layer=4)
    model.kasmina.deterministic = False
    layer = model.kasmina_layers["0"]
    layer.request_germination(0, kernels.artifact(DESIGN, layer.site(0)), STRATEGY)
    model.step()
    return model, layer
