"""What one seed is going through, from germination until it is FOSSILIZED or DORMANT."""

import copy
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from esper.contracts import GraftingStrategy
from esper.kasmina.host_state import HostState
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.prepared import Prepared


def _uncancellable() -> "Future[bool]":
    """A waiter that gives up must not take the answer from the training thread's hands."""
    future: Future[bool] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(eq=False)
class Tenancy:
    """What one seed is going through, from germination until it is FOSSILIZED or DORMANT."""

    layer: KasminaLayer
    seed_idx: int
    artifact_id: str
    strategy: GraftingStrategy | None = None  # None: moved by hand
    alpha: float = 0.0  # for loading by hand
    steps_left: int | None = None  # in the present state; None: it waits for somebody's word
    prepared: "Future[Prepared] | None" = None  # while LOADING
    fits: bool = False  # what was prepared has been found fit on this rank, others may still load
    host_state: HostState | None = None  # of before the host heard the kernel
    settled: "Future[bool]" = field(default_factory=_uncancellable)  # is it in place?

    def answer(self, in_place: bool) -> None:
        """Tell whoever waits for the kernel; only the first answer counts."""
        if not self.settled.done():
            self.settled.set_result(in_place)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tenancy":
        layer = copy.deepcopy(self.layer, memo)
        return replace(
            self, layer=layer, prepared=None, fits=False, host_state=None, settled=_uncancellable()
        )
