from collections.abc import Callable, Sequence

from torch import Tensor

def observe_both_passes(
    y: Tensor, channel_dim: int, health: Tensor, first_seed: int, num_seeds: int, /
) -> None: ...
def observed_relu(
    x: Tensor, channel_dim: int, health: Tensor, first_seed: int, num_seeds: int, /
) -> Tensor: ...
def bottleneck(
    y: Tensor,
    inp: Tensor,
    leaves: Sequence[Tensor],
    in_place: bool,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    activation: int,
    seeds: Sequence[int],
    starts: Sequence[int],
    alpha: Tensor | None,
    non_finite: Tensor,
    fault: Tensor,
    /,
) -> Tensor:
    """Return the layer's output; without an alpha the host does not hear the seeds."""

def connect(
    differentiable_grads: Callable[..., Sequence[Tensor | None]],
    refused_error: type[RuntimeError],
    /,
) -> None:
    """Say what is called for gradients that will be differentiated, and what refusals raise."""

class Bottlenecks:
    """All seeds of one design on one layer; see :mod:`esper.bottleneck`."""

    def __init__(
        self,
        places: Sequence[int],
        stack: Sequence[Tensor] | None,
        addresses: Sequence[int],
        channels: int,
        min_rank: int,
        max_rank: int,
        activation: int,
        seeds: Sequence[int],
        starts: Sequence[int],
        alpha: Tensor,
        non_finite: Tensor,
        fault: Tensor,
        /,
    ) -> None: ...
    def blend(
        self, host: Tensor, inp: Tensor, leaves: Sequence[Tensor], in_place: bool, /
    ) -> Tensor | None:
        """Return the layer's output, or None for a call that the op does not compute."""

    def isolate(self, host: Tensor, inp: Tensor, leaves: Sequence[Tensor], /) -> Tensor | None:
        """Return ``host``, or None for a call that the op does not compute."""
