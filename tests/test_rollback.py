"""A rollback gives the host back, bit for bit, and locks the seed; stale commands change nothing."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kasmina_library import MemoryLibrary, Residual
from torch import Tensor, nn

import esper
from esper.config import SeedSettings
from esper.contracts import (
    CommandKind,
    GraftingStrategy,
    KasminaControlCommand,
    LifecycleEvent,
    SeedState,
)
from esper.errors import EsperError, LifecycleError
from esper.kasmina.model import MorphableModel

S = SeedState
QUICK = GraftingStrategy(
    training_steps=3, grafting_steps=3, stabilization_steps=2, fine_tuning_steps=50
)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, amsgrad=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "plain sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.01),
}


class Run:
    """A small network with a batch norm, a seed of which is led through its life."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer], **settings: Any):
        torch.manual_seed(0)
        library = MemoryLibrary()
        self.artifact_id = library.add(Residual)
        net = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        chosen = SeedSettings(seeds_per_layer=1, deterministic=True, **settings)
        self.model = esper.wrap(net, ["0"], settings=chosen)
        self.model.connect(library)
        self.optimizer = make(self.model.parameters())
        self.model.attach_optimizer(self.optimizer)
        self.layer = self.model.kasmina_layers["0"]
        self.events: list[LifecycleEvent] = []
        self.model.kasmina.emit_lifecycle = self.events.append

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(16, 8)).square().mean().backward()
        self.optimizer.step()
        self.model.step()

    def lead_to(self, state: SeedState) -> None:
        if self.layer.state(0) is S.DORMANT:
            self.layer.request_germination(0, self.artifact_id, QUICK)
        for _ in range(100):
            if self.layer.state(0) is state:
                return
            if self.layer.state(0) is S.EVALUATING:
                self.layer.keep(0, "test")
            else:
                self.step()
        raise AssertionError(f"{state.name} was not reached")

    def host(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Copies of weights and buffers, and of the optimizer's state of each host parameter."""
        weights = {
            name: tensor.clone()
            for name, tensor in self.model.state_dict().items()
            if "esper" not in name
        }
        states = [
            copy.deepcopy(self.optimizer.state.get(parameter, {}))
            for name, parameter in self.model.named_parameters()
            if "esper" not in name
        ]
        return weights, states


def assert_same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    "state", [S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING], ids=lambda s: s.name
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_rollback_gives_back_weights_buffers_and_optimizer_states(
    optimizer: str, state: SeedState
) -> None:
    run = Run(OPTIMIZERS[optimizer])
    run.lead_to(S.TRAINING)
    while run.layer.state(0) is S.TRAINING:
        before = _before_the_next_transition(run)
    run.lead_to(state)
    run.step()
    weights_before, states_before = before
    assert not torch.equal(run.host()[0]["0.weight"], weights_before["0.weight"])
    run.layer.roll_back(0, "test")
    assert_same(run.host(), (weights_before, states_before))
    assert run.layer.state(0) is S.ROLLED_BACK
    assert type(run.layer.default_transform) is nn.Linear
    assert "0" not in {name for name, _ in run.model.kasmina.tenancies}
    run.step()  # and training goes on
    with pytest.raises(LifecycleError, match="the state is final"):
        run.layer.request_germination(0, run.artifact_id)


def _before_the_next_transition(run: Run) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Make a step, and return the host between optimizer.step() and model.step()."""
    run.optimizer.zero_grad()
    run.model(torch.randn(16, 8)).square().mean().backward()
    run.optimizer.step()
    host = run.host()
    run.model.step()
    return host


def test_what_the_optimizer_did_not_know_yet_it_does_not_know_again() -> None:
    run = Run(OPTIMIZERS["adam"])
    run.layer.request_germination(
        0, run.artifact_id, QUICK.model_copy(update={"training_steps": 0})
    )
    while run.layer.state(0) is not S.GRAFTING:
        run.model.step()  # without any step of the optimizer
    for _ in range(2):
        run.step()
    assert run.optimizer.state[run.model[0].weight]
    run.layer.roll_back(0, "test")
    assert run.model[0].weight not in run.optimizer.state


@pytest.mark.parametrize("state", [S.DORMANT, S.TRAINING])
def test_a_seed_that_was_not_heard_is_locked_and_no_more(state: SeedState) -> None:
    run = Run(OPTIMIZERS["adam"])
    run.step()
    if state is not S.DORMANT:
        run.lead_to(state)
    before = run.host()
    run.layer.roll_back(0, "test")
    assert_same(run.host(), before)
    assert run.layer.state(0) is S.ROLLED_BACK


@pytest.mark.parametrize("state", [S.FOSSILIZED, S.ROLLED_BACK])
def test_what_is_final_is_not_rolled_back(state: SeedState) -> None:
    run = Run(OPTIMIZERS["adam"])
    if state is S.FOSSILIZED:
        run.lead_to(state)
    else:
        run.layer.roll_back(0, "test")
    before = run.host()
    with pytest.raises(LifecycleError, match="the state is final"):
        run.layer.roll_back(0, "again")
    assert_same(run.host(), before)
    assert run.layer.state(0) is state


def test_without_the_state_of_before_nothing_is_changed() -> None:
    run = Run(OPTIMIZERS["adam"], rollback_capacity_bytes=0)
    run.lead_to(S.GRAFTING)
    before = run.host()
    with pytest.raises(EsperError, match=r"seed 0 on '0': the host's state .* is not there"):
        run.layer.roll_back(0, "test")
    assert_same(run.host(), before)
    assert run.layer.state(0) is S.GRAFTING


def test_a_host_that_is_too_large_is_not_copied_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = Run(OPTIMIZERS["adam"], rollback_capacity_bytes=8)
    run.lead_to(S.GRAFTING)
    assert run.model.kasmina.tenancies["0", 0].host_state is None
    assert "seed 0 on '0' can be culled but not rolled back" in caplog.text


def test_the_copy_of_the_host_is_let_go_with_the_seed() -> None:
    run = Run(OPTIMIZERS["adam"])
    run.lead_to(S.GRAFTING)
    tenancy = run.model.kasmina.tenancies["0", 0]
    assert tenancy.host_state is not None
    run.layer.cull(0, "test")
    assert tenancy.host_state is None


def command(kind: CommandKind, run: Run, **changes: Any) -> KasminaControlCommand:
    fields: dict[str, Any] = {
        "kind": kind,
        "layer_name": "0",
        "seed_idx": 0,
        "artifact_id": run.artifact_id,
        "epoch": 3,
        "reason": "test",
    }
    return KasminaControlCommand(**fields | changes)


def refusal(run: Run, order: KasminaControlCommand) -> str:
    state = run.layer.state(0)
    run.model.kasmina.submit(order)
    run.model.step()
    assert run.layer.state(0) is state
    last = run.events[-1]
    assert last.source is last.target
    return last.reason


def test_rollbacks_come_as_commands() -> None:
    run = Run(OPTIMIZERS["adam"])
    run.lead_to(S.STABILIZATION)
    run.model.kasmina.submit(command(CommandKind.ROLL_BACK, run))
    run.model.step()
    assert run.layer.state(0) is S.ROLLED_BACK
    assert run.events[-1].reason == "test"


@pytest.mark.parametrize("kind", [CommandKind.GERMINATE, CommandKind.CULL, CommandKind.ROLL_BACK])
def test_a_command_of_a_past_epoch_is_refused(kind: CommandKind) -> None:
    run = Run(OPTIMIZERS["adam"])
    if kind is not CommandKind.GERMINATE:
        run.lead_to(S.TRAINING)
    run.model.kasmina.epoch = 6
    reason = refusal(run, command(kind, run, valid_until_epoch=5))
    assert reason == (
        f"{kind} refused: stale: decided on epoch 3 and valid until epoch 5, but it is epoch 6"
    )
    run.model.kasmina.epoch = 5
    before = run.model.kasmina.num_transitions
    run.model.kasmina.submit(command(kind, run, valid_until_epoch=5))
    run.model.step()
    assert run.model.kasmina.num_transitions > before


def test_a_command_for_another_kernel_is_refused() -> None:
    run = Run(OPTIMIZERS["adam"])
    run.lead_to(S.TRAINING)
    assert "stale: meant for kernel ffff" in refusal(
        run, command(CommandKind.CULL, run, artifact_id="f" * 64)
    )


def test_a_copy_of_a_model_has_no_state_to_go_back_to() -> None:
    run = Run(OPTIMIZERS["adam"])
    run.lead_to(S.GRAFTING)
    twin = copy.deepcopy(run.model)
    assert isinstance(twin, MorphableModel)
    with pytest.raises(EsperError, match="is not there"):
        twin.kasmina_layers["0"].roll_back(0, "test")
    run.layer.roll_back(0, "test")
