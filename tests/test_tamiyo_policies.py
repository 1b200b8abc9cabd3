"""The policies beside the default one, and the budgets that no policy can exceed."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tamiyo_samples import FLAT, epochs, evaluation, kernel_costing, moved, view

from esper.config import TamiyoSettings
from esper.contracts import (
    CommandKind,
    GraftingStrategy,
    KasminaControlCommand,
    KernelQuery,
    KernelRecord,
    SeedId,
    SeedState,
    Topic,
)
from esper.tamiyo import (
    Cost,
    ManualPolicy,
    ModelView,
    PlateauPolicy,
    Policy,
    RandomPolicy,
    ScheduledPolicy,
    Tamiyo,
)
from esper.testing import LINEAR_8_4, FakeBus, FakeLibrary

S = SeedState
LENIENT = TamiyoSettings(
    window_epochs=3, warmup_epochs=0, cooldown_epochs=0, embargo_epochs=0, max_adaptations=100
)


@pytest.fixture
def kernel() -> KernelRecord:
    return kernel_costing(parameters=10)


def test_a_schedule_is_kept_and_made_up_for(kernel: KernelRecord) -> None:
    policy = ScheduledPolicy([2, 3], LENIENT)
    assert policy.decide(view(kernel, FLAT[:2])) == []
    [command] = policy.decide(view(kernel, FLAT[:3]))
    assert (command.layer_name, command.seed_idx) == ("fc", 1)
    assert command.reason == "number 1 of 2 that are scheduled"
    busy = {"num_adaptations": 1, "adapting": frozenset({("fc", 1)})}
    assert policy.decide(view(kernel, FLAT, **busy)) == []
    [late] = policy.decide(view(kernel, [1.0] * 9, num_adaptations=1))
    assert late.reason == "number 2 of 2 that are scheduled"
    assert policy.decide(view(kernel, [1.0] * 9, num_adaptations=2)) == []


def test_chance_is_the_same_for_the_same_seed_and_history(kernel: KernelRecord) -> None:
    def run(seed: int) -> list[tuple[int, int]]:
        policy = RandomPolicy(seed, rate=0.5, settings=LENIENT)
        decisions = [(n, policy.decide(view(kernel, [1.0] * n))) for n in range(1, 60)]
        return [(n, command.seed_idx) for n, commands in decisions for command in commands]

    assert run(0) == run(0)
    assert run(0) != run(1)
    assert 15 < len(run(0)) < 45
    assert {seed_idx for _, seed_idx in run(0)} == {0, 1}


@pytest.mark.parametrize(
    "policy",
    [PlateauPolicy(LENIENT), ScheduledPolicy([0], LENIENT), RandomPolicy(0, 1.0, LENIENT)],
    ids=lambda policy: type(policy).__name__,
)
@pytest.mark.parametrize(
    ("contribution", "verdict"), [(1.0, CommandKind.KEEP), (0.1, CommandKind.CULL)]
)
def test_every_policy_judges_by_the_same_paired_test(
    policy: Policy, contribution: float, verdict: CommandKind, kernel: KernelRecord
) -> None:
    [command] = policy.decide(view(kernel, epochs=epochs(FLAT, evaluation(contribution))))
    assert command.kind is verdict


@pytest.mark.parametrize(
    ("before", "verdict"), [(0.83, CommandKind.ROLL_BACK), (0.84, CommandKind.KEEP)]
)
def test_a_seed_that_has_cost_the_host_more_than_chance_does_is_rolled_back(
    before: float, verdict: CommandKind, kernel: KernelRecord
) -> None:
    needed = view(
        kernel, epochs=epochs(FLAT, evaluation(5.0)), loss_before={("fc", 0): before}
    )  # the network of now would lose much without it, but stood at ``before`` when it came
    [command] = PlateauPolicy(LENIENT).decide(needed)
    assert command.kind is verdict


BRIEF = GraftingStrategy(training_steps=10, grafting_steps=10, stabilization_steps=5)


@pytest.mark.parametrize(
    "of",
    [
        lambda limits: PlateauPolicy(limits, BRIEF),
        lambda limits: ScheduledPolicy([0], limits, BRIEF),
        lambda limits: RandomPolicy(0, 1.0, limits, BRIEF),
    ],
    ids=["PlateauPolicy", "ScheduledPolicy", "RandomPolicy"],
)
@pytest.mark.parametrize(("last_epoch", "begun"), [(None, 1), (7, 1), (6, 0), (3, 0)])
def test_nothing_begins_that_could_not_be_judged_before_the_end(
    of: Callable[[TamiyoSettings], Policy], last_epoch: int | None, begun: int, kernel: KernelRecord
) -> None:
    """After epoch 3, of ten steps each, it takes 2.5 epochs to the test, one to obey its verdict."""
    policy = of(LENIENT.model_copy(update={"last_epoch": last_epoch}))
    assert len(policy.decide(view(kernel, FLAT))) == begun


def test_after_the_first_epoch_its_own_steps_tell_how_long_one_is(kernel: KernelRecord) -> None:
    [only] = epochs(FLAT[:1])
    for last_epoch, begun in ((4, 1), (3, 0)):
        limits = LENIENT.model_copy(update={"last_epoch": last_epoch})
        policy = ScheduledPolicy([0], limits, BRIEF)
        first = only.model_copy(update={"step": 10})
        assert len(policy.decide(view(kernel, epochs=(first,)))) == begun


def test_a_controller_that_joins_late_does_not_take_all_steps_for_one_epoch(
    kernel: KernelRecord,
) -> None:
    """After epoch 9, of ten steps each, it takes 2.5 epochs to the test, one to obey its verdict."""
    [only] = epochs(FLAT[:1])
    for last_epoch, begun in ((13, 1), (12, 0)):
        limits = LENIENT.model_copy(update={"last_epoch": last_epoch})
        policy = ScheduledPolicy([0], limits, BRIEF)
        joined = only.model_copy(update={"epoch": 9, "step": 100})
        assert len(policy.decide(view(kernel, epochs=(joined,)))) == begun


def test_by_hand_nothing_happens_unasked(kernel: KernelRecord) -> None:
    policy = ManualPolicy()
    assert policy.decide(view(kernel, epochs=epochs(FLAT, evaluation(1.0)))) == []
    policy.germinate("fc", 1, kernel.artifact_id, GraftingStrategy(training_steps=7))
    policy.keep("fc", 0)
    policy.cull("out", 2)
    policy.roll_back("out", 3)
    commands = policy.decide(view(kernel))
    assert [(c.kind, c.layer_name, c.seed_idx) for c in commands] == [
        (CommandKind.GERMINATE, "fc", 1),
        (CommandKind.KEEP, "fc", 0),
        (CommandKind.CULL, "out", 2),
        (CommandKind.ROLL_BACK, "out", 3),
    ]
    assert commands[0].artifact_id == kernel.artifact_id
    assert commands[0].strategy.training_steps == 7
    assert policy.decide(view(kernel)) == []


def test_gain_is_weighed_against_parameters_and_flops() -> None:
    cheap, dear = kernel_costing(parameters=10, flops=10), kernel_costing(parameters=90, flops=90)
    policy = ScheduledPolicy([0], LENIENT)

    def choice(at_first: KernelRecord, at_second: KernelRecord) -> int:
        kernels = {
            ("fc", 0): [at_first],
            ("fc", 1): [at_second],
        }  # the second has thrice the energy
        [command] = policy.decide(view(cheap, candidates=lambda seed_id: kernels[seed_id]))
        return command.seed_idx

    assert choice(cheap, cheap) == 1
    assert choice(cheap, dear) == 0


@pytest.mark.parametrize(
    ("limits", "kernel"),
    [
        ({"max_flops_per_sample": 9}, kernel_costing(flops=10)),
        ({"max_memory_bytes": 9}, kernel_costing(memory_bytes=10)),
        ({"max_memory_bytes": 9}, kernel_costing(memory_bytes=None)),
        ({"max_risk_score": 0.5}, kernel_costing(risk_score=0.6)),
        ({"max_risk_score": 0.5}, kernel_costing(risk_score=None)),
        ({"required_tags": frozenset({"fast"})}, kernel_costing(tags=("slow",))),
        ({"excluded_tags": frozenset({"slow"})}, kernel_costing(tags=("slow",))),
    ],
)
def test_what_is_not_allowed_is_not_chosen(limits: dict[str, Any], kernel: KernelRecord) -> None:
    policy = ScheduledPolicy([0], LENIENT.model_copy(update=limits))
    assert policy.decide(view(kernel)) == []
    assert len(ScheduledPolicy([0], LENIENT).decide(view(kernel))) == 1


class Greedy:
    """Asks for every kernel at every seed, every time."""

    def decide(self, view: ModelView) -> list[KasminaControlCommand]:
        return [
            KasminaControlCommand(
                kind=CommandKind.GERMINATE,
                layer_name=seed_id[0],
                seed_idx=seed_id[1],
                artifact_id=kernel.artifact_id,
                epoch=view.epoch,
                reason="more",
            )
            for seed_id in SEED_IDS
            for kernel in view.candidates(seed_id)
        ]


SEED_IDS: list[SeedId] = [("fc", idx) for idx in range(6)]
COSTS = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
ENDS = st.sampled_from([S.CULLED, S.FOSSILIZED, S.ROLLED_BACK, S.CANCELLED])
FATES = st.lists(st.tuples(st.sampled_from(SEED_IDS), ENDS), max_size=12)


@given(costs=st.lists(COSTS, min_size=1, max_size=4, unique=True), fates=FATES)
@settings(max_examples=30)
def test_budgets_are_never_exceeded(
    costs: Sequence[tuple[int, int, int]], fates: list[tuple[SeedId, SeedState]]
) -> None:
    limits = TamiyoSettings(max_parameters=90, max_flops_per_sample=80, max_memory_bytes=70)
    kernels = [kernel_costing(*cost) for cost in costs]
    asyncio.run(_spend(limits, kernels, fates))


async def _spend(
    limits: TamiyoSettings, kernels: list[KernelRecord], fates: list[tuple[SeedId, SeedState]]
) -> None:
    bus, library = FakeBus(), FakeLibrary(kernels)
    query = KernelQuery(site=LINEAR_8_4, dtype="float32", device="cpu")
    tamiyo = Tamiyo(bus, library, lambda _: query, Greedy(), settings=limits)
    in_place: dict[SeedId, Cost] = {}
    [event] = epochs([1.0])
    for seed_id, end in [*fates, (SEED_IDS[0], S.CULLED)]:
        bus.sent.clear()
        await tamiyo.handle(bus.message(Topic.EPOCH, event))
        for command in bus.payloads(Topic.KASMINA_COMMANDS):
            assert isinstance(command, KasminaControlCommand)
            assert (command.layer_name, command.seed_idx) not in in_place
            kernel = library.kernel(command.artifact_id or "")
            in_place[command.layer_name, command.seed_idx] = Cost(
                kernel.manifest.num_parameters,
                kernel.manifest.flops_per_sample,
                kernel.memory_bytes or 0,
            )
        total = sum(in_place.values(), Cost())
        assert total.parameters <= 90
        assert total.flops_per_sample <= 80
        assert total.memory_bytes <= 70
        if seed_id in in_place:
            await tamiyo.handle(
                bus.message(Topic.LIFECYCLE, moved(S.LOADING, end, seed_id=seed_id))
            )
            if end is not S.FOSSILIZED:
                del in_place[seed_id]
