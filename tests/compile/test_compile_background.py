"""on_germination="background": what a child process compiles, and what runs meanwhile."""

import asyncio
from typing import Any

import pytest
import torch
from compile_cases import (
    FORMS,
    STRATEGY,
    WHOLE_LIFE,
    HeldCompiler,
    asks_for_gradients,
    batch,
    compiled_in_background,
    germinate,
    live,
    net,
    wrapped,
)
from kasmina_library import Irregular, MemoryLibrary
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import esper
from esper.contracts import SeedState
from esper.errors import EsperError, WorkerError
from esper.kasmina.compilation import catch_up
from esper.kasmina.model import MorphableModel

pytestmark = asks_for_gradients


@pytest.fixture
def compiled(
    model: MorphableModel,
    eager_counter: CompileCounterWithBackend,
    held: HeldCompiler,
    monkeypatch: pytest.MonkeyPatch,
) -> MorphableModel:
    """A model that has gone two steps since it was compiled."""
    compiled_in_background(model, eager_counter, monkeypatch)
    live(model, 2)
    return model


def test_a_grown_block_runs_uncompiled_until_the_child_has_compiled_it(
    compiled: MorphableModel,
    library: MemoryLibrary,
    eager_counter: CompileCounterWithBackend,
    held: HeldCompiler,
) -> None:
    assert eager_counter.frame_count == 1
    germinate(compiled, "2.up", 0, library.add())
    live(compiled, 2)
    assert compiled.kasmina_layers["2.up"].state(0) is SeedState.TRAINING
    assert eager_counter.frame_count == 1
    assert [r.runs_compiled for r in compiled.compile_report()] == [True, False, True]
    held.finish()
    live(compiled, 1)
    assert eager_counter.frame_count == 2
    assert [r.runs_compiled for r in compiled.compile_report()] == [True, True, True]


def test_the_forms_that_a_seed_will_take_are_compiled_while_it_trains(
    compiled: MorphableModel,
    library: MemoryLibrary,
    eager_counter: CompileCounterWithBackend,
    held: HeldCompiler,
) -> None:
    long = STRATEGY.model_copy(update={"training_steps": 5})
    compiled.kasmina_layers["2.up"].request_germination(0, library.add(), long)
    live(compiled, 5)
    assert compiled.kasmina_layers["2.up"].state(0) is SeedState.TRAINING
    assert len(held.jobs) == FORMS
    assert all(len(graphs) == 1 for graphs, _ in held.jobs)
    held.finish()
    live(compiled, WHOLE_LIFE)
    assert compiled.kasmina_layers["2.up"].state(0) is SeedState.EVALUATING
    assert len(held.jobs) == FORMS
    assert eager_counter.frame_count == 1 + FORMS
    germinate(compiled, "3.up", 0, library.add())
    live(compiled, WHOLE_LIFE)
    assert len(held.jobs) == FORMS
    assert eager_counter.frame_count == 1 + FORMS


def test_a_germination_compiled_ahead_in_the_background_never_runs_uncompiled(
    model: MorphableModel,
    library: MemoryLibrary,
    eager_counter: CompileCounterWithBackend,
    held: HeldCompiler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    artifact_id = library.add()
    compiled_in_background(model, eager_counter, monkeypatch, ahead=[artifact_id])
    live(model, 2)
    assert eager_counter.frame_count == 1  # the copies were traced alone
    held.finish()
    num_jobs = len(held.jobs)
    germinate(model, "2.down", 0, artifact_id)
    for _ in range(WHOLE_LIFE):
        live(model, 1)
        assert [r.runs_compiled for r in model.compile_report()] == [True, True, True]
    assert len(held.jobs) == num_jobs
    assert eager_counter.frame_count == 1 + FORMS


def test_evaluation_of_a_grown_block_is_compiled_in_the_background_too(
    compiled: MorphableModel,
    library: MemoryLibrary,
    eager_counter: CompileCounterWithBackend,
    held: HeldCompiler,
) -> None:
    germinate(compiled, "2.up", 0, library.add())
    live(compiled, WHOLE_LIFE)
    held.finish()
    live(compiled, 1)
    num_jobs, frames = len(held.jobs), eager_counter.frame_count
    inp = batch()
    with torch.no_grad():
        outs = [compiled(inp), compiled(inp)]
        assert len(held.jobs) == num_jobs + 1
        assert eager_counter.frame_count == frames + 1  # of the dormant blocks
        held.finish()
        outs.append(compiled(inp))
    assert eager_counter.frame_count == frames + 2
    torch.testing.assert_close(outs[0], outs[1])
    torch.testing.assert_close(outs[0], outs[2])


def test_a_life_in_the_background_is_an_eager_one(
    library: MemoryLibrary,
    eager_counter: CompileCounterWithBackend,
    held: HeldCompiler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    eager, model = wrapped(net(), library), wrapped(net(), library)
    compiled_in_background(model, eager_counter, monkeypatch)
    outs = []
    for which in (eager, model):
        torch.manual_seed(3)
        live(which, 2)
        germinate(which, "1.up", 1, library.add())
        germinate(which, "2.up", 0, library.add(Irregular))
        outs.append(live(which, 4))
        held.finish()
        outs[-1] += live(which, WHOLE_LIFE)
    torch.testing.assert_close(outs[0], outs[1])
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_cannot_be_compiled_in_the_background_runs_uncompiled_until_it_may_catch_up(
    compiled: MorphableModel,
    library: MemoryLibrary,
    eager_counter: CompileCounterWithBackend,
    held: HeldCompiler,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert asyncio.run(compiled.load_kernel("2.up", 0, library.add(), alpha=0.5))
    live(compiled, 2)
    held.finish(WorkerError("no compiler"))
    live(compiled, 3)
    assert caplog.text.count("could not be compiled in the background: no compiler") == 1
    assert eager_counter.frame_count == 1
    catch_up(compiled)
    live(compiled, 1)
    assert eager_counter.frame_count == 2


def test_a_variant_that_is_not_found_in_the_cache_is_warned_of(
    compiled: MorphableModel,
    library: MemoryLibrary,
    held: HeldCompiler,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert asyncio.run(compiled.load_kernel("2.up", 0, library.add(), alpha=0.5))
    live(compiled, 1)
    held.finish()

    def missed(*args: Any) -> Any:
        counters["inductor"]["fxgraph_cache_miss"] += 1
        return run(*args)

    blocks = compiled.kasmina.compiled_blocks[1].blocks
    run = blocks.run
    monkeypatch.setattr(blocks, "run", missed)
    live(compiled, 1)
    assert "block '2': what was compiled in the background was not found" in caplog.text


def test_without_inductors_cache_nothing_is_compiled_in_the_background(
    model: MorphableModel,
) -> None:
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        pytest.raises(EsperError, match="needs Inductor's cache on disk, which is turned off"),
    ):
        esper.compile(model, on_germination="background")
    assert model.compile_report() == []


def test_releasing_a_compiled_model_ends_the_child(
    model: MorphableModel,
    eager_counter: CompileCounterWithBackend,
    held: HeldCompiler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled_in_background(model, eager_counter, monkeypatch)
    esper.unwrap(model)
    assert held.closed
