"""The whole way: layer, snapshot, bus, forge, evaluator, controller, command, layer."""

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refusal
from redis_servers import MakeBus, RedisServer
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from urza_servers import served

import esper
from esper import blueprints, cli
from esper.config import SeedSettings, TamiyoSettings
from esper.contracts import (
    BlueprintStatus,
    CommandKind,
    Design,
    EpochEvent,
    GraftingStrategy,
    KasminaControlCommand,
    KernelStatus,
    OonaMessage,
    Outcome,
    SeedState,
    SiteSignature,
    TamiyoStatus,
    Topic,
)
from esper.errors import EsperError
from esper.kasmina.lifecycle import ACTIVE, OCCUPIED
from esper.kasmina.model import MorphableModel
from esper.pipeline import Pipeline
from esper.tamiyo import ModelView, PlateauPolicy, replay
from esper.tolaria import Callback
from esper.urza import Urza
from esper.urza.access import Tokens
from esper.urza.client import UrzaClient
from esper.urza.server import create_app

QUICK = GraftingStrategy(
    training_steps=4, grafting_steps=4, stabilization_steps=2, fine_tuning_steps=2
)
EAGER = TamiyoSettings(
    window_epochs=2, warmup_epochs=0, cooldown_epochs=0, min_relative_improvement=1e9
)


def one_design(site: SiteSignature) -> list[Design]:
    return [blueprints.get("residual_mlp")]


def bad_design(site: SiteSignature) -> list[Design]:
    return [Design(name="exploding", builder="esper.blueprints.bad:ExplodingBlueprint")]


def missing_design(site: SiteSignature) -> list[Design]:
    return [Design(name="missing", builder="esper.blueprints.nowhere:Nothing")]


@pytest.fixture
def model() -> MorphableModel:
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    settings = SeedSettings(seeds_per_layer=1, observe_every=2, deterministic=True)
    return esper.wrap(net, ["0"], settings=settings)


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Urza]:
    with Urza(tmp_path / "library") as urza:
        yield urza


def loss_per_sample(output: Tensor, target: Tensor) -> Tensor:
    return mse_loss(output, target, reduction="none").mean(1)


def fit(model: MorphableModel, pipeline: Pipeline, epochs: int, *others: Callback) -> None:
    torch.manual_seed(0)
    data = [(torch.randn(8, 6), torch.randn(8, 2)) for _ in range(4)]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tolaria = esper.Tolaria(model, optimizer, loss_per_sample, data, data, [pipeline, *others])
    tolaria.fit(epochs)


def test_a_seed_grows_from_a_design_to_a_verdict(
    model: MorphableModel, library: Urza, make_bus: MakeBus
) -> None:
    heard: list[OonaMessage] = []
    pipeline = Pipeline(
        model,
        library,
        designs=one_design,
        policy=PlateauPolicy(EAGER, QUICK),
        bus=make_bus(),
        listener=heard.append,
        synchronous=True,
    )
    with pipeline:
        fit(model, pipeline, 8)
        library.verify()

    [record] = library.kernels()
    assert record.status is KernelStatus.VALIDATED
    path = [m.payload.target for m in heard if m.topic is Topic.LIFECYCLE]
    assert path[:6] == [SeedState(value) for value in range(SeedState.GERMINATED, 7)]
    assert path[6] in (SeedState.FINE_TUNING, SeedState.CULLED, SeedState.ROLLED_BACK)
    [report, *_] = library.field_reports()
    assert report.artifact_id == record.artifact_id
    assert report.evaluation is not None
    lineage = library.lineage()
    assert json.loads(json.dumps(lineage)) == lineage
    kinds = {edge["kind"] for edge in lineage["edges"]}
    assert kinds == {"compiled", "adapted"}
    events = {entry.event for entry in library.audit.entries()}
    assert {"kernel.published", "kernel.reported", "seed.lifecycle"} <= events


def test_two_synchronous_runs_give_the_same_numbers(tmp_path: Path) -> None:
    def run(folder: Path) -> tuple[list[Tensor], list[tuple[object, ...]]]:
        torch.manual_seed(5)
        net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
        settings = SeedSettings(seeds_per_layer=2, observe_every=2, deterministic=True)
        model = esper.wrap(net, ["0"], settings=settings)
        moves: list[tuple[object, ...]] = []

        def note(message: OonaMessage) -> None:
            if message.topic is Topic.LIFECYCLE:
                event = message.payload
                moves.append((event.step, event.seed_id, event.target, event.artifact_id))

        pipeline = Pipeline(
            model,
            folder,
            designs=one_design,
            policy=PlateauPolicy(EAGER, QUICK),
            listener=note,
            synchronous=True,
        )
        with pipeline:
            fit(model, pipeline, 6)
        return [p.detach() for p in model.parameters()], moves

    first, second = run(tmp_path / "one"), run(tmp_path / "two")
    assert first[1] == second[1]
    assert len(first[1]) > 5
    for ours, theirs in zip(first[0], second[0], strict=True):
        assert torch.equal(ours, theirs)


def test_a_bad_design_is_rejected_and_never_loaded(model: MorphableModel, library: Urza) -> None:
    pipeline = Pipeline(
        model, library, designs=bad_design, policy=PlateauPolicy(EAGER, QUICK), synchronous=True
    )
    with pipeline:
        fit(model, pipeline, 4)
    [record] = library.kernels()
    assert record.status is KernelStatus.REJECTED
    failed = [check for check in library.report(record.artifact_id).checks if not check.passed]
    assert [check.name for check in failed] == ["finite"]
    assert model.kasmina.seeds_in(OCCUPIED) == []
    assert library.field_reports() == []


def test_a_design_that_cannot_be_traced_is_logged_and_the_rest_goes_on(
    model: MorphableModel, library: Urza, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = Pipeline(
        model,
        library,
        designs=lambda site: [*missing_design(site), *one_design(site)],
        policy=PlateauPolicy(EAGER, QUICK),
        synchronous=True,
    )
    with pipeline:
        fit(model, pipeline, 2)
    assert "design missing for ['0']" in caplog.text
    assert len(library.kernels(KernelStatus.VALIDATED)) == 1


def test_a_design_that_crashes_the_forge_is_logged_and_the_rest_goes_on(
    model: MorphableModel,
    library: Urza,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    crash = Design(name="crash", builder="forge_samples:Crashing")
    pipeline = Pipeline(
        model,
        library,
        designs=lambda site: [crash, *one_design(site)],
        policy=PlateauPolicy(EAGER, QUICK),
        synchronous=True,
    )
    with pipeline:
        fit(model, pipeline, 2)
    assert "design crash for ['0']" in caplog.text
    assert len(library.kernels(KernelStatus.VALIDATED)) == 1


class Failing:
    """A user's policy with a mistake in it."""

    def decide(self, view: ModelView) -> list[KasminaControlCommand]:
        raise ZeroDivisionError("policy")


def test_when_a_worker_fails_training_goes_on_and_the_failure_is_raised_at_the_end(
    model: MorphableModel, library: Urza
) -> None:
    pipeline = Pipeline(model, library, designs=one_design, policy=Failing())
    pipeline.start()
    fit(model, pipeline, 3)
    assert model.kasmina.step_count == 12
    with pytest.raises(EsperError, match=r"a worker of the pipeline failed: .*ZeroDivisionError"):
        pipeline.drain()
    with pytest.raises(EsperError, match="ZeroDivisionError"):
        pipeline.close()
    with Pipeline(model, library, designs=one_design):
        pass  # the model is free for another one


class GrowAtOnce:
    """A user's policy is a class with one method."""

    def decide(self, view: ModelView) -> list[KasminaControlCommand]:
        [seed_id] = view.health or [None]
        if seed_id is None or view.num_adaptations:
            return []
        [kernel] = view.candidates(seed_id)
        command = KasminaControlCommand(
            kind=CommandKind.GERMINATE,
            layer_name=seed_id[0],
            seed_idx=seed_id[1],
            artifact_id=kernel.artifact_id,
            strategy=QUICK,
            epoch=view.epochs[-1].epoch,
            reason="now",
        )
        return [command]


def test_a_pipeline_that_was_not_started_says_so(model: MorphableModel, library: Urza) -> None:
    pipeline = Pipeline(model, library, designs=one_design)
    held_out = [(torch.randn(5, 6), torch.randn(5, 2))]
    with pytest.raises(EsperError, match="the pipeline was not started: use it in a `with` block"):
        pipeline.end_epoch(held_out, loss_per_sample, train_loss=1.0)
    pipeline.close()


def test_a_pipeline_that_was_closed_is_not_started(model: MorphableModel, library: Urza) -> None:
    pipeline = Pipeline(model, library, designs=one_design)
    pipeline.close()
    with pytest.raises(EsperError, match="a pipeline is started once"):
        pipeline.start()


def test_where_no_loop_can_be_made_start_says_so_and_changes_nothing(
    model: MorphableModel, library: Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> asyncio.AbstractEventLoop:
        raise OSError(24, "Too many open files")

    pipeline = Pipeline(model, library, designs=one_design)
    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "new_event_loop", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            pipeline.start()
    with pipeline:
        pass


def test_to_close_is_not_to_wait_for_a_library_that_does_not_answer(
    model: MorphableModel, library: Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer, answered = threading.Event(), threading.Event(), threading.Event()

    def claim_kernel(*_: Any, **__: Any) -> None:
        asked.set()
        answer.wait()
        answered.set()

    monkeypatch.setattr(library, "claim_kernel", claim_kernel)
    watchdog = threading.Timer(60.0, answer.set)
    watchdog.start()
    try:
        with Pipeline(model, library, designs=one_design):
            asked.wait()
        assert not answered.is_set()
    finally:
        watchdog.cancel()
        answer.set()


def test_a_loop_that_forgets_the_step_is_told(
    model: MorphableModel, library: Urza, caplog: pytest.LogCaptureFixture
) -> None:
    held_out = [(torch.randn(5, 6), torch.randn(5, 2))]
    with Pipeline(model, library, designs=one_design) as pipeline:
        model.step()
        pipeline.end_epoch(held_out, loss_per_sample, train_loss=1.0)
        assert "no model.step()" not in caplog.text
        pipeline.end_epoch(held_out, loss_per_sample, train_loss=1.0)
    assert "no model.step() since the last end of an epoch (step 1)" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "plateau"}, r"policy must have a method decide\(view\).*got 'plateau'"),
        ({"bus": "redis://x"}, r"bus must be an Oona, as esper\.oona\.connect.*got 'redis://x'"),
    ],
)
def test_parts_of_the_wrong_kind_are_refused(
    model: MorphableModel, library: Urza, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        Pipeline(model, library, **options)


def test_a_users_policy_decides(model: MorphableModel, library: Urza) -> None:
    pipeline = Pipeline(model, library, designs=one_design, policy=GrowAtOnce(), synchronous=True)
    with pipeline:
        fit(model, pipeline, 2)
    assert model.kasmina_layers["0"].state(0) is SeedState.TRAINING


class GrowInThirdEpoch(GrowAtOnce):
    def decide(self, view: ModelView) -> list[KasminaControlCommand]:
        return super().decide(view) if len(view.epochs) >= 3 else []


class Spoil:
    """Ruins the host once, at the end of an epoch in which it hears the seed."""

    def __init__(self, model: MorphableModel):
        self.model = model
        self.done = False

    def on_step(self, step: int, epoch: int) -> None:
        pass

    def on_epoch(self, event: EpochEvent, step_losses: Sequence[float]) -> None:
        if not self.done and self.model.kasmina.seeds_in(ACTIVE):
            self.done = True
            with torch.no_grad():
                self.model[2].weight.mul_(1e6)


def test_a_loss_that_explodes_while_a_seed_comes_in_is_undone(
    model: MorphableModel, library: Urza
) -> None:
    pipeline = Pipeline(model, library, designs=one_design, policy=GrowAtOnce(), synchronous=True)
    spoil = Spoil(model)
    with pipeline:
        fit(model, pipeline, 8, spoil)
    assert spoil.done
    assert model.kasmina_layers["0"].state(0) is SeedState.ROLLED_BACK
    assert model[2].weight.abs().max() < 10
    [report] = library.field_reports()
    assert report.outcome is Outcome.ROLLED_BACK
    assert "exploded" in report.reason


def test_tamiyo_decides_again_in_the_same_way_on_a_runs_journal(
    model: MorphableModel, library: Urza, tmp_path: Path
) -> None:
    heard: list[OonaMessage] = []
    journal = tmp_path / "journal.jsonl"
    policy = PlateauPolicy(EAGER, QUICK)
    pipeline = Pipeline(
        model,
        library,
        designs=one_design,
        policy=policy,
        journal=journal,
        listener=heard.append,
        synchronous=True,
    )
    with pipeline:
        fit(model, pipeline, 8)
    commands = [m.payload for m in heard if m.topic is Topic.KASMINA_COMMANDS]
    assert len(commands) >= 2
    again = asyncio.run(replay(journal, policy))
    anonymous = {"command_id": "0"}
    assert [c.model_copy(update=anonymous) for c in again] == [
        c.model_copy(update=anonymous) for c in commands
    ]


def test_what_tamiyo_remembers_goes_into_a_checkpoint_and_comes_back(
    model: MorphableModel, library: Urza, tmp_path: Path
) -> None:
    policy = PlateauPolicy(EAGER, QUICK)
    with Pipeline(model, library, designs=one_design, policy=policy, synchronous=True) as pipeline:
        fit(model, pipeline, 3)
        state = pipeline.state_dict()
        esper.save(model, tmp_path / "saved", extra={"tamiyo": state})
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    extra = esper.load(tmp_path / "saved", net, library=library)
    resumed = Pipeline(net, library, designs=one_design, policy=policy)
    resumed.load_state_dict(extra["tamiyo"])
    assert resumed.tamiyo.status().num_adaptations == 1
    assert resumed.state_dict() == state
    with resumed, pytest.raises(EsperError, match="before it is started"):
        resumed.load_state_dict(state)


@pytest.mark.redis
def test_the_command_line_asks_and_pauses_tamiyo(
    model: MorphableModel,
    library: Urza,
    redis_server: RedisServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ask(kind: str) -> TamiyoStatus:
        cli.main(["tamiyo", kind, "--redis", redis_server.url()])
        return TamiyoStatus.model_validate_json(capsys.readouterr().out)

    bus = esper.oona.connect(redis_server.url())
    with Pipeline(model, library, designs=one_design, bus=bus):
        assert not ask("status").paused
        assert ask("pause").paused
        assert ask("status").paused
        assert not ask("resume").paused
    unanswered = ["tamiyo", "status", "--redis", redis_server.url(), "--timeout-s", "0.1"]
    assert "no controller has answered in 0.1 s" in refusal(unanswered, capsys)


@pytest.mark.redis
def test_training_goes_on_when_redis_dies_and_growing_when_it_is_back(
    model: MorphableModel,
    library: Urza,
    redis_server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_server.url())
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    pipeline = Pipeline(model, library, designs=one_design, policy=GrowInThirdEpoch())
    with pipeline:
        fit(model, pipeline, 1)
        pipeline.drain()  # the library is stocked
        redis_server.kill()
        fit(model, pipeline, 2)
        assert model.kasmina.step_count == 12
        assert model.kasmina_layers["0"].state(0) is SeedState.DORMANT
        redis_server.start()
        pipeline.drain()  # the epochs' ends arrive, and with them the decision
        fit(model, pipeline, 1)
        pipeline.drain()
        fit(model, pipeline, 1)
    assert model.kasmina.seeds_in(OCCUPIED) != []


def test_the_library_may_be_behind_a_server(
    model: MorphableModel, library: Urza, tmp_path: Path
) -> None:
    key_path = tmp_path / "library/keys/evaluator.pem"
    with (
        served(create_app(library, Tokens([]))) as url,
        UrzaClient(url, key_path=key_path) as client,
        Pipeline(
            model,
            client,
            designs=one_design,
            policy=PlateauPolicy(EAGER, QUICK),
            synchronous=True,
        ) as pipeline,
    ):
        fit(model, pipeline, 8)
    [record] = library.kernels()
    assert record.status is KernelStatus.VALIDATED
    assert library.field_reports()
    assert "seed.lifecycle" in {entry.event for entry in library.audit.entries()}
    library.verify()


def test_without_local_workers_others_do_the_work(
    model: MorphableModel, library: Urza, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The trainer knows the public key alone, and has its library from the environment."""
    public = tmp_path / "evaluator.pub"
    public.write_bytes(library.evaluator_key.trusted().pem())
    monkeypatch.setenv("URZA_TRUSTED_KEY", str(public))
    with served(create_app(library, Tokens([]))) as url:
        monkeypatch.setenv("URZA_API_URL", url)
        pipeline = Pipeline(
            model,
            designs=one_design,
            policy=PlateauPolicy(EAGER, QUICK),
            synchronous=True,
            local_workers=False,
        )
        with pipeline:
            fit(model, pipeline, 2)
            assert library.kernels() == []
            assert len(library.blueprints(BlueprintStatus.UNVALIDATED)) == 1
            asyncio.run(work_off(library))
            fit(model, pipeline, 8)
            assert library.field_reports()


async def work_off(library: Urza) -> None:
    async with esper.Tezzeret(library) as tezzeret, esper.Urabrask(library) as urabrask:
        await tezzeret.run()
        await urabrask.run()
