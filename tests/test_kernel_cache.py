"""The LRU cache against the dumbest correct model: a list."""

import hypothesis.strategies as st
import torch
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

from esper.kasmina.cache import KernelCache, kernel_bytes

CAPACITY = 100


class Sized(nn.Module):
    """Stands in for a kernel: an id, and parameters of so many bytes."""

    def __init__(self, artifact_id: str, num_floats: int):
        super().__init__()
        self.artifact_id = artifact_id
        self.weight = nn.Parameter(torch.zeros(num_floats))


class CacheMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.cache = KernelCache(CAPACITY)
        self.kernels: list[Sized] = []  # least lately used first
        self.pins: list[str] = []
        self.hits = self.misses = 0

    @rule(name=st.sampled_from("abcdef"), size=st.integers(0, 30))
    def put(self, name: str, size: int) -> None:
        kernel = Sized(name, size)
        self.cache.put(kernel)
        self.kernels = [k for k in self.kernels if k.artifact_id != name] + [kernel]
        self._evict()

    @rule(name=st.sampled_from("abcdef"))
    def get(self, name: str) -> None:
        expected = next((k for k in self.kernels if k.artifact_id == name), None)
        assert self.cache.get(name) is expected
        if expected is None:
            self.misses += 1
        else:
            self.hits += 1
            self.kernels.remove(expected)
            self.kernels.append(expected)

    @rule(name=st.sampled_from("abcdef"))
    def pin(self, name: str) -> None:
        self.cache.pin(name)
        self.pins.append(name)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.pins))
        self.cache.unpin(name)
        self.pins.remove(name)
        self._evict()

    @invariant()
    def agrees(self) -> None:
        stats = self.cache.stats()
        assert stats.num_kernels == len(self.kernels)
        assert stats.held_bytes == sum(map(kernel_bytes, self.kernels))
        assert (stats.hits, stats.misses) == (self.hits, self.misses)

    def _evict(self) -> None:
        for kernel in list(self.kernels):
            if sum(map(kernel_bytes, self.kernels)) <= CAPACITY:
                return
            if kernel.artifact_id not in self.pins:
                self.kernels.remove(kernel)


TestCache = CacheMachine.TestCase
