"""Seeds in the user's optimizers: what joins which, what refuses, and that the host never notices."""

import copy
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import wait
from inspect import signature
from typing import Any

import pytest
import torch
from kasmina_library import Doubled, MemoryLibrary, Residual
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel

import esper
from esper.config import SeedSettings
from esper.contracts import GraftingStrategy, LifecycleEvent, SeedState, SiteSignature
from esper.errors import EsperError
from esper.kasmina.kernel import Kernel
from esper.kasmina.model import MorphableModel

S = SeedState
FOREVER = GraftingStrategy(training_steps=1000)
BRIEF = GraftingStrategy(
    training_steps=2, grafting_steps=2, stabilization_steps=2, fine_tuning_steps=2
)
SETTINGS = SeedSettings(seeds_per_layer=2, deterministic=True, embargo_steps=2)
Optimizers = list[torch.optim.Optimizer]
Maker = Callable[[nn.Module], Optimizers]


def of_all(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Maker:
    return lambda net: [make(net.parameters(), **{"lr": 1e-2} | options)]


def muon_and_adamw(net: nn.Module) -> Optimizers:
    matrices = [p for p in net.parameters() if p.dim() == 2]
    vectors = [p for p in net.parameters() if p.dim() < 2]
    return [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(vectors, lr=1e-2)]


def layer_groups(net: nn.Sequential) -> Optimizers:
    groups = [{"params": list(net[0].parameters())}, {"params": list(net[2].parameters())}]
    return [torch.optim.AdamW(groups, lr=1e-2, amsgrad=True)]


PLAIN = ["Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam"]
PLAIN += ["RMSprop", "Rprop", "SGD"]
CAPTURABLE = [n for n in PLAIN if "capturable" in signature(getattr(torch.optim, n)).parameters]
REFUSING = ["LBFGS", "SparseAdam"]
MAKERS: dict[str, Maker] = {
    **{name: of_all(getattr(torch.optim, name)) for name in PLAIN},
    "SGD momentum": of_all(torch.optim.SGD, momentum=0.9, weight_decay=0.1),
    "SGD nesterov foreach": of_all(torch.optim.SGD, momentum=0.9, nesterov=True, foreach=True),
    "SGD fused": of_all(torch.optim.SGD, momentum=0.9, fused=True),
    "Adam fused": of_all(torch.optim.Adam, fused=True),
    "AdamW fused": of_all(torch.optim.AdamW, fused=True, amsgrad=True),
    "AdamW tensor lr": of_all(torch.optim.AdamW, lr=torch.tensor(1e-2)),
    "Adagrad fused": of_all(torch.optim.Adagrad, fused=True),
    "RMSprop centered": of_all(torch.optim.RMSprop, centered=True, momentum=0.9),
    "Muon": muon_and_adamw,
    "groups by layer": layer_groups,
    **{
        f"{name} foreach": of_all(getattr(torch.optim, name), foreach=True)
        for name in PLAIN
        if name != "Adafactor"
    },
    **{
        f"{name} capturable": of_all(getattr(torch.optim, name), capturable=True)
        for name in CAPTURABLE
    },
}


@pytest.fixture(autouse=True)
def _capturable_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch allows it on accelerators alone, but the arithmetic is the same everywhere."""
    devices = "_get_capturable_supported_devices"
    for name, module in [*sys.modules.items()]:
        if name.startswith("torch.optim.") and hasattr(module, devices):
            monkeypatch.setattr(module, devices, lambda supports_xla=True: ["cpu"])


def test_every_optimizer_of_torch_is_among_the_cases() -> None:
    listed = {name for name in torch.optim.__all__ if name[0].isupper()} - {"Optimizer"}
    assert listed == {*PLAIN, *REFUSING, "Muon"}


@pytest.fixture
def library() -> MemoryLibrary:
    return MemoryLibrary()


def host() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def wrapped(library: MemoryLibrary, net: nn.Module | None = None) -> MorphableModel:
    model = esper.wrap(host() if net is None else net, settings=SETTINGS)
    model.connect(library)
    return model


def learn(model: nn.Module, optimizers: Optimizers, number: int = 0) -> Tensor:
    for optimizer in optimizers:
        optimizer.zero_grad()
    inp = torch.randn(5, 8, generator=torch.Generator().manual_seed(number))
    loss = (model(inp) - inp).square().mean()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    if isinstance(model, MorphableModel):
        model.step()
    return loss.detach()


def states(optimizers: Optimizers) -> list[Any]:
    """A deep copy of all that the optimizers hold: groups by position, states by parameter."""
    return copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])


def assert_same(found: Any, expected: Any) -> None:
    """Bit for bit."""
    if isinstance(expected, Tensor):
        assert found.dtype is expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def members(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]


def kernel_of(model: MorphableModel, name: str = "0") -> Kernel:
    kernel = model.kasmina_layers[name].kernel(1)
    assert kernel is not None
    return kernel


def germinate(
    model: MorphableModel,
    library: MemoryLibrary,
    name: str = "0",
    strategy: GraftingStrategy = FOREVER,
    builder: type[nn.Module] = Residual,
) -> None:
    layer = model.kasmina_layers[name]
    layer.request_germination(1, library.add(builder, layer.site(1)), strategy)
    model.step()


# ---------------------------------------------------------------------- every optimizer


@pytest.mark.parametrize("name", MAKERS)
def test_a_seed_that_came_and_went_leaves_the_run_bit_identical(
    name: str, library: MemoryLibrary
) -> None:
    plain = host()
    plain_optimizers = MAKERS[name](plain)
    expected = [learn(plain, plain_optimizers, number) for number in range(9)]

    model = wrapped(library)
    optimizers = MAKERS[name](model)
    for optimizer in optimizers:
        model.attach_optimizer(optimizer)
    losses = [learn(model, optimizers, number) for number in range(3)]

    before = states(optimizers)
    germinate(model, library)
    joined = sum(len(group) for optimizer in optimizers for group in members(optimizer))
    assert joined == 4 + 4
    kernel = kernel_of(model)
    start = [weight.detach().clone() for weight in kernel.weights()]
    host_ids = {id(p) for p in model.parameters()}
    for optimizer, kept in zip(optimizers, before, strict=True):
        mine = [p for g in optimizer.param_groups for p in g["params"] if id(p) in host_ids]
        held = [optimizer.state[p] for p in mine if p in optimizer.state]
        assert_same(held, list(kept["state"].values()))
    losses += [learn(model, optimizers, number) for number in range(3, 6)]
    moved = [not torch.equal(a, b) for a, b in zip(start, kernel.weights(), strict=True)]
    assert all(moved)

    model.kasmina_layers["0"].cull(1, "test")
    losses += [learn(model, optimizers, number) for number in range(6, 9)]
    assert_same(losses, expected)
    assert_same(list(model.parameters()), list(plain.parameters()))
    assert_same(states(optimizers), states(plain_optimizers))


@pytest.mark.parametrize("name", MAKERS)
def test_a_seed_lives_through_all_states(name: str, library: MemoryLibrary) -> None:
    model = wrapped(library)
    optimizers = MAKERS[name](model)
    for optimizer in optimizers:
        model.attach_optimizer(optimizer, lr=1e-3)
    germinate(model, library, strategy=BRIEF)
    layer = model.kasmina_layers["0"]
    seen = set()
    for number in range(12):
        seen.add(layer.state(1))
        if layer.state(1) is S.EVALUATING:
            layer.keep(1, "test")
        assert learn(model, optimizers, number).isfinite()
    assert layer.state(1) is S.FOSSILIZED
    assert {S.TRAINING, S.GRAFTING, S.STABILIZATION} <= seen
    sizes = [
        len(group["params"])
        for o in optimizers
        for group in o.param_groups
        if "esper_seeds" in group
    ]
    assert sum(sizes) == 4


@pytest.mark.parametrize("name", MAKERS)
def test_the_state_of_a_kernels_weights_has_the_form_of_the_hosts(
    name: str, library: MemoryLibrary
) -> None:
    """Fused and capturable steps take counts that are tensors only, and on the weights' device."""
    model = wrapped(library)
    optimizers = MAKERS[name](model)
    for optimizer in optimizers:
        model.attach_optimizer(optimizer)
    learn(model, optimizers)
    germinate(model, library)
    learn(model, optimizers, 1)
    of_kernel = {id(weight) for weight in kernel_of(model).weights()}
    for optimizer in optimizers:
        forms: dict[bool, set[Any]] = {True: set(), False: set()}
        for weight, state in optimizer.state.items():
            forms[id(weight) in of_kernel].add((weight.dim(), *form(weight, state)))
        assert forms[True] == forms[False]
        if name.endswith(("capturable", "fused")):
            assert all(
                isinstance(s["step"], Tensor) for s in optimizer.state.values() if "step" in s
            )


def form(weight: Tensor, state: dict[str, Any]) -> list[Any]:
    return [
        (key, value.dtype, value.device, value.dim() and value.shape == weight.shape)
        if isinstance(value, Tensor)
        else (key, type(value))
        for key, value in sorted(state.items())
    ]


# ---------------------------------------------------------------------- refusals


def muon_alone(net: nn.Module) -> Optimizers:
    return muon_and_adamw(net)[:1]


class Gain(nn.Module):
    """``act * gain``, for layers whose input no Linear takes."""

    def __init__(self, site: SiteSignature):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(site.act_channels))

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act * self.gain


class SparseHost(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 8, sparse=True)

    def forward(self, inp: Tensor) -> Tensor:
        return self.table(torch.arange(5))


REFUSALS: dict[str, tuple[Callable[[], nn.Module], str, type[nn.Module], Maker, str]] = {
    "Muon": (host, "0", Residual, muon_alone, r"Muon does not take the kernel's weights .*: .*2D"),
    "LBFGS": (host, "0", Residual, of_all(torch.optim.LBFGS), "LBFGS keeps one history"),
    "SparseAdam": (
        SparseHost,
        "table",
        Gain,
        of_all(torch.optim.SparseAdam),
        r"SparseAdam does not take the kernel's weights .*: .*dense gradients",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_an_optimizer_that_refuses_a_kernel_has_its_seed_culled(
    name: str, library: MemoryLibrary
) -> None:
    make_host, layer_name, builder, make, reason = REFUSALS[name]
    model = wrapped(library, make_host())
    events: list[LifecycleEvent] = []
    model.kasmina.emit_lifecycle = events.append
    [optimizer] = make(model)
    model.attach_optimizer(optimizer)
    before, groups = states([optimizer]), members(optimizer)
    model(torch.randn(5, 8))
    own_classes = [type(module) for module in model.modules()]
    germinate(model, library, layer_name, builder=builder)

    [culled] = [event for event in events if event.target is S.CULLED]
    with pytest.raises(EsperError, match=reason):
        raise EsperError(culled.reason)
    layer = model.kasmina_layers[layer_name]
    assert layer.state(1) is S.DORMANT
    assert layer.state_layout.value("error_count", 1) == 1
    assert [type(module) for module in model.modules()] == own_classes
    assert model.kasmina.num_occupied == 0
    assert members(optimizer) == groups
    assert_same(states([optimizer]), before)

    germinate(model, library, layer_name, builder=Doubled)  # nothing to learn, nothing to refuse
    assert layer.state(1) is S.GRAFTING


def closure(net: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = net(torch.ones(5, 8)).square().mean()
        loss.backward()
        return loss

    return evaluate


def test_lbfgs_begins_anew_when_a_kernel_that_it_was_made_with_leaves(
    library: MemoryLibrary,
) -> None:
    model = wrapped(library)
    germinate(model, library, strategy=BRIEF)
    while model.kasmina_layers["0"].state(1) is S.TRAINING:
        model.step()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    model.attach_optimizer(optimizer)
    first = optimizer.step(closure(model, optimizer))
    model.kasmina_layers["0"].cull(1, "test")
    assert len(members(optimizer)[0]) == 4
    for _ in range(3):
        last = optimizer.step(closure(model, optimizer))
    assert last < first


def test_lbfgs_goes_on_beside_a_refused_seed(library: MemoryLibrary) -> None:
    plain, model = host(), wrapped(library)
    [expected], [optimizer] = (of_all(torch.optim.LBFGS)(net) for net in (plain, model))
    model.attach_optimizer(optimizer)
    for number in range(4):
        expected.step(closure(plain, expected))
        optimizer.step(closure(model, optimizer))
        if number == 1:
            germinate(model, library)
    assert_same(list(model.parameters()), list(plain.parameters()))
    other = wrapped(library)
    with pytest.raises(ValueError, match="LBFGS has one parameter group alone"):
        other.attach_optimizer(torch.optim.LBFGS(other.parameters()), lr=0.1)


def test_a_kernel_in_place_is_refused_by_attaching(library: MemoryLibrary) -> None:
    model = wrapped(library)
    first = torch.optim.SGD(model.parameters(), lr=0.1)
    [muon] = muon_alone(model)
    germinate(model, library)
    with pytest.raises(EsperError, match="Muon does not take the kernel's weights"):
        model.attach_optimizer(muon, lr=0.1)
    assert len(muon.param_groups) == 1
    assert not model.kasmina.enrollment.attachments
    model.attach_optimizer(first)
    assert len(members(first)[0]) == 4 + 4


def test_a_state_dict_with_a_refused_kernel_changes_nothing(library: MemoryLibrary) -> None:
    grown = wrapped(library)
    layer = grown.kasmina_layers["0"]
    germinate(grown, library, strategy=BRIEF)
    while layer.state(1) is S.TRAINING:
        grown.step()
    model = wrapped(library)
    [muon] = muon_alone(model)
    model.attach_optimizer(muon)
    with pytest.raises(EsperError, match="Muon does not take"):
        model.load_state_dict(grown.state_dict())
    assert model.kasmina_layers["0"].state(1) is S.DORMANT
    assert len(members(muon)[0]) == 2


def test_an_optimizer_of_another_model_is_refused(library: MemoryLibrary) -> None:
    model = wrapped(library)
    foreign = torch.optim.Adam(host().parameters())
    with pytest.raises(ValueError, match="Adam has none of the parameters of this Sequential"):
        model.attach_optimizer(foreign)
    assert not model.kasmina.enrollment.attachments
    model.attach_optimizer(torch.optim.Adam(model[2].parameters()))


def test_an_optimizer_of_kernels_alone_is_one_of_the_models(library: MemoryLibrary) -> None:
    model = wrapped(library)
    model.attach_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    germinate(model, library)
    of_kernel = torch.optim.Adam(kernel_of(model).parameters())
    model.attach_optimizer(of_kernel)
    assert model.kasmina.enrollment.attachment_of(of_kernel) is not None


def test_an_optimizer_is_asked_again_with_other_options(
    library: MemoryLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the preparation of a kernel and the step that seats it."""
    asked: list[float] = []

    class Choosy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            decay = self.param_groups[0]["weight_decay"]
            if closure is not None:  # a trial
                asked.append(decay)
                if decay > 0.5:
                    raise RuntimeError("this decay is too much")
            return super().step()

    model, prepared = unseated(library, monkeypatch, lambda net: Choosy(net.parameters(), lr=0.1))
    [group] = model.kasmina.enrollment.attachments[0].optimizer.param_groups
    wait([prepared])
    assert asked == [0, 0]
    group["lr"], group["weight_decay"] = 0.2, 0.75
    model.step()
    assert asked == [0, 0, 0.75]
    assert model.kasmina_layers["0"].state(1) is S.DORMANT
    model.kasmina.close()


def unseated(
    library: MemoryLibrary,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[nn.Module], torch.optim.Optimizer],
) -> tuple[MorphableModel, Any]:
    """Return a model whose next step seats a kernel, and the future of its preparation."""
    stepped, fetch = threading.Event(), library.fetch_kernel
    monkeypatch.setattr(library, "fetch_kernel", lambda name: stepped.wait() and fetch(name))
    model = esper.wrap(host(), settings=SETTINGS.model_copy(update={"deterministic": False}))
    model.connect(library)
    model.attach_optimizer(make(model))
    germinate(model, library)
    stepped.set()
    prepared = model.kasmina.tenancies["0", 1].prepared
    assert prepared is not None
    return model, prepared


class Demanding(torch.optim.SGD):
    """It cannot be made of parameters and options, so nobody can ask a copy of it."""

    def __init__(self, params: Any, teacher: nn.Module):
        super().__init__(params, lr=0.1)
        self.teacher = teacher


def test_an_optimizer_that_cannot_be_asked_is_trusted(library: MemoryLibrary) -> None:
    model = wrapped(library)
    optimizer = Demanding(model.parameters(), host())
    model.attach_optimizer(optimizer)
    germinate(model, library)
    assert len(members(optimizer)[0]) == 4 + 4


# ---------------------------------------------------------------------- own options and schedulers


def test_options_of_seeds_are_checked_when_attached(library: MemoryLibrary) -> None:
    model = wrapped(library)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"SGD has no options \['learning_rate'\], only \['dam"):
        model.attach_optimizer(optimizer, learning_rate=0.1)
    model.attach_optimizer(optimizer, lr=0.01)
    model.attach_optimizer(optimizer)
    model.attach_optimizer(optimizer, lr=0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]
    with pytest.raises(ValueError, match=r"SGD is attached with {'lr': 0.01}, got {'lr': 0.5}"):
        model.attach_optimizer(optimizer, lr=0.5)


def test_a_scheduler_that_is_there_first_is_refused(library: MemoryLibrary) -> None:
    model = wrapped(library)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9)
    with pytest.raises(ValueError, match="attach the optimizer before you make the scheduler"):
        model.attach_optimizer(optimizer, lr=0.01)
    assert len(optimizer.param_groups) == 1
    model.attach_optimizer(optimizer)


def sequential(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts = [lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.SequentialLR(optimizer, parts, [4])


def chained(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts = [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LambdaLR each": lambda o: lr_scheduler.LambdaLR(
        o, [lambda epoch: 0.5**epoch] * len(o.param_groups)
    ),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, [0.01, 0.001], [0.1, 0.01], 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.01], 20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(
        o, patience=0, min_lr=[1e-4, 1e-5]
    ),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "SWALR": lambda o: SWALR(o, 0.01),
}


def test_every_scheduler_of_torch_is_among_the_cases() -> None:
    listed = {name for name in lr_scheduler.__all__ if name != "LRScheduler"}
    assert listed <= {name.split()[0] for name in SCHEDULERS}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_move_the_group_of_seeds_as_any_other(name: str, library: MemoryLibrary) -> None:
    reference = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.01)], momentum=0.9
    )
    model = wrapped(library)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.attach_optimizer(optimizer, lr=0.01)
    schedulers = [SCHEDULERS[name](o) for o in (reference, optimizer)]
    metric = {"metrics": 1.0} if name == "ReduceLROnPlateau" else {}
    for number in range(9):
        reference.step()
        learn(model, [optimizer], number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own, in SequentialLR
            for scheduler in schedulers:
                scheduler.step(**metric)
        if number == 2:
            germinate(model, library)
        if number == 5:
            model.kasmina_layers["0"].cull(1, "test")
        rates = [[group["lr"] for group in o.param_groups] for o in (reference, optimizer)]
        assert rates[0] == rates[1]
        sizes = [len(group) for group in members(optimizer)]
        assert sizes == [4, 4 if 2 <= number < 5 else 0]


def test_the_seeds_learn_at_their_own_rate(library: MemoryLibrary) -> None:
    model = wrapped(library)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.attach_optimizer(optimizer, lr=0.0, weight_decay=0.5)
    germinate(model, library)
    kernel = kernel_of(model)
    before = [weight.detach().clone() for weight in kernel.weights()]
    learn(model, [optimizer])
    assert_same([w.detach() for w in kernel.weights()], before)
    optimizer.param_groups[1]["lr"] = 0.1
    learn(model, [optimizer])
    assert not torch.equal(kernel.weights()[0], before[0])


# ---------------------------------------------------------------------- groups and several optimizers


def test_matrices_join_matrices_and_vectors_vectors(library: MemoryLibrary) -> None:
    model = wrapped(library)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    model.attach_optimizer(optimizer)
    germinate(model, library)
    for group, dim in zip(optimizer.param_groups, (2, 1), strict=True):
        assert [p.dim() for p in group["params"]] == [dim] * 4


def blocks() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    )


@pytest.mark.parametrize(("name", "number"), [("0.0", 0), ("0.1", 0), ("1.0", 1), ("1.1", 1)])
def test_a_seed_joins_the_optimizer_of_its_layer_or_its_surroundings(
    name: str, number: int, library: MemoryLibrary
) -> None:
    model = wrapped(library, blocks())
    model(torch.randn(5, 8))
    optimizers = [
        torch.optim.SGD(model[0].parameters(), lr=0.1),
        torch.optim.Adam(model[1].parameters()),
    ]
    for optimizer in optimizers:
        model.attach_optimizer(optimizer)
    germinate(model, library, name)
    sizes = [len(members(optimizer)[0]) for optimizer in optimizers]
    assert sizes == [6 if index == number else 2 for index in range(2)]
    learn(model, optimizers)
    model.kasmina_layers[name].cull(1, "test")
    assert [len(members(optimizer)[0]) for optimizer in optimizers] == [2, 2]
    assert all(id(p) in members(o)[0] for o in optimizers for p in o.state)


def test_an_optimizer_for_the_same_parameters_takes_the_others_place(
    library: MemoryLibrary,
) -> None:
    model = wrapped(library)
    host_parameters = list(model.parameters())
    first = torch.optim.SGD(host_parameters, lr=0.1)
    model.attach_optimizer(first, lr=0.01)
    germinate(model, library)
    second = torch.optim.Adam(host_parameters)
    model.attach_optimizer(second)
    assert [a.optimizer for a in model.kasmina.enrollment.attachments] == [second]
    assert len(members(second)[0]) == 4 + 4


def plain_sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=1e-2)


def exchange_groups(model: MorphableModel, optimizer: torch.optim.Optimizer) -> Optimizers:
    groups = optimizer.param_groups
    groups[:] = [{**group, "params": [*group["params"]]} for group in groups]
    return [optimizer]


def exchange_optimizer(model: MorphableModel, optimizer: torch.optim.Optimizer) -> Optimizers:
    successor = torch.optim.AdamW(list(model.parameters()), lr=1e-3)
    model.attach_optimizer(successor)
    return [successor, optimizer]


@pytest.mark.parametrize("change", [exchange_groups, exchange_optimizer])
def test_a_prepared_kernel_joins_what_is_there_when_it_is_seated(
    change: Callable[[MorphableModel, torch.optim.Optimizer], Optimizers],
    library: MemoryLibrary,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, prepared = unseated(library, monkeypatch, plain_sgd)
    [optimizer] = [attached.optimizer for attached in model.kasmina.enrollment.attachments]
    wait([prepared])
    old_groups = optimizer.param_groups[:]

    [home, *others] = change(model, optimizer)
    model.step()

    weights = {id(weight) for weight in kernel_of(model).weights()}
    assert weights <= {id(p) for group in home.param_groups for p in group["params"]}
    elsewhere = [g for other in others for g in other.param_groups] + old_groups
    assert not weights & {id(p) for group in elsewhere for p in group["params"]}
    model.kasmina.close()


def test_named_parameters_keep_their_names(library: MemoryLibrary) -> None:
    model = wrapped(library)
    optimizer = torch.optim.AdamW(model.named_parameters())
    model.attach_optimizer(optimizer, lr=1e-4)
    names = list(optimizer.param_groups[0]["param_names"])
    germinate(model, library, strategy=BRIEF)
    while model.kasmina_layers["0"].state(1) is S.TRAINING:
        learn(model, [optimizer])
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [by_id[id(p)] for p in group["params"]]
    assert len(optimizer.param_groups[1]["param_names"]) == 4
    model.kasmina_layers["0"].cull(1, "test")
    assert [group["param_names"] for group in optimizer.param_groups] == [names, []]


# ---------------------------------------------------------------------- states, averages


@pytest.mark.parametrize("options", [{}, {"lr": 1e-3}], ids=["host's group", "own group"])
def test_loading_an_optimizers_state_midway(
    options: dict[str, float], library: MemoryLibrary
) -> None:
    model = wrapped(library)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.attach_optimizer(optimizer, **options)
    germinate(model, library)
    learn(model, [optimizer])
    optimizer_state = states([optimizer])[0]
    weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    expected = [learn(model, [optimizer], number) for number in range(3)]
    optimizer.load_state_dict(optimizer_state)
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.copy_(weights.pop(0))
    assert_same([learn(model, [optimizer], number) for number in range(3)], expected)

    model.kasmina_layers["0"].cull(1, "test")
    assert sum(map(len, members(optimizer))) == len(optimizer.state) == 4
    for _ in range(3):
        learn(model, [optimizer])
    germinate(model, library)
    assert [len(group) for group in members(optimizer)] == ([4, 4] if options else [8])


@pytest.mark.parametrize("averaging", [{}, {"use_buffers": True}], ids=["weights", "buffers"])
def test_an_average_ignores_training_and_follows_growth_by_a_state_dict(
    averaging: dict[str, bool], library: MemoryLibrary
) -> None:
    model = wrapped(library)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.attach_optimizer(optimizer)
    average = AveragedModel(model, **averaging)
    germinate(model, library, strategy=GraftingStrategy(training_steps=3, grafting_steps=3))
    total = [torch.zeros_like(p) for p in average.module.parameters()]
    count = 0
    while model.kasmina_layers["0"].state(1) is S.TRAINING:
        average.update_parameters(model)
        total = [t + p.detach() for t, p in zip(total, model.parameters(), strict=True)]
        count += 1
        learn(model, [optimizer], count)
    for mean, summed in zip(average.module.parameters(), total, strict=True):
        torch.testing.assert_close(mean, summed / count)

    kept = copy.deepcopy(average.module.state_dict())
    average.module.load_state_dict(model.state_dict() | average.module.state_dict())
    now = average.module.state_dict()
    assert now.keys() == model.state_dict().keys()
    assert_same({name: now[name] for name in kept}, kept)
    average.update_parameters(model)
    for mean, current in zip(average.module.parameters(), model.parameters(), strict=True):
        assert mean.shape == current.shape
    kernel = average.module.kasmina_layers["0"].kernel(1)
    assert_same(
        [w.detach() for w in kernel.weights()], [w.detach() for w in kernel_of(model).weights()]
    )


def test_a_checkpoint_keeps_the_group_of_seeds(tmp_path: Any, library: MemoryLibrary) -> None:
    def begin(net: nn.Module) -> tuple[MorphableModel, torch.optim.Optimizer, Any]:
        model = wrapped(library, net)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model.attach_optimizer(optimizer, lr=1e-3)
        return model, optimizer, lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)

    def go_on(model: MorphableModel, optimizer: torch.optim.Optimizer, scheduler: Any) -> list[Any]:
        numbers: list[Any] = []
        for number in range(4):
            numbers.append(learn(model, [optimizer], number))
            scheduler.step()
            numbers.append([group["lr"] for group in optimizer.param_groups])
        return numbers

    model, optimizer, scheduler = begin(host())
    germinate(model, library)
    go_on(model, optimizer, scheduler)
    esper.save(model, tmp_path, optimizer, extra={"scheduler": scheduler.state_dict()})
    expected = go_on(model, optimizer, scheduler)
    twin, again, resumed = begin(host())
    extra = esper.load(tmp_path, twin, again)
    resumed.load_state_dict(extra["scheduler"])
    assert_same(go_on(twin, again, resumed), expected)
