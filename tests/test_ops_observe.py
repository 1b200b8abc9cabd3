"""esper::observe and esper::observe_grad against literals, NumPy-like sums and the reference."""

from typing import Any

import pytest
import torch
from blend_cases import DTYPES, LAYOUTS, laid_out
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close
from torch import Tensor

from esper import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHAPES = (
    ((4, 10), 1),
    ((2, 3, 9), -1),
    ((3, 8, 5, 7), 1),
    ((6, 4), 0),
    ((4,), 0),
    ((0, 6), 1),
    ((260, 70), 1),
    ((3, 70, 40, 30), 1),
    ((700, 5), 1),  # several rows to a vector, and some left over
    ((19, 9, 3, 3), 1),  # short lines
    ((70, 9001), 1),  # several strips of columns, the last one narrow
    ((2, 6, 40_003), 1),  # long lines in several stretches
    ((300, 601), 1),  # stretches of many chunks, which end within one
)


def fresh_health(capacity: int = 64, device: str = "cpu") -> Tensor:
    return torch.zeros(6, capacity, device=device)


def assert_health_close(actual: Tensor, expected: Tensor) -> None:
    """Counts are exact; mean, M2 and energy are judged as float32 rows."""
    for row in (0, 3, 4):
        assert torch.equal(actual[row].cpu(), expected[row].cpu()), f"row {row}"
    for row, name in ((1, "mean"), (2, "M2"), (5, "energy")):
        assert_close(actual[row].cpu(), expected[row].double().cpu(), name)


def test_literals(device: str) -> None:
    y = torch.tensor(
        [[1.0, 3.0, 0.0, torch.nan, 5.0], [5.0, 7.0, -0.0, torch.inf, 5.0]], device=device
    )
    health = fresh_health(device=device)
    ops.observe(y, 1, health, 2, 3)  # chunks of 2, 2 and 1 channels
    assert health[:, 2].tolist() == [4.0, 4.0, 20.0, 0.0, 0.0, 0.0]
    assert health[:, 3].tolist() == [2.0, 0.0, 0.0, 2.0, 2.0, 0.0]
    assert health[:, 4].tolist() == [2.0, 5.0, 0.0, 0.0, 0.0, 0.0]
    assert health[:, :2].count_nonzero() == health[:, 5:].count_nonzero() == 0

    ops.observe(y[:1, :2], 1, health, 2, 1)  # merges 1 and 3 into 1, 3, 5, 7
    assert health[0, 2].item() == 6
    assert health[1, 2].item() == pytest.approx(20 / 6)
    assert health[2, 2].item() == pytest.approx(20 + 2 + (4 - 2) ** 2 * 4 * 2 / 6)


def test_grad_literals(device: str) -> None:
    grad = torch.tensor([[1.0, 2.0, 3.0], [torch.nan, -2.0, torch.inf]], device=device)
    health = fresh_health(device=device)
    for _ in range(2):
        ops.observe_grad(grad, 1, health, 0, 2)
    assert health[5, :2].tolist() == [2 * (1.0 + 4.0 + 4.0), 2 * 9.0]
    assert health[:5].count_nonzero() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), SHAPES)
def test_matches_the_reference(
    shape: tuple[int, ...], channel_dim: int, dtype: torch.dtype, layout: str, device: str
) -> None:
    actual, expected = fresh_health(device=device), fresh_health()
    for _ in range(2):
        y = torch.randn(shape) * 2 + 3
        y.select(channel_dim, 1).zero_()
        if y.numel() > 20:
            y.view(-1)[0], y.view(-1)[7] = torch.nan, -torch.inf
        y = laid_out(y.to(dtype), layout, channel_dim)
        for observe in ("observe", "observe_grad"):
            getattr(ops, observe)(y.to(device), channel_dim, actual, 5, 4)
            getattr(reference, observe)(y, channel_dim, expected, 5, 4)
    assert_health_close(actual, expected)


def test_chunks_are_contiguous_and_even(device: str) -> None:
    for channels, num_seeds in ((10, 4), (7, 7), (64, 3), (5, 1)):
        y = torch.arange(channels, dtype=torch.float32, device=device).expand(2, channels)
        health = fresh_health(device=device)
        ops.observe(y, 1, health, 0, num_seeds)
        chunks = torch.arange(channels).tensor_split(num_seeds)
        assert health[0, :num_seeds].tolist() == [2 * len(chunk) for chunk in chunks]
        means = [chunk.float().mean().item() for chunk in chunks]
        assert health[1, :num_seeds].tolist() == pytest.approx(means)


def test_variance_survives_a_mean_far_from_zero(device: str) -> None:
    y = torch.randn(4096, 4, dtype=torch.float64) + 1e6
    health = fresh_health(device=device)
    ops.observe(y.to(device), 1, health, 0, 1)
    expected = (y - y.mean()).square().sum()
    assert health[2, 0].item() == pytest.approx(expected.item(), rel=1e-6)


def test_non_finite_first_element_is_no_shift(device: str) -> None:
    y = torch.tensor([torch.inf, 1.0, 3.0], device=device)
    health = fresh_health(device=device)
    ops.observe(y[:, None], 1, health, 0, 1)
    assert health[:5, 0].tolist() == [2.0, 2.0, 2.0, 0.0, 1.0]


@pytest.mark.parametrize("shape", [(300, 60), (2, 60, 70), (5, 60, 3), (300, 600), (4000, 600)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30], ids=str)
def test_one_bad_number_spoils_no_sum(value: float, shape: tuple[int, ...], device: str) -> None:
    """1e30 is finite, but its square is not in float32."""
    actual, expected = fresh_health(device=device), fresh_health()
    y = torch.randn(shape) + 1
    for place in (y.numel() // 7, y.numel() - 1):
        y.view(-1)[place] = value
    for observe in ("observe", "observe_grad"):
        getattr(ops, observe)(y.to(device), 1, actual, 0, 4)
        getattr(reference, observe)(y, 1, expected, 0, 4)
    assert_health_close(actual, expected)


@pytest.mark.parametrize("shape", [(300, 60), (2, 60, 700), (5, 60, 3), (64, 60, 1, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dead_channels_are_counted_one_by_one(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str
) -> None:
    y = torch.zeros(shape, dtype=dtype)
    y[:, ::2] = -0.0
    for channel in (0, 17, 18, 59):  # each is alive by its very last number
        y[:, channel].view(shape[0], -1)[-1, -1] = torch.finfo(dtype).tiny
    health = fresh_health(device=device)
    ops.observe(laid_out(y, layout, 1).to(device), 1, health, 0, 60)
    items = y.numel() / 60
    alive = [0.0 if channel in (0, 17, 18, 59) else items for channel in range(60)]
    assert health[3, :60].tolist() == alive


WIDE_AND_NARROW = [(4000, 33), (9, 4, 40_000), (64, 20_000), (3, 2048, 7, 7)]


@pytest.mark.parametrize("shape", WIDE_AND_NARROW)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_any_number_of_threads_gives_the_same_bits(shape: tuple[int, ...], layout: str) -> None:
    y = laid_out(torch.randn(shape), layout, 1)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            health = fresh_health()
            ops.observe(y, 1, health, 0, 3)
            ops.observe_grad(y, 1, health, 0, 3)
        finally:
            torch.set_num_threads(1)
        results.append(health)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_columns_saturate(device: str) -> None:
    y = torch.tensor([3e38, -3e38], device=device)
    health = fresh_health(device=device)
    ops.observe(y[:, None], 1, health, 0, 1)
    ops.observe_grad(y[:, None], 1, health, 0, 1)
    limit = torch.finfo(torch.float32).max
    assert health[2, 0].item() == health[5, 0].item() == limit


def test_repeats_bit_for_bit(device: str) -> None:
    y = torch.randn(33, 50, 7, device=device)
    results = []
    for _ in range(3):
        health = fresh_health(device=device)
        ops.observe(y, 1, health, 0, 4)
        ops.observe_grad(y, 1, health, 0, 4)
        results.append(health)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.usefixtures("autograd_language")
@pytest.mark.parametrize("create_graph", [False, True])
def test_both_passes_are_booked(create_graph: bool, device: str) -> None:
    x = torch.randn(6, 10, device=device, requires_grad=True)
    actual, expected = fresh_health(device=device), fresh_health(device=device)
    weights = torch.randn(6, 10, device=device)
    y = x * 2
    ops.observe_both_passes(y, 1, actual, 1, 4)
    y.relu_()  # the gradient that counts is that of the value which was observed
    [grad] = torch.autograd.grad((y * weights).sum(), x, create_graph=create_graph)
    reference.observe(x.detach() * 2, 1, expected, 1, 4)
    reference.observe_grad(grad.detach() / 2, 1, expected, 1, 4)
    assert_health_close(actual, expected)


@pytest.mark.usefixtures("autograd_language")
def test_a_frozen_output_is_observed_once(device: str) -> None:
    actual, expected = fresh_health(device=device), fresh_health(device=device)
    y = torch.randn(6, 10, device=device)
    ops.observe_both_passes(y, 1, actual, 0, 2)
    reference.observe(y, 1, expected, 0, 2)
    assert_health_close(actual, expected)


@pytest.mark.usefixtures("autograd_language")
def test_an_output_that_receives_no_gradient_books_none(device: str) -> None:
    class Barrier(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    x = torch.ones(2, 4, device=device, requires_grad=True)
    health = torch.zeros(6, 2, device=device)
    y = x * 2
    ops.observe_both_passes(y, 1, health, 0, 2)
    Barrier.apply(y).sum().backward()
    assert health[5].tolist() == [0.0, 0.0]
    assert x.grad is None


def test_needs_no_graph(device: str) -> None:
    y = torch.randn(3, 4, device=device, requires_grad=True) * 2
    health = fresh_health(device=device)
    ops.observe(y, 1, health, 0, 2)
    assert not health.requires_grad


@pytest.mark.parametrize("op", ["observe", "observe_grad"])
def test_opcheck(op: str, device: str) -> None:
    arguments = (torch.randn(3, 8, 5, device=device), 1, fresh_health(device=device), 2, 4)
    torch.library.opcheck(getattr(torch.ops.esper, op), arguments)


@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    channel_dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    num_seeds = data.draw(st.integers(1, shape[channel_dim]))
    y = laid_out(torch.randn(shape) + 1, data.draw(st.sampled_from(LAYOUTS)), channel_dim)
    actual, expected = fresh_health(), fresh_health()
    ops.observe(y, channel_dim, actual, 0, num_seeds)
    reference.observe(y, channel_dim, expected, 0, num_seeds)
    assert_health_close(actual, expected)


WRONG = {
    "integers": ({"y": torch.zeros(2, 4).int()}, r"y must be float32, .* got Int"),
    "more seeds than channels": ({"num_seeds": 5}, r"num_seeds must lie in \[1, 4\].*got 5"),
    "no seeds": ({"num_seeds": 0}, r"num_seeds must lie in \[1, 4\].*got 0"),
    "beyond the bank": ({"first_seed": 63}, r"first_seed must lie in \[0, 62\], got 63"),
    "before the bank": ({"first_seed": -1}, r"first_seed must lie in \[0, 62\], got -1"),
    "health of doubles": (
        {"health": fresh_health().double()},
        r"health must be Float, got Double",
    ),
    "health of five rows": (
        {"health": torch.zeros(5, 64)},
        r"health must be contiguous of shape \(6, capacity\), got \(5, 64, \)",
    ),
    "no such dimension": ({"channel_dim": -3}, r"channel_dim must be a dimension of y .*got -3"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    arguments = {
        "y": torch.zeros(2, 4),
        "channel_dim": 1,
        "health": fresh_health(),
        "first_seed": 0,
        "num_seeds": 2,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.esper.observe(**(arguments | change))
