"""How far a bounded activation is driven to its bounds, from the mean and variance of its output.

With the centre c and the radius r of its range, and its output y,

    saturation = mean of ((y - c) / r)^2 = (variance + (mean - c)^2) / r^2

is 0 where every output is in the middle and 1 where each is at a bound, be it the same one or not.
For Tanh and Sigmoid, whose slopes are 1 - y^2 and y * (1 - y), ``1 - saturation`` is exactly the
mean slope over the steepest; of what is clipped (Hardtanh, Hardsigmoid, ReLU6) saturation is never
less than the share; Softsign's slope falls off faster.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn


class Reach(NamedTuple):
    """The range of an activation's output. A ReLU rests at 0, so a clipped one begins there."""

    centre: float
    radius: float

    def saturation(self, mean: float, variance: float) -> float:
        """Return a number in [0, 1]; rounding may have taken the outputs beyond their bounds."""
        # Divided first, since bounds as far off as floating point goes have no square.
        offset = (mean - self.centre) / self.radius
        return min(1.0, variance / self.radius / self.radius + offset**2)


def _of_clipping(module: nn.Hardtanh) -> Reach | None:
    low, high = module.min_val, module.max_val
    reach = Reach(0.0, high) if low == 0 else Reach((low + high) / 2, (high - low) / 2)
    return reach if math.isfinite(reach.radius) else None


_AROUND_ZERO, _ABOVE_ZERO = Reach(0.0, 1.0), Reach(0.5, 0.5)
_REACHES: dict[str, Callable[[Any], Reach | None]] = {
    **dict.fromkeys(("Tanh", "Softsign"), lambda _: _AROUND_ZERO),
    **dict.fromkeys(("Sigmoid", "Hardsigmoid"), lambda _: _ABOVE_ZERO),
    **dict.fromkeys(("Hardtanh", "ReLU6"), _of_clipping),
}


def reach_of(host_name: str, module: nn.Module) -> Reach | None:
    """Return the range of a module that runs the forward of ``host_name``, None if it has none."""
    reach = _REACHES.get(host_name)
    return None if reach is None else reach(module)
