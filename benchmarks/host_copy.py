"""What the copy of the host costs that a rollback goes back to: ``python -m benchmarks.host_copy``."""

import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from esper.kasmina.host_state import HostState

ROUNDS = 7
T = TypeVar("T")


def milliseconds(work: Callable[[], T]) -> tuple[float, T]:
    begin = time.perf_counter()
    result = work()
    return (time.perf_counter() - begin) * 1e3, result


def main() -> None:
    torch.set_num_threads(1)
    net = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(10)])
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(8, 1024)).sum().backward()
    optimizer.step()
    times_ms: dict[str, list[float]] = {"copy": [], "step of Adam": [], "restore": []}
    for _ in range(ROUNDS):
        copy_ms, state = milliseconds(partial(HostState, net, [optimizer]))
        times_ms["copy"].append(copy_ms)
        times_ms["step of Adam"].append(milliseconds(optimizer.step)[0])
        times_ms["restore"].append(milliseconds(state.restore)[0])
    for name, rounds in times_ms.items():
        print(f"{name}: {min(rounds):.1f} ms")


if __name__ == "__main__":
    main()
