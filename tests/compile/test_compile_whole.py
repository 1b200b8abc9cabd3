"""torch.compile on a wrapped model: the graphs of the unwrapped one, and few more once it grows."""

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from compile_cases import (
    FORMS,
    WHOLE_LIFE,
    Block,
    asks_for_gradients,
    batch,
    germinate,
    live,
    net,
    wrapped,
)
from kasmina_library import MemoryLibrary
from torch import Tensor, nn
from torch._dynamo.guards import CheckFunctionManager
from torch._dynamo.testing import CompileCounterWithBackend

from esper.contracts import SeedState
from esper.kasmina.model import MorphableModel

pytestmark = asks_for_gradients


def test_a_dormant_model_compiles_to_the_graph_of_the_unwrapped_one(
    library: MemoryLibrary,
) -> None:
    plain, model = net(), wrapped(net(), library)
    explained = [torch._dynamo.explain(m)(batch()) for m in (plain, model)]
    assert [e.graph_count for e in explained] == [1, 1]
    assert [e.graph_break_count for e in explained] == [0, 0]
    assert explained[0].op_count == explained[1].op_count


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), net])
def test_a_dormant_model_is_guarded_by_as_much_as_the_unwrapped_one(
    make: Callable[[], nn.Module], library: MemoryLibrary
) -> None:
    checks: list[int] = []

    def count(manager: Any, *args: Any, **kwargs: Any) -> None:
        original(manager, *args, **kwargs)
        checks.append(len(str(manager.guard_manager).splitlines()))

    original = CheckFunctionManager.__init__
    with mock.patch.object(CheckFunctionManager, "__init__", count):
        for model in (make(), wrapped(make(), library)):
            model(batch())  # shows the layers their widths
            torch.compiler.reset()
            torch.compile(model, backend="eager", fullgraph=True)(batch())
    assert len(checks) == 2
    assert checks[0] == checks[1]


def test_a_dormant_model_compiles_once_and_computes_what_the_unwrapped_one_does(
    library: MemoryLibrary,
) -> None:
    plain, model = net(), wrapped(net(), library)
    counter = CompileCounterWithBackend("inductor")
    run = torch.compile(model, backend=counter, fullgraph=True)
    for inp in (batch(), batch(), batch()):
        torch.testing.assert_close(run(inp), plain(inp))
        model.step()
    assert counter.frame_count == 1


def test_a_model_compiles_itself_as_one_block(
    model: MorphableModel, counter: CompileCounterWithBackend
) -> None:
    model.compile(backend=counter, fullgraph=True)
    live(model, 3)
    assert [report.name for report in model.compile_report()] == [""]
    assert model.kasmina_layers["1.act"].shapes is not None
    assert counter.frame_count == 1


def test_a_function_that_calls_the_model_compiles_to_one_graph(
    model: MorphableModel, counter: CompileCounterWithBackend
) -> None:
    @torch.compile(backend=counter, fullgraph=True)
    def doubled(inp: Tensor) -> Tensor:
        out: Tensor = model(inp) * 2
        return out

    live(model, 3, doubled)
    assert counter.frame_count == 1


def test_a_whole_model_recompiles_once_per_form_and_never_for_alpha_or_culling(
    model: MorphableModel, library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    run = torch.compile(model, backend=counter, fullgraph=True)
    live(model, 2, run)
    germinate(model, "1.up", 0, library.add())
    live(model, WHOLE_LIFE, run)
    assert model.kasmina_layers["1.up"].state(0) is SeedState.EVALUATING
    assert counter.frame_count == 1 + FORMS
    model.kasmina_layers["1.up"].cull(0, "test")
    live(model, 3, run)
    germinate(model, "1.up", 0, library.add())
    live(model, WHOLE_LIFE, run)
    model.kasmina_layers["1.up"].keep(0, "test")
    live(model, 5, run)
    assert model.kasmina_layers["1.up"].state(0) is SeedState.FOSSILIZED
    assert counter.frame_count == 1 + FORMS


def test_a_copy_of_a_grown_model_compiles(
    model: MorphableModel, library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    model(batch())
    germinate(model, "1.up", 0, library.add())
    live(model, 4)
    twin = copy.deepcopy(model)
    inp = batch()
    run = torch.compile(twin, backend=counter, fullgraph=True)
    torch.testing.assert_close(run(inp), model(inp))
    assert counter.frame_count == 1


@pytest.mark.parametrize("of_torch", [True, False])
def test_a_germination_that_may_reach_dynamos_limit_is_warned_of(
    of_torch: bool, library: MemoryLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    host, name = (nn.Sequential(Block()), "0.up") if of_torch else (Block(), "up")
    model = wrapped(host, library)
    run = torch.compile(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=6):
        live(model, 2, run)
        germinate(model, name, 0, library.add())
        live(model, WHOLE_LIFE, run)
        assert "by default" not in caplog.text
        germinate(model, name, 1, library.add())
    assert "seed 1 on" in caplog.text
    assert "torch.compile has 4 variants of the model and by default makes no more than 6" in (
        caplog.text
    )


def test_a_model_that_is_not_compiled_is_not_warned_of_dynamos_limit(
    model: MorphableModel, library: MemoryLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        germinate(model, "1.up", 0, library.add())
    assert "by default" not in caplog.text
