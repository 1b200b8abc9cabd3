"""How far a result may lie from the float64 reference: one table, by the dtype of the result.

Errors are judged by their norm relative to the reference's, so that one element near zero decides
nothing; each limit lies far below the 0.01 of a deliberate 1 percent error.
"""

import torch
from torch import Tensor

RELATIVE_NORM = {
    torch.float64: 1e-14,  # a few roundings of 1.1e-16 each
    torch.float32: 1e-6,  # a few roundings of 6e-8 each, and sums of some thousand terms
    torch.float16: 5e-4,  # computed in float32, rounded once to 11 bits: at most 4.9e-4
    torch.bfloat16: 4e-3,  # computed in float32, rounded once to 8 bits: at most 3.9e-3
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the error by the norm of ``expected``, over what is finite there."""
    finite = expected.isfinite()
    error = (actual.double() - expected.double())[finite].norm()
    scale = expected.double()[finite].norm()
    return (error / scale if scale > 0 else error).item()


def assert_sum_close(actual: Tensor, terms: Tensor, name: str) -> None:
    """Assert that ``actual`` is the sum of ``terms``, float64, as its own dtype can add them up.

    Terms of both signs may cancel almost wholly, so the error is judged by their magnitude. A
    deliberate error of 1 percent still fails unless all but a ten-thousandth cancels.
    """
    error = (actual.double() - terms.sum()).abs().item()
    limit = RELATIVE_NORM[actual.dtype] * terms.abs().sum().item()
    assert error <= limit, f"{name}: error {error:.2e} above {limit:.2e}"


def assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    """Assert that ``actual`` is ``expected``, the float64 reference, rounded to its own dtype."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} for {expected.shape}"
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(actual), kind(expected)), f"{name}: {kind.__name__} differs"
    error = relative_error(actual, expected)
    limit = RELATIVE_NORM[actual.dtype]
    assert error <= limit, f"{name}: relative error {error:.2e} above {limit:.0e}"


def matches_storage(actual: Tensor, expected: Tensor) -> bool:
    """Return whether both hold the same bits, NaN payloads and signs of zero included."""
    dense = (t.clone(memory_format=torch.contiguous_format) for t in (actual, expected))
    return torch.equal(*(t.view(-1).view(torch.uint8) for t in dense))
