"""Urabrask between library and bus, with its real worker process."""

import asyncio
import fcntl
import os
import platform
import sys
import tempfile
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from urabrask_artifacts import ACT, Artifact, artifact, graph, residual_mlp
from urabrask_lessons import LEARNABLE, lessons, needs_xgboost
from urza_samples import judge, measurement

from esper.config import EvaluatorSettings
from esper.contracts import (
    Blueprint,
    Confidence,
    KernelBundle,
    KernelCharacterized,
    KernelReady,
    KernelStatus,
    RiskSource,
    Topic,
)
from esper.errors import (
    ArtifactIntegrityError,
    ArtifactNotFoundError,
    ArtifactNotValidatedError,
    WorkerError,
)
from esper.oona import MemoryBus
from esper.tezzeret.pipelines import torch_release
from esper.trust import verify_bundle
from esper.urabrask import Urabrask
from esper.urabrask.interest import ENOUGH_PEERS
from esper.urabrask.risk import WEIGHTS
from esper.urabrask.turn import device_to_itself, lock_path
from esper.urza import Urza
from esper.worker import WorkerProcess

SETTINGS = EvaluatorSettings(timeout_s=30.0, batch_sizes=(1, 7), timed_block_s=0.01)
UNSTEADY = SETTINGS.model_copy(update={"max_spread": 1e-12, "measured_again": 0})

pytestmark = pytest.mark.asyncio(loop_scope="module")  # that of the worker process


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def process() -> AsyncIterator[WorkerProcess]:
    """One for all: a fresh one takes seconds."""
    limits = {"niceness": SETTINGS.niceness, "memory_limit_bytes": SETTINGS.memory_limit_bytes}
    process = WorkerProcess("esper.urabrask.child", **limits)
    yield process
    await process.close()


@pytest.fixture
def urza(tmp_path: Path) -> Urza:
    return Urza(tmp_path)


@pytest.fixture
def bus() -> MemoryBus:
    return MemoryBus()


Make = Callable[..., Urabrask]


@pytest.fixture
def make(urza: Urza, process: WorkerProcess) -> Make:
    def make(settings: EvaluatorSettings = SETTINGS, bus: MemoryBus | None = None) -> Urabrask:
        urabrask = Urabrask(urza, bus, settings)
        urabrask._process = process
        return urabrask

    return make


@pytest.fixture
def urabrask(make: Make, bus: MemoryBus) -> Urabrask:
    return make(bus=bus)


def publish(urza: Urza, specimen: Artifact) -> str:
    """Publish an artifact together with a blueprint for it."""
    manifest, files = specimen
    blueprint = Blueprint(
        design=manifest.design,
        site=manifest.site,
        dtype=manifest.dtype,
        graph_digest=manifest.files["graph.json"],
        num_parameters=manifest.num_parameters,
        flops_per_sample=manifest.flops_per_sample,
    )
    blueprint_id = urza.submit_blueprint(blueprint, files["graph.json"])
    return urza.publish_kernel(manifest.model_copy(update={"blueprint_id": blueprint_id}), files)


def exploding() -> Artifact:
    logarithm = graph(("aten.log.default", (ACT,)))
    return artifact(logarithm, logarithm)


async def test_a_validated_kernel_may_be_loaded(urza: Urza, urabrask: Urabrask) -> None:
    artifact_id = publish(urza, residual_mlp())
    report = await urabrask.evaluate(artifact_id)

    assert report.status is KernelStatus.VALIDATED
    assert urza.report(artifact_id) == report
    bundle = urza.fetch_kernel(artifact_id)
    verify_bundle(bundle, urza.trusted_key)
    assert bundle.record.tags == report.tags
    assert report.measurement is not None
    assert bundle.record.latency_us == report.measurement.forward_p50_us


async def test_waiting_and_announced_kernels_are_judged_once(
    urza: Urza, bus: MemoryBus, urabrask: Urabrask, caplog: pytest.LogCaptureFixture
) -> None:
    waiting, announced = publish(urza, residual_mlp()), publish(urza, exploding())
    running = asyncio.create_task(urabrask.run())
    verdicts = bus.subscribe(Topic.KERNEL_CHARACTERIZED, "test")
    characterized = [await anext(verdicts), await anext(verdicts)]
    late = publish(urza, residual_mlp(dtype="float64"))
    for artifact_id in (waiting, announced, "0" * 64, late):
        bus.publish(Topic.KERNEL_READY, "tezzeret", KernelReady(artifact_id=artifact_id))
    characterized.append(await anext(verdicts))
    await bus.drained([Topic.KERNEL_READY])
    bus.close()
    await running
    await verdicts.aclose()

    payloads = [message.payload for message in characterized]
    assert [(p.artifact_id, p.status) for p in payloads if isinstance(p, KernelCharacterized)] == [
        (waiting, KernelStatus.VALIDATED),
        (announced, KernelStatus.REJECTED),
        (late, KernelStatus.VALIDATED),
    ]
    assert urza.kernel(announced).status is KernelStatus.REJECTED
    assert "kernel 000000000000 was not evaluated: " in caplog.text


async def test_run_without_a_bus_ends_when_nothing_waits(make: Make) -> None:
    await make().run()


async def test_evaluators_share_the_work_and_judge_nothing_twice(urza: Urza) -> None:
    for dtype in ("float32", "float64"):
        publish(urza, residual_mlp(dtype=dtype))
    async with Urabrask(urza, settings=SETTINGS) as one, Urabrask(urza, settings=SETTINGS) as other:
        await asyncio.gather(one.run(), other.run())
    assert [kernel.status for kernel in urza.kernels()] == [KernelStatus.VALIDATED] * 2
    events = [entry.event for entry in urza.audit.entries()]
    assert events.count("kernel.reported") == 2


async def test_a_lease_lost_during_an_evaluation_ends_it_quietly(
    urza: Urza, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    artifact_id = publish(urza, residual_mlp())
    settings = SETTINGS.model_copy(update={"lease_s": 0.1})
    stuck = asyncio.Event()

    async def hang(*args: object, **kwargs: object) -> None:
        stuck.set()
        await asyncio.Event().wait()

    urabrask = Urabrask(urza, settings=settings)
    monkeypatch.setattr(urabrask._process, "call", hang)
    running = asyncio.create_task(urabrask.run())
    await stuck.wait()
    urza.release_kernel(artifact_id, urabrask.worker.owner)
    terms = {"device": "cpu", "torch_version": torch_release()}
    assert urza.claim_kernel("heir", 3600.0, **terms) == artifact_id
    caplog.set_level("INFO", logger="esper.urabrask")
    await running
    assert f"is leased to heir, not to {urabrask.worker.owner}" in caplog.text
    assert urza.kernel(artifact_id).status is KernelStatus.PENDING_BENCHMARKING


async def test_a_cancelled_evaluation_gives_the_kernel_back(
    urza: Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact_id = publish(urza, residual_mlp())
    urabrask = Urabrask(urza, settings=SETTINGS)
    stuck = asyncio.Event()

    async def hang(*args: object, **kwargs: object) -> None:
        stuck.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(urabrask._process, "call", hang)
    running = asyncio.create_task(urabrask.run())
    await stuck.wait()
    assert urza.forge_status().evaluating_kernels == 1
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    terms = {"device": "cpu", "torch_version": torch_release()}
    assert urza.claim_kernel("heir", 3600.0, **terms) == artifact_id


async def test_what_cannot_be_judged_is_left_to_its_lease(
    urza: Urza, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    artifact_id = publish(urza, residual_mlp())
    urabrask = Urabrask(urza, settings=SETTINGS)

    async def fail(*args: object, **kwargs: object) -> None:
        raise WorkerError("no answer within 60 s")

    monkeypatch.setattr(urabrask._process, "call", fail)
    await urabrask.run()
    assert caplog.text.count("was not evaluated: no answer within 60 s") == 1
    status = urza.forge_status()
    assert (status.waiting_kernels, status.evaluating_kernels) == (0, 1)
    assert urza.kernel(artifact_id).status is KernelStatus.PENDING_BENCHMARKING


_HOLD = """
import asyncio, sys
from esper.urabrask.interest import ENOUGH_PEERS
from esper.urabrask.risk import WEIGHTS
from esper.urabrask.turn import device_to_itself
async def hold():
    async with device_to_itself("cpu"):
        print("held", flush=True)
        sys.stdin.read()
asyncio.run(hold())
"""


@pytest.mark.parametrize("killed", [False, True])
async def test_one_benchmark_at_a_time(
    urza: Urza, killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    holder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _HOLD), stdin=PIPE, stdout=PIPE, env=environment
    )
    assert holder.stdin
    assert holder.stdout
    assert await holder.stdout.readline() == b"held\n"
    entered = asyncio.Event()

    async def wait_for_turn() -> None:
        async with device_to_itself("cuda"), device_to_itself("cpu"):
            entered.set()

    waiting = asyncio.create_task(wait_for_turn())
    with pytest.raises(BlockingIOError), lock_path("cpu").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not entered.is_set()
    if killed:
        holder.kill()
    else:
        holder.stdin.close()
    await waiting
    await holder.wait()


async def test_tampered_bytes_get_no_verdict(
    urza: Urza, urabrask: Urabrask, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact_id = publish(urza, residual_mlp())
    bundle = urza.fetch_kernel(artifact_id)
    tampered = KernelBundle(
        record=bundle.record, files=bundle.files | {"params.safetensors": b"tampered"}
    )
    monkeypatch.setattr(urza, "fetch_kernel", lambda artifact_id: tampered)
    with pytest.raises(ArtifactIntegrityError, match=r"params\.safetensors"):
        await urabrask.evaluate(artifact_id)
    assert urza.kernel(artifact_id).status is KernelStatus.PENDING_BENCHMARKING


async def test_a_bundle_of_another_artifact_gets_no_verdict(
    urza: Urza, urabrask: Urabrask, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = publish(urza, residual_mlp()), publish(urza, exploding())
    bundle = urza.fetch_kernel(good)
    monkeypatch.setattr(urza, "fetch_kernel", lambda artifact_id: bundle)
    with pytest.raises(ArtifactIntegrityError, match=f"{bad}: its manifest is that of artifact"):
        await urabrask.evaluate(bad)


async def test_unknown_kernels_are_an_error(urabrask: Urabrask) -> None:
    with pytest.raises(ArtifactNotFoundError):
        await urabrask.evaluate("0" * 64)


async def test_an_undecided_kernel_gets_another_chance(urza: Urza, make: Make) -> None:
    artifact_id = publish(urza, residual_mlp())
    await make(UNSTEADY).evaluate(artifact_id)
    assert urza.kernel(artifact_id).status is KernelStatus.UNDECIDED
    with pytest.raises(ArtifactNotValidatedError, match="is UNDECIDED"):
        verify_bundle(urza.fetch_kernel(artifact_id), urza.trusted_key)
    await make().run()
    assert urza.kernel(artifact_id).status is KernelStatus.VALIDATED


async def test_an_undecided_kernel_is_left_alone_for_a_while(urza: Urza, make: Make) -> None:
    artifact_id = publish(urza, residual_mlp())
    unsteady = make(UNSTEADY).worker
    assert await unsteady.process_pending_kernels() == 1
    report_digest = urza.kernel(artifact_id).statement.report_digest
    assert await unsteady.process_pending_kernels() == 0
    assert await make().worker.process_pending_kernels() == 0
    kernel = urza.kernel(artifact_id)
    assert kernel.status is KernelStatus.UNDECIDED
    assert kernel.statement.report_digest == report_digest


async def test_the_report_says_who_judged_the_risk_and_why(urza: Urza, make: Make) -> None:
    report = await make().evaluate(publish(urza, residual_mlp()))
    assert report.risk_by is RiskSource.RULES
    assert report.risk_reason == "0 of the 200 outcomes that a model needs are known"
    assert set(report.risk_components) == set(WEIGHTS)
    assert sum(report.risk_components.values()) == pytest.approx(report.risk_score, abs=0.005)
    assert report.conf_level is Confidence.HIGH


@needs_xgboost
async def test_a_proven_model_judges_the_risk(urza: Urza, make: Make) -> None:
    urabrask = make()
    urabrask._chronicle.lessons = lessons(LEARNABLE)
    report = await urabrask.evaluate(publish(urza, residual_mlp()))
    assert report.risk_by is RiskSource.MODEL
    assert report.risk_comparison is not None
    assert report.risk_comparison.num_outcomes == 300
    assert urza.report(report.artifact_id) == report


async def test_the_forge_hears_of_what_is_unlike_its_peers(urza: Urza, make: Make) -> None:
    """Its peers take a hundred times as much memory."""
    manifest, files = residual_mlp()
    for index in range(ENOUGH_PEERS):
        peer_id = publish(urza, (manifest.model_copy(update={"flops_per_sample": index}), files))
        measured = measurement(12.5, 100_000 + index)
        judge(urza, peer_id, machine=platform.machine(), measurement=measured)
    blueprint_id = urza.kernel(artifact_id := publish(urza, residual_mlp())).manifest.blueprint_id
    report = await make().evaluate(artifact_id)
    assert report.urabrask_interest > 0.5
    assert urza.blueprint_record(blueprint_id).urabrask_interest == report.urabrask_interest
    # Measured anew by one who cannot tell, as it is not steady enough, it stays as unusual.
    assert (await make(UNSTEADY).evaluate(artifact_id)).urabrask_interest == 0
    assert urza.blueprint_record(blueprint_id).urabrask_interest == report.urabrask_interest
