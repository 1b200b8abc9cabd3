"""Lets a model be timed only if it computes what the other one computes."""

import contextlib
import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

# Relative norm of the difference. Both sides are rounded, so twice what one rounding costs; a
# product of matrices that is summed in another order differs by some 1e-6 in float32.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 8e-3}

_STATE = "state of"


class WrongResultError(Exception):
    """A variant does not compute what it is compared with, so its time means nothing."""


def check_identical(name: str, reference: nn.Module, model: nn.Module, inp: Tensor) -> None:
    """Compare, bit for bit, outputs in eval and training, gradients and ``state_dict()``.

    Leaves both models as found. Raises :class:`WrongResultError`, which names what differs first.
    """
    with deterministic():
        expected, seen = _computed(reference, inp), _computed(model, inp)
    check_equal(name, expected, seen)


def check_equal(name: str, expected: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> None:
    """Compare named results bit for bit."""
    if list(expected) != list(seen):
        raise WrongResultError(f"{name}: expected {list(expected)}, got {list(seen)}")
    for what, value in expected.items():
        if not torch.equal(value, seen[what]):
            raise WrongResultError(f"{name}: {what} is not bit-identical")


def check_alike(name: str, reference: nn.Module, model: nn.Module, inp: Tensor) -> None:
    """Compare outputs in eval and training and all gradients, up to rounding.

    The models share their parameters and may call them by other names. Leaves both as found.
    """
    names = {id(parameter): name for name, parameter in reference.named_parameters()}
    with deterministic():
        expected, seen = (_without_state(_computed(net, inp, names)) for net in (reference, model))
    if expected.keys() != seen.keys():
        raise WrongResultError(f"{name}: expected {list(expected)}, got {list(seen)}")
    for what, value in expected.items():
        check_close(f"{name}: {what}", value, seen[what])


def check_close(what: str, expected: Tensor, seen: Tensor) -> None:
    """Compare two tensors by the norm of their difference, by the tolerance of ``seen``'s dtype."""
    if expected.shape != seen.shape:
        raise WrongResultError(
            f"{what} should have shape {tuple(expected.shape)}, has {tuple(seen.shape)}"
        )
    difference = torch.linalg.vector_norm((seen.to(expected.dtype) - expected).flatten())
    error = float(difference / torch.linalg.vector_norm(expected.flatten()))
    if not error <= TOLERANCES[seen.dtype]:  # written so that NaN fails
        raise WrongResultError(f"{what} is off by {error:.1e}, relative to its norm")


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Have torch use no algorithm that may differ from itself."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _computed(
    model: nn.Module, inp: Tensor, names: Mapping[int, str] | None = None
) -> dict[str, Tensor]:
    """Return what ``model`` computes, gradients by the names given or by the model's own."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(0)  # for dropout
    model.zero_grad()
    with torch.no_grad():
        seen = {"output in eval": model.eval()(inp)}
    with torch.enable_grad():
        out = model.train()(inp)
        out.backward(torch.ones_like(out))
    seen["output in training"] = out.detach()
    for own_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            name = own_name if names is None else names.get(id(parameter), own_name)
            seen[f"gradient of {name}"] = parameter.grad.clone()
    seen |= {f"{_STATE} {key}": value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(before)
    model.zero_grad()
    return seen


def _without_state(computed: dict[str, Tensor]) -> dict[str, Tensor]:
    return {what: value for what, value in computed.items() if not what.startswith(_STATE)}
