"""Lets a model be timed only if it computes, bit for bit, what the other one computes."""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WrongResultError(Exception):
    """A variant does not compute what it is compared with, so its time means nothing."""


def check_identical(name: str, reference: nn.Module, model: nn.Module, inp: Tensor) -> None:
    """Compare outputs in eval and training, gradients and ``state_dict()``; leave both as found.

    Raises :class:`WrongResultError`, which names what differs first.
    """
    with deterministic():
        expected, seen = _computed(reference, inp), _computed(model, inp)
    if list(expected) != list(seen):
        raise WrongResultError(f"{name}: expected {list(expected)}, got {list(seen)}")
    for what, value in expected.items():
        if not torch.equal(value, seen[what]):
            raise WrongResultError(f"{name}: {what} is not bit-identical")


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Have torch use no algorithm that may differ from itself."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _computed(model: nn.Module, inp: Tensor) -> dict[str, Tensor]:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(0)  # for dropout
    model.zero_grad()
    with torch.no_grad():
        seen = {"output in eval": model.eval()(inp)}
    out = model.train()(inp)
    out.backward(torch.ones_like(out))
    seen["output in training"] = out.detach()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            seen[f"gradient of {name}"] = parameter.grad.clone()
    seen |= {f"state of {key}": value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(before)
    model.zero_grad()
    return seen
