"""What Tamiyo decides, and what she makes of what the bus tells her."""

import asyncio
import math
from collections.abc import Sequence

import pytest
from kasmina_library import LINEAR_8_4, MemoryLibrary

from esper.config import TamiyoSettings
from esper.contracts import (
    CommandKind,
    EpochEvent,
    FieldReport,
    HealthBatch,
    HealthSignal,
    KasminaControlCommand,
    KernelQuery,
    KernelRecord,
    LifecycleEvent,
    Outcome,
    SeedEvaluation,
    SeedId,
    SeedState,
    Topic,
)
from esper.oona import MemoryBus
from esper.tamiyo import ModelView, PlateauPolicy, Tamiyo
from esper.tamiyo.policy import relative_improvement

S = SeedState
SETTINGS = TamiyoSettings(window_epochs=3, warmup_epochs=3, cooldown_epochs=2, max_adaptations=2)
FLAT, FALLING = [1.0, 1.0, 1.0, 1.0], [1.0, 0.8, 0.6, 0.4]


def epochs(
    losses: Sequence[float],
    *evaluations: SeedEvaluation,
    train_losses: Sequence[float] | None = None,
) -> tuple[EpochEvent, ...]:
    return tuple(
        EpochEvent(
            epoch=number,
            step=10 * number,
            train_loss=loss if train_losses is None else train_losses[number],
            val_loss=loss,
            val_loss_standard_error=0.1,
            evaluations=evaluations if number == len(losses) - 1 else (),
        )
        for number, loss in enumerate(losses)
    )


def signal(seed_id: SeedId, energy: float) -> HealthSignal:
    return HealthSignal(
        seed_id=seed_id,
        health_score=1.0,
        execution_time_us=1.0,
        lifecycle_state=S.DORMANT,
        epoch=0,
        step=0,
        mean=0.0,
        variance=1.0,
        dead_fraction=0.0,
        non_finite=0,
        gradient_energy=energy,
        error_count=0,
    )


def evaluation(contribution: float, error: float = 0.1) -> SeedEvaluation:
    return SeedEvaluation(
        seed_id=("fc", 0),
        loss_with=1.0,
        loss_without=1.0 + contribution,
        contribution=contribution,
        standard_error=error,
        num_samples=100,
    )


@pytest.fixture
def kernel() -> KernelRecord:
    library = MemoryLibrary()
    return library.bundles[library.add()].record


def view(kernel: KernelRecord, losses: Sequence[float] = FLAT, **changes: object) -> ModelView:
    defaults: dict[str, object] = {
        "epochs": epochs(losses),
        "health": {("fc", 0): signal(("fc", 0), 1.0), ("fc", 1): signal(("fc", 1), 3.0)},
        "states": {},
        "failures": {},
        "adapting": frozenset(),
        "num_adaptations": 0,
        "num_parameters_added": 0,
        "last_change_epoch": None,
        "candidates": lambda _: [kernel],
    }
    return ModelView(**defaults | changes)  # type: ignore[arg-type]


def decide(view: ModelView, **changes: object) -> list[KasminaControlCommand]:
    return PlateauPolicy(SETTINGS.model_copy(update=changes)).decide(view)


def test_on_a_plateau_the_seed_with_the_largest_gradient_energy_germinates(
    kernel: KernelRecord,
) -> None:
    [command] = decide(view(kernel))
    assert command.kind is CommandKind.GERMINATE
    assert (command.layer_name, command.seed_idx) == ("fc", 1)
    assert command.artifact_id == kernel.artifact_id
    assert command.epoch == 3
    assert "the held-out loss fell by 0.0% in 3 epochs" in command.reason


def test_a_layer_where_kernels_were_culled_stands_back(kernel: KernelRecord) -> None:
    health = {("fc", 1): signal(("fc", 1), 3.0), ("out", 0): signal(("out", 0), 1.0)}
    [command] = decide(view(kernel, health=health))
    assert command.layer_name == "fc"
    failures = {("fc", 0): frozenset({"a"})}
    [command] = decide(view(kernel, health=health, failures=failures))
    assert command.layer_name == "out"


QUIET = {
    "the loss still falls": {"losses": FALLING},
    "overfitting": {"epochs": epochs([0.4, 0.41, 0.42, 0.43], train_losses=FALLING)},
    "too early": {"losses": FLAT[:3]},
    "too few epochs for a slope": {"losses": FLAT[:2]},
    "an adaptation is under way": {"adapting": frozenset({("fc", 0)})},
    "just changed": {"last_change_epoch": 2},
    "enough adaptations": {"num_adaptations": 2},
    "nothing observed yet": {"health": {}},
    "no kernels": {"candidates": lambda _: []},
    "all seeds taken": {"states": {("fc", 0): S.FOSSILIZED, ("fc", 1): S.CULLED}},
}


@pytest.mark.parametrize("case", QUIET)
def test_otherwise_nothing_happens(case: str, kernel: KernelRecord) -> None:
    assert decide(view(kernel, **QUIET[case])) == []


def test_the_parameter_budget_is_never_exceeded(kernel: KernelRecord) -> None:
    needed = kernel.manifest.num_parameters
    assert decide(view(kernel, num_parameters_added=1), max_parameters=needed) == []
    assert len(decide(view(kernel, num_parameters_added=1), max_parameters=needed + 1)) == 1


def test_a_kernel_that_failed_at_a_seed_is_not_tried_there_again(kernel: KernelRecord) -> None:
    failures = {(("fc", i)): frozenset({kernel.artifact_id}) for i in (0, 1)}
    assert decide(view(kernel, failures=failures)) == []


@pytest.mark.parametrize(
    ("contribution", "verdict"),
    [(0.11, CommandKind.KEEP), (0.1, CommandKind.CULL), (-1.0, CommandKind.CULL)],
)
def test_a_seed_is_kept_if_it_contributes_more_than_its_standard_error(
    contribution: float, verdict: CommandKind, kernel: KernelRecord
) -> None:
    [command] = decide(view(kernel, epochs=epochs(FLAT, evaluation(contribution))))
    assert command.kind is verdict
    effect = "lowers" if contribution > 0 else "raises"
    assert f"{effect} the held-out loss by {abs(contribution):.4f}" in command.reason


@pytest.mark.parametrize("contribution", [math.nan, -math.inf])
def test_a_seed_that_spoils_the_loss_is_culled(contribution: float, kernel: KernelRecord) -> None:
    [command] = decide(view(kernel, epochs=epochs(FLAT, evaluation(contribution))))
    assert command.kind is CommandKind.CULL


def test_relative_improvement_is_the_fall_of_the_fitted_line() -> None:
    assert relative_improvement([4.0, 3.0, 2.0]) == pytest.approx(2 / 3)
    assert relative_improvement([2.0, 3.0, 2.0]) == 0.0
    assert relative_improvement([1.0, 2.0]) < 0
    assert relative_improvement([-1.0, -2.0, -3.0]) == pytest.approx(1.0)
    assert relative_improvement([-0.1, 0.1]) == pytest.approx(-2.0)


class Reports:
    """A library that remembers the field reports."""

    def __init__(self, kernel: KernelRecord):
        self.record = kernel
        self.reports: list[FieldReport] = []

    def query(self, query: KernelQuery) -> list[KernelRecord]:
        assert query.site == LINEAR_8_4
        return [self.record]

    def kernel(self, artifact_id: str) -> KernelRecord:
        assert artifact_id == self.record.artifact_id
        return self.record

    def record_field_report(self, report: FieldReport) -> None:
        self.reports.append(report)


def moved(source: SeedState, target: SeedState, epoch: int = 5) -> LifecycleEvent:
    return LifecycleEvent(
        seed_id=("fc", 1), source=source, target=target, epoch=epoch, step=1, reason="test"
    )


async def run_tamiyo(
    kernel: KernelRecord, moves: list[LifecycleEvent]
) -> tuple[list[KasminaControlCommand], Reports]:
    """Let Tamiyo see a plateau, then ``moves``, then four more epochs of it."""
    bus, library = MemoryBus(), Reports(kernel)
    query = KernelQuery(site=LINEAR_8_4, dtype="float32", device="cpu")
    tamiyo = Tamiyo(bus, library, lambda _: query, PlateauPolicy(SETTINGS))
    task = asyncio.create_task(tamiyo.run())
    await asyncio.sleep(0)
    commands = []

    async def follow() -> None:
        async for message in bus.subscribe(Topic.KASMINA_COMMANDS, "test"):
            commands.append(message.payload)

    follower = asyncio.create_task(follow())
    signals = (signal(("fc", 0), 1.0), signal(("fc", 1), 3.0))
    bus.publish(Topic.SEED_HEALTH, "test", HealthBatch(signals=signals))
    for event in epochs(FLAT):
        bus.publish(Topic.EPOCH, "test", event)
    await bus.drained()
    for move in moves:
        bus.publish(Topic.LIFECYCLE, "test", move)
    await bus.drained()
    for event in epochs([1.0] * 12)[8:]:
        bus.publish(Topic.EPOCH, "test", event)
        await bus.drained()
    bus.close()
    await asyncio.gather(task, follower)
    return commands, library


async def test_one_adaptation_at_a_time_and_a_field_report_at_its_end(
    kernel: KernelRecord,
) -> None:
    commands, library = await run_tamiyo(kernel, [moved(S.LOADING, S.TRAINING)])
    assert [c.seed_idx for c in commands] == [1]
    assert library.reports == []

    ends = [moved(S.LOADING, S.TRAINING), moved(S.FINE_TUNING, S.FOSSILIZED)]
    commands, library = await run_tamiyo(kernel, ends)
    assert [c.seed_idx for c in commands] == [1, 0]
    [report] = library.reports
    assert report.outcome is Outcome.FOSSILIZED
    assert (report.seed_id, report.started_epoch, report.ended_epoch) == (("fc", 1), 3, 5)


async def test_a_cull_and_a_failed_load_are_told_apart(kernel: KernelRecord) -> None:
    _, library = await run_tamiyo(
        kernel, [moved(S.LOADING, S.TRAINING), moved(S.TRAINING, S.CULLED)]
    )
    assert [r.outcome for r in library.reports] == [Outcome.CULLED]
    _, library = await run_tamiyo(kernel, [moved(S.LOADING, S.CULLED)])
    assert [r.outcome for r in library.reports] == [Outcome.FAILED]


async def test_a_refused_germination_frees_tamiyo_for_another(kernel: KernelRecord) -> None:
    commands, library = await run_tamiyo(kernel, [moved(S.DORMANT, S.DORMANT)])
    assert len(commands) == 2
    assert library.reports == []
