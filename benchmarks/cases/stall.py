"""Does the pipeline disturb the training? Steps while it is busy against steps while it is idle.

Busy is everything at once: a forge that compiles, an evaluator that benchmarks, both in their niced
children, and a loader that loads, verifies and builds one kernel after another in a thread. It needs
a core that is spare. Blocks of steps with and without that alternate.

Blocked is the time of a step in which its thread neither ran nor waited for a core: wall time
minus CPU time minus the time in the run queue, which Linux tells for each thread.
"""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from tempfile import TemporaryDirectory

import torch

import esper
from benchmarks.clocks import Work
from benchmarks.harness import Plan
from benchmarks.kernels import DTYPE, Kernels
from benchmarks.models import MLP
from benchmarks.modes import training_step
from benchmarks.rows import Finding
from benchmarks.schedule import Spent, each
from benchmarks.tails import quantile, ratio_of_medians
from esper import blueprints
from esper.kasmina.cache import KernelCache
from esper.kasmina.loader import KernelLoader, compute_alone

BLOCKS = 6  # of each kind
STEPS = 400  # a block
DESIGN = "residual_mlp"


def samples(plan: Plan, kernels: Kernels) -> Iterator[Finding]:
    net, inp = MLP.prepare(plan.device, plan.seed)
    model = kernels.wrapped(net, inp, seeds_per_layer=4)
    site = model.kasmina_layers["0"].site(0)
    kernels.artifact(DESIGN, site)
    step = training_step(model, inp)
    idle: list[Spent] = []
    busy: list[Spent] = []
    loading: list[Spent] = []
    for _ in range(1 if plan.quick else BLOCKS):
        steps = 5 if plan.quick else STEPS
        idle += timed(step, steps)
        with busy_loader(kernels, model):
            loading += timed(step, steps)
            with busy_workers(plan, model):
                busy += timed(step, steps)
    name = f"{MLP.name}, training step"
    row = f"{name}, pipeline busy / idle"
    walls = [spent.wall_ns for spent in busy]
    yield ratio_of_medians(row, walls, "idle", [s.wall_ns for s in idle], at_most=1.05)
    for what, of, at_most in (("idle", idle, None), ("one load after another", loading, 1_000)):
        blocked = [spent.blocked_ns for spent in of]
        yield quantile(f"{name}, {what}: blocked", blocked, 50)
        yield quantile(f"{name}, {what}: blocked", blocked, 99, at_most=at_most)


def timed(step: Work, count: int) -> list[Spent]:
    with torch.enable_grad():
        step()
        return each(step, count)


@contextlib.contextmanager
def busy_loader(kernels: Kernels, model: esper.MorphableModel) -> Iterator[None]:
    """Load one kernel after another meanwhile, each from the library."""
    layer = model.kasmina_layers["0"]
    artifact_id = kernels.artifact(DESIGN, layer.site(0))
    loader = KernelLoader(kernels.library(), KernelCache(0))
    enough = threading.Event()

    def load() -> None:
        compute_alone()
        while not enough.is_set():
            loader.prepare(artifact_id, layer.site(0), layer.dtype, layer.device)

    with _thread(load, enough):
        yield


@contextlib.contextmanager
def busy_workers(plan: Plan, model: esper.MorphableModel) -> Iterator[None]:
    """Compile and evaluate one kernel after another meanwhile, in a library of their own."""
    site = model.kasmina_layers["0"].site(0)
    enough, at_work = threading.Event(), threading.Event()

    async def work(library: esper.Urza) -> None:
        device = plan.device.type
        async with (
            esper.Tezzeret(library, device=device) as forge,
            esper.Urabrask(library, device=device) as evaluator,
        ):
            blueprint_id = await forge.submit(blueprints.get(DESIGN), site, DTYPE)
            artifact_id = await forge.compile(blueprint_id)
            while not enough.is_set():
                evaluating = asyncio.create_task(evaluator.evaluate(artifact_id))
                await forge.compile(blueprint_id)
                at_work.set()
                await evaluating

    def run() -> None:
        with TemporaryDirectory() as folder, esper.Urza(folder) as library:
            asyncio.run(work(library))

    with _thread(run, enough):
        at_work.wait()
        yield


@contextlib.contextmanager
def _thread(run: Work, enough: threading.Event) -> Iterator[None]:
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()
