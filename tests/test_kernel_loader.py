"""Kernels prepared in the background: loads of one artifact merged, and warm when they come."""

import copy
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forge_samples as samples
import pytest
import torch
from kasmina_library import LINEAR_8_4, MemoryLibrary, Residual

import esper.kasmina.loader as loader_module
from esper.contracts import KernelBundle, KernelStatus
from esper.errors import ArtifactNotValidatedError
from esper.kasmina.cache import KernelCache
from esper.kasmina.kernel import Kernel
from esper.kasmina.loader import KernelLoader, compute_alone, warm_up

CPU = torch.device("cpu")
THREADS = 4


class SlowLibrary(MemoryLibrary):
    """Hands nothing out before the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.asked = threading.Semaphore(0)
        self.fetched: list[str] = []

    def fetch_kernel(self, artifact_id: str) -> KernelBundle:
        self.fetched.append(artifact_id)
        self.asked.release()
        self.gate.wait()
        return super().fetch_kernel(artifact_id)


class Lookups(KernelCache):
    """A cache that tells how often it was asked."""

    def __init__(self) -> None:
        super().__init__(2**20)
        self.asked = threading.Semaphore(0)

    def get(self, artifact_id: str) -> Kernel | None:
        found = super().get(artifact_id)
        self.asked.release()
        return found


def prepare(loader: KernelLoader, artifact_id: str) -> Kernel:
    return loader.prepare(artifact_id, LINEAR_8_4, torch.float32, CPU)


def wait_for(semaphore: threading.Semaphore, times: int) -> None:
    for _ in range(times):
        assert semaphore.acquire(timeout=60)


def test_concurrent_loads_of_one_artifact_are_merged() -> None:
    library, cache = SlowLibrary(), Lookups()
    loader = KernelLoader(library, cache)
    artifact_id, other_id = library.add(), library.add(Residual, dropout=0.5)
    with ThreadPoolExecutor(THREADS + 1) as pool:
        loads = [pool.submit(prepare, loader, artifact_id) for _ in range(THREADS)]
        other = pool.submit(prepare, loader, other_id)
        wait_for(cache.asked, THREADS + 1)
        wait_for(library.asked, 2)
        library.gate.set()
        kernels = [load.result() for load in loads]
        assert other.result().artifact_id == other_id
    assert sorted(library.fetched) == sorted([artifact_id, other_id])
    weights = [kernel.weights()[0] for kernel in kernels]
    assert len({weight.data_ptr() for weight in weights}) == THREADS, "each seed has its own"
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    prepare(loader, artifact_id)
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.num_kernels) == (1, THREADS + 1, 2)
    assert stats.hit_rate == 1 / (THREADS + 2)
    assert stats.held_bytes > 0


def test_a_load_that_fails_fails_for_all_who_wait_and_may_be_tried_again() -> None:
    library, cache = SlowLibrary(), Lookups()
    loader = KernelLoader(library, cache)
    artifact_id = library.add(status=KernelStatus.REJECTED)
    with ThreadPoolExecutor(THREADS) as pool:
        loads = [pool.submit(prepare, loader, artifact_id) for _ in range(THREADS)]
        wait_for(cache.asked, THREADS)
        library.gate.set()
        for load in loads:
            with pytest.raises(ArtifactNotValidatedError, match="is REJECTED"):
                load.result()
    assert library.fetched == [artifact_id]
    library.add()
    assert prepare(loader, artifact_id).artifact_id == artifact_id


def test_the_hit_rate_of_an_unused_cache_is_nought() -> None:
    assert KernelCache(1).stats().hit_rate == 0


def test_what_is_prepared_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[str] = []
    monkeypatch.setattr(
        loader_module, "warm_up", lambda kernel, device: warmed.append(kernel.artifact_id)
    )
    library = MemoryLibrary()
    loader = KernelLoader(library, KernelCache(2**20))
    artifact_id = library.add()
    for _ in range(2):
        prepare(loader, artifact_id)
    assert warmed == [artifact_id], "once, not for every seed"


@pytest.mark.parametrize("design", [samples.Stateful, samples.Tied, samples.Shifted])
def test_warming_up_leaves_no_trace(design: type[samples.SiteModule]) -> None:
    kernel = samples.kernel(samples.design(design))
    before, training = copy.deepcopy(kernel.state_dict()), kernel.training
    random_state = torch.get_rng_state()
    warm_up(kernel, CPU)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert kernel.training is training
    assert all(parameter.grad is None for parameter in kernel.parameters())
    for name, value in kernel.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("training", [True, False])
def test_warming_up_runs_forward_and_backward(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training mode, except for a kernel that draws random numbers there."""
    runs: list[tuple[bool, bool]] = []
    call = Kernel.call

    def recorded(kernel: Kernel, *args: object) -> torch.Tensor:
        out = call(kernel, *args)
        out.register_hook(lambda grad: runs.append((kernel.training, bool(grad.any()))))
        return out

    monkeypatch.setattr(Kernel, "call", recorded)
    warm_up(samples.kernel(samples.design(samples.Tied if training else samples.Stateful)), CPU)
    assert runs == [(training, True)]


@pytest.mark.skipif(os.cpu_count() == 1, reason="OpenMP brings no helpers on a single core")
def test_a_loading_thread_brings_no_threads_of_openmp() -> None:
    """They would spin on the cores that the trainer computes on."""
    kernel = samples.kernel(samples.design(samples.Tied))
    threads = torch.get_num_threads()

    def count_threads() -> int:
        warm_up(kernel, CPU)
        return sum(1 for _ in Path("/proc/self/task").iterdir())

    counts = []
    for initializer in (compute_alone, None):
        with ThreadPoolExecutor(1, initializer=initializer) as pool:
            counts.append(pool.submit(count_threads).result())
    assert counts[0] < counts[1], "without it there are helpers"
    assert torch.get_num_threads() == threads, "the trainer keeps its own"


@pytest.mark.cuda
def test_a_kernel_copied_on_a_stream_of_its_own_computes_on_the_training_stream() -> None:
    library = MemoryLibrary()
    artifact_id = library.add(device="cuda")
    device = torch.device("cuda", torch.cuda.current_device())
    loader = KernelLoader(library, KernelCache(2**20))
    kernel = loader.prepare(artifact_id, LINEAR_8_4, torch.float32, device)
    reference = loader.prepare(artifact_id, LINEAR_8_4, torch.float32, device).cpu()
    inp, act = torch.randn(5, 8), torch.randn(5, 4)
    torch.testing.assert_close(
        kernel(inp.to(device), act.to(device)).cpu(), reference(inp, act), atol=1e-5, rtol=1e-5
    )
