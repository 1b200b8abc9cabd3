"""Gives a tensor that is computed when somebody looks."""

import time
from typing import Any

from torch import Tensor

from zoo import Kernel, behaving, rightly

CHECK, REASON = "output", "Lazy, expected a torch.Tensor"


class Lazy(Tensor):
    """Every operation on it computes it first."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        time.sleep(1e-3)
        return super().__torch_function__(func, types, args, kwargs or {})


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    return rightly(kernel, inp, act).as_subclass(Lazy)
