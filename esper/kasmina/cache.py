"""LRU cache of kernels that are built and on their device, limited by bytes."""

import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass

from esper.kasmina.kernel import Kernel


@dataclass(frozen=True)
class CacheStats:
    """Numbers since the cache was made; ``held_bytes`` and ``num_kernels`` are as of now."""

    hits: int
    misses: int
    evictions: int
    num_kernels: int
    held_bytes: int
    capacity_bytes: int

    @property
    def hit_rate(self) -> float:
        """Share of hits among all look-ups; 0 before the first one."""
        return self.hits / max(1, self.hits + self.misses)


class KernelCache:
    """Prototype kernels by artifact id; each seed works on a copy of its own. Thread-safe.

    Pinned kernels (those in use by a seed) are never evicted, so ``held_bytes`` may exceed the
    capacity while many different kernels are in use.
    """

    def __init__(self, capacity_bytes: int):
        self.capacity_bytes = capacity_bytes
        self._kernels: OrderedDict[str, Kernel] = OrderedDict()
        self._sizes: dict[str, int] = {}  # of those kernels, in bytes
        self._held_bytes = 0
        self._pins: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def get(self, artifact_id: str) -> Kernel | None:
        """Return the prototype and mark it as used last, or None."""
        with self._lock:
            kernel = self._kernels.get(artifact_id)
            self._counts["hits" if kernel is not None else "misses"] += 1
            if kernel is not None:
                self._kernels.move_to_end(artifact_id)
            return kernel

    def put(self, kernel: Kernel) -> None:
        """Add a prototype, and drop those used least lately until the capacity holds."""
        artifact_id, size = kernel.artifact_id, kernel_bytes(kernel)
        with self._lock:
            self._held_bytes += size - self._sizes.get(artifact_id, 0)
            self._kernels[artifact_id], self._sizes[artifact_id] = kernel, size
            self._kernels.move_to_end(artifact_id)
            evicted = self._drop_surplus()
        del evicted  # freed here, outside the lock

    def pin(self, artifact_id: str) -> None:
        with self._lock:
            self._pins[artifact_id] += 1

    def unpin(self, artifact_id: str) -> None:
        with self._lock:
            self._pins[artifact_id] -= 1
            if self._pins[artifact_id] <= 0:
                del self._pins[artifact_id]
            evicted = self._drop_surplus()
        del evicted

    def stats(self) -> CacheStats:
        with self._lock:
            return CacheStats(
                hits=self._counts["hits"],
                misses=self._counts["misses"],
                evictions=self._counts["evictions"],
                num_kernels=len(self._kernels),
                held_bytes=self._held_bytes,
                capacity_bytes=self.capacity_bytes,
            )

    def _drop_surplus(self) -> list[Kernel]:
        if self._held_bytes <= self.capacity_bytes:
            return []
        evicted = []
        for artifact_id in list(self._kernels):
            if self._held_bytes <= self.capacity_bytes:
                break
            if artifact_id in self._pins:
                continue
            evicted.append(self._kernels.pop(artifact_id))
            self._held_bytes -= self._sizes.pop(artifact_id)
        self._counts["evictions"] += len(evicted)
        return evicted


def kernel_bytes(kernel: Kernel) -> int:
    """Bytes of a kernel's parameters and buffers."""
    return sum(t.nbytes for t in (*kernel.parameters(), *kernel.buffers()))
