"""Does the pipeline disturb the training? Steps while it is busy against steps while it is idle.

Busy is everything at once: a forge that compiles and an evaluator that benchmarks, both without a
pause and in their niced children, and a thread that loads, verifies and builds a kernel in one step
of fifty, which is far more often than any training germinates. It needs a core that is spare. Blocks
of steps with and without that alternate. What it costs if one load follows another without a pause,
so that a thread wants the interpreter's lock all the time, is a row of its own.

Blocked is the time in which the training thread neither ran nor waited for a core: wall time minus
CPU time minus the time in the run queue, which Linux tells for each thread. For a load it is that of
all steps from the load's begin to its end, mostly one. Where loads follow one another, a step has as
many of them as fit in between its operators.

A hypervisor that takes a core away seems to block a thread, too. How much of that there is shows in a
loop that computes for as long as a step, and needs no lock, no memory and no system for it.
"""

import asyncio
import contextlib
import functools
import itertools
import queue
import threading
from collections.abc import Callable, Iterator
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
LOAD_EVERY = 50  # steps, while the pipeline is busy
SPINS = 60_000  # about a millisecond
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
    alone: list[Spent] = []
    single: list[Spent] = []
    for _ in range(1 if plan.quick else BLOCKS):
        steps = 5 if plan.quick else STEPS
        idle += timed(step, steps)
        alone += each(spin, steps)
        with loads_on_demand(kernels, model) as load:
            single += timed(functools.partial(while_loading, step, load), steps // 4)
            with busy_workers(plan, model):
                busy += timed(now_and_then(load, step), steps)
        with busy_loader(kernels, model):
            loading += timed(step, steps)
    name = f"{MLP.name}, training step"
    idle_ns = [spent.wall_ns for spent in idle]
    for what, spent_so, at_most in (
        ("pipeline busy", busy, 1.05),
        ("one load after another", loading, None),
    ):
        walls_ns = [spent.wall_ns for spent in spent_so]
        yield ratio_of_medians(f"{name}, {what} / idle", walls_ns, "idle", idle_ns, at_most=at_most)
    for what, of, most in (
        ("a loop that needs nothing", alone, None),
        (f"{name}, idle", idle, None),
        (f"{name}, one load", single, 1_000),
        (f"{name}, one load after another", loading, None),
    ):
        blocked = [spent.blocked_ns for spent in of]
        yield quantile(f"{what}: blocked", blocked, 50)
        yield quantile(f"{what}: blocked", blocked, 99, at_most=most)


def timed(step: Work, count: int) -> list[Spent]:
    with torch.enable_grad():
        step()
        return each(step, count)


def spin() -> None:
    """Compute for about a millisecond."""
    for _ in range(SPINS):
        pass


def while_loading(step: Work, load: Callable[[], threading.Event]) -> None:
    """Run steps from the begin of a load to its end."""
    loaded = load()
    step()
    while not loaded.is_set():
        step()


def now_and_then(load: Callable[[], threading.Event], step: Work) -> Work:
    """Return a step in which, once in a while, a load begins."""
    numbers = itertools.count()

    def work() -> None:
        if next(numbers) % LOAD_EVERY == 0:
            load()
        step()

    return work


@contextlib.contextmanager
def loads_on_demand(
    kernels: Kernels, model: esper.MorphableModel
) -> Iterator[Callable[[], threading.Event]]:
    """Yield what begins to load a kernel from the library in a thread of its own."""
    prepare = library_load(kernels, model)
    wanted: queue.SimpleQueue[threading.Event | None] = queue.SimpleQueue()

    def serve() -> None:
        compute_alone()
        while (loaded := wanted.get()) is not None:
            prepare()
            loaded.set()

    def begin() -> threading.Event:
        wanted.put(loaded := threading.Event())
        return loaded

    with _thread(serve, lambda: wanted.put(None)):
        yield begin


def library_load(kernels: Kernels, model: esper.MorphableModel) -> Work:
    """Return what loads a kernel from the library, as if it were the first time."""
    layer = model.kasmina_layers["0"]
    artifact_id = kernels.artifact(DESIGN, layer.site(0))
    loader = KernelLoader(kernels.library(), KernelCache(0))
    return lambda: loader.prepare(artifact_id, layer.site(0), layer.dtype, layer.device)


@contextlib.contextmanager
def busy_loader(kernels: Kernels, model: esper.MorphableModel) -> Iterator[None]:
    """Load one kernel after another meanwhile, each from the library."""
    prepare, enough = library_load(kernels, model), threading.Event()

    def load() -> None:
        compute_alone()
        while not enough.is_set():
            prepare()

    with _thread(load, enough.set):
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

    with _thread(run, enough.set):
        at_work.wait()
        yield


@contextlib.contextmanager
def _thread(run: Work, end: Work) -> Iterator[None]:
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        end()
        thread.join()
