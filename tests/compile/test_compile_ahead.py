"""Variants that are compiled ahead, and what runs uncompiled until it may catch up."""

import logging

import pytest
import torch
from compile_cases import WHOLE_LIFE, asks_for_gradients, batch, germinate, live
from kasmina_library import Doubled, MemoryLibrary
from torch._dynamo.testing import CompileCounterWithBackend

import esper
from esper.contracts import SeedState
from esper.kasmina.compilation import catch_up
from esper.kasmina.model import MorphableModel

pytestmark = asks_for_gradients


def test_a_germination_compiled_ahead_recompiles_nothing(
    model: MorphableModel, library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    artifacts = [library.add(), library.add(Doubled)]
    esper.compile(model, ahead=artifacts, backend=counter, fullgraph=True)
    before = [p.detach().clone() for p in model.parameters()]
    model(batch())
    random = torch.get_rng_state()
    model(torch.ones(5, 8))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    live(model, 2)
    frames = counter.frame_count
    germinate(model, "2.up", 0, artifacts[0])
    live(model, WHOLE_LIFE)
    germinate(model, "3.down", 0, artifacts[0])
    germinate(model, "1.up", 0, artifacts[1])
    live(model, WHOLE_LIFE)
    assert counter.frame_count == frames
    assert model.kasmina_layers["3.down"].state(0) is SeedState.EVALUATING
    assert [r.num_recompiles for r in model.compile_report()] == [0, 0, 0]


def test_what_is_not_compiled_ahead_runs_eagerly_until_it_may_catch_up(
    model: MorphableModel,
    library: MemoryLibrary,
    counter: CompileCounterWithBackend,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    esper.compile(model, on_germination="eager", backend=counter, fullgraph=True)
    assert "runs uncompiled until catch_up()" in caplog.text
    live(model, 2)
    assert counter.frame_count == 1
    germinate(model, "2.up", 0, library.add())
    live(model, WHOLE_LIFE)
    assert "block '2': runs uncompiled in its new form" in caplog.text
    assert "block '1'" not in caplog.text
    assert counter.frame_count == 1
    assert [r.runs_compiled for r in model.compile_report()] == [True, False, True]
    inp = batch()
    expected = model(inp)
    catch_up(model)
    torch.testing.assert_close(model(inp), expected)
    assert counter.frame_count == 2
    assert [r.runs_compiled for r in model.compile_report()] == [True, True, True]
