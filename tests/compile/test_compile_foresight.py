"""What may germinate next is compiled in the background before it does."""

import asyncio
from pathlib import Path

import pytest
import torch
from compile_cases import (
    FORMS,
    WHOLE_LIFE,
    Block,
    HeldCompiler,
    asks_for_gradients,
    compiled_in_background,
    germinate,
    live,
    wrapped,
)
from kasmina_library import MemoryLibrary
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import mse_loss

import esper
from esper import blueprints
from esper.config import SeedSettings
from esper.contracts import Design, KasminaControlCommand, SeedState, SiteSignature
from esper.kasmina.model import MorphableModel
from esper.tamiyo import ModelView

pytestmark = asks_for_gradients


@pytest.fixture
def compiled(
    model: MorphableModel,
    eager_counter: CompileCounterWithBackend,
    held: HeldCompiler,
    monkeypatch: pytest.MonkeyPatch,
) -> MorphableModel:
    """One whose child can be told of one kernel."""
    compiled_in_background(model, eager_counter, monkeypatch, ahead_limit=1)
    live(model, 2)
    return model


def test_a_germination_that_was_foreseen_never_runs_uncompiled(
    compiled: MorphableModel,
    library: MemoryLibrary,
    eager_counter: CompileCounterWithBackend,
    held: HeldCompiler,
) -> None:
    artifact_id = library.add()
    compiled.kasmina.foresee(("2.up", 1), artifact_id)
    for _ in range(FORMS):
        live(compiled, 1)
        held.finish()
    assert len(held.jobs) == FORMS
    assert all(len(graphs) == 1 for graphs, _ in held.jobs)
    assert eager_counter.frame_count == 1  # the copies were traced alone
    for name in ("2.up", "3.up"):  # equal blocks share what was foreseen of one
        germinate(compiled, name, 1, artifact_id)
        for _ in range(WHOLE_LIFE):
            live(compiled, 1)
            assert all(report.runs_compiled for report in compiled.compile_report())
        assert compiled.kasmina_layers[name].state(1) is SeedState.EVALUATING
    assert len(held.jobs) == FORMS
    assert eager_counter.frame_count == 1 + FORMS


def test_nothing_is_traced_while_the_child_is_at_work(
    compiled: MorphableModel, library: MemoryLibrary, held: HeldCompiler
) -> None:
    compiled.kasmina.foresee(("2.up", 0), library.add())
    live(compiled, 3)
    assert len(held.jobs) == 1
    assert [report.num_pending for report in compiled.compile_report()] == [1, FORMS, 1]
    held.finish()
    live(compiled, 1)
    assert len(held.jobs) == 2


def test_no_more_kernels_are_foreseen_than_the_limit_says(
    compiled: MorphableModel, library: MemoryLibrary, held: HeldCompiler
) -> None:
    artifact_id = library.add()
    for seed_id in (("2.up", 0), ("2.up", 1), ("2.down", 0), ("1.up", 0), ("2.up", 0)):
        compiled.kasmina.foresee(seed_id, artifact_id)
    for _ in range(3 * FORMS):
        live(compiled, 1)
        held.finish()
    assert len(held.jobs) == FORMS  # of seed 0 of "up", in either block


def test_a_block_that_has_grown_is_not_prepared_for_what_was_foreseen_of_a_dormant_one(
    compiled: MorphableModel, library: MemoryLibrary, held: HeldCompiler
) -> None:
    artifact_id = library.add()
    compiled.kasmina.foresee(("2.up", 0), artifact_id)
    assert asyncio.run(compiled.load_kernel("2.down", 0, artifact_id))
    live(compiled, 1)
    compiled.kasmina.foresee(("2.up", 0), artifact_id)
    for _ in range(3):
        live(compiled, 1)
        held.finish()
    assert len(held.jobs) == 2  # heard and learning, heard and frozen


def test_foresight_changes_neither_the_model_nor_its_random_numbers(
    compiled: MorphableModel, library: MemoryLibrary, held: HeldCompiler
) -> None:
    compiled.kasmina.foresee(("2.up", 0), library.add())
    before = [parameter.detach().clone() for parameter in compiled.parameters()]
    compiled.zero_grad()
    random = torch.get_rng_state()
    compiled(torch.ones(5, 8))
    assert len(held.jobs) == 1
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(before, compiled.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in compiled.parameters())


def test_a_kernel_that_cannot_be_loaded_is_not_foreseen(
    compiled: MorphableModel, caplog: pytest.LogCaptureFixture
) -> None:
    compiled.kasmina.foresee(("2.up", 0), "f" * 64)
    assert "kernel ffffffffffff is not compiled ahead" in caplog.text
    assert [report.num_pending for report in compiled.compile_report()] == [0, 0, 0]


class Unique(Block):
    """A block that cannot be copied."""

    def __deepcopy__(self, memo: dict[int, object]) -> nn.Module:
        raise TypeError("there is but one")


def test_a_block_that_cannot_be_copied_trains_on(
    library: MemoryLibrary,
    eager_counter: CompileCounterWithBackend,
    held: HeldCompiler,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = wrapped(nn.Sequential(Unique(), Unique()), library)
    compiled_in_background(model, eager_counter, monkeypatch)
    live(model, 2)
    model.kasmina.foresee(("1.up", 0), library.add())
    live(model, 3)
    assert caplog.text.count("block '1': what may germinate is not compiled ahead") == 1
    assert "there is but one" in caplog.text
    assert held.jobs == []


class Idle:
    """A policy that lets nothing germinate."""

    def decide(self, view: ModelView) -> list[KasminaControlCommand]:
        return []


def one_design(site: SiteSignature) -> list[Design]:
    return [blueprints.get("residual_mlp")]


def loss_per_sample(output: Tensor, target: Tensor) -> Tensor:
    return mse_loss(output, target, reduction="none").mean(1)


def test_a_pipeline_has_validated_kernels_compiled_before_anything_germinates(
    eager_counter: CompileCounterWithBackend,
    held: HeldCompiler,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    settings = SeedSettings(seeds_per_layer=1, observe_every=2, deterministic=True)
    model = esper.wrap(net, ["0"], settings=settings)
    compiled_in_background(model, eager_counter, monkeypatch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = [(torch.randn(8, 6), torch.randn(8, 2)) for _ in range(8)]
    pipeline = esper.Pipeline(model, tmp_path, designs=one_design, policy=Idle(), synchronous=True)
    with pipeline:
        tolaria = esper.Tolaria(model, optimizer, loss_per_sample, data, data, [pipeline])
        tolaria.fit(2)
        assert len(held.jobs) == 1
        held.finish()
        tolaria.fit(1)
    assert len(held.jobs) == 2
    assert model.kasmina.num_transitions == 0
