"""Whole lives of seeds: commands, steps, optimizers, and giving the layer back."""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

import pytest
import torch
from kasmina_library import LINEAR_8_4, MemoryLibrary, Residual
from torch import nn

import esper
from esper.config import SeedSettings
from esper.contracts import (
    CommandKind,
    GraftingStrategy,
    KasminaControlCommand,
    KernelBundle,
    KernelStatus,
    LifecycleEvent,
    RampCurve,
    SeedState,
    SiteSignature,
)
from esper.errors import EsperError, LifecycleError
from esper.kasmina.ensemble import Bottlenecks, Ensemble
from esper.kasmina.model import MorphableModel
from esper.kasmina.seats import seats_of

S = SeedState
STRATEGY = GraftingStrategy(
    training_steps=3,
    grafting_steps=4,
    stabilization_steps=2,
    fine_tuning_steps=3,
    curve=RampCurve.LINEAR,
)


@pytest.fixture
def library() -> MemoryLibrary:
    return MemoryLibrary()


@pytest.fixture
def model(library: MemoryLibrary) -> MorphableModel:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    wrapped = esper.wrap(
        net, settings=SeedSettings(seeds_per_layer=2, deterministic=True, embargo_steps=3)
    )
    wrapped.connect(library)
    return wrapped


def step(model: MorphableModel, optimizer: torch.optim.Optimizer | None = None) -> None:
    model.zero_grad()
    model(torch.randn(5, 8)).square().mean().backward()
    if optimizer is not None:
        optimizer.step()
    model.step()


def command(
    kind: CommandKind, artifact_id: str | None = None, **fields: object
) -> KasminaControlCommand:
    defaults = {"layer_name": "0", "seed_idx": 1, "strategy": STRATEGY, "epoch": 0}
    return KasminaControlCommand(
        kind=kind, artifact_id=artifact_id, reason="test", **defaults | fields
    )


def test_a_seed_lives_through_all_states_on_schedule(
    model: MorphableModel, library: MemoryLibrary
) -> None:
    events: list[LifecycleEvent] = []
    model.kasmina.emit_lifecycle = events.append
    layer = model.kasmina_layers["0"]
    alphas = []
    model.kasmina.submit(command(CommandKind.GERMINATE, library.add()))
    for _ in range(12):
        step(model)
        alphas.append((layer.state(1), layer.state_layout.value("alpha_blend", 1)))
    model.kasmina.submit(command(CommandKind.KEEP))
    for _ in range(5):
        step(model)
        alphas.append((layer.state(1), layer.state_layout.value("alpha_blend", 1)))

    assert alphas == [
        (S.TRAINING, 0.0),
        (S.TRAINING, 0.0),
        (S.TRAINING, 0.0),
        (S.GRAFTING, 0.25),
        (S.GRAFTING, 0.5),
        (S.GRAFTING, 0.75),
        (S.GRAFTING, 1.0),
        (S.STABILIZATION, 1.0),
        (S.STABILIZATION, 1.0),
        (S.EVALUATING, 1.0),
        (S.EVALUATING, 1.0),
        (S.EVALUATING, 1.0),
        (S.FINE_TUNING, 1.0),
        (S.FINE_TUNING, 1.0),
        (S.FINE_TUNING, 1.0),
        (S.FOSSILIZED, 1.0),
        (S.FOSSILIZED, 1.0),
    ]
    path = [event.source for event in events] + [events[-1].target]
    assert path == [S(value) for value in range(S.DORMANT, S.FOSSILIZED + 1)]
    assert {event.artifact_id for event in events} == set(library.bundles)
    assert not model.kasmina.tenancies


def test_only_the_states_that_learn_move_the_seed(
    model: MorphableModel, library: MemoryLibrary
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model.attach_optimizer(optimizer)
    layer = model.kasmina_layers["0"]
    model.kasmina.submit(command(CommandKind.GERMINATE, library.add()))
    moved: dict[SeedState, set[bool]] = {}
    for number in range(20):
        state, kernel = layer.state(1), layer.kernel(1)
        before = [w.detach().clone() for w in kernel.weights()] if kernel else []
        step(model, optimizer)
        if before:
            changed = any(
                not torch.equal(a, b) for a, b in zip(before, kernel.weights(), strict=True)
            )
            moved.setdefault(state, set()).add(changed)
        if number == 11:
            model.kasmina.submit(command(CommandKind.KEEP))
    assert moved == {
        S.TRAINING: {True},
        S.GRAFTING: {True},
        S.STABILIZATION: {False},
        S.EVALUATING: {False},
        S.FINE_TUNING: {True},
        S.FOSSILIZED: {False},
    }


def test_culling_gives_back_the_layer_and_the_optimizer(
    model: MorphableModel, library: MemoryLibrary
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.attach_optimizer(optimizer, lr=0.01)
    keys = list(model.state_dict())
    host = [p for group in optimizer.param_groups for p in group["params"]]
    step(model, optimizer)
    momentum = {p: optimizer.state[p]["momentum_buffer"] for p in host}
    layer = model.kasmina_layers["0"]

    model.kasmina.submit(command(CommandKind.GERMINATE, library.add()))
    step(model, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]
    assert type(model[0]).__name__ == "ActiveLinear"
    step(model, optimizer)
    assert len(optimizer.state) == len(host) + 4

    model.kasmina.submit(command(CommandKind.CULL))
    step(model, optimizer)
    assert layer.state(1) is S.CULLED
    assert type(model[0]) is nn.Linear
    assert list(model.state_dict()) == keys
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(host), 0]
    assert set(optimizer.state) == set(host)
    assert all(optimizer.state[p]["momentum_buffer"] is momentum[p] for p in host)

    for _ in range(3):
        step(model, optimizer)
    assert layer.state(1) is S.DORMANT


def test_a_command_is_obeyed_once_and_a_wrong_one_is_refused_with_a_reason(
    model: MorphableModel, library: MemoryLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[LifecycleEvent] = []
    model.kasmina.emit_lifecycle = events.append
    order = command(CommandKind.GERMINATE, library.add())
    model.kasmina.submit(order)
    model.kasmina.submit(order)
    step(model)
    assert "refused" not in caplog.text
    model.kasmina.submit(command(CommandKind.KEEP))
    model.kasmina.submit(command(CommandKind.KEEP, layer_name="nowhere"))
    model.kasmina.submit(command(CommandKind.KEEP, seed_idx=7))
    step(model)
    assert "KEEP refused: seed 1 on '0': no edge TRAINING > FINE_TUNING" in events[-1].reason
    assert "Layer nowhere not found" in caplog.text
    assert "Invalid seed index: 7" in caplog.text
    assert model.kasmina_layers["0"].state(1) is S.TRAINING


def test_loading_by_hand_grafts_at_the_alpha_asked_for(
    model: MorphableModel, library: MemoryLibrary
) -> None:
    layer = model.kasmina_layers["0"]
    assert asyncio.run(layer.load_kernel(0, library.add()))
    assert layer.state(0) is S.GRAFTING
    assert layer.state_layout.value("alpha_blend", 0) == pytest.approx(0.3)
    for _ in range(50):
        step(model)
    assert layer.state(0) is S.GRAFTING
    assert layer.state_layout.value("alpha_blend", 0) == pytest.approx(0.3)
    layer.stabilize(0, alpha=0.7)
    assert layer.state_layout.value("alpha_blend", 0) == pytest.approx(0.7)


def test_loading_from_another_thread_waits_for_the_next_step(
    model: MorphableModel, library: MemoryLibrary
) -> None:
    step(model)
    results: list[bool] = []
    thread = threading.Thread(
        target=lambda: results.append(asyncio.run(model.load_kernel("0", 1, library.add())))
    )
    thread.start()
    while thread.is_alive():
        step(model)
        thread.join(0.001)
    assert results == [True]
    assert model.kasmina_layers["0"].state(1) is S.GRAFTING


def rejected(library: MemoryLibrary) -> str:
    return library.add(status=KernelStatus.REJECTED)


def pending(library: MemoryLibrary) -> str:
    return library.add(status=KernelStatus.PENDING_BENCHMARKING)


def unknown(library: MemoryLibrary) -> str:
    return "f" * 64


def changed(library: MemoryLibrary, **update: object) -> str:
    artifact_id = library.add()
    bundle = library.bundles[artifact_id]
    library.bundles[artifact_id] = bundle.model_copy(update=update)
    return artifact_id


def tampered(library: MemoryLibrary) -> str:
    bundle: KernelBundle = library.bundles[library.add()]
    files = dict(bundle.files)
    files["params.safetensors"] = files["params.safetensors"][:-1] + b"\x01"
    return changed(library, files=files)


def unsigned(library: MemoryLibrary) -> str:
    bundle = library.bundles[library.add()]
    return changed(library, record=bundle.record.model_copy(update={"signature": None}))


def for_another_site(library: MemoryLibrary) -> str:
    return library.add(
        Residual,
        SiteSignature(host="Linear", inp_shape=(None, 6), act_shape=(None, 4), channel_dim=1),
    )


BAD_ARTIFACTS: dict[str, tuple[Callable[[MemoryLibrary], str], str]] = {
    "rejected": (rejected, "REJECTED"),
    "pending": (pending, "PENDING_BENCHMARKING"),
    "unknown": (unknown, "no kernel ffff"),
    "tampered": (tampered, "params.safetensors"),
    "unsigned": (unsigned, "sign"),
    "for another site": (for_another_site, "was made for site"),
}


@pytest.mark.parametrize("case", BAD_ARTIFACTS)
def test_a_bad_artifact_is_not_loaded_and_the_host_stays_as_it_was(
    case: str, model: MorphableModel, library: MemoryLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    make, message = BAD_ARTIFACTS[case]
    inp = torch.randn(5, 8)
    expected = model(inp)
    assert asyncio.run(model.load_kernel("0", 1, make(library))) is False
    [line] = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert line.startswith("seed 1 on '0': kernel not loaded: ")
    assert message in line
    assert torch.equal(model(inp), expected)
    assert type(model[0]) is nn.Linear
    layer = model.kasmina_layers["0"]
    assert layer.state(1) is S.DORMANT
    assert layer.state_layout.value("error_count", 1) == 1
    assert asyncio.run(model.load_kernel("0", 1, library.add()))


def test_a_kernel_of_another_torch_release_is_not_loaded(
    model: MorphableModel, library: MemoryLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact_id = library.add()
    monkeypatch.setattr(torch, "__version__", "9.9.1")
    assert asyncio.run(model.load_kernel("0", 1, artifact_id)) is False


def test_wrong_arguments_raise_before_anything_is_loaded(
    model: MorphableModel, library: MemoryLibrary
) -> None:
    artifact_id = library.add()
    for name, seed_idx, alpha, message in [
        ("blocks.9", 0, 0.3, r"Layer blocks.9 not found \(layers with seeds: '0', '1', '2'\)"),
        ("0", 7, 0.3, "Invalid seed index: 7"),
        ("0", -1, 0.3, "Invalid seed index: -1"),
        ("0", 1, 1.4, r"seed 1 on '0': alpha must lie in \[0, 1\], got 1.4"),
    ]:
        with pytest.raises(ValueError, match=message):
            asyncio.run(model.load_kernel(name, seed_idx, artifact_id, alpha=alpha))
    asyncio.run(model.load_kernel("0", 1, artifact_id))
    with pytest.raises(LifecycleError, match="no edge GRAFTING > GERMINATED"):
        asyncio.run(model.load_kernel("0", 1, artifact_id))


def test_without_a_library_nothing_loads_and_the_error_says_how_to_connect_one(
    library: MemoryLibrary,
) -> None:
    model = esper.wrap(nn.Linear(8, 8), seeds_per_layer=2)
    with pytest.raises(
        EsperError, match=r"no library is connected: call model\.connect\(esper\.Urza"
    ):
        asyncio.run(model.load_kernel("", 0, library.add()))
    assert model.kasmina_layers[""].state(0) is SeedState.DORMANT


def test_a_cancelled_germination_leaves_no_trace(
    model: MorphableModel, library: MemoryLibrary
) -> None:
    layer = model.kasmina_layers["0"]
    layer.request_germination(1, library.add(), STRATEGY)
    layer.cancel_germination(1)
    step(model)
    assert layer.state(1) is S.DORMANT
    layer.request_germination(1, library.add(), STRATEGY)
    step(model)
    assert layer.state(1) is S.TRAINING
    layer.cancel_germination(1)
    assert layer.state(1) is S.DORMANT
    assert type(model[0]) is nn.Linear


def test_two_seeds_of_one_layer_share_one_cached_kernel(
    model: MorphableModel, library: MemoryLibrary
) -> None:
    artifact_id = library.add()
    for seed_idx in (0, 1):
        assert asyncio.run(model.load_kernel("0", seed_idx, artifact_id))
    stats = model.kasmina_layers["0"].kernel_cache.stats()
    assert (stats.hits, stats.misses, stats.num_kernels) == (1, 1, 1)
    first, second = (model.kasmina_layers["0"].kernel(i).weights()[0] for i in (0, 1))
    assert first.data_ptr() != second.data_ptr()
    layer = model.kasmina_layers["0"]
    layer.cull(0, "test")
    assert type(model[0]).__name__ == "ActiveLinear"
    layer.cull(1, "test")
    assert type(model[0]) is nn.Linear


def test_unwrapping_a_grown_model_must_be_meant(
    model: MorphableModel, library: MemoryLibrary
) -> None:
    asyncio.run(model.load_kernel("0", 1, library.add()))
    with pytest.raises(esper.errors.EsperError, match=r"kernels are in place at \[\('0', 1\)\]"):
        esper.unwrap(model)
    assert isinstance(model, MorphableModel)
    esper.unwrap(model, discard_kernels=True)
    assert type(model) is nn.Sequential
    assert type(model[0]) is nn.Linear


def test_activations_and_convolutions_carry_seeds(library: MemoryLibrary) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    model = esper.wrap(net, settings=SeedSettings(seeds_per_layer=2))
    model.connect(library)
    inp = torch.randn(5, 8)
    expected = model(inp)
    site = model.kasmina_layers["1"].site(1)
    assert (site.host, site.inp_shape, site.act_shape) == ("ReLU", (None, 8), (None, 4))
    assert asyncio.run(model.load_kernel("1", 1, library.add(Residual, site), alpha=1.0))
    assert not torch.equal(model(inp), expected)
    before = nn.functional.linear(inp, net[0].weight, net[0].bias)
    kernel = model.kasmina_layers["1"].kernel(1)
    act = torch.relu(before)
    by_hand = torch.cat([act[:, :4], kernel(before, act[:, 4:])], 1)
    torch.testing.assert_close(model(inp), net[2](by_hand))


def test_the_site_of_a_seed_is_its_chunk(model: MorphableModel) -> None:
    assert model.kasmina_layers["0"].site(1) == LINEAR_8_4


def test_a_layer_may_change_while_a_kernel_is_prepared_for_it(library: MemoryLibrary) -> None:
    looking, changed = threading.Event(), threading.Event()

    class Gate(nn.Identity):
        """Holds the loading thread up while it looks through the layer."""

        def named_modules(self, *args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name.startswith("esper-loader"):
                looking.set()
                assert changed.wait(60)
            return super().named_modules(*args, **kwargs)

    model = esper.wrap(nn.Sequential(nn.Linear(8, 8)), settings=SeedSettings(seeds_per_layer=2))
    model.connect(library)
    model.attach_optimizer(torch.optim.SGD(model.parameters()))
    layer, artifact_id = model.kasmina_layers["0"], library.add()
    assert asyncio.run(layer.load_kernel(0, artifact_id))
    layer.default_transform.add_module("gate", Gate())
    layer.request_germination(1, artifact_id, STRATEGY)
    step(model)
    assert looking.wait(60)
    layer.cull(0, "test")
    changed.set()
    prepared = model.kasmina.tenancies["0", 1].prepared
    assert prepared is not None
    wait([prepared])
    step(model)
    assert layer.state(1) is S.TRAINING


def prepare(
    library: MemoryLibrary, monkeypatch: pytest.MonkeyPatch, neighbour: bool = False
) -> MorphableModel:
    """Return a model whose next step seats a kernel on layer "0", as they do a ``neighbour``."""
    model = esper.wrap(nn.Sequential(nn.Linear(8, 8)), settings=SeedSettings(seeds_per_layer=2))
    model.connect(library)
    model.attach_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    stepped, fetch = threading.Event(), library.fetch_kernel
    monkeypatch.setattr(library, "fetch_kernel", lambda name: stepped.wait() and fetch(name))
    for seed_idx in range(1 + neighbour):
        model.kasmina_layers["0"].request_germination(seed_idx, library.add(), STRATEGY)
    step(model)
    stepped.set()
    for tenancy in model.kasmina.tenancies.values():
        assert tenancy.prepared is not None
        wait([tenancy.prepared])
    return model


def unheard(model: MorphableModel) -> list[Ensemble]:
    seats = seats_of(model.kasmina_layers["0"].default_transform)
    assert seats is not None
    return seats._unheard


def formed(model: MorphableModel) -> list[Ensemble]:
    """Return what was formed beforehand for the kernel on seed 0."""
    prepared = model.kasmina.tenancies["0", 0].prepared
    assert prepared is not None
    return prepared.result().ensembles


def test_how_a_kernel_computes_is_settled_before_the_step_that_seats_it(
    library: MemoryLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepare(library, monkeypatch)
    [beforehand] = formed(model)
    assert isinstance(beforehand, Bottlenecks)
    model.step()
    assert unheard(model) == [beforehand]
    step(model)
    assert all(weight.grad is not None for weight in beforehand.seats[0].kernel.weights())


def test_a_prepared_kernel_computes_with_a_neighbour_that_came_meanwhile(
    library: MemoryLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepare(library, monkeypatch, neighbour=True)
    [beforehand] = formed(model)
    model.step()
    [together] = unheard(model)
    assert together is not beforehand
    assert [seat.seed_idx for seat in together.seats] == [0, 1]
    step(model)
    weights = [weight for seat in together.seats for weight in seat.kernel.weights()]
    assert all(weight.grad is not None for weight in weights)


def test_a_prepared_kernel_computes_with_the_bank_where_it_is(
    library: MemoryLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moving the model gives the layer other views of the bank, wherever it goes."""
    model = prepare(library, monkeypatch)
    [beforehand] = formed(model)
    model.to(torch.float32)
    model.step()
    [seated] = unheard(model)
    assert seated is not beforehand
    cells = seated.seats[0].cells
    assert isinstance(seated, Bottlenecks)
    assert seated.cells is cells
    assert model.kasmina_layers["0"].state(0) is S.TRAINING


def test_a_prepared_kernel_has_the_mode_that_its_layer_has_by_then(
    library: MemoryLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepare(library, monkeypatch)
    model.eval()
    model.step()
    seats = seats_of(model.kasmina_layers["0"].default_transform)
    assert seats is not None
    assert not any(module.training for seat in seats.occupants() for module in seat.modules())
    assert not seats.training


def test_a_prepared_kernel_goes_where_its_layer_has_gone_meanwhile(
    library: MemoryLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepare(library, monkeypatch)
    [optimizer] = [attached.optimizer for attached in model.kasmina.enrollment.attachments]
    optimizer.param_groups[0]["params"].clear()
    optimizer.add_param_group({"params": list(model.parameters()), "lr": 0.01})
    step(model)
    assert model.kasmina_layers["0"].state(0) is S.TRAINING
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 2 + 4]


def test_a_prepared_kernel_is_given_up_where_its_layer_has_another_dtype(
    library: MemoryLibrary, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = prepare(library, monkeypatch)
    model.double()
    model.step()
    assert model.kasmina_layers["0"].state(0) is S.DORMANT
    assert "layer '0' has become torch.float64 on cpu while its kernel was" in caplog.text
    model(torch.randn(5, 8, dtype=torch.float64)).sum().backward()
