"""Tamiyo beside her policy: explosions, pauses, status, memory, and decisions made again."""

import asyncio
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from kasmina_library import LINEAR_8_4
from redis_servers import MakeBus
from tamiyo_samples import FLAT, epochs, evaluation, kernel_costing, moved, signal

import esper.tamiyo as tamiyo_room
from esper.config import TamiyoSettings
from esper.contracts import (
    CommandKind,
    EpochEvent,
    HealthBatch,
    KasminaControlCommand,
    KernelQuery,
    KernelRecord,
    RequestKind,
    SeedState,
    TamiyoRequest,
    TamiyoStatus,
    Topic,
)
from esper.tamiyo import ManualPolicy, PlateauPolicy, Policy, RandomPolicy, Tamiyo
from esper.testing import FakeBus, FakeLibrary, FixedPolicy

S = SeedState
SETTINGS = TamiyoSettings(window_epochs=3, warmup_epochs=3, cooldown_epochs=2)
QUERY = KernelQuery(site=LINEAR_8_4, dtype="float32", device="cpu")


@pytest.fixture
def kernel() -> KernelRecord:
    return kernel_costing(parameters=10, flops=20, memory_bytes=30)


class Run:
    """Tamiyo, handed one message after the other."""

    def __init__(
        self,
        kernel: KernelRecord,
        policy: Policy | None = None,
        journal: Path | None = None,
    ):
        self.bus, self.library = FakeBus(), FakeLibrary([kernel])
        self.tamiyo = Tamiyo(
            self.bus,
            self.library,
            lambda _: QUERY,
            policy or PlateauPolicy(SETTINGS),
            settings=SETTINGS,
            journal=journal,
        )

    async def hear(self, topic: Topic, *payloads: object) -> None:
        for payload in payloads:
            await self.tamiyo.handle(self.bus.message(topic, payload))  # type: ignore[arg-type]

    async def plateau(self) -> None:
        """Four epochs that bring nothing: Tamiyo germinates seed 1 on 'fc'."""
        signals = (signal(("fc", 0), 1.0), signal(("fc", 1), 3.0))
        await self.hear(Topic.SEED_HEALTH, HealthBatch(signals=signals))
        await self.hear(Topic.EPOCH, *epochs(FLAT))

    async def move(self, *path: SeedState, epoch: int = 4) -> None:
        for source, target in itertools.pairwise(path):
            await self.hear(Topic.LIFECYCLE, moved(source, target, epoch))

    @property
    def commands(self) -> list[KasminaControlCommand]:
        return self.bus.payloads(Topic.KASMINA_COMMANDS)  # type: ignore[return-value]


def epoch(number: int, val_loss: float, train_loss: float = 1.0, error: float = 0.1) -> EpochEvent:
    return EpochEvent(
        epoch=number,
        step=10 * number,
        train_loss=train_loss,
        val_loss=val_loss,
        val_loss_standard_error=error,
    )


IN_GRAFTING = (S.DORMANT, S.GERMINATED, S.LOADING, S.TRAINING, S.GRAFTING)


@pytest.mark.parametrize(
    "event",
    [epoch(5, 11.1), epoch(5, math.nan), epoch(5, math.inf), epoch(5, 1.0, train_loss=math.nan)],
)
async def test_a_loss_that_explodes_while_a_seed_comes_in_is_rolled_back(
    event: EpochEvent, kernel: KernelRecord
) -> None:
    run = Run(kernel)
    await run.plateau()
    await run.move(*IN_GRAFTING)
    await run.hear(Topic.EPOCH, event)
    order = run.commands[-1]
    assert order.kind is CommandKind.ROLL_BACK
    assert (order.layer_name, order.seed_idx) == ("fc", 1)
    assert order.artifact_id == kernel.artifact_id
    assert order.valid_until_epoch == 5 + SETTINGS.command_lifetime_epochs
    await run.move(S.GRAFTING, S.ROLLED_BACK, epoch=5)
    [report] = run.library.reports
    assert report.outcome == "ROLLED_BACK"
    assert "loss" in report.reason
    await run.hear(Topic.EPOCH, epoch(6, 1.0))
    assert len(run.commands) == 2


async def test_what_cannot_be_rolled_back_is_culled(kernel: KernelRecord) -> None:
    run = Run(kernel)
    await run.plateau()
    await run.move(*IN_GRAFTING)
    await run.hear(Topic.EPOCH, epoch(5, math.nan))
    await run.move(S.GRAFTING, S.GRAFTING)  # refused
    await run.hear(Topic.EPOCH, epoch(6, math.nan))
    kinds = [command.kind for command in run.commands]
    assert kinds == [CommandKind.GERMINATE, CommandKind.ROLL_BACK, CommandKind.CULL]


async def test_a_kept_seed_has_not_cost_the_host_more_than_it_brings(kernel: KernelRecord) -> None:
    run = Run(kernel)
    await run.plateau()
    await run.move(*IN_GRAFTING, S.STABILIZATION, S.EVALUATING)
    judged = evaluation(5.0).model_copy(update={"seed_id": ("fc", 1), "loss_with": 1.2})
    await run.hear(Topic.EPOCH, epoch(5, 1.2).model_copy(update={"evaluations": (judged,)}))
    assert run.commands[-1].kind is CommandKind.ROLL_BACK
    assert "risen from 1.0000 to 1.2000" in run.commands[-1].reason


@pytest.mark.parametrize(
    ("event", "path"),
    [
        (epoch(5, 10.9), IN_GRAFTING),  # not ten times more than it was
        (epoch(5, 11.1, error=4.0), IN_GRAFTING),  # as chance may do
        (epoch(5, math.nan), IN_GRAFTING[:-1]),  # the host does not hear the seed yet
    ],
)
async def test_otherwise_nothing_is_rolled_back(
    event: EpochEvent, path: tuple[SeedState, ...], kernel: KernelRecord
) -> None:
    run = Run(kernel)
    await run.plateau()
    await run.move(*path)
    await run.hear(Topic.EPOCH, event)
    assert [c.kind for c in run.commands] == [CommandKind.GERMINATE]


async def test_while_paused_nothing_begins_but_what_is_under_way_is_judged(
    kernel: KernelRecord,
) -> None:
    run = Run(kernel, RandomPolicy(rate=1.0, settings=SETTINGS))
    run.tamiyo.pause()
    await run.plateau()
    assert run.commands == []
    run.tamiyo.resume()
    await run.hear(Topic.EPOCH, epoch(4, 1.0))
    assert [c.kind for c in run.commands] == [CommandKind.GERMINATE]
    run.tamiyo.pause()
    await run.hear(Topic.EPOCH, epochs([1.0] * 6, evaluation(1.0))[-1])
    assert [c.kind for c in run.commands] == [CommandKind.GERMINATE, CommandKind.KEEP]


async def test_prospects_are_the_free_seeds_by_expected_gain_and_no_decision(
    kernel: KernelRecord, tmp_path: Path
) -> None:
    journal = tmp_path / "journal.jsonl"
    run = Run(kernel, journal=journal)
    signals = (signal(("fc", 0), 1.0), signal(("fc", 1), 3.0))
    await run.hear(Topic.SEED_HEALTH, HealthBatch(signals=signals))
    told = journal.read_text()
    prospects = await run.tamiyo.prospects()
    assert [offer.seed_id for offer in prospects] == [("fc", 1), ("fc", 0)]
    assert {offer.kernel.artifact_id for offer in prospects} == {kernel.artifact_id}
    assert journal.read_text() == told
    assert run.commands == []
    await run.plateau()  # seed 1 germinates
    assert [offer.seed_id for offer in await run.tamiyo.prospects()] == [("fc", 0)]


async def test_requests_come_over_the_bus_and_are_answered(
    make_bus: MakeBus, kernel: KernelRecord
) -> None:
    bus = make_bus()
    tamiyo = Tamiyo(bus, FakeLibrary([kernel]), lambda _: QUERY, ManualPolicy())
    task = asyncio.create_task(tamiyo.run())
    answers = bus.subscribe(Topic.TAMIYO_STATUS, "test")
    seen = []
    for kind in (RequestKind.STATUS, RequestKind.PAUSE, RequestKind.RESUME):
        request = TamiyoRequest(kind=kind)
        bus.publish(Topic.TAMIYO_REQUESTS, "test", request)
        message = await anext(answers)
        assert isinstance(message.payload, TamiyoStatus)
        assert message.payload.request_id == request.request_id
        seen.append(message.payload.paused)
    assert seen == [False, True, False]
    await answers.aclose()
    bus.close()
    await task


async def test_the_status_tells_what_is_under_way_and_what_it_costs(kernel: KernelRecord) -> None:
    run = Run(kernel)
    before = run.tamiyo.status()
    assert (before.epoch, before.adapting, before.num_parameters) == (None, (), 0)
    await run.plateau()
    status = run.tamiyo.status()
    assert status.policy == "PlateauPolicy"
    assert status.epoch == 3
    assert status.adapting == ((("fc", 1), S.GERMINATED),)
    assert (status.num_parameters, status.flops_per_sample, status.memory_bytes) == (10, 20, 30)


async def test_a_memory_in_json_goes_on_as_if_nothing_had_been(kernel: KernelRecord) -> None:
    async def rest(run: Run) -> list[tuple[object, ...]]:
        already = len(run.commands)
        await run.hear(Topic.EPOCH, epochs([1.0] * 6, evaluation(1.0))[-1])
        await run.move(S.EVALUATING, S.CULLED, epoch=6)
        await run.hear(Topic.EPOCH, *(epoch(number, 1.0) for number in range(7, 16)))
        return [(c.kind, c.seed_idx, c.epoch, c.reason) for c in run.commands[already:]]

    first = Run(kernel)
    await first.plateau()
    await first.move(*IN_GRAFTING)
    first.tamiyo.resume()
    state = json.loads(json.dumps(first.tamiyo.state_dict(), allow_nan=False))
    second = Run(kernel)
    second.tamiyo.load_state_dict(state)
    assert second.tamiyo.state_dict() == state
    expected = await rest(first)
    assert len(expected) >= 2
    assert await rest(second) == expected


async def test_a_damaged_memory_is_refused_and_nothing_is_lost(kernel: KernelRecord) -> None:
    run = Run(kernel)
    await run.plateau()
    before = run.tamiyo.state_dict()
    with pytest.raises(ValueError, match="history"):
        run.tamiyo.load_state_dict({"paused": True})
    assert run.tamiyo.state_dict() == before


async def test_a_diverged_loss_is_remembered_in_json(kernel: KernelRecord) -> None:
    run = Run(kernel)
    await run.hear(Topic.EPOCH, epoch(0, math.nan, train_loss=math.inf))
    state = json.loads(json.dumps(run.tamiyo.state_dict(), allow_nan=False))
    second = Run(kernel)
    second.tamiyo.load_state_dict(state)
    assert second.tamiyo.state_dict() == state


async def a_life(run: Run) -> None:
    await run.plateau()
    await run.move(*IN_GRAFTING, S.STABILIZATION, S.EVALUATING)
    await run.hear(Topic.EPOCH, epochs([1.0] * 6, evaluation(0.01))[-1])
    await run.move(S.EVALUATING, S.CULLED, epoch=6)
    await run.hear(Topic.EPOCH, *(epoch(number, 1.0) for number in range(7, 16)))
    await run.move(*IN_GRAFTING, epoch=16)
    await run.hear(Topic.EPOCH, epoch(16, math.nan))


def without_ids(commands: list[KasminaControlCommand]) -> list[dict[str, object]]:
    return [command.model_dump(exclude={"command_id"}) for command in commands]


POLICIES: dict[str, Callable[[], Policy]] = {
    "plateau": lambda: PlateauPolicy(SETTINGS),
    "random": lambda: RandomPolicy(3, 1.0, SETTINGS),
}


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_recorded_run_is_decided_again_in_the_same_way(
    policy: str, kernel: KernelRecord, tmp_path: Path
) -> None:
    journal = tmp_path / "run" / "journal.jsonl"
    run = Run(kernel, POLICIES[policy](), journal)
    await a_life(run)
    assert len(run.commands) >= 2
    again = await tamiyo_room.replay(journal, POLICIES[policy](), settings=SETTINGS)
    assert without_ids(again) == without_ids(run.commands)


async def test_a_line_that_a_crash_cut_off_is_left_out(
    kernel: KernelRecord, tmp_path: Path
) -> None:
    journal = tmp_path / "journal.jsonl"
    run = Run(kernel, journal=journal)
    await run.plateau()
    with journal.open("a") as file:
        file.write('{"message": {"topic": "telem')
    again = await tamiyo_room.replay(journal, PlateauPolicy(SETTINGS), settings=SETTINGS)
    assert without_ids(again) == without_ids(run.commands)


async def test_a_fixed_policy_does_as_it_is_told(kernel: KernelRecord) -> None:
    order = KasminaControlCommand(
        kind=CommandKind.CULL, layer_name="fc", seed_idx=0, epoch=2, reason="told"
    )
    policy = FixedPolicy([order])
    run = Run(kernel, policy)
    await run.plateau()
    [issued] = run.commands
    assert issued.command_id == order.command_id
    assert [len(view.epochs) for view in policy.views] == [1, 2, 3, 4]


async def test_a_second_germination_of_a_taken_seed_is_not_issued(
    kernel: KernelRecord, caplog: pytest.LogCaptureFixture
) -> None:
    orders = [
        KasminaControlCommand(
            kind=CommandKind.GERMINATE,
            layer_name="fc",
            seed_idx=0,
            artifact_id=kernel.artifact_id,
            epoch=number,
            reason="told",
        )
        for number in (1, 2)
    ]
    run = Run(kernel, FixedPolicy(orders))
    await run.plateau()
    assert [c.epoch for c in run.commands] == [1]
    assert "no germination of seed 0 on 'fc': the seed is taken" in caplog.text
