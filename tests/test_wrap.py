"""Invariant 1, dormant is free, and everything that ``esper.wrap`` refuses."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.config import SeedSettings
from esper.errors import EsperError
from esper.kasmina.morph import made_once


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 8, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(32, 3),
        nn.Sigmoid(),
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (5, 8)),
    "cnn": (cnn, (5, 1, 5, 5)),
    "encoder": (encoder, (3, 4, 8)),
    "one layer": (lambda: nn.Linear(8, 4), (5, 8)),
}


def train(model: nn.Module, inputs: list[Tensor], *, wrapped: bool) -> list[Tensor]:
    """Return outputs, gradients, parameters and the random state along a training run."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    seen = []
    for inp in inputs:
        optimizer.zero_grad()
        out = model(inp)
        out.square().mean().backward()
        optimizer.step()
        if wrapped:
            model.step()  # type: ignore[operator]
        seen += [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return [*seen, *(p.detach() for p in model.parameters()), torch.get_rng_state()]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("telemetry", [True, False])
def test_a_dormant_model_trains_bit_for_bit_like_the_unwrapped_one(
    name: str, telemetry: bool
) -> None:
    build, shape = MODELS[name]
    plain = build()
    settings = SeedSettings(telemetry_enabled=telemetry, observe_every=2)
    wrapped = esper.wrap(copy.deepcopy(plain), settings=settings)
    inputs = [torch.randn(shape) for _ in range(7)]

    for ours, theirs in zip(
        train(wrapped, inputs, wrapped=True), train(plain, inputs, wrapped=False), strict=True
    ):
        assert torch.equal(ours, theirs)
    for (key, ours), (their_key, theirs) in zip(
        wrapped.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert key == their_key
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_dormant_layers_are_not_touched(name: str) -> None:
    build, shape = MODELS[name]
    model = build()
    forward = type(model).forward
    before = {n: (m.__class__, dict(m.__dict__)) for n, m in model.named_modules() if n}
    esper.wrap(model)
    model(torch.randn(shape))
    for n, m in model.named_modules():
        if n:
            assert m.__class__ is before[n][0]
            assert m.__dict__.keys() == before[n][1].keys()
    assert vars(type(model))["forward"] is forward
    assert type(model).__call__ is nn.Module.__call__


def test_only_layers_of_unknown_width_are_watched_and_only_for_one_forward() -> None:
    model = mlp()
    esper.wrap(model)
    assert [type(m).__name__ for m in model] == [
        "Linear",
        "ObservingReLU",
        "Linear",
        "ObservingGELU",
        "Linear",
    ]
    with pytest.raises(EsperError, match=r"layer '1' \(ReLU\) has shown no output yet"):
        model.kasmina_layers["1"].site(0)
    model(torch.randn(5, 8))
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.GELU, nn.Linear]
    assert model.kasmina_layers["1"].site(0).act_shape == (None, 4)


def test_unwrap_restores_the_model() -> None:
    model = mlp()
    before = dict(model.__dict__)
    assert esper.unwrap(esper.wrap(model)) is model
    assert type(model) is nn.Sequential
    assert model.__dict__.keys() == before.keys()
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.GELU, nn.Linear]
    esper.wrap(model)


def test_the_wrapped_class_is_made_once_and_is_still_the_users() -> None:
    one, two = esper.wrap(mlp()), esper.wrap(mlp())
    assert type(one) is type(two)
    assert isinstance(one, nn.Sequential)
    assert isinstance(one, esper.MorphableModel)


def test_deepcopy_copies_seeds_and_shares_nothing() -> None:
    model = esper.wrap(mlp())
    twin = copy.deepcopy(model)
    assert twin.kasmina is not model.kasmina
    assert twin.kasmina_layers["0"].default_transform is twin[0]
    twin.kasmina.bank.write("alpha_blend", 0, 0.5)
    assert model.kasmina.bank.fields["alpha_blend"][0] == 0.0
    inp = torch.randn(5, 8)
    twin(inp)
    assert torch.equal(model(inp), twin(inp))


@pytest.mark.parametrize("observing", [True, False])
def test_pickling_and_torch_save_give_the_plain_model(observing: bool) -> None:
    model = esper.wrap(mlp(), settings=SeedSettings(observe_every=1))
    if observing:
        model.step()
    plain = pickle.loads(pickle.dumps(model))
    assert type(plain) is nn.Sequential
    assert [type(m) for m in plain] == [nn.Linear, nn.ReLU, nn.Linear, nn.GELU, nn.Linear]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    inp = torch.randn(5, 8)
    assert torch.equal(model(inp), plain(inp))


def test_channels_are_divided_as_evenly_as_possible() -> None:
    model = esper.wrap(nn.Linear(8, 10), seeds_per_layer=4)
    layer = model.kasmina_layers[""]
    assert [layer.chunk(i) for i in range(4)] == [(0, 3), (3, 3), (6, 2), (8, 2)]


def test_a_narrow_layer_gets_as_many_seeds_as_channels_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(8, 2), nn.Tanh()), seeds_per_layer=4)
    assert model.kasmina_layers["0"].num_seeds == 2
    model(torch.randn(3, 8))
    assert model.kasmina_layers["1"].num_seeds == 2
    assert "layer '0' has 2 channels and gets as many seeds, not 4" in caplog.text


def test_layers_are_chosen_by_name_or_type() -> None:
    assert list(esper.wrap(mlp(), [nn.Linear]).kasmina_layers) == ["0", "2", "4"]
    assert list(esper.wrap(mlp(), ["2", nn.GELU]).kasmina_layers) == ["2", "3"]


class Clashing(nn.Linear):
    def step(self) -> None: ...


REFUSALS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no module": (lambda: esper.wrap(3), TypeError, "expects a torch.nn.Module, got int"),
    "no sites": (lambda: esper.wrap(nn.Flatten()), ValueError, "Flatten has no layer that can"),
    "no seeds": (
        lambda: esper.wrap(mlp(), seeds_per_layer=0),
        ValueError,
        "seeds_per_layer must be at least 1, got 0",
    ),
    "half a seed": (lambda: esper.wrap(mlp(), seeds_per_layer=1.5), TypeError, "got 1.5"),
    "unknown name": (lambda: esper.wrap(mlp(), ["9"]), ValueError, "Layer 9 not found"),
    "no site": (lambda: esper.wrap(cnn(), [""]), ValueError, "Layer '' is a Sequential, which"),
    "one string": (lambda: esper.wrap(mlp(), "0"), TypeError, "must be a list of names"),
    "wrapped": (lambda: esper.wrap(esper.wrap(mlp())), ValueError, "already wrapped"),
    "wrapped inside": (
        lambda: esper.wrap(nn.Sequential(esper.wrap(mlp()))),
        ValueError,
        "already wrapped .at '0'.",
    ),
    "taken name": (
        lambda: esper.wrap(nn.Sequential(Clashing(2, 2), nn.Linear(2, 2))[0]),
        ValueError,
        "Clashing has attributes that a MorphableModel needs: step",
    ),
    "unwrap": (lambda: esper.unwrap(mlp()), TypeError, "Sequential is not wrapped"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused(case: str) -> None:
    call, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        call()


def test_a_refused_call_leaves_the_model_untouched() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="Layer 9 not found"):
        esper.wrap(model, ["0", "9"])
    assert type(model) is nn.Sequential
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.GELU, nn.Linear]


def test_a_class_is_derived_once_whichever_thread_asks_first() -> None:
    asked, go_on = threading.Event(), threading.Event()
    made: list[type[nn.Module]] = []

    def make(host: type[nn.Module]) -> type[nn.Module]:
        made.append(host)
        asked.set()
        assert go_on.wait(60)
        return type(f"Of{host.__name__}", (host,), {})

    derive = made_once(make)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(derive, nn.Linear)
        assert asked.wait(60)
        second = pool.submit(derive, nn.Linear)
        go_on.set()
        assert first.result() is second.result() is derive(nn.Linear)
    assert made == [nn.Linear]
