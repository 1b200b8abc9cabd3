"""``esper.save`` and ``esper.load``: a run that stops goes on as if it had not."""

import contextlib
import copy
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from kasmina_library import LINEAR_8_4, Irregular, MemoryLibrary, Residual
from torch import Tensor, nn
from torch.optim import lr_scheduler

import esper
from esper.config import SeedSettings
from esper.contracts import (
    CommandKind,
    GraftingStrategy,
    KasminaControlCommand,
    SeedState,
    SiteSignature,
)
from esper.errors import ArtifactError, ArtifactNotFoundError, CheckpointError
from esper.kasmina.checkpoint_files import MANIFEST, _digest_of
from esper.kasmina.model import MorphableModel
from esper.kasmina.tree import pack, unpack

S = SeedState
BRIEF = GraftingStrategy(
    training_steps=3, grafting_steps=4, stabilization_steps=3, fine_tuning_steps=4
)
SETTINGS = SeedSettings(seeds_per_layer=2, deterministic=True, embargo_steps=6, observe_every=5)
NUM_STEPS = 8

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
}


def host() -> nn.Sequential:
    """A host that draws random numbers, has buffers, and seeds before and after them."""
    return nn.Sequential(
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 8)
    )


def optimizer_of(net: nn.Module, name: str) -> torch.optim.Optimizer:
    """Two groups, so that kernels have to find theirs."""
    groups = [
        {"params": list(net[0].parameters())},
        {"params": [*net[1].parameters(), *net[4].parameters()], "lr": 3e-3},
    ]
    return OPTIMIZERS[name](groups)


def start(library: MemoryLibrary, optimizer: str) -> tuple[MorphableModel, torch.optim.Optimizer]:
    model = esper.wrap(host(), settings=SETTINGS)
    model.connect(library)
    made = optimizer_of(model, optimizer)
    model.attach_optimizer(made)
    return model, made


def step(model: MorphableModel, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = model(torch.randn(5, 8)).square().mean() * random.uniform(0.5, 1) * numpy.random.rand()
    loss.backward()
    optimizer.step()
    model.step()
    return loss.detach()


def after(
    model: MorphableModel, optimizer: torch.optim.Optimizer, steps: int = NUM_STEPS
) -> list[Tensor]:
    """Train on, and return every number that a run consists of."""
    numbers = [step(model, optimizer) for _ in range(steps)]
    numbers += [tensor.clone() for tensor in model.state_dict().values()]
    for seat in model.kasmina.isolated_seats():
        numbers += [tensor.clone() for tensor in seat.state_dict().values()]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            kept = optimizer.state[parameter]
            numbers += [kept[key].clone() for key in sorted(kept) if isinstance(kept[key], Tensor)]
    flags = [p.requires_grad for group in optimizer.param_groups for p in group["params"]]
    numbers.append(torch.tensor(flags))
    numbers.append(torch.tensor([group["lr"] for group in optimizer.param_groups]))
    numbers.append(torch.tensor([len(group["params"]) for group in optimizer.param_groups]))
    numbers.append(torch.frombuffer(bytearray(bytes(model.kasmina.bank.block)), dtype=torch.uint8))
    numbers.append(torch.get_rng_state())
    return numbers


def assert_same(numbers: list[Tensor], expected: list[Tensor]) -> None:
    assert len(numbers) == len(expected)
    for number, (ours, theirs) in enumerate(zip(numbers, expected, strict=True)):
        assert ours.dtype is theirs.dtype, number
        assert ours.shape == theirs.shape, number
        # By their bytes, so that NaN equals NaN and 0 is not -0.
        assert ours.numpy().tobytes() == theirs.numpy().tobytes(), number


def resume(
    folder: Path, library: MemoryLibrary, optimizer: str, **options: Any
) -> tuple[MorphableModel, torch.optim.Optimizer]:
    """As a new process would, whose generators and initial weights are others."""
    torch.manual_seed(99)
    random.seed(99)
    numpy.random.seed(99)
    net = host()
    made = optimizer_of(net, optimizer)
    esper.load(folder, net, made, library=library, **options)
    return net, made


def walk(model: MorphableModel, optimizer: torch.optim.Optimizer, state: S, artifact: str) -> None:
    """Train until seed 1 of layer "0" is in the middle of ``state``."""
    layer = model.kasmina_layers["0"]
    for _ in range(3):
        step(model, optimizer)
    if state is S.DORMANT:
        return
    if state is S.ROLLED_BACK:
        layer._move(1, S.ROLLED_BACK, "test")
        return
    layer.request_germination(1, artifact, BRIEF)
    if state is S.LOADING:
        layer.await_kernel(1)
    if state in (S.GERMINATED, S.LOADING):
        return
    goal = S.TRAINING if state is S.CULLED else min(state, S.EVALUATING)
    while layer.state(1) is not goal:
        step(model, optimizer)
    if state is S.CULLED:
        layer.cull(1, "test")
    elif state > S.EVALUATING:
        layer.keep(1, "test")
    while state is S.FOSSILIZED and layer.state(1) is not S.FOSSILIZED:
        step(model, optimizer)
    if state not in (S.EVALUATING, S.FOSSILIZED):
        step(model, optimizer)
    assert layer.state(1) is state


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("state", [state for state in S if state is not S.CANCELLED])
@pytest.mark.parametrize("builder", [Residual, Irregular], ids=["dropout", "irregular"])
def test_a_run_goes_on_bit_for_bit_from_every_state(
    state: S, optimizer: str, builder: type[Residual], tmp_path: Path
) -> None:
    library = MemoryLibrary()
    options = {"dropout": 0.4} if builder is Residual else {}
    artifact = library.add(builder, site(8, 4), **options)
    model, made = start(library, optimizer)
    other = model.kasmina_layers["4"]
    other.request_germination(0, library.add(Residual, site(8, 4)), BRIEF)
    walk(model, made, state, artifact)
    esper.save(model, tmp_path, made)
    expected = after(model, made)
    assert_same(after(*resume(tmp_path, library, optimizer)), expected)


def site(inp: int, act: int) -> SiteSignature:
    return LINEAR_8_4.model_copy(update={"inp_shape": (None, inp), "act_shape": (None, act)})


def test_saving_changes_nothing(tmp_path: Path) -> None:
    runs = []
    for folder in (None, tmp_path):
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        library = MemoryLibrary()
        model, made = start(library, "Adam")
        walk(model, made, S.GRAFTING, library.add(Residual, site(8, 4), dropout=0.4))
        if folder is not None:
            esper.save(model, folder, made)
        runs.append(after(model, made))
    assert_same(*runs)


def test_a_resumed_run_may_be_saved_and_resumed_again(tmp_path: Path) -> None:
    library = MemoryLibrary()
    model, made = start(library, "Adam")
    walk(model, made, S.TRAINING, library.add(Residual, site(8, 4), dropout=0.4))
    esper.save(model, tmp_path, made)
    expected = [*after(model, made, 2), *after(model, made)]
    resumed = resume(tmp_path, library, "Adam")
    first = after(*resumed, 2)
    esper.save(resumed[0], tmp_path, resumed[1])
    assert_same([*first, *after(*resume(tmp_path, library, "Adam"))], expected)


def test_several_seats_of_a_layer_keep_their_order(tmp_path: Path) -> None:
    library = MemoryLibrary()
    model, made = start(library, "Adam")
    step(model, made)
    layer = model.kasmina_layers["0"]
    for seed_idx in (1, 0):
        layer.request_germination(seed_idx, library.add(Residual, site(8, 4)), BRIEF)
        step(model, made)
    for _ in range(3):
        step(model, made)
    assert [seat.seed_idx for seat in layer.occupants()] == [1, 0]
    esper.save(model, tmp_path, made)
    names = list(model.state_dict())
    members = names_in_groups(model, made)
    expected = after(model, made)
    twin, again = resume(tmp_path, library, "Adam")
    assert list(twin.state_dict()) == names
    assert names_in_groups(twin, again) == members
    assert_same(after(twin, again), expected)


def names_in_groups(
    model: MorphableModel, optimizer: torch.optim.Optimizer
) -> list[list[str | None]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]


@pytest.mark.parametrize("count", range(4, 8))
def test_a_run_goes_on_from_before_during_and_after_an_observed_step(
    count: int, tmp_path: Path
) -> None:
    library = MemoryLibrary()
    model, made = start(library, "Adam")
    observations: list[Any] = []
    model.kasmina.emit_observation = observations.append
    for _ in range(count):
        step(model, made)
    esper.save(model, tmp_path, made)
    observations.clear()
    expected = after(model, made)
    assert observations
    twin, again = resume(tmp_path, library, "Adam")
    repeated: list[Any] = []
    twin.kasmina.emit_observation = repeated.append
    assert_same(after(twin, again), expected)
    assert [seen.step for seen in repeated] == [seen.step for seen in observations]
    for ours, theirs in zip(repeated, observations, strict=True):
        for name, field in ours.snapshot.fields.items():
            assert torch.equal(field, theirs.snapshot.fields[name]), name


def test_commands_wait_on_and_are_obeyed_once(tmp_path: Path) -> None:
    library = MemoryLibrary()
    model, made = start(library, "Adam")
    step(model, made)
    artifact = library.add(Residual, site(8, 4))
    obeyed, waiting = (
        KasminaControlCommand(
            kind=CommandKind.GERMINATE,
            layer_name="0",
            seed_idx=seed_idx,
            artifact_id=artifact,
            strategy=BRIEF,
            epoch=0,
            reason="test",
        )
        for seed_idx in (0, 1)
    )
    model.kasmina.submit(obeyed)
    step(model, made)
    model.kasmina.submit(waiting)
    model.kasmina.epoch = 3
    esper.save(model, tmp_path, made)
    expected = after(model, made)
    twin, again = resume(tmp_path, library, "Adam")
    assert twin.kasmina.epoch == 3
    assert twin.kasmina_layers["0"].state(1) is S.DORMANT
    twin.kasmina.submit(obeyed)
    events: list[Any] = []
    twin.kasmina.emit_lifecycle = events.append
    assert_same(after(twin, again), expected)
    assert not [event for event in events if "refused" in event.reason]


def test_a_load_by_hand_that_was_under_way_starts_again(tmp_path: Path) -> None:
    library = MemoryLibrary()
    model, made = start(library, "Adam")
    artifact = library.add(Residual, site(8, 4))
    layer = model.kasmina_layers["0"]
    loading = layer.load_kernel(1, artifact, alpha=0.25)
    with contextlib.suppress(RuntimeError):  # no event loop: nobody will see to it
        loading.send(None)
    assert layer.state(1) in (S.GERMINATED, S.LOADING)
    esper.save(model, tmp_path, made)
    twin, again = resume(tmp_path, library, "Adam")
    step(twin, again)
    assert twin.kasmina_layers["0"].state(1) is S.GRAFTING
    assert twin.kasmina_layers["0"].state_layout.value("alpha_blend", 1) == 0.25
    model.kasmina.close()


def test_a_fossil_that_is_bypassed_stays_so(tmp_path: Path) -> None:
    library = MemoryLibrary()
    model, made = start(library, "Adam")
    walk(model, made, S.FOSSILIZED, library.add(Residual, site(8, 4)))
    model.kasmina.bank.write("fallback_active", 1, 1)
    step(model, made)
    [seat] = model.kasmina_layers["0"].occupants()
    assert seat.bypassed
    esper.save(model, tmp_path, made)
    expected = after(model, made)
    twin, again = resume(tmp_path, library, "Adam")
    events: list[Any] = []
    twin.kasmina.emit_lifecycle = events.append
    assert_same(after(twin, again), expected)
    assert not events


def test_a_fossil_may_still_be_lost(tmp_path: Path) -> None:
    library = MemoryLibrary()
    model, made = start(library, "Adam")
    walk(model, made, S.FOSSILIZED, library.add(Residual, site(8, 4)))
    esper.save(model, tmp_path, made)
    twin, again = resume(tmp_path, library, "Adam")
    twin.kasmina.bank.write("fallback_active", 1, 1)
    step(twin, again)
    [seat] = twin.kasmina_layers["0"].occupants()
    assert seat.bypassed


def test_a_frozen_seed_stays_frozen_whatever_is_asked_of_its_parameters(tmp_path: Path) -> None:
    library = MemoryLibrary()
    model, made = start(library, "Adam")
    walk(model, made, S.EVALUATING, library.add(Residual, site(8, 4)))
    esper.save(model, tmp_path, made)
    model.requires_grad_(True)
    expected = after(model, made)
    twin, again = resume(tmp_path, library, "Adam")
    assert not any(w.requires_grad for w in twin.kasmina_layers["0"].kernel(1).weights())
    twin.requires_grad_(True)
    assert_same(after(twin, again), expected)


def test_a_weight_that_the_user_froze_stays_frozen(tmp_path: Path) -> None:
    library = MemoryLibrary()
    model, made = start(library, "Adam")
    walk(model, made, S.GRAFTING, library.add(Residual, site(8, 4)))
    model.kasmina_layers["0"].kernel(1).down__bias.requires_grad_(False)
    esper.save(model, tmp_path, made)
    expected = after(model, made, 1)
    twin, again = resume(tmp_path, library, "Adam")
    assert not twin.kasmina_layers["0"].kernel(1).down__bias.requires_grad
    assert_same(after(twin, again, 1), expected)


def test_schedulers_and_own_groups_go_on(tmp_path: Path) -> None:
    def begin() -> tuple[MorphableModel, torch.optim.Optimizer, list[Any]]:
        model = esper.wrap(host(), settings=SETTINGS)
        model.connect(library)
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2))
        model.attach_optimizer(optimizer, lr=1e-4, weight_decay=0.0)
        schedulers = [
            lr_scheduler.MultiStepLR(optimizer, [3, 6, 9]),
            lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
        ]
        return model, optimizer, schedulers

    def go_on(model: MorphableModel, optimizer: Any, schedulers: list[Any]) -> list[Tensor]:
        numbers = []
        for _ in range(NUM_STEPS):
            loss = step(model, optimizer)
            schedulers[0].step()
            schedulers[1].step(loss)
            numbers += [loss, *(torch.as_tensor(g["lr"]).clone() for g in optimizer.param_groups)]
        return numbers

    library = MemoryLibrary()
    model, optimizer, schedulers = begin()
    walk(model, optimizer, S.GRAFTING, library.add(Residual, site(8, 4)))
    states = [scheduler.state_dict() for scheduler in schedulers]
    esper.save(model, tmp_path, optimizer, extra={"schedulers": states, "epoch": 7})
    expected = go_on(model, optimizer, schedulers)

    twin = host()
    again = torch.optim.AdamW(twin.parameters(), lr=torch.tensor(1e-2))
    resumed = [
        lr_scheduler.MultiStepLR(again, [3, 6, 9]),
        lr_scheduler.ReduceLROnPlateau(again, patience=0),
    ]
    extra = esper.load(tmp_path, twin, again, library=library)
    assert extra["epoch"] == 7
    for scheduler, state in zip(resumed, extra["schedulers"], strict=True):
        scheduler.load_state_dict(state)
    assert len(again.param_groups) == 2
    [attachment] = twin.kasmina.enrollment.attachments
    assert attachment.optimizer is again
    assert attachment.group_options == {"lr": 1e-4, "weight_decay": 0.0}
    assert_same(go_on(twin, again, resumed), expected)


ALL_OPTIMIZERS = [
    name
    for name in torch.optim.__all__
    if name[0].isupper() and name not in ("Optimizer", "SparseAdam")  # for sparse gradients alone
]


@pytest.mark.parametrize("name", ALL_OPTIMIZERS)
def test_every_optimizer_of_torch_goes_on(name: str, tmp_path: Path) -> None:
    def made_for(net: nn.Module) -> torch.optim.Optimizer:
        weights = [p for p in net.parameters() if p.dim() == 2 or name != "Muon"]
        return getattr(torch.optim, name)(weights, lr=1e-3)

    def go_on(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        numbers = []
        for _ in range(3):
            inp = torch.randn(5, 8)

            def closure(inp: Tensor = inp) -> Tensor:
                optimizer.zero_grad()
                loss = model(inp).square().mean()
                loss.backward()
                return loss

            numbers.append(torch.as_tensor(optimizer.step(closure)).detach())
            model.step()
        return numbers

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    model = esper.wrap(net(), settings=SETTINGS)
    optimizer = made_for(model)
    go_on(model, optimizer)
    esper.save(model, tmp_path, optimizer)
    expected = go_on(model, optimizer)
    twin = net()
    again = made_for(twin)
    kept = [(group, group["params"]) for group in again.param_groups]  # LBFGS and schedulers do
    esper.load(tmp_path, twin, again)
    for group, (same_group, same_list) in zip(again.param_groups, kept, strict=True):
        assert group is same_group
        assert group["params"] is same_list
    assert_same(go_on(twin, again), expected)


def several(net: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """One optimizer for each part of the host."""
    return {
        "front": torch.optim.SGD(net[0].parameters(), lr=1e-2, momentum=0.9),
        "back": torch.optim.AdamW([*net[1].parameters(), *net[4].parameters()], lr=1e-2),
    }


def start_with_several(
    library: MemoryLibrary,
) -> tuple[MorphableModel, dict[str, torch.optim.Optimizer]]:
    model = esper.wrap(host(), settings=SETTINGS)
    model.connect(library)
    made = several(model)
    model.attach_optimizer(made["back"], lr=3e-3)
    model.attach_optimizer(made["front"])
    artifact = library.add(Residual, site(8, 4), dropout=0.4)
    for name in ("0", "4"):
        model.kasmina_layers[name].request_germination(1, artifact, BRIEF)
    for _ in range(5):
        step_several(model, made)
    assert model.kasmina_layers["4"].state(1) is S.GRAFTING
    return model, made


def step_several(model: MorphableModel, made: dict[str, torch.optim.Optimizer]) -> list[Tensor]:
    for optimizer in made.values():
        optimizer.zero_grad()
    loss = model(torch.randn(5, 8)).square().mean()
    loss.backward()
    for optimizer in made.values():
        optimizer.step()
    model.step()
    return [loss.detach(), *(tensor.clone() for tensor in model.state_dict().values())]


def sizes_of_groups(made: dict[str, torch.optim.Optimizer]) -> dict[str, list[int]]:
    return {name: [len(g["params"]) for g in o.param_groups] for name, o in made.items()}


@pytest.mark.parametrize("form", ["dict", "list"])
def test_a_run_with_several_optimizers_goes_on(form: str, tmp_path: Path) -> None:
    def given(made: dict[str, torch.optim.Optimizer]) -> Any:
        return made if form == "dict" else [*made.values()]

    library = MemoryLibrary()
    model, made = start_with_several(library)
    assert sizes_of_groups(made) == {"front": [6], "back": [4, 4]}
    esper.save(model, tmp_path, given(made))
    expected = [number for _ in range(NUM_STEPS) for number in step_several(model, made)]

    twin = host()
    again = several(twin)
    esper.load(tmp_path, twin, given(again), library=library)
    assert sizes_of_groups(again) == {"front": [6], "back": [4, 4]}
    attached = twin.kasmina.enrollment.attachments
    assert [a.optimizer for a in attached] == [again["back"], again["front"]]
    assert [a.group_options for a in attached] == [{"lr": 3e-3}, {}]
    assert_same([n for _ in range(NUM_STEPS) for n in step_several(twin, again)], expected)
    for name in ("0", "4"):
        if twin.kasmina_layers[name].state(1) is not S.FOSSILIZED:
            twin.kasmina_layers[name].cull(1, "test")
    assert sizes_of_groups(again) == {"front": [2], "back": [4, 0]}


def test_several_optimizers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    library = MemoryLibrary()
    model, made = start_with_several(library)
    esper.save(model, tmp_path, made)
    names = re.escape("the checkpoint has optimizers ['front', 'back'], got ")
    for wrong, found in (("back", "['back']"), ("list", "['0', '1']")):
        net = host()
        again = several(net)
        given: Any = [*again.values()] if wrong == "list" else {wrong: again[wrong]}
        with pytest.raises(CheckpointError, match=names + re.escape(found)):
            esper.load(tmp_path, net, given, library=library)
        assert type(net) is nn.Sequential
    net = host()
    again = several(net)
    swapped = {"front": again["back"], "back": again["front"]}
    with pytest.raises(CheckpointError, match=r"SGD, got a .*AdamW") as raised:
        esper.load(tmp_path, net, swapped, library=library)
    assert raised.value.__notes__ == ["This concerns optimizer 'front'."]
    assert all(not optimizer.state for optimizer in again.values())
    with pytest.raises(ValueError, match=r"optimizers \['a', 'b'\] are one and the same"):
        esper.save(model, tmp_path, {"a": made["front"], "b": made["front"]})
    with pytest.raises(TypeError, match="a list or a dict of optimizers, got set"):
        esper.save(model, tmp_path, {made["front"]})
    with pytest.raises(TypeError, match=r"by names, got str: Parameter \('0'\)"):
        esper.save(model, tmp_path, [model[0].weight])


def test_a_list_of_one_optimizer_is_that_optimizer(tmp_path: Path) -> None:
    library = MemoryLibrary()
    model, made = start(library, "Adam")
    step(model, made)
    esper.save(model, tmp_path, [made])
    expected = after(model, made)
    assert_same(after(*resume(tmp_path, library, "Adam")), expected)


def test_momentum_keeps_its_strides(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    model = esper.wrap(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    esper.save(model, tmp_path, optimizer)
    twin = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    again = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    esper.load(tmp_path, twin, again)
    ours, theirs = (o.state[next(n.parameters())] for o, n in ((optimizer, net), (again, twin)))
    assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])
    assert ours["momentum_buffer"].stride() == theirs["momentum_buffer"].stride()


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))
        net[2].weight = net[0].weight
        return net

    model = esper.wrap(tied())
    esper.save(model, tmp_path)
    [weights] = tmp_path.glob("model-*.safetensors")
    assert list(safetensors.torch.load_file(weights)) == ["0.weight"]
    twin = tied()
    esper.load(tmp_path, twin)
    assert twin[0].weight is twin[2].weight
    assert torch.equal(twin[0].weight, model[0].weight)


def test_extra_state_of_modules_comes_along(tmp_path: Path) -> None:
    class Counted(nn.Linear):
        count = 0

        def get_extra_state(self) -> dict[str, int]:
            return {"count": self.count}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.count = state["count"]

    model = esper.wrap(nn.Sequential(Counted(8, 8), nn.Tanh()))
    model[0].count = 5
    esper.save(model, tmp_path)
    twin = nn.Sequential(Counted(8, 8), nn.Tanh())
    esper.load(tmp_path, twin)
    assert twin[0].count == 5


def test_random_numbers_may_be_left_alone(tmp_path: Path) -> None:
    library = MemoryLibrary()
    model, made = start(library, "Adam")
    esper.save(model, tmp_path, made)
    resume(tmp_path, library, "Adam", restore_rng=False)
    drawn = torch.rand(3), random.random(), numpy.random.rand()
    resume(tmp_path, library, "Adam", restore_rng=False)
    assert torch.equal(torch.rand(3), drawn[0])
    assert (random.random(), numpy.random.rand()) == drawn[1:]


def test_a_freshly_wrapped_and_connected_model_will_do(tmp_path: Path) -> None:
    library = MemoryLibrary()
    model, made = start(library, "Adam")
    walk(model, made, S.FINE_TUNING, library.add(Residual, site(8, 4)))
    esper.save(model, tmp_path, made)
    expected = after(model, made)
    twin, again = start(library, "Adam")
    esper.load(tmp_path, twin, again)
    assert_same(after(twin, again), expected)


def test_without_an_optimizer_the_model_alone_comes_back(tmp_path: Path) -> None:
    library = MemoryLibrary()
    model, made = start(library, "Adam")
    walk(model, made, S.STABILIZATION, library.add(Residual, site(8, 4)))
    esper.save(model, tmp_path, made)
    twin = host()
    assert esper.load(tmp_path, twin, library=library) == {}
    inp = torch.randn(5, 8)
    assert torch.equal(twin.eval()(inp), model.eval()(inp))
    assert not twin.kasmina.enrollment.attachments


# ---------------------------------------------------------------------- what is refused


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, MemoryLibrary]:
    """A checkpoint with a kernel in place, and the library that it needs."""
    library = MemoryLibrary()
    model, made = start(library, "Adam")
    walk(model, made, S.GRAFTING, library.add(Residual, site(8, 4)))
    esper.save(model, tmp_path, made)
    return tmp_path, library


def assert_refused(
    folder: Path,
    library: MemoryLibrary | None,
    net: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    error: type[Exception],
    message: str,
) -> None:
    """The load must raise, and leave everything as it was."""
    before = type(net), {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    optimizer_before = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message):
        esper.load(folder, net, optimizer, library=library)
    assert type(net) is before[0]
    assert list(net.state_dict()) == list(before[1])
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before[1].items())
    assert torch.equal(torch.get_rng_state(), before[2])
    if optimizer is not None:
        assert optimizer.state_dict() == optimizer_before


NETS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "shape": (
        lambda: nn.Sequential(*host()[:4], nn.Linear(8, 6)),
        r"'4.weight' has shape \(6, 8\) in the model and \(8, 8\) in the checkpoint; '4.bias'",
    ),
    "missing": (lambda: host()[:4], "'4.weight' is missing in the model"),
    "unexpected": (
        lambda: nn.Sequential(*host(), nn.Linear(8, 8)),
        "'5.weight' is missing in the checkpoint",
    ),
    "dtype": (
        lambda: host().bfloat16(),
        "'0.weight' is torch.bfloat16 in the model and torch.float32 in the checkpoint",
    ),
    "layer": (
        lambda: nn.Sequential(*host()[:3], nn.ReLU(), nn.Linear(8, 8)),
        "layer '3' that carries seeds is ReLU in the model and Tanh in the checkpoint",
    ),
}


@pytest.mark.parametrize("case", NETS)
def test_another_architecture_is_refused(case: str, saved: tuple[Path, MemoryLibrary]) -> None:
    build, message = NETS[case]
    net = build()
    optimizer = torch.optim.Adam(net.parameters())
    assert_refused(*saved, net, optimizer, CheckpointError, message)


def two_groups(net: nn.Module) -> torch.optim.Optimizer:
    swapped = [{"params": [*net[1].parameters(), *net[4].parameters()]}, {"params": []}]
    swapped[1]["params"] = list(net[0].parameters())
    return torch.optim.Adam(swapped)


WRONG_OPTIMIZERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "class": (
        lambda net: optimizer_of(net, "SGD with momentum"),
        r"optimizer is a torch.optim.adam.Adam, got a torch.optim.sgd.SGD",
    ),
    "groups": (
        lambda net: torch.optim.Adam(net.parameters()),
        "has 1 parameter groups, the checkpoint has 2",
    ),
    "members": (two_groups, r"group 0 of the optimizer lacks \['0.bias', '0.weight'\]"),
}


@pytest.mark.parametrize("case", WRONG_OPTIMIZERS)
def test_another_optimizer_is_refused(case: str, saved: tuple[Path, MemoryLibrary]) -> None:
    build, message = WRONG_OPTIMIZERS[case]
    net = host()
    assert_refused(*saved, net, build(net), CheckpointError, message)


def test_an_optimizer_of_another_model_is_refused(saved: tuple[Path, MemoryLibrary]) -> None:
    message = r"parameter 0 of group 0 of the optimizer, of shape \(8, 8\), is none of the model's"
    assert_refused(*saved, host(), optimizer_of(host(), "Adam"), ValueError, message)
    with pytest.raises(ValueError, match=message):
        esper.save(esper.wrap(host()), saved[0] / "other", optimizer_of(host(), "Adam"))


def test_an_optimizer_that_was_not_saved_is_refused(tmp_path: Path) -> None:
    esper.save(esper.wrap(host()), tmp_path)
    net = host()
    optimizer = optimizer_of(net, "Adam")
    assert_refused(tmp_path, None, net, optimizer, CheckpointError, "saved without an optimizer")


def test_a_kernel_that_cannot_be_had_is_named(saved: tuple[Path, MemoryLibrary]) -> None:
    folder, library = saved
    [artifact] = library.bundles
    named = f"{artifact} for seed 1 on '0'"
    net = host()
    optimizer = optimizer_of(net, "Adam")
    assert_refused(folder, None, net, optimizer, CheckpointError, named)
    assert_refused(folder, MemoryLibrary(), net, optimizer, ArtifactNotFoundError, named)
    bundle = library.bundles[artifact]
    files = bundle.files | {"params.safetensors": b"tampered"}
    library.bundles[artifact] = bundle.model_copy(update={"files": files})
    assert_refused(folder, library, net, optimizer, ArtifactError, "params.safetensors")
    wrapped = esper.wrap(host(), settings=SETTINGS)
    assert_refused(folder, library, wrapped, None, ArtifactError, "params.safetensors")


def test_a_model_that_is_not_fresh_is_refused(saved: tuple[Path, MemoryLibrary]) -> None:
    folder, library = saved
    model, made = start(library, "Adam")
    walk(model, made, S.TRAINING, next(iter(library.bundles)))
    message = r"needs a fresh model, but seeds \[\('0', 1\)\] are not DORMANT"
    assert_refused(folder, library, model, None, CheckpointError, message)
    other = esper.wrap(host(), seeds_per_layer=3)
    message = (
        "wrapped with other settings: seeds_per_layer is 3, the checkpoint has 2; observe_every"
    )
    assert_refused(folder, library, other, None, CheckpointError, message)
    other = esper.wrap(host(), ["0"], settings=SETTINGS)
    message = "layer '1' that carries seeds is None in the model and BatchNorm1d in the checkpoint"
    assert_refused(folder, library, other, None, CheckpointError, message)


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "altered": lambda data: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:],
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("case", DAMAGES)
@pytest.mark.parametrize(
    "pattern", ["model-*.safetensors", "training-*.safetensors", "training-*.json", MANIFEST]
)
def test_a_damaged_file_is_named(
    pattern: str, case: str, saved: tuple[Path, MemoryLibrary]
) -> None:
    [path] = saved[0].glob(pattern)
    damage(path, DAMAGES[case])
    assert_refused(*saved, host(), None, CheckpointError, re.escape(str(path)))


def test_a_missing_file_is_named(saved: tuple[Path, MemoryLibrary]) -> None:
    [path] = saved[0].glob("training-*.json")
    path.unlink()
    assert_refused(*saved, host(), None, CheckpointError, f"{re.escape(path.name)} is missing")
    (saved[0] / MANIFEST).unlink()
    assert_refused(*saved, host(), None, CheckpointError, "holds no checkpoint: it has no manifest")


def test_a_newer_format_is_refused(saved: tuple[Path, MemoryLibrary]) -> None:
    path = saved[0] / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"esper_checkpoint": 3}))
    message = "has format version 3, this Esper reads version 2"
    assert_refused(*saved, host(), None, CheckpointError, message)


@pytest.mark.parametrize("name", ["../model-0123456789abcdef.safetensors", "secret.json"])
def test_a_manifest_cannot_point_elsewhere(name: str, saved: tuple[Path, MemoryLibrary]) -> None:
    path = saved[0] / MANIFEST
    content = json.loads(path.read_text())
    content["files"]["model.safetensors"]["file"] = name
    content["sha256"] = _digest_of({k: v for k, v in content.items() if k != "sha256"})
    path.write_text(json.dumps(content))
    assert_refused(*saved, host(), None, CheckpointError, "is no checkpoint file")


def test_records_of_another_kind_are_refused(saved: tuple[Path, MemoryLibrary]) -> None:
    [path] = saved[0].glob("training-*.json")
    records = json.loads(path.read_text())
    records["kasmina"]["settings"]["horoscope"] = "Leo"
    rewrite(saved[0], "training.json", json.dumps(records).encode())
    assert_refused(*saved, host(), None, CheckpointError, f"(?s){path.name} .*settings.horoscope")


def rewrite(folder: Path, part: str, data: bytes) -> None:
    """Put ``data`` in a part's file, with a manifest that says so."""
    content = json.loads((folder / MANIFEST).read_text())
    entry = content["files"][part]
    (folder / entry["file"]).write_bytes(data)
    entry |= {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content["sha256"] = _digest_of({k: v for k, v in content.items() if k != "sha256"})
    (folder / MANIFEST).write_text(json.dumps(content))


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    model = esper.wrap(host())
    with pytest.raises(TypeError, match="extra/a/1 is a object, which a checkpoint cannot hold"):
        esper.save(model, tmp_path, extra={"a": [1, object()]})
    with pytest.raises(TypeError, match=r"Sequential is not wrapped by esper\.wrap"):
        esper.save(host(), tmp_path)
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    with pytest.raises(TypeError, match=r"'sparse' is torch.float32, torch.sparse_coo"):
        esper.save(model, tmp_path)


def test_a_save_that_fails_leaves_the_former_checkpoint(saved: tuple[Path, MemoryLibrary]) -> None:
    folder, library = saved
    before = sorted(path.name for path in folder.iterdir())
    model = esper.wrap(host())
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    with pytest.raises(TypeError):
        esper.save(model, folder)
    resume(folder, library, "Adam")
    del model._buffers["sparse"]
    esper.save(model, folder)
    after_that = sorted(path.name for path in folder.iterdir())
    assert len(after_that) == len(before) == 4, "what is superseded is removed"


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("mine")
    for _ in range(2):
        esper.save(esper.wrap(host()), tmp_path)
    assert (tmp_path / "notes.json").read_text() == "mine"


VALUES = [
    None,
    [True, 3, -0.0, "text", (1, (2,))],
    {"nan": float("nan"), "inf": [float("inf"), -float("inf")]},
    {1: "one", "1": "text", (2, 3): Counter({4: 5})},
    {"$tensor": "no tensor", "tensors": [torch.arange(3), torch.ones(2, 3).t()]},
]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_values_travel_as_they_are(value: Any) -> None:
    tensors: dict[str, Tensor] = {}
    packed = json.loads(json.dumps(pack(value, "root", tensors), allow_nan=False))
    assert repr(unpack(packed, tensors)) == repr(value)
