"""Tracing, packaging, and the forge that does both for the library."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import forge_samples as samples
import pytest
from forge_doubles import InlineWorker
from forge_samples import SITES
from torch import nn

from esper import blueprints
from esper.blueprints import bad
from esper.config import ForgeSettings
from esper.contracts import BlueprintStatus, Design, Pipeline, Topic
from esper.errors import (
    BlueprintError,
    BudgetExceededError,
    DataDependentShapeError,
    ForbiddenOperatorError,
    LibraryError,
    OutputMismatchError,
    WorkerError,
)
from esper.kasmina.kernel import Kernel
from esper.oona import MemoryBus
from esper.tezzeret import Tezzeret, child, forge
from esper.tezzeret.pipelines import package
from esper.tezzeret.trace import trace
from esper.urza import Urza
from esper.worker import Blobs, Header

LINEAR = SITES["linear"]
RESIDUAL_MLP = blueprints.get("residual_mlp")
# Of float32: the weights; what both maps, the activation in between and the sum compute; views of
# the weights are none of it.
HELD_BYTES = 4 * (536 + 16 + 16 + 8 + 8)


def test_blueprint_says_what_it_costs() -> None:
    blueprint, graph, _ = trace(RESIDUAL_MLP, LINEAR, "float32")
    assert blueprint.num_parameters == 24 * 16 + 16 + 16 * 8 + 8
    assert blueprint.flops_per_sample == 2 * (24 * 16 + 16 * 8)
    assert blueprint.graph_digest == samples.digest(graph)


_PRINT_IDS = """
import forge_samples as samples
from esper import blueprints
for name in ("residual_mlp", "self_attention", "standardize"):
    print(samples.artifact(blueprints.get(name), "sequence", "bfloat16")[0].artifact_id)
"""


def test_ids_are_the_same_in_every_process() -> None:
    other = subprocess.run(
        [sys.executable, "-c", _PRINT_IDS],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    names = ("residual_mlp", "self_attention", "standardize")
    artifacts = [samples.artifact(blueprints.get(name), "sequence", "bfloat16") for name in names]
    assert other.stdout.split() == [manifest.artifact_id for manifest, _ in artifacts]


@pytest.mark.parametrize(
    ("builder", "kind", "message"),
    [
        (
            samples.InPlace,
            ForbiddenOperatorError,
            r"'InPlace': operator 'aten.relu_.default' is not on the whitelist \(.*",
        ),
        (samples.WritesToHost, BlueprintError, "would write to 'self', which is not a buffer"),
        (
            samples.Random,
            ForbiddenOperatorError,
            r"operator 'aten.randn_like.default' is not on the whitelist \(File .*act",
        ),
        (
            samples.DataDependent,
            DataDependentShapeError,
            "cannot be exported for sizes that vary: Could not guard on data",
        ),
        (samples.FixedBatch, BlueprintError, "cannot be exported for sizes that vary: "),
        (
            samples.Selecting,
            DataDependentShapeError,
            r"aten.masked_select.default makes a size or a number of the values of its inputs",
        ),
        (samples.HoldsConstant, BlueprintError, "holds the constant .*: register it as a buffer"),
        (
            samples.TooNarrow,
            OutputMismatchError,
            r"must be like act, torch.float32 \(3, 8\), got torch.float32 \(3, 7\)",
        ),
        (samples.TwoOutputs, OutputMismatchError, "the output must be a tensor, got tuple"),
    ],
)
def test_refuses_designs_that_a_kernel_cannot_be(
    builder: type[nn.Module], kind: type[BlueprintError], message: str
) -> None:
    with pytest.raises(BlueprintError, match=message) as caught:
        trace(samples.design(builder), LINEAR, "float32")
    assert caught.type is kind


def test_refuses_an_unknown_dtype() -> None:
    with pytest.raises(BlueprintError, match="'residual_mlp': dtype 'int64' is not supported"):
        trace(RESIDUAL_MLP, LINEAR, "int64")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ForgeSettings(max_parameters=535), "536 parameters, at most 535 are allowed"),
        (ForgeSettings(max_flops_per_sample=1023), "1024 FLOPs per sample, at most 1023 are"),
        (
            ForgeSettings(max_memory_bytes=HELD_BYTES - 1),
            f"{HELD_BYTES} bytes of weights and of what a sample computes, at most",
        ),
    ],
)
def test_budgets(settings: ForgeSettings, message: str) -> None:
    with pytest.raises(BudgetExceededError, match=message):
        trace(RESIDUAL_MLP, LINEAR, "float32", settings)


def test_a_design_may_use_up_its_budgets() -> None:
    limits = {"max_parameters": 536, "max_flops_per_sample": 1024, "max_memory_bytes": HELD_BYTES}
    trace(RESIDUAL_MLP, LINEAR, "float32", ForgeSettings(**limits))


@pytest.mark.parametrize("builder", [bad.ExplodingBlueprint, bad.ExplodingGradient])
def test_bad_designs_pass_all_that_is_static(builder: type[nn.Module]) -> None:
    design = Design(name="bad", builder=f"esper.blueprints.bad:{builder.__name__}")
    Kernel.build(*samples.artifact(design))


def test_a_name_that_kernels_use_themselves_is_refused() -> None:
    blueprint, graph, _ = trace(samples.design(samples.Reserved), LINEAR, "float32")
    with pytest.raises(BlueprintError, match=r"a weight cannot have this name: .*weights"):
        package(blueprint, graph, "cpu")


@pytest.fixture
def urza(tmp_path: Path) -> Iterator[Urza]:
    with Urza(tmp_path / "library") as library:
        yield library
        library.verify()


@pytest.fixture
async def bus() -> AsyncIterator[MemoryBus]:
    transport = MemoryBus()
    yield transport
    transport.close()


@pytest.fixture
def tezzeret(urza: Urza, bus: MemoryBus, monkeypatch: pytest.MonkeyPatch) -> Tezzeret:
    monkeypatch.setattr(forge, "WorkerProcess", InlineWorker)
    return Tezzeret(urza, bus)


def published(bus: MemoryBus, topic: Topic) -> int:
    return bus.stats()[topic].published if topic in bus.stats() else 0


async def test_submit_stores_and_announces_once_it_is_due(
    tezzeret: Tezzeret, urza: Urza, bus: MemoryBus
) -> None:
    blueprint_id = await tezzeret.submit(RESIDUAL_MLP, LINEAR, "float32")
    blueprint, graph, _ = trace(RESIDUAL_MLP, LINEAR, "float32")
    assert blueprint_id == blueprint.blueprint_id
    assert urza.graph(blueprint_id) == graph
    assert urza.blueprint_status(blueprint_id)[0] is BlueprintStatus.UNVALIDATED
    await tezzeret.compile(blueprint_id)
    assert await tezzeret.submit(RESIDUAL_MLP, LINEAR, "float32") == blueprint_id
    assert published(bus, Topic.BLUEPRINT_SUBMITTED) == 1


async def test_what_cannot_be_traced_is_explained_in_one_line(
    tezzeret: Tezzeret, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="esper.tezzeret.forge")
    message = "sizes that vary: Could not guard on .*the rest is logged at DEBUG"
    with pytest.raises(BlueprintError, match=message) as caught:
        await tezzeret.submit(samples.design(samples.DataDependent), LINEAR, "float32")
    assert "\n" not in str(caught.value)
    [record] = [r for r in caplog.records if r.name == "esper.tezzeret.forge"]
    assert record.levelname == "DEBUG"
    assert "return act + 1 if act.sum() > 0 else act" in record.getMessage()


async def test_a_long_failure_to_compile_is_one_line_of_the_log_and_whole_in_the_library(
    tezzeret: Tezzeret,
    urza: Urza,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(header: Header, blobs: Blobs) -> tuple[Header, Blobs]:
        raise BlueprintError("no\nfor many\nreasons")

    blueprint_id = await tezzeret.submit(RESIDUAL_MLP, LINEAR, "float32")
    monkeypatch.setitem(child.HANDLERS, "package", fail)
    tezzeret._bus = None
    await tezzeret.run()
    assert urza.blueprint_status(blueprint_id)[1] == "no\nfor many\nreasons"
    [warning] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning == (
        f"blueprint {blueprint_id} was not compiled: no (the rest is logged at DEBUG)"
    )


async def test_compile_publishes_an_artifact_that_loads(
    tezzeret: Tezzeret, urza: Urza, bus: MemoryBus
) -> None:
    blueprint_id = await tezzeret.submit(RESIDUAL_MLP, LINEAR, "float32")
    artifact_id = await tezzeret.compile(blueprint_id)
    assert urza.blueprint_status(blueprint_id)[0] is BlueprintStatus.COMPILED
    assert published(bus, Topic.KERNEL_READY) == 1
    bundle = urza.fetch_kernel(artifact_id)
    kernel = Kernel.build(bundle.record.manifest, bundle.files)
    assert kernel.artifact_id == artifact_id == samples.artifact(RESIDUAL_MLP)[0].artifact_id


async def test_a_newer_torch_compiles_again(
    tezzeret: Tezzeret, urza: Urza, bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    blueprint_id = await tezzeret.submit(RESIDUAL_MLP, LINEAR, "float32")
    await tezzeret.compile(blueprint_id)
    monkeypatch.setattr(forge, "torch_release", lambda: "99.0")
    await tezzeret.submit(RESIDUAL_MLP, LINEAR, "float32")
    assert published(bus, Topic.BLUEPRINT_SUBMITTED) == 2
    await tezzeret.compile(blueprint_id)
    assert urza.blueprint_status(blueprint_id)[0] is BlueprintStatus.COMPILED


async def test_a_failure_is_invalid_and_logged(
    tezzeret: Tezzeret, urza: Urza, bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    blueprint_id = await tezzeret.submit(samples.design(samples.Fickle), LINEAR, "float32")
    monkeypatch.setenv("ESPER_TEST_WIDTH", "3")
    with pytest.raises(BlueprintError, match="'Fickle' has changed since it was submitted"):
        await tezzeret.compile(blueprint_id)
    status, log = urza.blueprint_status(blueprint_id)
    assert status is BlueprintStatus.INVALID
    assert "'down.weight' must be float32 (2, 8), got torch.float32 (3, 8)" in log
    assert published(bus, Topic.KERNEL_READY) == 0
    with pytest.raises(LibraryError, match="is INVALID; it cannot be compiled"):
        await tezzeret.compile(blueprint_id)


async def test_a_pipeline_that_is_not_there(
    tezzeret: Tezzeret, urza: Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    blueprint_id = await tezzeret.submit(RESIDUAL_MLP, LINEAR, "float32")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"pipeline STANDARD needs the compiler g\+\+"):
        await tezzeret.compile(blueprint_id, Pipeline.STANDARD)
    assert urza.blueprint_status(blueprint_id)[0] is BlueprintStatus.UNVALIDATED


async def test_says_why_a_simpler_pipeline_is_enough(
    tezzeret: Tezzeret, urza: Urza, caplog: pytest.LogCaptureFixture
) -> None:
    blueprint_id = await tezzeret.submit(RESIDUAL_MLP, LINEAR, "float32")
    fast = await tezzeret.compile(blueprint_id)
    with caplog.at_level("INFO"):
        assert await tezzeret.compile(blueprint_id, Pipeline.STANDARD) == fast
    remark = f"STANDARD points to kernel {fast} of FAST: all of its seeds compute as one"
    assert remark in urza.blueprint_status(blueprint_id)[1]
    assert remark in caplog.text


async def test_cancelling_gives_the_blueprint_back(tezzeret: Tezzeret, urza: Urza) -> None:
    blueprint_id = await tezzeret.submit(RESIDUAL_MLP, LINEAR, "float32")
    worker = tezzeret._worker
    assert isinstance(worker, InlineWorker)
    worker.gate.clear()
    worker.called.clear()
    compiling = asyncio.create_task(tezzeret.compile(blueprint_id))
    await worker.called.wait()
    assert urza.blueprint_status(blueprint_id)[0] is BlueprintStatus.COMPILING
    compiling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await compiling
    assert urza.blueprint_status(blueprint_id) == (BlueprintStatus.UNVALIDATED, "cancelled")


async def test_run_compiles_what_was_left_behind_and_what_is_announced(
    tezzeret: Tezzeret, urza: Urza, bus: MemoryBus, caplog: pytest.LogCaptureFixture
) -> None:
    lost = await tezzeret.submit(RESIDUAL_MLP, LINEAR, "float32")
    urza.set_blueprint_status(lost, BlueprintStatus.COMPILING)
    reserved = await tezzeret.submit(samples.design(samples.Reserved), LINEAR, "float32")
    running = asyncio.create_task(tezzeret.run())
    announced = await tezzeret.submit(blueprints.get("norm"), LINEAR, "float32")
    await bus.drained()
    bus.close()
    await running
    statuses = [urza.blueprint_status(i)[0] for i in (lost, reserved, announced)]
    assert statuses == [
        BlueprintStatus.COMPILED,
        BlueprintStatus.INVALID,
        BlueprintStatus.COMPILED,
    ]
    assert len(urza.kernels()) == 2
    assert f"blueprint {reserved} was not compiled" in caplog.text


async def test_run_without_a_bus_compiles_what_is_waiting(
    urza: Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forge, "WorkerProcess", InlineWorker)
    tezzeret = Tezzeret(urza)
    await tezzeret.submit(RESIDUAL_MLP, LINEAR, "float32")
    await tezzeret.run()
    assert len(urza.kernels()) == 1


async def test_real_child_traces_compiles_crashes_and_hangs(urza: Urza, tmp_path: Path) -> None:
    tezzeret = Tezzeret(urza)
    blueprint_id = await tezzeret.submit(RESIDUAL_MLP, LINEAR, "float32")
    artifact_id = await tezzeret.compile(blueprint_id)
    assert artifact_id == samples.artifact(RESIDUAL_MLP)[0].artifact_id
    with pytest.raises(BlueprintError, match=r"'aten\.relu_\.default' is not on the whitelist"):
        await tezzeret.submit(samples.design(samples.InPlace), LINEAR, "float32")
    with pytest.raises(WorkerError, match=r"'trace': the process ended.*exit status 3"):
        await tezzeret.submit(samples.design(samples.Crashing), LINEAR, "float32")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    hanging = Design(name="Hanging", builder="forge_samples:Hanging", hparams={"fifo": str(fifo)})
    submitting = asyncio.create_task(tezzeret.submit(hanging, LINEAR, "float32"))
    assert await asyncio.to_thread(fifo.read_text) == "reached"
    await tezzeret.close()
    with pytest.raises(WorkerError, match="'trace': the process ended"):
        await submitting
    assert len(urza.blueprints()) == 1
