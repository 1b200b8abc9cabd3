"""torch.compile and esper.compile: what is compiled, how often, and that it computes the same."""

import asyncio
import copy
import gc
import itertools
import json
import logging
import pickle
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from kasmina_library import Doubled, Irregular, MemoryLibrary, Residual
from torch import Tensor, nn
from torch._dynamo.guards import CheckFunctionManager
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.fx import symbolic_trace

import esper
from esper.config import SeedSettings
from esper.contracts import GraftingStrategy, RampCurve, SeedState
from esper.errors import EsperError, WorkerError
from esper.kasmina import compilation
from esper.kasmina.compilation import catch_up
from esper.kasmina.model import MorphableModel
from esper.kasmina.traced import UnportableGraphError, read_graph, write_graph
from esper.worker import Header

# Dynamo asks a block's input, which is no leaf, for its gradient; it hides the warning, but not
# from filters that make an error of it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

S = SeedState
STRATEGY = GraftingStrategy(
    training_steps=2,
    grafting_steps=4,
    stabilization_steps=2,
    fine_tuning_steps=2,
    curve=RampCurve.LINEAR,
)
WHOLE_LIFE = 10  # steps from germination to EVALUATING, and one more
FORMS = 3  # isolated, heard and learning, heard and frozen
NEVER = 10**6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.act = nn.Tanh()
        self.down = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.act(self.up(x)))
        return out


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), Block(), Block(), Block(), nn.Linear(8, 2))


def wrapped(host: nn.Module, library: MemoryLibrary, observe_every: int = NEVER) -> MorphableModel:
    settings = SeedSettings(
        seeds_per_layer=2, deterministic=True, embargo_steps=1, observe_every=observe_every
    )
    model = esper.wrap(host, settings=settings)
    model.connect(library)
    model.attach_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    return model


@pytest.fixture
def library() -> MemoryLibrary:
    return MemoryLibrary()


@pytest.fixture
def model(library: MemoryLibrary) -> MorphableModel:
    return wrapped(net(), library)


@pytest.fixture
def counter() -> CompileCounterWithBackend:
    return CompileCounterWithBackend("aot_eager")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    gc.collect()  # models of other tests that were left while they were observed
    torch.compiler.reset()
    torch.compiler.set_stance("default")
    counters.clear()
    yield
    assert not counters["graph_break"]


def batch() -> Tensor:
    return torch.randn(5, 8)


def step(model: MorphableModel, run: Any = None) -> Tensor:
    """Take one step of SGD, through ``run`` where the model is compiled from outside."""
    model.zero_grad()
    out: Tensor = (model if run is None else run)(batch())
    out.square().mean().backward()
    [attachment] = model.kasmina.enrollment.attachments
    attachment.optimizer.step()
    model.step()
    return out.detach()


def germinate(model: MorphableModel, name: str, seed_idx: int, artifact_id: str) -> None:
    model.kasmina_layers[name].request_germination(seed_idx, artifact_id, STRATEGY)


def live(model: MorphableModel, steps: int, run: Any = None) -> list[Tensor]:
    return [step(model, run) for _ in range(steps)]


# ---------------------------------------------------------------------- torch.compile


def test_a_dormant_model_compiles_to_the_graph_of_the_unwrapped_one(
    library: MemoryLibrary,
) -> None:
    plain, model = net(), wrapped(net(), library)
    explained = [torch._dynamo.explain(m)(batch()) for m in (plain, model)]
    assert [e.graph_count for e in explained] == [1, 1]
    assert [e.graph_break_count for e in explained] == [0, 0]
    assert explained[0].op_count == explained[1].op_count


def test_a_dormant_layer_is_guarded_by_as_much_as_the_unwrapped_one(
    library: MemoryLibrary,
) -> None:
    checks: list[int] = []

    def count(manager: Any, *args: Any, **kwargs: Any) -> None:
        original(manager, *args, **kwargs)
        checks.append(len(str(manager.guard_manager).splitlines()))

    original = CheckFunctionManager.__init__
    with mock.patch.object(CheckFunctionManager, "__init__", count):
        for model in (nn.Linear(8, 8), wrapped(nn.Linear(8, 8), library)):
            torch.compiler.reset()
            torch.compile(model, backend="eager", fullgraph=True)(batch())
    assert len(checks) == 2
    assert checks[0] == checks[1]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_dormant_model_compiles_once_and_computes_what_the_unwrapped_one_does(
    backend: str, library: MemoryLibrary
) -> None:
    plain, model = net(), wrapped(net(), library)
    counter = CompileCounterWithBackend(backend)
    run = torch.compile(model, backend=counter, fullgraph=True)
    for inp in (batch(), batch(), batch()):
        torch.testing.assert_close(run(inp), plain(inp))
        model.step()
    assert counter.frame_count == 1


def test_layers_of_unknown_width_see_the_first_forward_of_a_compiled_model(
    library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    model = wrapped(net(), library)
    assert model.kasmina_layers["1.act"].shapes is None
    run = torch.compile(model, backend=counter, fullgraph=True)
    random = torch.get_rng_state()
    run(torch.ones(5, 8))
    assert torch.equal(torch.get_rng_state(), random)
    assert model.kasmina_layers["1.act"].site(0).act_shape == (None, 4)
    run(batch())
    assert counter.frame_count == 1


def test_a_model_that_fake_tensors_cannot_run_compiles_all_the_same(
    library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    class Real(Block):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling() and torch._guards.detect_fake_mode(x):
                raise TypeError("no fake")
            return super().forward(x)

    plain = Real()
    model = wrapped(copy.deepcopy(plain), library, observe_every=3)
    run = torch.compile(model, backend=counter, fullgraph=True)
    inp = batch()
    torch.testing.assert_close(run(inp), plain(inp))
    assert model.kasmina_layers["act"].shapes is None
    live(model, 8, run)
    assert model.kasmina_layers["act"].shapes is not None
    assert counter.frame_count == 1


def test_observed_steps_run_eagerly_and_compile_nothing(
    library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    model = wrapped(net(), library, observe_every=3)
    seen: list[int] = []
    model.kasmina.emit_observation = lambda observation: seen.append(observation.step)
    run = torch.compile(model, backend=counter, fullgraph=True)
    live(model, 12, run)
    assert len(seen) >= 2
    assert counter.frame_count == 1


def test_an_evaluation_before_an_observed_step_runs_eagerly_and_compiles_nothing(
    library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    model = wrapped(net(), library, observe_every=2)
    seen: list[int] = []
    model.kasmina.emit_observation = lambda observation: seen.append(observation.step)
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


def test_a_lazy_layer_is_shaped_by_the_first_forward_of_a_compiled_model(
    library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    plain = nn.Sequential(nn.LazyLinear(4), nn.Tanh())
    model = esper.wrap(copy.deepcopy(plain), settings=SeedSettings(seeds_per_layer=2))
    results = []
    for module in (plain, model):
        torch.manual_seed(3)
        results.append(torch.compile(module, backend=counter, fullgraph=True)(batch()))
    assert model[0].weight.device.type == "cpu"
    assert torch.equal(*results)
    assert counter.frame_count == 2


def test_a_model_that_has_grown_already_is_compiled_in_the_same_blocks(
    library: MemoryLibrary,
) -> None:
    model = wrapped(net(), library)
    dormant = esper.compile(copy.deepcopy(model), backend="eager")
    for name in ("1.up", "2.up"):
        germinate(model, name, 0, library.add())
    live(model, 1)
    esper.compile(model, backend="eager")
    names = [[report.name for report in m.compile_report()] for m in (dormant, model)]
    assert names[0] == names[1] == ["1", "2", "3"]


def test_observed_steps_of_blocks_run_eagerly_and_compile_nothing(
    library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    model = wrapped(net(), library, observe_every=3)
    seen: list[int] = []
    model.kasmina.emit_observation = lambda observation: seen.append(observation.step)
    esper.compile(model, backend=counter, fullgraph=True)
    live(model, 12)
    assert len(seen) >= 2
    assert counter.frame_count == 1


def test_a_whole_model_recompiles_once_per_form_and_never_for_alpha_or_culling(
    model: MorphableModel, library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    run = torch.compile(model, backend=counter, fullgraph=True)
    live(model, 2, run)
    germinate(model, "1.up", 0, library.add())
    live(model, WHOLE_LIFE, run)
    assert model.kasmina_layers["1.up"].state(0) is S.EVALUATING
    assert counter.frame_count == 1 + FORMS
    model.kasmina_layers["1.up"].cull(0, "test")
    live(model, 3, run)
    germinate(model, "1.up", 0, library.add())
    live(model, WHOLE_LIFE, run)
    model.kasmina_layers["1.up"].keep(0, "test")
    live(model, 5, run)
    assert model.kasmina_layers["1.up"].state(0) is S.FOSSILIZED
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


# ---------------------------------------------------------------------- esper.compile


def test_blocks_are_the_largest_repeated_modules_else_parts_else_the_model(
    library: MemoryLibrary,
) -> None:
    encoder = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False)
    perceptron = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    stages = nn.Sequential(
        nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 2), nn.Tanh())
    )
    for host, names in [
        (net(), ["1", "2", "3"]),
        (encoder, ["layers.0", "layers.1"]),
        (perceptron, [""]),
        (stages, ["0", "1"]),
        (nn.Linear(8, 8), [""]),
    ]:
        model = esper.compile(wrapped(host, library), backend="eager")
        assert [report.name for report in model.compile_report()] == names


def test_named_blocks_alone_are_compiled(
    model: MorphableModel, counter: CompileCounterWithBackend
) -> None:
    esper.compile(model, blocks=["2"], backend=counter, fullgraph=True)
    live(model, 3)
    [report] = model.compile_report()
    assert (report.name, report.class_name, report.num_graphs) == ("2", "Block", 1)
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


def test_equal_blocks_share_one_graph_and_a_germination_recompiles_its_block_alone(
    model: MorphableModel, library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    esper.compile(model, backend=counter, fullgraph=True)
    live(model, 3)
    assert counter.frame_count == 1
    germinate(model, "2.up", 0, library.add())
    live(model, WHOLE_LIFE)
    assert [r.num_recompiles for r in model.compile_report()] == [0, FORMS, 0]
    assert model.compile_report()[1].stall_s > 0
    germinate(model, "3.up", 0, library.add())
    live(model, WHOLE_LIFE)
    assert counter.frame_count == 1 + FORMS


def test_every_new_form_compiles_once(model: MorphableModel, library: MemoryLibrary) -> None:
    counter = CompileCounterWithBackend("eager")  # many graphs, which are only counted
    esper.compile(model, backend=counter, fullgraph=True)
    live(model, 2)
    frames = [counter.frame_count]
    for name, seed_idx, builder in [
        ("1.up", 0, Residual),
        ("1.up", 1, Residual),
        ("2.up", 0, Irregular),
        ("3.down", 0, Residual),
        ("3.act", 1, Residual),
    ]:
        layer = model.kasmina_layers[name]
        germinate(model, name, seed_idx, library.add(builder, layer.site(seed_idx)))
        live(model, WHOLE_LIFE)
        assert layer.state(seed_idx) is S.EVALUATING
        frames.append(counter.frame_count)
    assert [b - a for a, b in itertools.pairwise(frames)] == [FORMS] * 5
    for name, layer in model.kasmina_layers.items():
        for seed_idx in (0, 1):
            if layer.state(seed_idx) is S.EVALUATING:
                assert layer.kernel(seed_idx) is not None, name
                layer.cull(seed_idx, "test")
    live(model, 3)
    assert counter.frame_count == frames[-1]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("blockwise", [False, True])
def test_a_compiled_life_is_an_eager_one(
    backend: str, blockwise: bool, library: MemoryLibrary
) -> None:
    eager, model = wrapped(net(), library), wrapped(net(), library)
    run = None
    if blockwise:
        esper.compile(model, backend=backend, fullgraph=True)
    else:
        run = torch.compile(model, backend=backend, fullgraph=True)
    outs = []
    for which, through in ((eager, None), (model, run)):
        torch.manual_seed(3)
        live(which, 2, through)
        germinate(which, "1.up", 1, library.add())
        germinate(which, "2.up", 0, library.add(Irregular))
        outs.append(live(which, WHOLE_LIFE + 1, through))
        with torch.no_grad():
            outs[-1].append((which if through is None else through)(torch.ones(5, 8)))
    torch.testing.assert_close(outs[0], outs[1])
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiled_isolation_does_not_reach_the_host(library: MemoryLibrary) -> None:
    plain, model = wrapped(net(), library), wrapped(net(), library)
    for which in (plain, model):
        esper.compile(which, backend="aot_eager", fullgraph=True)
    outs = []
    for which in (plain, model):
        torch.manual_seed(3)
        live(which, 2)
        if which is model:
            germinate(which, "1.up", 0, library.add())
        outs.append(live(which, 2))
    assert model.kasmina_layers["1.up"].state(0) is S.TRAINING
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    [seat] = model.kasmina.isolated_seats()
    assert all(weight.grad is not None for weight in seat.kernel.weights())


def test_dropout_in_isolation_compiles(
    model: MorphableModel, library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    esper.compile(model, backend=counter, fullgraph=True)
    live(model, 2)
    germinate(model, "1.up", 0, library.add(Residual, dropout=0.5))
    live(model, 2)
    assert model.kasmina_layers["1.up"].state(0) is S.TRAINING
    assert counter.frame_count == 2


def test_faults_are_counted_in_compiled_code(
    model: MorphableModel, library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    esper.compile(model, backend=counter, fullgraph=True)
    live(model, 2)
    assert asyncio.run(model.load_kernel("1.up", 0, library.add(), alpha=0.5))
    kernel = model.kasmina_layers["1.up"].kernel(0)
    assert kernel is not None
    with torch.no_grad():
        kernel.weights()[-1].fill_(float("nan"))
    assert all(out.isfinite().all() for out in live(model, 6))
    assert model.kasmina_layers["1.up"].state(0) in (S.CULLED, S.DORMANT)


# ---------------------------------------------------------------------- ahead


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_germination_compiled_ahead_recompiles_nothing(
    backend: str, model: MorphableModel, library: MemoryLibrary
) -> None:
    artifacts = [library.add(), library.add(Doubled)]
    counter = CompileCounterWithBackend(backend)
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
    assert model.kasmina_layers["3.down"].state(0) is S.EVALUATING
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


def test_a_stall_is_said(
    model: MorphableModel, library: MemoryLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    esper.compile(model, backend="eager", fullgraph=True)
    live(model, 2)
    assert "stalled" not in caplog.text
    germinate(model, "2.up", 0, library.add())
    live(model, 2)
    assert "block '2': compiled another variant; this step stalled for" in caplog.text


# ---------------------------------------------------------------------- in the background


class HeldCompiler:
    """Stands for the child process: a job is done once the test says so."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Sequence[Header], Future[None]]] = []
        self.closed = False

    def submit(self, graphs: Sequence[Header]) -> "Future[None]":
        json.dumps(graphs)
        self.jobs.append((graphs, Future()))
        return self.jobs[-1][1]

    def finish(self, error: Exception | None = None) -> None:
        for _, job in self.jobs:
            if not job.done():
                job.set_result(None) if error is None else job.set_exception(error)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> HeldCompiler:
    compiler = HeldCompiler()
    monkeypatch.setattr(compilation, "BackgroundCompiler", lambda: compiler)
    return compiler


@pytest.fixture
def eager_counter() -> CompileCounterWithBackend:
    return CompileCounterWithBackend("eager")  # many graphs, which are only counted


def compiled_in_background(
    model: MorphableModel,
    counter: CompileCounterWithBackend,
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> None:
    monkeypatch.setattr(compilation, "BACKENDS_ON_DISK", {counter})
    esper.compile(model, on_germination="background", backend=counter, fullgraph=True, **options)


def test_a_grown_block_runs_uncompiled_until_the_child_has_compiled_it(
    model: MorphableModel,
    library: MemoryLibrary,
    eager_counter: CompileCounterWithBackend,
    held: HeldCompiler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled_in_background(model, eager_counter, monkeypatch)
    live(model, 2)
    assert eager_counter.frame_count == 1
    germinate(model, "2.up", 0, library.add())
    live(model, 2)
    assert model.kasmina_layers["2.up"].state(0) is S.TRAINING
    assert eager_counter.frame_count == 1
    assert [r.runs_compiled for r in model.compile_report()] == [True, False, True]
    held.finish()
    live(model, 1)
    assert eager_counter.frame_count == 2
    assert [r.runs_compiled for r in model.compile_report()] == [True, True, True]


def test_the_forms_that_a_seed_will_take_are_compiled_while_it_trains(
    model: MorphableModel,
    library: MemoryLibrary,
    eager_counter: CompileCounterWithBackend,
    held: HeldCompiler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled_in_background(model, eager_counter, monkeypatch)
    live(model, 2)
    long = STRATEGY.model_copy(update={"training_steps": 5})
    model.kasmina_layers["2.up"].request_germination(0, library.add(), long)
    live(model, 5)
    assert model.kasmina_layers["2.up"].state(0) is S.TRAINING
    assert len(held.jobs) == FORMS
    assert all(len(graphs) == 1 for graphs, _ in held.jobs)
    held.finish()
    live(model, WHOLE_LIFE)
    assert model.kasmina_layers["2.up"].state(0) is S.EVALUATING
    assert len(held.jobs) == FORMS
    assert eager_counter.frame_count == 1 + FORMS
    germinate(model, "3.up", 0, library.add())
    live(model, WHOLE_LIFE)
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
    model: MorphableModel,
    library: MemoryLibrary,
    eager_counter: CompileCounterWithBackend,
    held: HeldCompiler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled_in_background(model, eager_counter, monkeypatch)
    live(model, 2)
    germinate(model, "2.up", 0, library.add())
    live(model, WHOLE_LIFE)
    held.finish()
    live(model, 1)
    num_jobs, frames = len(held.jobs), eager_counter.frame_count
    inp = batch()
    with torch.no_grad():
        outs = [model(inp), model(inp)]
        assert (len(held.jobs), eager_counter.frame_count) == (
            num_jobs + 1,
            frames + 1,
        )  # and dormant
        held.finish()
        outs.append(model(inp))
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
    model: MorphableModel,
    library: MemoryLibrary,
    eager_counter: CompileCounterWithBackend,
    held: HeldCompiler,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiled_in_background(model, eager_counter, monkeypatch)
    live(model, 2)
    assert asyncio.run(model.load_kernel("2.up", 0, library.add(), alpha=0.5))
    live(model, 2)
    held.finish(WorkerError("no compiler"))
    live(model, 3)
    assert caplog.text.count("could not be compiled in the background: no compiler") == 1
    assert eager_counter.frame_count == 1
    catch_up(model)
    live(model, 1)
    assert eager_counter.frame_count == 2


def test_a_variant_that_is_not_found_in_the_cache_is_warned_of(
    model: MorphableModel,
    library: MemoryLibrary,
    eager_counter: CompileCounterWithBackend,
    held: HeldCompiler,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiled_in_background(model, eager_counter, monkeypatch)
    live(model, 2)
    assert asyncio.run(model.load_kernel("2.up", 0, library.add(), alpha=0.5))
    live(model, 1)
    held.finish()

    def missed(*args: Any) -> Any:
        counters["inductor"]["fxgraph_cache_miss"] += 1
        return run(*args)

    blocks = model.kasmina.compiled_blocks[1].blocks
    run = blocks.run
    monkeypatch.setattr(blocks, "run", missed)
    live(model, 1)
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


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def plus_one_i(x: Tensor) -> Tensor:
    return x + 1j


def test_a_graph_with_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(UnportableGraphError, match="it holds modules or tensors of its own"):
        write_graph(symbolic_trace(Holder()))
    with pytest.raises(UnportableGraphError, match="an argument is a complex"):
        write_graph(symbolic_trace(plus_one_i))


def test_a_graph_that_was_sent_computes_the_same() -> None:
    def compute(x: Tensor) -> Tensor:
        parts = torch.stack([x[..., 1:], x[:, None, 0].expand(-1, 3)])
        filled = parts.masked_fill(parts > 0, float("-inf")).to(torch.float64)
        return torch.nn.functional.softmax(filled[:, 0], dim=-1, dtype=torch.float32)

    graph = symbolic_trace(compute)
    again = read_graph(json.loads(json.dumps(write_graph(graph))))
    inp = torch.arange(-10.0, 10.0).reshape(5, 4)
    torch.testing.assert_close(again(inp), compute(inp), rtol=0, atol=0, equal_nan=True)
    assert [node.name for node in again.graph.nodes] == [node.name for node in graph.graph.nodes]


def test_releasing_a_compiled_model_ends_the_child(
    model: MorphableModel,
    eager_counter: CompileCounterWithBackend,
    held: HeldCompiler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled_in_background(model, eager_counter, monkeypatch)
    esper.unwrap(model)
    assert held.closed


@pytest.mark.timeout(300)  # seven compilations by Inductor
def test_the_trainer_finds_what_a_child_process_has_compiled(
    library: MemoryLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    small = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    model = wrapped(small, library)
    esper.compile(model, blocks=[""], on_germination="background", fullgraph=True)
    batches = itertools.cycle([torch.randn(size, 8) for size in (5, 7)])  # of a symbolic size

    def train() -> None:
        model(next(batches)).square().mean().backward()
        model.step()

    for _ in range(3):
        train()
    assert asyncio.run(model.load_kernel("0", 0, library.add(), alpha=0.5))
    deadline_s = time.monotonic() + 240
    misses = counters["inductor"]["fxgraph_cache_miss"]
    train()
    while not model.compile_report()[0].runs_compiled and time.monotonic() < deadline_s:
        train()
    [report] = model.compile_report()
    assert (report.runs_compiled, report.num_recompiles) == (True, 2)
    assert counters["inductor"]["fxgraph_cache_miss"] == misses
    assert counters["inductor"]["fxgraph_cache_hit"] >= 2  # forward and backward
    esper.unwrap(model, discard_kernels=True)


# ---------------------------------------------------------------------- the limit


def test_the_limit_is_warned_of_before_it_is_reached(
    model: MorphableModel, library: MemoryLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    esper.compile(model, recompile_limit=5, backend="eager")
    live(model, 2)
    germinate(model, "1.up", 0, library.add())
    live(model, 4)
    assert "compiled variants" not in caplog.text
    live(model, WHOLE_LIFE)
    assert "block '1': Block has 4 compiled variants, and torch.compile makes no more than 5" in (
        caplog.text
    )
    assert "hit config.recompile_limit" not in caplog.text


def test_more_variants_than_dynamo_allows_by_default_are_compiled(
    model: MorphableModel, library: MemoryLibrary
) -> None:
    counter = CompileCounterWithBackend("eager")  # many graphs, which are only counted
    esper.compile(model, backend=counter, fullgraph=True)
    live(model, 2)
    with torch._dynamo.config.patch(recompile_limit=8):  # the default; torch's own tests raise it
        for name in ("1.up", "2.down", "3.act"):
            layer = model.kasmina_layers[name]
            germinate(model, name, 0, library.add(Residual, layer.site(0)))
            live(model, WHOLE_LIFE)
    assert counter.frame_count == 1 + 3 * FORMS > 8


# ---------------------------------------------------------------------- traps


def encoder_layer() -> nn.TransformerEncoderLayer:
    torch.manual_seed(2)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


@pytest.mark.parametrize("blockwise", [False, True])
def test_an_active_seed_is_heard_by_a_compiled_encoder_layer_in_eval_mode(
    blockwise: bool, library: MemoryLibrary
) -> None:
    host = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False).eval()
    model = wrapped(host, library)
    inp = torch.randn(2, 3, 8)
    run: Any = model
    if blockwise:
        esper.compile(model, backend="aot_eager", fullgraph=True)
    else:
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        dormant = model(inp)
        torch.testing.assert_close(run(inp), dormant)
        site = model.kasmina_layers["layers.0.linear1"].site(0)
        assert asyncio.run(
            model.load_kernel("layers.0.linear1", 0, library.add(Residual, site), alpha=1.0)
        )
        grown = run(inp)
        assert not torch.allclose(grown, dormant)
        torch.compiler.set_stance("force_eager")
        expected = model(inp)
        torch.compiler.set_stance("default")
    torch.testing.assert_close(grown, expected)


def test_the_output_projection_of_attention_carries_no_seeds(library: MemoryLibrary) -> None:
    model = esper.compile(wrapped(encoder_layer(), library), backend="aot_eager", fullgraph=True)
    assert not any(name.endswith("out_proj") for name in model.kasmina_layers)
    inp = torch.randn(2, 3, 8)
    model(inp)
    torch.testing.assert_close(model(inp), encoder_layer()(inp))


def test_tools_that_look_at_exact_types_see_the_host_type_once_a_seed_is_culled(
    model: MorphableModel, library: MemoryLibrary
) -> None:
    esper.compile(model, backend="aot_eager", fullgraph=True)
    live(model, 2)
    assert type(model[1].up) is nn.Linear
    germinate(model, "1.up", 0, library.add())
    live(model, 2)
    assert type(model[1].up) is not nn.Linear
    assert isinstance(model[1].up, nn.Linear)
    model.kasmina_layers["1.up"].cull(0, "test")
    assert type(model[1].up) is nn.Linear


# ---------------------------------------------------------------------- the model stays one


def test_a_copy_and_a_pickle_of_a_compiled_model_are_not_compiled(model: MorphableModel) -> None:
    esper.compile(model, blocks=["", "2"], backend="aot_eager", fullgraph=True)
    live(model, 2)
    inp = batch()
    twin = copy.deepcopy(model)
    assert twin.compile_report() == []
    torch.testing.assert_close(twin(inp), model(inp))
    with torch.no_grad():
        model[0].weight.zero_()
    assert not torch.allclose(twin(inp), model(inp))
    restored = pickle.loads(pickle.dumps(twin))
    torch.testing.assert_close(restored(inp), twin(inp))
    pickle.dumps(model)


def test_an_unwrapped_model_is_uncompiled(
    model: MorphableModel, counter: CompileCounterWithBackend
) -> None:
    esper.compile(model, backend=counter, fullgraph=True)
    plain = esper.unwrap(model)
    assert all("_compiled_call_impl" not in module.__dict__ for module in plain.modules())
    plain(batch())
    plain(batch())
    assert counter.frame_count == 0


def test_state_dict_keys_are_those_of_the_unwrapped_model(model: MorphableModel) -> None:
    esper.compile(model, backend="aot_eager")
    live(model, 2)
    assert list(model.state_dict()) == list(net().state_dict())


def test_bad_arguments_are_refused_and_change_nothing(
    model: MorphableModel, library: MemoryLibrary
) -> None:
    with pytest.raises(TypeError, match="expects a wrapped model, got Sequential"):
        esper.compile(net())
    for options, message in [
        ({"blocks": ["9"]}, "block '9' is no module of Sequential"),
        ({"blocks": []}, "blocks must name at least one module"),
        (
            {"on_germination": "wait"},
            "on_germination must be 'stall', 'eager' or 'background', got 'wait'",
        ),
        ({"recompile_limit": 1}, "recompile_limit must be at least 2, got 1"),
        (
            {"on_germination": "background", "backend": "eager"},
            "on_germination='background' needs backend='inductor', got backend='eager'",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            esper.compile(model, **options)
    for options, message in [
        ({"blocks": "1"}, "blocks must be a list of names, got '1'"),
        ({"ahead": "f"}, "ahead must be a list of artifact ids, got 'f'"),
    ]:
        with pytest.raises(TypeError, match=message):
            esper.compile(model, **options)
    with pytest.raises(EsperError, match="ahead needs a library"):
        esper.compile(esper.wrap(net()), ahead=["f" * 64])
    assert model.compile_report() == []
    esper.compile(model, backend="eager")
    with pytest.raises(EsperError, match="is compiled already"):
        esper.compile(model)
