"""What people do with models beside training them: compiling, checkpoints and leaving Esper."""

import tempfile
from typing import Any

import torch
from compat_cases import Case
from compat_runs import (
    LIBRARY,
    DoesNotApplyError,
    assert_close,
    assert_identical,
    first_line,
    germinate,
    grow,
    modes,
    run,
    tensors,
    wrapped,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parameter import is_lazy

import esper
from esper.contracts import GraftingStrategy, SeedState
from esper.kasmina.model import MorphableModel

_BACKEND = "aot_eager"  # dynamo and AOTAutograd, where breaks and recompiles happen; no code
_MID_RAMP = GraftingStrategy(training_steps=1, grafting_steps=4)


# ---------------------------------------------------------------------- torch.compile


def compiled(case: Case) -> None:
    """Dormant, it compiles to the graphs of the unwrapped model; grown, to what runs uncompiled."""
    fullgraph, num_graphs, theirs = _compiled_plain(case)
    model, counter = wrapped(case), CompileCounterWithBackend(_BACKEND)
    ours = _run_compiled(model, case, torch.compile(model, backend=counter, fullgraph=fullgraph))
    assert counter.frame_count <= num_graphs, f"{counter.frame_count} graphs, not {num_graphs}"
    assert_identical(ours[0], theirs[0], "outputs")
    assert_identical(ours[1], theirs[1], "gradients")
    if case.no_seeds is not None:
        return
    model = wrapped(case)
    grow(model, case)
    expected = run(model, case, training=case.trains)
    _reset_compiler()
    esper.compile(model, backend=_BACKEND, fullgraph=fullgraph)
    run(model, case, training=case.trains)  # uncompiled, if layers are there whose width is unknown
    ours = run(model, case, training=case.trains)
    assert sum(report.num_graphs for report in model.compile_report()) > 0
    assert_close(ours[0], expected[0], "outputs")
    assert_close(ours[1], expected[1], "gradients")


def _compiled_plain(case: Case) -> tuple[bool, int, tuple[list[Tensor], list[Tensor]]]:
    """Return whether the unwrapped model compiles as one graph, to how many, and its results."""
    reason = ""
    for fullgraph in (True, False):
        model, counter = case.build(), CompileCounterWithBackend(_BACKEND)
        call = torch.compile(model, backend=counter, fullgraph=fullgraph)
        try:
            results = _run_compiled(model, case, call)
        except Exception as error:
            reason = first_line(error)
        else:
            return fullgraph, counter.frame_count, results
    raise DoesNotApplyError(f"does not compile without Esper either: {reason}")


def _run_compiled(model: nn.Module, case: Case, call: Any) -> tuple[list[Tensor], list[Tensor]]:
    _reset_compiler()
    return run(model, case, training=case.trains, calling=lambda _: call)


def _reset_compiler() -> None:
    torch.compiler.reset()
    torch.compiler.set_stance("default")  # models of other checks may still be observed


# ---------------------------------------------------------------------- checkpoints


def saved_and_loaded(case: Case) -> None:
    """State dicts go to and fro while dormant; a run that was saved mid-ramp goes on bit for bit."""
    _assert_interchangeable(case)
    model = wrapped(case)
    optimizer = torch.optim.AdamW(_shaped(model, case).parameters(), lr=0.01)
    model.attach_optimizer(optimizer)
    if case.no_seeds is None:
        layer = germinate(model, case, _MID_RAMP)
        _learn(model, optimizer, case)
        assert 0 < layer.state_layout.value("alpha_blend", 0) < 1
    _learn(model, optimizer, case)
    with tempfile.TemporaryDirectory() as folder:
        esper.save(model, folder, optimizer)
        expected = _learn(model, optimizer, case)
        twin = _shaped(case.build(), case)
        again = torch.optim.AdamW(twin.parameters(), lr=0.01)
        esper.load(folder, twin, again, library=LIBRARY)
    assert isinstance(twin, MorphableModel)
    if case.no_seeds is None:
        assert twin.kasmina_layers[case.seeded].state(0) is SeedState.GRAFTING
    assert_identical(_learn(twin, again, case), expected, "numbers of the run")


def _assert_interchangeable(case: Case) -> None:
    """Weights go from the plain model into the wrapped one, and back into a plain one."""
    plain, model, back = (_shaped(net, case) for net in (case.build(), wrapped(case), case.build()))
    run(plain, case, training=case.trains)
    model.load_state_dict(plain.state_dict())
    back.load_state_dict(model.state_dict())
    for training in modes(case):
        theirs, *others = (run(m, case, training=training)[0] for m in (plain, model, back))
        for ours in others:
            assert_identical(ours, theirs, "outputs")


def _shaped(net: nn.Module, case: Case) -> nn.Module:
    """Let a forward give lazy modules the shapes that optimizers and state dicts need."""
    if any(is_lazy(tensor) for tensor in (*net.parameters(), *net.buffers())):
        with torch.no_grad():
            run(net, case, training=False)
    return net


def _learn(model: MorphableModel, optimizer: torch.optim.Optimizer, case: Case) -> list[Tensor]:
    """Train a step; return outputs, gradients and the state after it."""
    outputs, grads = run(model, case, training=case.trains)
    optimizer.step()
    model.step()
    return [*outputs, *grads, *(tensor.clone() for tensor in model.state_dict().values())]


# ---------------------------------------------------------------------- leaving


def exported(case: Case) -> None:
    """A fossilized model leaves as plain PyTorch that computes the same, also by torch.export."""
    model = wrapped(case)
    if case.no_seeds is None:
        layer = grow(model, case)
        layer.stabilize(0)
        layer.evaluate(0)
        layer.fossilize(0)
    expected = _evaluated(model, case)
    plain = esper.export(model)
    ours = [type(module) for module in plain.modules() if _is_ours(type(module))]
    assert not ours, f"classes of Esper: {ours}"
    assert_close(_evaluated(plain, case), expected, "outputs")
    if _program_of(case.build(), case, required=False) is not None:
        program = _program_of(plain, case, required=True)
        assert_close(_evaluated(program.module(), case), expected, "outputs of the program")


def _is_ours(cls: type) -> bool:
    return any(base.__module__.partition(".")[0] == "esper" for base in cls.__mro__)


def _evaluated(model: nn.Module, case: Case) -> list[Tensor]:
    args, kwargs = case.inputs()
    torch.manual_seed(1)
    with torch.no_grad():
        return tensors(model(*args, **kwargs))


def _program_of(model: nn.Module, case: Case, *, required: bool) -> Any:
    args, kwargs = case.inputs()
    try:
        return torch.export.export(model.eval(), args, kwargs, strict=False)
    except Exception:
        if required:
            raise
        return None
