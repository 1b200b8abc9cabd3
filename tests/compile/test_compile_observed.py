"""Observed steps run eagerly, compile nothing, and leave the process as it was."""

import gc

import torch
from compile_cases import asks_for_gradients, batch, live, net, wrapped
from kasmina_library import MemoryLibrary
from torch._dynamo.testing import CompileCounterWithBackend

import esper
from esper.kasmina.model import MorphableModel

pytestmark = asks_for_gradients


def observed(model: MorphableModel) -> list[int]:
    """Return the list to which each observed step is going to be appended."""
    steps: list[int] = []
    model.kasmina.emit_observation = lambda observation: steps.append(observation.step)
    return steps


def test_observed_steps_run_eagerly_and_compile_nothing(
    library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    model = wrapped(net(), library, observe_every=3)
    seen = observed(model)
    run = torch.compile(model, backend=counter, fullgraph=True)
    live(model, 12, run)
    assert len(seen) >= 2
    assert counter.frame_count == 1


def test_an_evaluation_before_an_observed_step_runs_eagerly_and_compiles_nothing(
    library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    model = wrapped(net(), library, observe_every=2)
    seen = observed(model)
    run = torch.compile(model, backend=counter, fullgraph=True)
    live(model, 2, run)
    assert model.kasmina.observing
    with torch.no_grad():
        run(batch())
    assert counter.frame_count == 1
    live(model, 6, run)
    assert seen
    assert counter.frame_count == 1
    model.kasmina.release()
    assert torch._dynamo.eval_frame._stance.stance == "default"


def stance() -> str:
    return str(torch._dynamo.eval_frame._stance.stance)


def test_models_that_are_observed_in_turn_leave_the_stance_as_it_was(
    library: MemoryLibrary,
) -> None:
    first, second = (wrapped(net(), library, observe_every=3) for _ in range(2))
    live(first, 3)
    live(second, 3)
    assert stance() == "force_eager"
    live(first, 1)
    assert stance() == "force_eager"
    live(second, 1)
    assert stance() == "default"


def test_a_model_that_is_forgotten_while_it_is_observed_does_not_keep_others_uncompiled(
    library: MemoryLibrary,
) -> None:
    model = wrapped(net(), library, observe_every=3)
    live(model, 3)
    assert stance() == "force_eager"
    del model
    gc.collect()
    assert stance() == "default"


def test_observed_steps_of_blocks_run_eagerly_and_compile_nothing(
    library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    model = wrapped(net(), library, observe_every=3)
    seen = observed(model)
    esper.compile(model, backend=counter, fullgraph=True)
    live(model, 12)
    assert len(seen) >= 2
    assert counter.frame_count == 1
