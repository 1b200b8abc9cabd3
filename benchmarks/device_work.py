"""What a call makes a CUDA device do: kernels, allocations, synchronisations; and its capture."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C._autograd import DeviceType

from benchmarks.clocks import Work

_WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")


def device_work(work: Work) -> dict[str, int]:
    """Return how many kernels, allocations and synchronisations one call of ``work`` makes."""
    for _ in range(3):
        work()  # fills caches and allocates gradients
    torch.cuda.synchronize()
    allocated = _allocations()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        allocations = _allocations() - allocated
        torch.cuda.synchronize()
    events = profile.events() or []
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    waits = [event for event in events if event.name in _WAITS]
    return {
        "kernels": len(kernels),
        "allocations": allocations,
        "synchronisations": len(waits) - 1,  # ours
    }


def _allocations() -> int:
    return int(torch.cuda.memory_stats()["allocation.all.allocated"])


@dataclass(frozen=True)
class CapturedCall:
    graph: "torch.cuda.CUDAGraph"
    output: Tensor  # rewritten by each replay

    def replay(self) -> None:
        self.graph.replay()


def captured(work: Work) -> CapturedCall:
    """Capture a call of ``work``, which returns a tensor, in a CUDA graph."""
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = work()
    assert isinstance(output, Tensor)
    return CapturedCall(graph, output)
