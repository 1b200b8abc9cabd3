"""esper::bottleneck_ and its backward against literals, the reference and torch's own checkers."""

from collections.abc import Callable

import pytest
import torch
from bottleneck_cases import (
    CASES,
    DTYPES,
    LARGE,
    Case,
    Sample,
    expected_grads,
    expected_result,
    with_y,
)
from bottleneck_cases import make_sample as make
from tolerances import RELATIVE_NORM, assert_close, matches_storage, relative_error
from torch import Tensor

import esper.bottleneck as fused
from esper import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory", "autograd_language")
PAIR = Case((5,), 7, 12, 3, 4, (4, 1), (8, 2))


def run(sample: Sample, leaves: list[Tensor] | None = None, **options: bool) -> Tensor:
    leaves = sample.leaves() if leaves is None else leaves
    bank = sample.bank
    return fused.bottleneck(
        sample.y,
        sample.inp,
        sample.weights,
        leaves,
        sample.activation,
        *sample.sites,
        bank.alpha,
        *sample.cells,
        **options,
    )


def run_isolated(sample: Sample, leaves: list[Tensor]) -> Tensor:
    sites, cells = sample.sites, sample.cells
    return fused.isolated_bottleneck(
        sample.y, sample.inp, sample.weights, leaves, sample.activation, *sites, *cells
    )


def stacked(sample: Sample, by_leaf: list[Tensor]) -> list[Tensor]:
    """Return the gradients of the leaves as gradients of the given weights."""
    per_seed = len(by_leaf) // len(sample.case.seeds)
    return [torch.cat(by_leaf[kind::per_seed]) for kind in range(per_seed)]


def assert_grads_close(sample: Sample, actual: list[Tensor], isolated: bool = False) -> None:
    # In float16 and bfloat16 several roundings follow each other, each within the limit.
    limit = RELATIVE_NORM[sample.y.dtype] * (1 if sample.y.element_size() > 2 else 3)
    expected = expected_grads(sample, isolated)
    for at, (mine, wanted) in enumerate(zip(actual, expected[-len(actual) :], strict=True)):
        assert mine.shape == wanted.shape
        assert mine.dtype == sample.y.dtype
        error = relative_error(mine, wanted)
        assert error <= limit, f"gradient {at} of {sample.case}: {error:.1e}"


def test_literals(device: str) -> None:
    def tensor(*rows: list[float]) -> Tensor:
        return torch.tensor(rows, device=device)

    y = tensor([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]).requires_grad_()
    inp = tensor([1.0, -2.0], [3.0, 1.0]).requires_grad_()
    down, up = tensor([1.0, 1.0]).requires_grad_(), tensor([2.0], [-4.0]).requires_grad_()
    weights = fused.BottleneckWeights(down, None, up, None)
    alpha, non_finite = torch.tensor([0.0, 0.5], device=device), torch.zeros(2, device=device)
    fault = torch.zeros(2, dtype=torch.uint8, device=device)

    result = fused.bottleneck(
        y, inp, weights, (down, up), "relu", (1,), (1,), alpha, non_finite, fault
    )

    # The hidden value is relu(-1) = 0 in the first row and relu(4) = 4 in the second.
    assert result.tolist() == [[1.0, 2.0, 3.0], [4.0, 9.0, -2.0]]
    result.backward(tensor([1.0, 2.0, 4.0], [8.0, 2.0, 4.0]))
    grads = [t.grad.tolist() for t in (y, inp, down, up) if t.grad is not None]
    by_hidden = 0.5 * (2 * 2 - 4 * 4)
    assert grads == [
        [[1.0, 2.0, 4.0], [8.0, 2.0, 4.0]],
        [[0.0, 0.0], [by_hidden, by_hidden]],
        [[3 * by_hidden, by_hidden]],
        [[0.5 * 2 * 4], [0.5 * 4 * 4]],
    ]
    assert non_finite.tolist() == [0, 0]
    assert fault.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, LARGE], ids=str)
def test_matches_the_reference(case: Case, dtype: torch.dtype, device: str) -> None:
    sample = make(case, dtype, device=device)
    y, inp = sample.y.requires_grad_(), sample.inp.requires_grad_()
    leaves = sample.leaves()
    result = run(sample, leaves)
    assert_close(result, expected_result(sample), "bottleneck")
    grad_y, *grads = torch.autograd.grad(result, [y, inp, *leaves], sample.grad)
    assert matches_storage(grad_y, sample.grad)
    assert_grads_close(sample, [grads[0], *stacked(sample, grads[1:])])
    assert sample.bank.non_finite.sum().item() == sample.bank.fault.sum().item() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_every_activation(activation: str, dtype: torch.dtype, device: str) -> None:
    for case in (PAIR, LARGE):
        sample = make(case, dtype, activation, device)
        inp, leaves = sample.inp.requires_grad_(), sample.leaves()
        result = run(sample, leaves)
        assert_close(result, expected_result(sample), activation)
        grads = torch.autograd.grad(result, [inp, *leaves], sample.grad)
        assert_grads_close(sample, [grads[0], *stacked(sample, [*grads[1:]])])


@pytest.mark.parametrize("case", [*CASES[:6], LARGE], ids=str)
def test_isolated_gives_the_gradient_of_alpha_one_and_nothing_to_the_host(
    case: Case, device: str
) -> None:
    sample = make(case, device=device)
    y, inp, leaves = sample.y.requires_grad_(), sample.inp.requires_grad_(), sample.leaves()
    result = run_isolated(sample, leaves)
    assert result.data_ptr() == y.data_ptr()
    assert matches_storage(result, y)
    grad_y, grad_inp, *grads = torch.autograd.grad(
        result, [y, inp, *leaves], sample.grad, allow_unused=True
    )
    assert matches_storage(grad_y, sample.grad)
    assert grad_inp is None
    assert_grads_close(sample, stacked(sample, grads), isolated=True)


@pytest.mark.parametrize("isolated", [False, True])
def test_a_group_equals_separate_calls(isolated: bool, device: str) -> None:
    sample = make(CASES[2], device=device)
    leaves = sample.leaves()
    together = run_isolated(sample, leaves) if isolated else run(sample, leaves)
    grads = torch.autograd.grad(together, leaves, sample.grad)
    y, num_seeds = sample.y, len(sample.case.seeds)
    per_seed = len(leaves) // num_seeds
    for s, (seed, start) in enumerate(zip(*sample.sites, strict=True)):
        own = leaves[s * per_seed : (s + 1) * per_seed]
        weights = fused.BottleneckWeights(*own)
        at = weights, own, sample.activation, (seed,), (start,)
        if isolated:
            result = fused.isolated_bottleneck(y, sample.inp, *at, *sample.cells)
        else:
            result = fused.bottleneck(y, sample.inp, *at, sample.bank.alpha, *sample.cells)
        chunk = slice(start, start + sample.case.chunk)
        assert_close(result[:, chunk], together[:, chunk].double(), "chunk")
        alone = torch.autograd.grad(result, own, sample.grad)
        for mine, theirs in zip(alone, grads[s * per_seed :], strict=False):
            assert_close(mine, theirs.double(), "gradient")


def test_in_place_equals_out_of_place(device: str) -> None:
    sample = make(PAIR, device=device)
    before = sample.y.clone()
    apart = run(sample)
    assert matches_storage(sample.y, before)
    mine = with_y(sample, before.clone().requires_grad_() * 1)
    result = run(mine, in_place=True)
    assert result.data_ptr() == mine.y.data_ptr()
    assert matches_storage(result, apart)
    with torch.no_grad():
        assert matches_storage(run(sample), apart)
        assert matches_storage(sample.y, before)
        assert run(sample, in_place=True) is sample.y
    assert matches_storage(sample.y, apart)


def test_in_place_is_known_to_autograd(device: str) -> None:
    sample = make(PAIR, device=device)
    y = sample.y.requires_grad_() * 1
    saved = y.square().sum()
    run(with_y(sample, y), in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_a_changed_weight_is_known_to_autograd(device: str) -> None:
    sample = make(PAIR, device=device)
    result = run(sample)
    sample.weights.down.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize("case", [PAIR, Case((5,), 7, 12, 3, 4, (4,), (8,), has_bias=False)])
@pytest.mark.parametrize("isolated", [False, True])
def test_gradients_are_of_the_weights_as_they_were_saved(
    isolated: bool, case: Case, device: str
) -> None:
    sample = make(case, device=device)
    sample.y.requires_grad_()
    leaves, call = sample.leaves(), run_isolated if isolated else run
    for at, part in enumerate(leaves):
        # As in a stack: in the memory of the weights, with a count of changes of its own.
        leaves[at] = torch.nn.Parameter(torch.empty_like(part))
        leaves[at].data = part.detach()
    expected = torch.autograd.grad(call(sample, leaves), leaves, sample.grad)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        result = call(sample, leaves)
        with torch.no_grad():
            for leaf in leaves:
                leaf.mul_(3)
        grads = torch.autograd.grad(result, leaves, sample.grad)
    torch.testing.assert_close(grads, expected)


def test_a_changed_input_of_an_isolated_seed_is_known_to_autograd(device: str) -> None:
    sample = make(PAIR, device=device)
    result = run_isolated(sample, sample.leaves())
    sample.inp.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_a_changed_result_of_an_isolated_seed_is_known_to_autograd(device: str) -> None:
    sample = make(PAIR, device=device)
    host = sample.y.requires_grad_().tanh()  # saves its output
    result = run_isolated(with_y(sample, host), sample.leaves())
    result.relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_leaves_without_gradient_get_none(device: str) -> None:
    sample = make(PAIR, device=device)
    leaves = sample.leaves()
    for leaf in leaves[1:]:
        leaf.requires_grad_(False)
    run(sample, leaves).backward(sample.grad)
    assert [leaf.grad is not None for leaf in leaves] == [True] + [False] * (len(leaves) - 1)
    frozen = [leaf.requires_grad_(False) for leaf in leaves]
    assert not run(sample, frozen).requires_grad
    assert run_isolated(sample, frozen) is sample.y
    sample.inp.requires_grad_()
    run(sample, frozen).backward(sample.grad)
    assert sample.inp.grad is not None
    assert_close(sample.inp.grad, expected_grads(sample)[0], "inp")


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_any_layout(layout: str, device: str) -> None:
    def laid_out(t: Tensor) -> Tensor:
        match layout:
            case "strided":
                return torch.stack([t, t], -1)[..., 0]
            case "transposed":
                return t.mT.contiguous().mT
            case _:
                return t[:1].expand(t.shape)

    sample = make(PAIR, device=device)
    weights = fused.BottleneckWeights(*(laid_out(w) if w.dim() > 1 else w for w in sample.weights))
    y, inp, grad = (laid_out(t) for t in (sample.y, sample.inp, sample.grad))
    values = Sample(PAIR, sample.activation, y, inp, grad, weights, sample.bank)
    leaves = values.leaves()
    result = run(values, leaves)
    assert_close(result, expected_result(values), layout)
    assert_grads_close(values, stacked(values, [*torch.autograd.grad(result, leaves, grad)]))
    if layout != "expanded":
        apart = result.detach()
        with torch.no_grad():
            assert_close(run(values, in_place=True), apart.double(), layout)
        assert values.y.stride() == y.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alpha_zero_is_the_host_bit_for_bit(dtype: torch.dtype, device: str) -> None:
    sample = make(PAIR, dtype, device=device, alpha=0.0)
    special = torch.tensor([-0.0, 0.0, torch.nan, torch.inf, -torch.inf, 3e4]).to(sample.y)
    sample.y[:3] = special.repeat(2)
    assert matches_storage(run(sample), sample.y)


def test_alpha_one_is_the_kernel(device: str) -> None:
    sample = make(PAIR, device=device, alpha=1.0)
    branches = reference.bottleneck_branches(sample.inp, *sample.weights, "gelu", 2)
    expected = sample.y.clone()
    for s, start in enumerate(PAIR.starts):
        expected[:, start : start + PAIR.chunk] += branches[:, s]
    assert_close(run(sample), expected.double(), "alpha one")


def lossy(device: str) -> Sample:
    """Return a sample with NaN in row 1 of the input and inf in a channel of the second seed."""
    sample = make(PAIR, activation="identity", device=device)
    sample.inp[1, 0] = torch.nan
    sample.weights.up_bias[4] = torch.inf
    return sample


def test_what_the_branch_breaks_is_kept_counted_and_gets_no_gradient(device: str) -> None:
    sample = lossy(device)
    sample.y[1, 2] = torch.inf  # the host's own, nobody's fault
    inp, leaves = sample.inp.requires_grad_(), sample.leaves()
    result = run(sample, leaves)
    assert_close(result, expected_result(sample), "bottleneck")
    assert torch.equal(result[1], sample.y[1])
    assert torch.equal(result[:, 2], sample.y[:, 2])
    # A row each; and a channel of the second seed, but for the host's own element.
    assert sample.bank.non_finite.tolist() == [0, 4 + 4 - 1, 0, 0, 4, 0]
    assert sample.bank.fault.tolist() == [0, 1, 0, 0, 1, 0]
    sample.bank.non_finite.zero_()
    sample.bank.fault.zero_()
    grad_inp, *by_leaf = torch.autograd.grad(result, [inp, *leaves], sample.grad)
    grads = [grad_inp, *stacked(sample, by_leaf)]
    assert grad_inp[1].tolist() == [0.0] * 7
    assert grads[4][4].item() == 0
    for mine, wanted in zip(grads, expected_grads(sample), strict=True):
        assert_close(mine, wanted.nan_to_num(0.0), "gradient")
    # NaN in inp spreads to a column of down's gradients and to all of up's.
    assert sample.bank.non_finite.tolist() == [0, 3 + 12, 0, 0, 3 + 12, 0]
    assert sample.bank.fault.tolist() == [0, 1, 0, 0, 1, 0]


def test_a_non_finite_gradient_reaches_the_host_alone(device: str) -> None:
    for isolated in (False, True):
        sample = make(PAIR, device=device)
        sample.grad[0, 3], sample.grad[2, 9] = torch.nan, torch.inf
        y, leaves = sample.y.requires_grad_(), sample.leaves()
        result = run_isolated(sample, leaves) if isolated else run(sample, leaves)
        grad_y, *grads = torch.autograd.grad(result, [y, *leaves], sample.grad)
        assert matches_storage(grad_y, sample.grad)
        assert_grads_close(sample, stacked(sample, grads), isolated)
        assert sample.bank.fault.sum() == 0


@pytest.mark.parametrize("isolated", [False, True])
def test_gradients_that_overflow_become_zero_on_their_seed(isolated: bool, device: str) -> None:
    sample = make(PAIR, activation="identity", device=device, alpha=1.0)
    sample.weights.up[4:] = 1e30  # of the second seed, cell 1
    sample.inp.fill_(1e-10)
    sample.grad.fill_(1e30)
    leaves = sample.leaves()
    result = run_isolated(sample, leaves) if isolated else run(sample, leaves)
    grads = torch.autograd.grad(result, leaves, sample.grad)
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[4].abs().sum() == grads[5].abs().sum() == 0
    assert sample.bank.non_finite.tolist() == [0, 3 * 7 + 3, 0, 0, 0, 0]
    assert sample.bank.fault.tolist() == [0, 1, 0, 0, 0, 0]


def test_the_gradient_of_inp_counts_for_the_first_seed(device: str) -> None:
    sample = make(PAIR, activation="identity", device=device, alpha=1.0)
    sample.weights.up[4:] = 1e30
    sample.grad.fill_(1e30)
    sample.inp.fill_(0.0).requires_grad_()
    frozen = [leaf.requires_grad_(False) for leaf in sample.leaves()]
    run(sample, frozen).backward(sample.grad)
    assert sample.inp.grad is not None
    assert sample.inp.grad.abs().sum() == 0
    assert sample.bank.non_finite.tolist() == [0, 0, 0, 0, 5 * 7, 0]


def differentiable(activation: str) -> tuple[Callable[..., Tensor], list[Tensor], Sample]:
    sample = make(PAIR, torch.float64, activation)
    inputs = [sample.y.requires_grad_(), sample.inp.requires_grad_(), *sample.leaves()]
    bank = sample.bank

    def bottleneck(y: Tensor, inp: Tensor, *leaves: Tensor) -> Tensor:
        rows = stacked(sample, [leaf.detach() for leaf in leaves])
        weights = fused.BottleneckWeights(*rows)
        at = leaves, activation, *sample.sites
        return fused.bottleneck(y, inp, weights, *at, bank.alpha, *sample.cells)

    return bottleneck, inputs, sample


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_gradcheck(activation: str) -> None:
    bottleneck, inputs, _ = differentiable(activation)
    torch.autograd.gradcheck(bottleneck, inputs)


@pytest.mark.parametrize("activation", ["identity", "gelu", "tanh"])
def test_gradgradcheck(activation: str) -> None:
    bottleneck, inputs, sample = differentiable(activation)
    torch.autograd.gradgradcheck(lambda *t: bottleneck(*t).tanh(), inputs)
    assert sample.bank.fault.sum() == 0


def test_second_derivatives_of_an_isolated_seed_leave_the_host_alone(device: str) -> None:
    sample = make(PAIR, device=device)
    x, leaves = sample.y.requires_grad_(), sample.leaves()

    def penalised(y: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), inputs)

    (alone,) = penalised(x.tanh(), [x])
    isolated = run_isolated(with_y(sample, x.tanh()), leaves)
    with_seed, *by_leaves = penalised(isolated, [x, *leaves])
    assert torch.equal(alone, with_seed)
    assert by_leaves[0].abs().sum() > 0


def test_a_bad_second_gradient_is_counted(device: str) -> None:
    sample = lossy(device)
    leaves = sample.leaves()
    result = run(sample, leaves)
    sample.bank.fault.zero_()
    grads = torch.autograd.grad(result, leaves, sample.grad, create_graph=True)
    assert all(grad.isfinite().all() for grad in grads)
    assert sample.bank.fault.tolist() == [0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(with_bias: bool, device: str) -> None:
    case = Case((2, 3), 5, 12, 3, 4, (4, 1), (8, 2), has_bias=with_bias)
    sample = make(case, device=device)
    site = (*sample.weights, sample.code, *map(list, sample.sites))
    cells = (sample.bank.alpha, *sample.cells)
    torch.library.opcheck(
        torch.ops.esper.bottleneck_.default, (sample.y, sample.inp, *site, *cells)
    )
    hidden, lost = torch.ops.esper.bottleneck_(sample.y, sample.inp, *site, *cells)
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            torch.ops.esper.bottleneck_backward.default,
            (sample.grad, sample.inp, hidden, lost, *site, *cells, *needs),
        )


def test_functorch_is_refused_aloud() -> None:
    sample = make(PAIR)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda y: run(with_y(sample, y)).sum())(sample.y)


WRONG = {
    "integers": ({"y": torch.zeros(5, 12).int()}, r"y must be float32, .* got Int"),
    "dtype of inp": ({"inp": torch.zeros(5, 7).double()}, r"inp must be Float, got Double"),
    "rows": ({"inp": torch.zeros(4, 7)}, r"inp must have y's shape \(5, 12, \) .*got \(4, 7, \)"),
    "down": ({"down": torch.zeros(6, 8)}, r"down must have shape \(6, 7, \), got \(6, 8, \)"),
    "down_bias": ({"down_bias": torch.zeros(5)}, r"down_bias must have shape \(6, \), got \(5, \)"),
    "up": ({"up": torch.zeros(7, 3)}, r"up must have shape .* for 2 seeds, got \(7, 3, \)"),
    "up_bias": ({"up_bias": torch.zeros(9)}, r"up_bias must have shape \(8, \), got \(9, \)"),
    "activation": ({"activation": 7}, r"activation must lie in \[0, 7\), got 7"),
    "start": ({"starts": [8, 9]}, r"starts must lie in \[0, 8\] for 4 channels of 12, got 9"),
    "starts": ({"starts": [8]}, r"one entry per seed, got 2 and 1"),
    "seed": ({"seeds": [4, 6]}, r"seeds must lie in \[0, 6\) of alpha, got 6"),
    "alpha": ({"alpha": torch.zeros(6).double()}, r"alpha must be Float, got Double"),
    "fault": ({"fault": torch.zeros(6)}, r"fault must be Byte, got Float"),
    "strided bank": (
        {"non_finite": torch.zeros(12)[::2]},
        r"non_finite must be contiguous of shape \(num_seeds, \)",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    sample = make(PAIR)
    arguments: dict[str, object] = {
        "y": sample.y,
        "inp": sample.inp,
        **sample.weights._asdict(),
        "activation": 0,
        "seeds": [4, 1],
        "starts": [8, 2],
        "alpha": sample.bank.alpha,
        "non_finite": sample.bank.non_finite,
        "fault": sample.bank.fault,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.esper.bottleneck_(**(arguments | change))


def test_wrong_hidden() -> None:
    sample = make(PAIR)
    site = (*sample.weights, 0, *sample.sites)
    with pytest.raises(RuntimeError, match=r"hidden must have shape \(5, 6, \), got \(5, 5, \)"):
        torch.ops.esper.bottleneck_backward(
            sample.grad, sample.inp, torch.zeros(5, 5), None, *site, None, *sample.cells, True, True
        )


def test_unknown_activation_and_trained_alpha() -> None:
    sample = make(PAIR, activation="swish")
    with pytest.raises(ValueError, match=r"activation must be one of identity, .*got 'swish'"):
        run(sample)
    with pytest.raises(ValueError, match="got 'swish'"):
        run_isolated(sample, sample.leaves())
    sample = make(PAIR)
    sample.bank.alpha.requires_grad_()
    with pytest.raises(ValueError, match="alpha must not require a gradient"):
        run(sample)


@pytest.mark.cuda
def test_never_waits_for_the_device() -> None:
    sample = make(PAIR, device="cuda")
    leaves = sample.leaves()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(sample, leaves).backward(sample.grad)
        run_isolated(sample, leaves).backward(sample.grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
