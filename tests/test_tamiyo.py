"""What Tamiyo decides, and what she makes of what the bus tells her."""

import asyncio
import math

import pytest
import torch
from kasmina_library import LINEAR_8_4
from tamiyo_samples import FALLING, FLAT, epochs, evaluation, kernel_costing, moved, signal, view

from esper.config import TamiyoSettings
from esper.contracts import (
    CommandKind,
    HealthBatch,
    KasminaControlCommand,
    KernelQuery,
    KernelRecord,
    LifecycleEvent,
    OonaMessage,
    Outcome,
    SeedState,
    Topic,
)
from esper.oona import MemoryBus
from esper.tamiyo import Cost, ModelView, PlateauPolicy, Tamiyo
from esper.tamiyo.trend import fit_trend, plateau
from esper.testing import FakeLibrary

S = SeedState
SETTINGS = TamiyoSettings(window_epochs=3, warmup_epochs=3, cooldown_epochs=2, max_adaptations=2)


@pytest.fixture
def kernel() -> KernelRecord:
    return kernel_costing(parameters=10)


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
    assert "the held-out loss falls by 0.0% in 3 epochs" in command.reason


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
    "an embargo on both seeds": {"last_failure_epoch": {("fc", 0): 2, ("fc", 1): 3}},
    "all seeds taken": {"states": {("fc", 0): S.FOSSILIZED, ("fc", 1): S.CULLED}},
}


@pytest.mark.parametrize("case", QUIET)
def test_otherwise_nothing_happens(case: str, kernel: KernelRecord) -> None:
    assert decide(view(kernel, **QUIET[case])) == []


def test_a_kernel_beyond_the_budget_is_not_chosen(kernel: KernelRecord) -> None:
    needed = kernel.manifest.num_parameters
    spent = Cost(parameters=1)
    assert decide(view(kernel, spent=spent), max_parameters=needed) == []
    assert len(decide(view(kernel, spent=spent), max_parameters=needed + 1)) == 1


def test_a_kernel_that_failed_at_a_seed_is_not_tried_there_again(kernel: KernelRecord) -> None:
    failures = {(("fc", i)): frozenset({kernel.artifact_id}) for i in (0, 1)}
    assert decide(view(kernel, failures=failures)) == []


@pytest.mark.parametrize(
    ("contribution", "verdict"),
    [(0.17, CommandKind.KEEP), (0.16, CommandKind.CULL), (-1.0, CommandKind.CULL)],
)
def test_a_seed_is_kept_if_it_contributes_more_than_chance_does(
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


def test_the_trend_is_the_fall_of_the_fitted_line() -> None:
    assert fit_trend([4.0, 3.0, 2.0], 3).improvement == pytest.approx(2 / 3)
    assert fit_trend([2.0, 3.0, 2.0], 3).improvement == 0.0
    assert fit_trend([1.0, 2.0], 2).improvement < 0
    assert fit_trend([-1.0, -2.0, -3.0], 3).improvement == pytest.approx(1.0)
    assert fit_trend([-0.1, 0.1], 2).improvement == pytest.approx(-2.0)
    assert fit_trend([0.0, 0.0], 2).improvement == 0.0


def test_the_error_of_a_trend_is_that_of_least_squares() -> None:
    noise = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses = 5 - 0.01 * torch.arange(50, dtype=torch.float64) + 0.1 * noise
    design = torch.stack([torch.ones(50), torch.arange(50)], 1).double()
    solution = torch.linalg.lstsq(design, losses).solution
    variance = (losses - design @ solution).square().sum() / 48
    error = (variance * torch.linalg.inv(design.T @ design)[1, 1]).sqrt()
    unit = 49 / losses.mean()
    trend = fit_trend(losses.tolist(), 50)
    assert trend.improvement == pytest.approx(float(-solution[1] * unit))
    assert trend.standard_error == pytest.approx(float(error * unit))


def test_noise_is_waited_out_and_not_taken_for_a_plateau() -> None:
    noise = [0.1 * (-1) ** n for n in range(16)]
    falling = [3 - 0.1 * n + wobble for n, wobble in enumerate(noise)]
    still = [3 + wobble for wobble in noise]
    assert all(plateau(falling[:n], 4, 0.02, 1.0) is None for n in range(2, 17))
    assert plateau(still[:4], 4, 0.02, 1.0) is None
    assert plateau(still, 4, 0.02, 1.0) is not None


async def run_tamiyo(
    kernel: KernelRecord, moves: list[LifecycleEvent]
) -> tuple[list[KasminaControlCommand], FakeLibrary]:
    """Let Tamiyo see a plateau, then ``moves``, then four more epochs of it."""
    bus, library = MemoryBus(), FakeLibrary([kernel])
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


async def test_a_policy_sees_every_observed_seed_and_its_state(kernel: KernelRecord) -> None:
    seen: list[ModelView] = []

    class Watching:
        def decide(self, view: ModelView) -> list[KasminaControlCommand]:
            seen.append(view)
            return []

    tamiyo = Tamiyo(MemoryBus(), FakeLibrary([kernel]), lambda _: None, Watching())
    signals = (signal(("fc", 0), 1.0), signal(("fc", 1), 3.0))
    for topic, payload in (
        (Topic.SEED_HEALTH, HealthBatch(signals=signals)),
        (Topic.LIFECYCLE, moved(S.DORMANT, S.GERMINATED)),
        (Topic.EPOCH, epochs(FLAT)[0]),
    ):
        await tamiyo.handle(OonaMessage(topic=topic, sender_id="test", payload=payload))
    assert seen[0].states == {("fc", 0): S.DORMANT, ("fc", 1): S.GERMINATED}
