"""Bad input through the public surface: an error that names what is wrong, and an intact host."""

import asyncio
import copy
import logging
from collections.abc import Callable

import pytest
import torch
from kasmina_library import LINEAR_8_4, Irregular, MemoryLibrary, Residual
from pydantic import ValidationError
from torch import Tensor, nn

import esper
from esper.config import SeedSettings
from esper.contracts import GraftingStrategy, SeedState, SiteSignature
from esper.kasmina.kernel import Kernel
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.model import MorphableModel

S = SeedState
FOREVER = GraftingStrategy(training_steps=10_000)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def planted(net: nn.Module, library: MemoryLibrary) -> MorphableModel:
    model = esper.wrap(net, settings=SeedSettings(seeds_per_layer=2, deterministic=True))
    model.connect(library)
    return model


def seeded(
    state: SeedState, net: nn.Module | None = None, builder: Callable[..., nn.Module] = Residual
) -> MorphableModel:
    """Bring seed 1 of layer "0" into TRAINING or, at alpha 0.5, into GRAFTING."""
    library = MemoryLibrary()
    model = planted(mlp() if net is None else net, library)
    layer = model.kasmina_layers["0"]
    if state is S.TRAINING:
        layer.request_germination(1, library.add(builder), FOREVER)
        model.step()
    else:
        assert asyncio.run(layer.load_kernel(1, library.add(builder), alpha=0.5))
    assert layer.state(1) is state
    return model


def evidence(model: MorphableModel) -> tuple[object, ...]:
    """Everything that a refused call must leave as it was."""
    bank = bytes(model.kasmina.bank.block)
    return type(model[0]), list(model.state_dict()), set(model.kasmina.tenancies), bank


# ------------------------------------------------------------------ alpha

ALPHAS: dict[str, tuple[SeedState, Callable[[KasminaLayer, float], object]]] = {
    "stabilize": (S.GRAFTING, lambda layer, alpha: layer.stabilize(1, alpha=alpha)),
    "load_kernel": (
        S.GRAFTING,
        lambda layer, alpha: asyncio.run(layer.load_kernel(0, "0" * 64, alpha=alpha)),
    ),
    "graft": (
        S.TRAINING,
        lambda layer, alpha: layer.graft(1, GraftingStrategy.model_construct(alpha_target=alpha)),
    ),
}


@pytest.mark.parametrize("alpha", [-0.1, 1.4, float("nan"), float("inf")])
@pytest.mark.parametrize("verb", ALPHAS)
def test_alpha_outside_0_to_1_is_refused_and_changes_nothing(verb: str, alpha: float) -> None:
    state, call = ALPHAS[verb]
    model = seeded(state)
    before = evidence(model)
    seed = 0 if verb == "load_kernel" else 1
    message = rf"seed {seed} on '0': alpha must lie in \[0, 1\], got {alpha}"
    with pytest.raises(ValueError, match=message):
        call(model.kasmina_layers["0"], alpha)
    assert evidence(model) == before


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_alphas_range_are_taken(alpha: float) -> None:
    layer = seeded(S.GRAFTING).kasmina_layers["0"]
    layer.stabilize(1, alpha=alpha)
    assert layer.state_layout.value("alpha_blend", 1) == alpha


@pytest.mark.parametrize(
    ("field", "value", "expectation"),
    [
        ("alpha_target", 1.4, "less than or equal to 1"),
        ("alpha_target", -0.1, "greater than or equal to 0"),
        ("alpha_target", float("nan"), "less than or equal to 1"),
        ("grafting_steps", 0, "greater than or equal to 1"),
        ("training_steps", -1, "greater than or equal to 0"),
        ("curve", 9, "0, 1 or 2"),
        ("speed", 9, "Extra inputs are not permitted"),
    ],
)
def test_a_strategy_out_of_range_cannot_be_made(field: str, value: float, expectation: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){field}.*{expectation}"):
        GraftingStrategy(**{field: value})


def test_a_strategy_of_another_type_is_refused() -> None:
    library = MemoryLibrary()
    model = planted(mlp(), library)
    before = evidence(model)
    message = r"seed 1 on '0': strategy must be a GraftingStrategy, got \{'training_steps': 3\}"
    with pytest.raises(TypeError, match=message):
        model.kasmina_layers["0"].request_germination(1, library.add(), {"training_steps": 3})
    assert evidence(model) == before


# ------------------------------------------------------------------ seeds and chunks

SEED_VERBS: dict[str, Callable[[KasminaLayer, int], object]] = {
    "chunk": lambda layer, seed: layer.chunk(seed),
    "site": lambda layer, seed: layer.site(seed),
    "state": lambda layer, seed: layer.state(seed),
    "value": lambda layer, seed: layer.state_layout.value("alpha_blend", seed),
    "kernel": lambda layer, seed: layer.kernel(seed),
    "silenced": lambda layer, seed: layer.silenced(seed).__enter__(),
    "request_germination": lambda layer, seed: layer.request_germination(seed, "0" * 64),
    "cancel_germination": lambda layer, seed: layer.cancel_germination(seed),
    "load_kernel": lambda layer, seed: asyncio.run(layer.load_kernel(seed, "0" * 64)),
    "graft": lambda layer, seed: layer.graft(seed, FOREVER),
    "stabilize": lambda layer, seed: layer.stabilize(seed),
    "evaluate": lambda layer, seed: layer.evaluate(seed),
    "fine_tune": lambda layer, seed: layer.fine_tune(seed),
    "keep": lambda layer, seed: layer.keep(seed, "test"),
    "fossilize": lambda layer, seed: layer.fossilize(seed),
    "cull": lambda layer, seed: layer.cull(seed, "test"),
}


@pytest.mark.parametrize("seed", [-1, 2, 7])
@pytest.mark.parametrize("verb", SEED_VERBS)
def test_a_seed_that_the_layer_has_not_is_refused(verb: str, seed: int) -> None:
    model = seeded(S.GRAFTING)
    before = evidence(model)
    message = rf"Invalid seed index: {seed} \(layer '0' has seeds 0 to 1\)"
    with pytest.raises(ValueError, match=message):
        SEED_VERBS[verb](model.kasmina_layers["0"], seed)
    assert evidence(model) == before


@pytest.mark.parametrize("seed", [True, 1.0, "1", None])
@pytest.mark.parametrize("verb", SEED_VERBS)
def test_a_seed_index_of_another_type_is_refused(verb: str, seed: object) -> None:
    model = seeded(S.GRAFTING)
    before = evidence(model)
    with pytest.raises(TypeError, match=f"seed index must be an int, got {seed!r}"):
        SEED_VERBS[verb](model.kasmina_layers["0"], seed)
    assert evidence(model) == before


def test_an_unknown_field_is_refused() -> None:
    slice_ = seeded(S.GRAFTING).kasmina_layers["0"].state_layout
    with pytest.raises(KeyError, match="beta"):
        slice_.value("beta", 1)


# ------------------------------------------------------------------ kernels that do not fit

OUTPUTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "fewer channels": (lambda out: out[:, :3], "torch.float32 (5, 3)"),
    "more rows": (lambda out: torch.cat([out, out]), "torch.float32 (10, 4)"),
    "one dimension more": (lambda out: out[None], "torch.float32 (1, 5, 4)"),
    "one row, to be broadcast": (lambda out: out[:1], "torch.float32 (1, 4)"),
    "float64": (lambda out: out.double(), "torch.float64 (5, 4)"),
}


@pytest.mark.parametrize("case", OUTPUTS)
@pytest.mark.parametrize("state", [S.TRAINING, S.GRAFTING])
def test_an_output_of_another_shape_names_seed_and_shapes_and_spares_the_host(
    state: SeedState,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    change, shown = OUTPUTS[case]
    plain = mlp()
    model = seeded(state, copy.deepcopy(plain), Irregular)
    call = Kernel.call
    monkeypatch.setattr(Kernel, "call", lambda *args: change(call(*args)))
    inp = torch.randn(5, 8, requires_grad=True)
    twin = inp.detach().clone().requires_grad_()
    out, expected = model(inp), plain(twin)
    out.square().mean().backward()
    expected.square().mean().backward()
    assert torch.equal(out, expected)
    assert torch.equal(inp.grad, twin.grad)
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.getMessage().startswith("seed 1 on '0': kernel ")
    assert f"returned {shown}, expected torch.float32 (5, 4)" in record.getMessage()
    model.step()
    assert model.kasmina_layers["0"].state(1) is S.CULLED


MISFITS: dict[str, tuple[Callable[[nn.Module], nn.Module], SiteSignature, tuple[str, ...]]] = {
    "dtype": (lambda net: net.double(), LINEAR_8_4, ("dtype float32, the layer needs float64",)),
    "chunk": (
        lambda net: net,
        SiteSignature(host="Linear", inp_shape=(None, 8), act_shape=(None, 5), channel_dim=1),
        ("act_shape=(None, 5)", "act_shape=(None, 4)"),
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_kernel_for_another_site_is_not_loaded(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    prepare, site, messages = MISFITS[case]
    plain = prepare(mlp())
    library = MemoryLibrary()
    model = planted(copy.deepcopy(plain), library)
    assert asyncio.run(model.load_kernel("0", 1, library.add(Residual, site))) is False
    assert "seed 1 on '0': kernel not loaded" in caplog.text
    assert all(message in caplog.text for message in messages)
    inp = torch.randn(5, 8, dtype=plain[0].weight.dtype)
    assert torch.equal(model(inp), plain(inp))


def test_a_layer_on_another_device_than_the_seeds_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    library = MemoryLibrary()
    model = planted(mlp(), library)
    model[0].to("meta")
    assert asyncio.run(model.load_kernel("0", 1, library.add())) is False
    expected = (
        "seed 1 on '0': kernel not loaded: layer '0' is on meta, the seeds on cpu: "
        "move the wrapped model as a whole"
    )
    assert expected in caplog.text
    assert model.kasmina_layers["0"].state(1) is S.DORMANT
