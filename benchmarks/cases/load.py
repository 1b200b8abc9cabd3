"""How long does it take to have a kernel ready? From the library, and from the cache.

Timed in a thread of its own, as a loader does it: fetched, verified, built, warmed up, and copied
for a seed. Wall time, but for that in which the thread waited for a core.
"""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from benchmarks.clocks import Work
from benchmarks.gate import WrongResultError
from benchmarks.harness import Plan
from benchmarks.kernels import Kernels
from benchmarks.rows import Finding
from benchmarks.schedule import each
from benchmarks.tails import quantile
from esper import KasminaLayer
from esper.kasmina.cache import KernelCache
from esper.kasmina.kernel import Kernel
from esper.kasmina.loader import KernelLoader, compute_alone

DESIGNS = ("residual_mlp", "low_rank", "gated")
CACHE_BYTES = 2**28


def samples(plan: Plan, kernels: Kernels) -> Iterator[Finding]:
    net, inp = nn.Linear(128, 64).to(plan.device), torch.randn(32, 128, device=plan.device)
    layer = kernels.wrapped(net, inp, seeds_per_layer=4).kasmina_layers[""]
    for design in DESIGNS[:1] if plan.quick else DESIGNS:
        artifact_id = kernels.artifact(design, layer.site(0))
        fresh = KernelLoader(kernels.library(), KernelCache(0))
        cached = KernelLoader(kernels.library(), KernelCache(CACHE_BYTES))
        for loader in (fresh, cached):
            check(prepare(loader, layer, artifact_id), inp, plan)
        count = 5 if plan.quick else 200
        for place, loader, limits in (
            ("library", fresh, {50: 2_000, 99: 10_000}),
            ("cache", cached, {50: None, 99: None}),
        ):
            times = times_ns(functools.partial(prepare, loader, layer, artifact_id), count)
            for percent, at_most in limits.items():
                row = f"{design} for Linear(128, 64), from the {place} to ready"
                yield quantile(row, times, percent, at_most=at_most)


def prepare(loader: KernelLoader, layer: KasminaLayer, artifact_id: str) -> Kernel:
    return loader.prepare(artifact_id, layer.site(0), layer.dtype, layer.device)


def check(kernel: Kernel, inp: Tensor, plan: Plan) -> None:
    """A fresh kernel of these designs adds exactly nothing."""
    act = torch.randn(32, 16, device=plan.device)
    if not torch.equal(kernel(inp, act), act):
        raise WrongResultError(f"{kernel.manifest.design.name}: a fresh kernel changes its chunk")


def times_ns(work: Work, count: int) -> list[float]:
    """Return what each call took in a thread of its own, but for its wait for a core."""
    with ThreadPoolExecutor(1, initializer=compute_alone) as loader_thread:
        return [spent.own_ns for spent in loader_thread.submit(each, work, count).result()]
