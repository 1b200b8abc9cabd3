"""The ways in which a model is used; each makes the call that is timed."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.clocks import Work
from esper import MorphableModel


@dataclass(frozen=True)
class Mode:
    name: str
    grad: bool
    work: Callable[[nn.Module, Tensor], Work]


def forward(model: nn.Module, inp: Tensor) -> Work:
    return functools.partial(model.eval(), inp)


def forward_backward(model: nn.Module, inp: Tensor) -> Work:
    """Gradients accumulate, which is the same work in every call."""
    cotangent = torch.ones_like(model.train()(inp))
    return lambda: model(inp).backward(cotangent)


FORWARD = Mode("forward", False, forward)
FORWARD_BACKWARD = Mode("forward+backward", True, forward_backward)
MODES = (FORWARD, FORWARD_BACKWARD)


def training_step(model: nn.Module, inp: Tensor, learning_rate: float = 0.0) -> Work:
    """Make a step of Adam, with ``model.step()`` if the model is wrapped.

    At the learning rate 0 it does its work, but the weights that all variants share stay the same.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    cotangent = torch.ones_like(model.train()(inp))

    def step() -> None:
        optimizer.zero_grad()
        model(inp).backward(cotangent)
        optimizer.step()

    if not isinstance(model, MorphableModel):
        return step
    model.attach_optimizer(optimizer)

    def step_of_wrapped() -> None:
        step()
        model.step()

    return step_of_wrapped
