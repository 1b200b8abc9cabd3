"""What the ranks of a distributed run tell one another beside training: small tensors, over gloo.

A process group of its own on the CPU, so that on CUDA nothing here waits for the device.
"""

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from esper.errors import DistributedError


class ControlGroup:
    """The ranks of ``process_group``, until that is destroyed. Every method is a collective.

    Each waits for the slowest rank, and raises :class:`DistributedError` once a rank is gone, or
    has not come within the timeout. Training thread.
    """

    def __init__(self, process_group: dist.ProcessGroup, timeout: timedelta):
        ranks = dist.get_process_group_ranks(process_group)
        self.rank = dist.get_rank(process_group)
        self.size = len(ranks)
        self.timeout = timeout
        with self._naming_the_lost("making a group for control"):
            self._group = dist.new_group(
                ranks,
                timeout=timeout,
                backend="gloo",
                # Names of groups that are made locally may come twice, once one was destroyed.
                use_local_synchronization=self.size < dist.get_world_size(),
            )

    def maxima(self, values: Sequence[int]) -> list[int]:
        """Return the largest value of any rank at each place."""
        shared = torch.tensor(values, dtype=torch.int64)
        with self._naming_the_lost("agreeing"):
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
        return shared.tolist()

    def broadcast(self, letter: bytes, num_bytes: int, source: int = 0) -> bytes:
        """Return the letter of rank ``source``, which has so many bytes."""
        shared = torch.zeros(num_bytes, dtype=torch.uint8)
        if self.rank == source:
            shared[: len(letter)] = torch.tensor(list(letter), dtype=torch.uint8)
        with self._naming_the_lost("passing on a message"):
            dist.broadcast(shared, group=self._group, group_src=source)
        return bytes(shared.tolist())

    def concatenated(self, rows: Tensor) -> Tensor:
        """Return the ``rows``, (N,) on the CPU, of all ranks in their order; N may differ."""
        counts = [0] * self.size
        counts[self.rank] = len(rows)
        counts = self.maxima(counts)
        padded = torch.zeros(max(counts), dtype=rows.dtype)
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        with self._naming_the_lost("gathering"):
            dist.all_gather(parts, padded, group=self._group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @contextlib.contextmanager
    def _naming_the_lost(self, occupation: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise DistributedError(
                f"rank {self.rank} of {self.size} lost the others while {occupation}: a rank is "
                f"gone, or did not come within {self.timeout.total_seconds():g} s: {error}"
            ) from error
