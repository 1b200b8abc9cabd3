"""What people do with models while seeds are in them: nothing of it may break."""

import asyncio
import copy
import logging
import pickle
import threading
import time
from collections.abc import Callable

import pytest
import torch
from kasmina_library import Irregular, MemoryLibrary, NotANumber, Residual
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

import esper
from esper.config import SeedSettings
from esper.contracts import GraftingStrategy, LifecycleEvent, SeedState, SiteSignature
from esper.kasmina.kernel import Kernel
from esper.kasmina.model import MorphableModel

S = SeedState
FOREVER = GraftingStrategy(training_steps=10_000)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def seeded(
    net: nn.Module, state: SeedState, builder: Callable[..., nn.Module] = Residual, **options: int
) -> MorphableModel:
    """Wrap ``net`` and bring seed 1 of its layer "0" into TRAINING or GRAFTING."""
    library = MemoryLibrary()
    settings = SeedSettings(seeds_per_layer=2, deterministic=True, **options)
    model = esper.wrap(net, settings=settings)
    model.connect(library)
    layer = model.kasmina_layers["0"]
    if state is S.TRAINING:
        layer.request_germination(1, library.add(builder), FOREVER)
        model.step()
    else:
        assert asyncio.run(layer.load_kernel(1, library.add(builder), alpha=0.5))
    assert layer.state(1) is state
    return model


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 10)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on_through_germination_and_culling(name: str) -> None:
    library = MemoryLibrary()
    settings = SeedSettings(seeds_per_layer=2, deterministic=True)
    model = esper.wrap(mlp(), settings=settings)
    model.connect(library)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    model.attach_optimizer(optimizer)
    layer = model.kasmina_layers["0"]
    for step in range(9):
        model(torch.randn(5, 8)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        model.step()
        if step == 1:
            layer.request_germination(1, library.add(), FOREVER)
        if step == 5:
            held = [p for group in optimizer.param_groups for p in group["params"]]
            assert {id(w) for w in layer.kernel(1).weights()} <= {id(p) for p in held}
            layer.cull(1, "test")
    assert [len(group["params"]) for group in optimizer.param_groups] == [4]
    assert len(optimizer.state) == 4


def test_a_kernel_that_was_there_first_joins_the_optimizer() -> None:
    model = seeded(mlp(), S.GRAFTING)
    host = [p for name, p in model.named_parameters() if "esper" not in name]
    optimizer = torch.optim.SGD(host, lr=0.1)
    model.attach_optimizer(optimizer)
    model.attach_optimizer(optimizer)
    assert len(optimizer.param_groups[0]["params"]) == len(host) + 4
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer, got int"):
        model.attach_optimizer(3)


def test_a_kernel_without_an_optimizer_is_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    seeded(mlp(), S.GRAFTING)
    assert "seed 1 on '0': its kernel will not learn: no optimizer is attached" in caplog.text


def test_gradient_clipping_does_not_see_a_seed_in_training() -> None:
    plain = mlp()
    model = seeded(copy.deepcopy(plain), S.TRAINING)
    for weight in model.kasmina_layers["0"].kernel(1).weights():
        weight.data.mul_(1e20)
    inp = torch.randn(5, 8)
    norms = []
    for net in (plain, model):
        net(inp).square().mean().backward()
        norms.append(clip_grad_norm_(net.parameters(), 0.1))
    assert norms[0] == norms[1]
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_zero_grad_reaches_a_seed_in_training() -> None:
    model = seeded(mlp(), S.TRAINING)
    model(torch.randn(5, 8)).square().mean().backward()
    weights = model.kasmina_layers["0"].kernel(1).weights()
    assert all(weight.grad is not None for weight in weights)
    model.zero_grad()
    assert all(weight.grad is None for weight in weights)


@pytest.mark.parametrize("builder", [Residual, Irregular])
@pytest.mark.parametrize("state", [S.TRAINING, S.GRAFTING])
def test_a_frozen_hosts_input_may_be_changed_in_place(
    state: SeedState, builder: Callable[..., nn.Module]
) -> None:
    class Residual2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.frozen = nn.ModuleList([nn.Linear(8, 8).requires_grad_(False)])

        def forward(self, inp: Tensor) -> Tensor:
            hidden = self.first(inp)
            hidden += self.frozen[0](hidden)
            return hidden

    library = MemoryLibrary()
    settings = SeedSettings(seeds_per_layer=2, deterministic=True)
    model = esper.wrap(Residual2(), settings=settings)
    model.connect(library)
    layer = model.kasmina_layers["frozen.0"]
    if state is S.TRAINING:
        layer.request_germination(1, library.add(builder), FOREVER)
        model.step()
    else:
        asyncio.run(layer.load_kernel(1, library.add(builder)))
    model(torch.randn(5, 8)).square().mean().backward()
    assert all(weight.grad is not None for weight in layer.kernel(1).weights())


@pytest.mark.parametrize("state", [S.TRAINING, S.GRAFTING])
def test_a_kernel_that_raises_under_checkpointing_does_not_break_backward(
    state: SeedState, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seeded(mlp(), state, Irregular)

    def fail(*args: object) -> Tensor:
        raise ZeroDivisionError("kernel")

    monkeypatch.setattr(Kernel, "call", fail)
    inp = torch.randn(5, 8, requires_grad=True)
    checkpoint(model, inp, use_reentrant=False).sum().backward()
    assert inp.grad is not None
    model.step()
    assert model.kasmina_layers["0"].state(1) is S.CULLED


@pytest.mark.parametrize("builder", [Residual, Irregular])
@pytest.mark.parametrize("state", [S.TRAINING, S.GRAFTING])
def test_an_overflowing_loss_is_not_the_seeds_fault(
    state: SeedState, builder: Callable[..., nn.Module]
) -> None:
    model = seeded(mlp(), state, builder, max_errors=1)
    (model(torch.randn(5, 8)).sum() * float("inf")).backward()
    model.step()
    assert model.kasmina_layers["0"].state(1) is state


@pytest.mark.parametrize("builder", [Residual, Irregular])
def test_a_gradient_penalty_goes_through_a_grafted_seed(builder: Callable[..., nn.Module]) -> None:
    model = seeded(mlp(), S.GRAFTING, builder)
    inp = torch.randn(5, 8, requires_grad=True)
    [grad] = torch.autograd.grad(model(inp).sum(), inp, create_graph=True)
    grad.square().sum().backward()
    assert all(w.grad is not None for w in model.kasmina_layers["0"].kernel(1).weights()[:1])


def test_a_class_that_others_put_on_a_layer_stays() -> None:
    net = mlp()
    model = esper.wrap(net, settings=SeedSettings(seeds_per_layer=2, observe_every=2))
    weight_norm(net[0])
    for _ in range(7):
        model(torch.randn(5, 8)).sum().backward()
        model.step()
    assert type(net[0]).__name__ == "ParametrizedLinear"
    esper.unwrap(model)
    assert type(net[0]).__name__ == "ParametrizedLinear"
    net(torch.randn(5, 8))


def test_a_layer_parametrized_while_active_survives_culling() -> None:
    model = seeded(mlp(), S.GRAFTING)
    weight_norm(model[0])
    model.kasmina_layers["0"].cull(1, "test")
    model(torch.randn(5, 8))
    assert "esper" not in str(list(model.state_dict()))


def test_a_layer_parametrized_while_active_applies_its_seeds_once() -> None:
    model = seeded(mlp(), S.GRAFTING, observe_every=2)
    weight_norm(model[0])
    inp = torch.randn(5, 8)
    expected = model(inp)
    for _ in range(6):
        model.step()
        assert torch.equal(model(inp), expected)
    model.kasmina_layers["0"].rest()  # as when another seed of the layer is occupied
    assert torch.equal(model(inp), expected)


def test_a_layer_parametrized_while_observed_is_observed_once() -> None:
    model = esper.wrap(
        nn.Sequential(nn.Linear(8, 8)), settings=SeedSettings(seeds_per_layer=2, observe_every=1)
    )
    model.step()
    weight_norm(model[0])
    for _ in range(3):
        model(torch.randn(5, 8)).sum().backward()
        health = model.kasmina.bank.fields["health_accumulator"]
        assert health[0, :2].tolist() == [20.0, 20.0]
        model.step()


class Gated(nn.Module):
    """Activations where no seed can sit: a scalar gate, integers, and one with many widths."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(0.5))
        self.fc = nn.Linear(8, 8)
        self.tanh, self.relu, self.shared = nn.Tanh(), nn.ReLU(), nn.Sigmoid()

    def forward(self, inp: Tensor) -> Tensor:
        self.relu(torch.arange(3))
        out = self.shared(self.fc(inp)) * self.tanh(self.gate)
        return out + self.shared(inp[:, :2]).sum()


def test_odd_uses_of_activations_do_not_disturb_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = esper.wrap(Gated(), settings=SeedSettings(seeds_per_layer=4, observe_every=2))
    for _ in range(6):
        model(torch.randn(5, 8)).sum().backward()
        model.step()
    assert model.kasmina_layers["shared"].shapes.channels == 8
    assert model.kasmina_layers["shared"].num_seeds == 4
    assert model.kasmina_layers["tanh"].shapes is None
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_what_goes_wrong_in_watching_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("batching rule not implemented")

    monkeypatch.setattr("esper.ops.observe_both_passes", fail)
    model = esper.wrap(nn.Sequential(nn.Linear(8, 8)), settings=SeedSettings(observe_every=1))
    for _ in range(4):
        model(torch.randn(5, 8)).sum().backward()
        model.step()
    assert caplog.text.count("layer '0' is not observed: RuntimeError: batching rule") == 1


def test_a_model_that_changes_its_dtype_takes_its_seeds_along() -> None:
    library = MemoryLibrary()
    model = esper.wrap(mlp(), settings=SeedSettings(seeds_per_layer=2))
    model.connect(library)
    model.double()
    assert asyncio.run(model.load_kernel("0", 1, library.add())) is False
    model.float()
    assert asyncio.run(model.load_kernel("0", 1, library.add())) is True
    model.double()
    assert model(torch.randn(5, 8, dtype=torch.float64)).dtype is torch.float64
    model.step()
    assert model.kasmina_layers["0"].state(1) is S.GRAFTING
    training = seeded(mlp(), S.TRAINING).double()
    training(torch.randn(5, 8, dtype=torch.float64)).sum().backward()
    training.step()
    assert training.kasmina_layers["0"].state(1) is S.TRAINING


def test_a_child_of_a_wrapped_model_cannot_be_wrapped_again() -> None:
    model = esper.wrap(mlp())
    with pytest.raises(ValueError, match="Linear is already wrapped"):
        esper.wrap(model[0])
    esper.wrap(esper.unwrap(model)[0])


def test_a_waiter_that_gives_up_does_not_disturb_the_training_thread() -> None:
    library = MemoryLibrary()
    model = esper.wrap(mlp(), settings=SeedSettings(seeds_per_layer=2))
    model.connect(library)
    model.step()

    def wait_in_vain() -> None:
        loading = model.load_kernel("0", 1, library.add())
        with pytest.raises(TimeoutError):
            asyncio.run(asyncio.wait_for(loading, 0.01))

    thread = threading.Thread(target=wait_in_vain)
    thread.start()
    thread.join()
    layer = model.kasmina_layers["0"]
    while layer.state(1) is not S.GRAFTING:
        time.sleep(0.001)  # for the loading thread
        model.step()


def test_a_load_that_was_culled_cannot_take_anothers_place() -> None:
    library = MemoryLibrary()
    model = esper.wrap(
        mlp(), settings=SeedSettings(seeds_per_layer=2, deterministic=True, embargo_steps=0)
    )
    model.connect(library)
    first, second = library.add(), library.add(NotANumber)
    layer = model.kasmina_layers["0"]
    layer.request_germination(1, first, FOREVER)
    tenancy = model.kasmina.tenancies["0", 1]
    model.kasmina.loads.prepare(tenancy)
    layer.cull(1, "changed my mind")
    layer.revive(1)
    layer.request_germination(1, second, FOREVER)
    model.step()
    assert layer.kernel(1).artifact_id == second
    assert tenancy.settled.result() is False


def test_a_listener_that_fails_decides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = seeded(mlp(), S.GRAFTING)

    def fail(event: LifecycleEvent) -> None:
        raise OSError("full")

    model.kasmina.emit_lifecycle = fail
    model.kasmina_layers["0"].cull(1, "test")
    assert type(model[0]) is nn.Linear
    assert "a lifecycle event was not delivered" in caplog.text


def test_a_fossil_that_spoils_is_bypassed_and_reported_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = seeded(mlp(), S.GRAFTING, NotANumber, max_errors=2)
    layer = model.kasmina_layers["0"]
    layer.stabilize(1)
    layer.evaluate(1)
    layer.fossilize(1)
    events: list[LifecycleEvent] = []
    model.kasmina.emit_lifecycle = events.append
    for _ in range(5):
        model(torch.randn(5, 8)).sum().backward()
        model.step()
    [event] = events
    assert (event.source, event.target) == (S.FOSSILIZED, S.FOSSILIZED)
    assert event.reason == "bypassed: non-finite numbers in 2 steps"
    assert caplog.text.count("seed 1 on '0': bypassed") == 1
    plain = mlp()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "esper" not in k})
    inp = torch.randn(5, 8)
    assert torch.equal(model(inp), plain(inp))


def test_a_frozen_seed_stays_frozen_when_the_user_unfreezes_everything() -> None:
    model = seeded(mlp(), S.GRAFTING)
    layer = model.kasmina_layers["0"]
    layer.stabilize(1)
    model.requires_grad_(True)
    model(torch.randn(5, 8)).square().mean().backward()
    assert all(weight.grad is None for weight in layer.kernel(1).weights())


@pytest.mark.parametrize("observing", [True, False])
def test_layers_can_be_copied_and_pickled_by_themselves(observing: bool) -> None:
    model = esper.wrap(mlp(), settings=SeedSettings(observe_every=1))
    if observing:
        model.step()
    for layer in model:
        assert type(pickle.loads(pickle.dumps(layer))) is type(copy.deepcopy(layer))
        assert "esper" not in str(vars(copy.deepcopy(layer)))
    model(torch.randn(5, 8))
    assert model.kasmina_layers["1"].shapes is not None
    grown = seeded(mlp(), S.GRAFTING)
    with pytest.raises(esper.errors.EsperError, match="Linear with kernels in place cannot be"):
        pickle.dumps(grown[0])


def test_health_counts_the_observed_step_alone() -> None:
    observed = []
    model = seeded(mlp(), S.GRAFTING, NotANumber, max_errors=1000, observe_every=4)
    model.kasmina.emit_observation = observed.append
    for _ in range(10):
        model(torch.randn(5, 8)).square().mean().backward()
        model.step()
    rows = observed[-1].snapshot.fields["health_accumulator"]
    assert rows[0, 1] == 5 * 4
    assert 0 < rows[4, 1] <= 5 * 4 + 4 * 60  # one step's outputs and gradients, not ten


def test_a_host_that_works_in_place_shows_its_kernel_the_same_input_with_and_without_gradients() -> (
    None
):
    site = SiteSignature(host="ReLU", inp_shape=(None, 8), act_shape=(None, 4), channel_dim=1)
    library = MemoryLibrary()
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True))
    model = esper.wrap(net, settings=SeedSettings(seeds_per_layer=2, deterministic=True))
    inp = torch.randn(5, 8)
    model(inp)
    model.connect(library)
    assert asyncio.run(model.load_kernel("1", 1, library.add(Irregular, site), alpha=0.5))
    expected = model(inp)
    with torch.no_grad():
        assert torch.equal(model(inp), expected)


def test_a_rank_two_kernel_is_not_asked_about_images() -> None:
    site = SiteSignature(host="Tanh", inp_shape=(None, 6), act_shape=(None, 3), channel_dim=1)
    library = MemoryLibrary()
    model = esper.wrap(nn.Sequential(nn.Tanh()), settings=SeedSettings(seeds_per_layer=2))
    model(torch.randn(5, 6))
    model.connect(library)
    assert asyncio.run(model.load_kernel("0", 1, library.add(Irregular, site), alpha=0.5))
    images = torch.randn(2, 6, 6, 6)
    assert torch.equal(model(images), images.tanh())
    assert model.kasmina_layers["0"].quarantine_reason(1) is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # shapes are compared
@pytest.mark.parametrize("builder", [Residual, Irregular])
def test_a_grown_model_can_be_traced(builder: Callable[..., nn.Module]) -> None:
    model = seeded(mlp(), S.GRAFTING, builder)
    inp, more = torch.randn(5, 8), torch.randn(3, 8)
    model(inp)
    traced = torch.jit.trace(model, inp)
    torch.testing.assert_close(traced(more), model(more))
