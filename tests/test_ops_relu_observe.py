"""esper::relu_observe and its gradient: PyTorch's bits, and what observing them apart would book."""

import copy

import pytest
import torch
from blend_cases import DTYPES, LAYOUTS, laid_out
from hypothesis import given
from hypothesis import strategies as st
from test_ops_observe import SHAPES, assert_health_close, fresh_health
from tolerances import matches_storage
from torch import Tensor, nn

import esper
import esper.kasmina.observer as observer
from esper import ops, reference
from esper.config import SeedSettings

pytestmark = pytest.mark.usefixtures("poisoned_memory", "autograd_language")


def awkward(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return numbers of both signs with a zero of each, infinities and a NaN among them."""
    x = torch.randn(shape)
    if x.numel() > 20:
        x.view(-1)[:6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -1e-30])
    return x.to(dtype)


def layout(t: Tensor) -> list[int]:
    """Return the strides that say where something lies: none does along a size of one."""
    pairs = zip(t.shape, t.stride(), strict=True)
    return [stride for size, stride in pairs if size > 1 and t.numel() > 0]


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit, and in the same layout; but a NaN is a NaN.

    In float16 and bfloat16 PyTorch's own loops disagree about which bits it has.
    """
    assert layout(actual) == layout(expected)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert matches_storage(actual.nan_to_num(), expected.nan_to_num())


def test_literals(device: str) -> None:
    x = torch.tensor([[1.0, -3.0, torch.nan], [-5.0, -7.0, torch.inf]], device=device)
    health = fresh_health(device=device)
    y = ops.relu_observe(x, 1, health, 2, 2)
    assert y.nan_to_num(9.0).tolist() == [[1.0, 0.0, 9.0], [0.0, 0.0, torch.finfo().max]]
    assert health[:, 2].tolist() == [4.0, 0.25, 0.75, 2.0, 0.0, 0.0]
    assert health[:, 3].tolist() == [0.0, 0.0, 0.0, 0.0, 2.0, 0.0]
    grad = torch.full_like(y, 2.0)
    assert ops.relu_observe_grad(grad, y, 1, health, 2, 2).tolist() == [[2, 0, 2], [0, 0, 2]]
    assert health[5, 2:4].tolist() == [4 * 4.0, 2 * 4.0]
    assert health[:, :2].count_nonzero() == health[:, 4:].count_nonzero() == 0


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), SHAPES)
def test_matches_pytorch_and_the_reference(
    shape: tuple[int, ...], channel_dim: int, dtype: torch.dtype, order: str, device: str
) -> None:
    x = laid_out(awkward(shape, dtype), order, channel_dim).to(device)
    grad = laid_out(awkward(shape, dtype).flip(0), order, channel_dim).to(device)
    actual, expected = fresh_health(device=device), fresh_health(device=device)
    y = ops.relu_observe(x, channel_dim, actual, 5, 4)
    assert_same_bits(y, reference.relu_observe(x, channel_dim, expected, 5, 4))
    grad_x = ops.relu_observe_grad(grad, y, channel_dim, actual, 5, 4)
    assert_same_bits(grad_x, reference.relu_observe_grad(grad, y, channel_dim, expected, 5, 4))
    assert_health_close(actual, expected)


@pytest.mark.parametrize("y_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", [*LAYOUTS, "expanded"])
def test_gradients_come_in_any_layout(grad_layout: str, y_layout: str, device: str) -> None:
    shape = (3, 8, 5, 7)
    y = laid_out(torch.randn(shape).relu(), y_layout, 1).to(device)
    grad = torch.randn(1).expand(shape).to(device)
    if grad_layout != "expanded":
        grad = laid_out(torch.randn(shape), grad_layout, 1).to(device)
    actual, expected = fresh_health(device=device), fresh_health(device=device)
    grad_x = ops.relu_observe_grad(grad, y, 1, actual, 0, 4)
    assert_same_bits(grad_x, reference.relu_observe_grad(grad, y, 1, expected, 0, 4))
    assert_health_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_kind_of_bits(dtype: torch.dtype) -> None:
    integers = torch.int32 if dtype == torch.float32 else torch.int64
    limits = torch.iinfo(integers)
    x = torch.randint(limits.min, limits.max, (1000, 33), dtype=integers).view(dtype)
    y = ops.relu_observe(x, 1, fresh_health(), 0, 3)
    assert matches_storage(y, x.relu())  # the bits of NaN included
    grad_x = ops.relu_observe_grad(x, x.flip(0), 1, fresh_health(), 0, 3)
    assert matches_storage(grad_x, torch.ops.aten.threshold_backward(x, x.flip(0), 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_16_bits(dtype: torch.dtype) -> None:
    x = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).view(256, 256)
    actual, expected = fresh_health(), fresh_health()
    assert_same_bits(ops.relu_observe(x, 1, actual, 0, 4), x.relu())
    reference.observe(x.relu(), 1, expected, 0, 4)
    assert_health_close(actual, expected)
    ones = torch.ones_like(x)
    assert_same_bits(
        ops.relu_observe_grad(ones, x, 1, actual, 0, 4),
        torch.ops.aten.threshold_backward(ones, x, 0),
    )


@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    channel_dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    num_seeds = data.draw(st.integers(1, shape[channel_dim]))
    x = laid_out(torch.randn(shape), data.draw(st.sampled_from(LAYOUTS)), channel_dim)
    actual, expected = fresh_health(), fresh_health()
    y = ops.relu_observe(x, channel_dim, actual, 0, num_seeds)
    assert_same_bits(y, reference.relu_observe(x, channel_dim, expected, 0, num_seeds))
    grad_x = ops.relu_observe_grad(x, y, channel_dim, actual, 0, num_seeds)
    assert_same_bits(grad_x, reference.relu_observe_grad(x, y, channel_dim, expected, 0, num_seeds))
    assert_health_close(actual, expected)


@pytest.mark.parametrize("op", ["relu_observe", "relu_observe_grad"])
@pytest.mark.parametrize("order", LAYOUTS)
def test_opcheck(op: str, order: str, device: str) -> None:
    x = laid_out(torch.randn(3, 8, 5, 7), order, 1).to(device)
    tensors = (x,) if op == "relu_observe" else (x, x.relu())
    arguments = (*tensors, 1, fresh_health(device=device), 2, 4)
    torch.library.opcheck(getattr(torch.ops.esper, op), arguments)


def test_gradcheck_of_first_and_second_order(device: str) -> None:
    x = torch.randn(4, 6, dtype=torch.float64, device=device, requires_grad=True)
    health = fresh_health(device=device)

    def observed(inp: Tensor) -> Tensor:
        return ops.observed_relu(inp, 1, health, 0, 3).square()

    assert torch.autograd.gradcheck(observed, x)
    assert torch.autograd.gradgradcheck(observed, x)


@pytest.mark.parametrize("create_graph", [False, True])
def test_observed_relu_books_both_passes(create_graph: bool, device: str) -> None:
    x = torch.randn(6, 10, device=device, requires_grad=True)
    actual, expected = fresh_health(device=device), fresh_health(device=device)
    weights = torch.randn(6, 10, device=device)
    y = ops.observed_relu(x, 1, actual, 1, 4)
    [grad] = torch.autograd.grad((y * weights).sum(), x, create_graph=create_graph)
    reference.observe(x.detach().relu(), 1, expected, 1, 4)
    reference.observe_grad(weights, 1, expected, 1, 4)
    assert_health_close(actual, expected)
    assert_same_bits(grad.detach(), torch.where(x > 0, weights, 0.0).detach())


def test_observed_relu_compiles() -> None:
    x, health, expected = torch.randn(6, 10), fresh_health(), fresh_health()
    compiled = torch.compile(ops.observed_relu, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, 1, health, 0, 2), x.relu())
    reference.observe(x.relu(), 1, expected, 0, 2)
    assert_health_close(health, expected)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())


def cnn() -> nn.Sequential:
    first = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten())


@pytest.fixture
def fused_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer, "FUSED_FROM_NUMEL", 0)


MODELS = {"mlp": (mlp, (5, 8)), "cnn": (cnn, (2, 3, 9, 9))}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("fused_at_any_size")
def test_observed_steps_leave_the_host_bit_for_bit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fused = ops.observed_relu

    def counted(x: Tensor, *place: object) -> Tensor:
        calls.append(x.shape)
        return fused(x, *place)  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "observed_relu", counted)
    build, shape = MODELS[name]
    plain = build()
    model = esper.wrap(
        copy.deepcopy(plain), settings=SeedSettings(seeds_per_layer=2, observe_every=1)
    )
    for _ in range(6):
        inp = torch.randn(shape)
        results = []
        for net in (plain, model):
            net.zero_grad()
            out = net(inp.clone().requires_grad_())
            out.square().sum().backward()
            results.append([out.detach(), *(p.grad for p in net.parameters())])
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
        model.step()
    assert len(calls) >= 4


@pytest.mark.usefixtures("fused_at_any_size")
def test_an_observed_model_books_what_separate_passes_book(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    healths = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = esper.wrap(mlp(), settings=SeedSettings(seeds_per_layer=2, observe_every=2))
        if not fused:
            layers = model.kasmina_layers.values()
            for layer in layers:
                monkeypatch.setattr(layer.observer, "relu", lambda *_: None)
        seen: list[Tensor] = []
        model.kasmina.emit_observation = lambda o, s=seen: s.append(
            o.snapshot.fields["health_accumulator"].clone()
        )
        for _ in range(8):
            model(torch.randn(5, 8)).square().sum().backward()
            model.step()
        healths.append(seen[-1])
    assert healths[0].count_nonzero() > 0
    assert_health_close(healths[0], healths[1].double())


@pytest.mark.usefixtures("fused_at_any_size")
def test_an_inplace_relu_is_observed_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("must not be fused")

    monkeypatch.setattr(ops, "observed_relu", fail)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True))
    model = esper.wrap(net, settings=SeedSettings(observe_every=1))
    for _ in range(4):
        model(torch.randn(5, 8)).sum().backward()
        model.step()
    assert model.kasmina_layers["1"].observer.trouble is None


@pytest.mark.usefixtures("fused_at_any_size")
def test_what_goes_wrong_in_the_fused_op_leaves_the_host_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("batching rule not implemented")

    monkeypatch.setattr(ops, "observed_relu", fail)
    model = esper.wrap(mlp(), settings=SeedSettings(observe_every=1))
    inp = torch.randn(5, 8)
    for _ in range(4):
        assert torch.equal(model(inp), model[2](model[0](inp).relu()).relu())
        model.step()
    assert caplog.text.count("layer '1' is not observed: RuntimeError: batching rule") == 1


WRONG = {
    "gradients of another shape": (
        {"grad": torch.zeros(2, 5)},
        r"grad must have y's shape \(2, 4, \), got \(2, 5, \)",
    ),
    "gradients of another dtype": (
        {"grad": torch.zeros(2, 4).double()},
        r"grad must be Float, got Double",
    ),
    "more seeds than channels": ({"num_seeds": 5}, r"num_seeds must lie in \[1, 4\].*got 5"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    arguments = {
        "grad": torch.zeros(2, 4),
        "y": torch.zeros(2, 4),
        "channel_dim": 1,
        "health": fresh_health(),
        "first_seed": 0,
        "num_seeds": 2,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.esper.relu_observe_grad(**(arguments | change))


def test_integers_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"x must be float32, .* got Int"):
        ops.relu_observe(torch.zeros(2, 4).int(), 1, fresh_health(), 0, 2)


def test_small_activations_are_observed_by_a_read_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused_sizes = []
    fused = ops.observed_relu

    def counted(x: Tensor, *place: object) -> Tensor:
        fused_sizes.append(x.numel())
        return fused(x, *place)  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "observed_relu", counted)
    model = esper.wrap(nn.Sequential(nn.Linear(8, 512), nn.ReLU()), telemetry_enabled=True)
    model(torch.randn(1, 8))
    model.kasmina.next_due = 0
    model.step()
    for batch in (observer.FUSED_FROM_NUMEL // 512, 2):
        model(torch.randn(batch, 8))
    assert fused_sizes == [observer.FUSED_FROM_NUMEL]
