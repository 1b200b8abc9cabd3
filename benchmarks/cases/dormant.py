"""What do sleeping seeds cost? Wrapped models against the same ones unwrapped.

Each comparison has an A/A control: another unwrapped model, treated in just the same way.
"""

import functools
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.clocks import Work
from benchmarks.device_work import captured, device_work
from benchmarks.findings import UNWRAPPED, duration, exact, ratio
from benchmarks.gate import check_equal, check_identical
from benchmarks.harness import Plan, Times, Trial
from benchmarks.instructions import count
from benchmarks.kernels import Kernels
from benchmarks.models import (
    LINEAR,
    LINEAR_RELU,
    MANY_LINEARS,
    MLP,
    SUITE,
    Subject,
    copied,
    wrapped,
)
from benchmarks.modes import FORWARD_BACKWARD, MODES, Mode, forward
from benchmarks.rows import Baseline, Finding

WRAPPED = "wrapped"
CONTROL = "A/A"
CONTROL_MARGIN = 0.01
MAX_INSTRUCTIONS = 1.001
MAX_STEP_NS = 1_000
COUNTED = (LINEAR, LINEAR_RELU)  # callgrind would take minutes for the larger ones
COMPILED = (LINEAR, MLP)


def trials(plan: Plan, kernels: Kernels) -> list[Trial]:
    made = [eager(subject, mode, plan) for subject in SUITE for mode in MODES]
    made += [compiled(subject, mode, plan) for subject in compilable(plan) for mode in MODES]
    if plan.device.type == "cuda":
        made += [in_graph(subject, plan) for subject in SUITE]
    return made + [step(subject, plan) for subject in (MLP, MANY_LINEARS)]


def counts(plan: Plan) -> Iterator[Finding]:
    """Yield what is counted: device work on CUDA, instructions where valgrind works."""
    if plan.device.type == "cuda":
        for subject in SUITE:
            yield from extra_device_work(subject, plan)
    elif not plan.quick:
        yield from instructions_if_possible(plan)


def eager(subject: Subject, mode: Mode, plan: Plan) -> Trial:
    net, inp = subject.prepare(plan.device, plan.seed)
    return against_control(
        f"{subject.name}, {mode.name}",
        lambda variant: mode.work(make(variant, net, inp), inp),
        check=lambda: check(subject, plan),
        grad=mode.grad,
        length=2.0,
    )


def compilable(plan: Plan) -> Sequence[Subject]:
    """Return the models to compile; where there is no C++ compiler, say so in a line."""
    if plan.quick:
        return ()
    if plan.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        print("torch.compile is not measured: no C++ compiler is found", file=sys.stderr)
        return ()
    return COMPILED


def compiled(subject: Subject, mode: Mode, plan: Plan) -> Trial:
    """Compare compiled models. Copies of a model share what was compiled for the first one."""
    net, inp = subject.prepare(plan.device, plan.seed)
    # All variants run the same code, and more of them than dynamo would compile for it by default.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True

    def model(variant: str) -> nn.Module:
        return cast(nn.Module, torch.compile(make(variant, net, inp), fullgraph=True))

    name = f"{subject.name}, compiled, {mode.name}"
    return against_control(
        name,
        lambda variant: mode.work(model(variant), inp),
        check=lambda: check_identical(name, model(UNWRAPPED), model(WRAPPED), inp),
        grad=mode.grad,
    )


def in_graph(subject: Subject, plan: Plan) -> Trial:
    """Compare forwards that were captured in a CUDA graph."""
    net, inp = subject.prepare(plan.device, plan.seed)
    return against_control(
        f"{subject.name}, captured, forward",
        lambda variant: captured(forward(make(variant, net, inp), inp)).replay,
        check=lambda: check_captured(subject, plan),
    )


def make(variant: str, net: nn.Module, inp: Tensor) -> nn.Module:
    return wrapped(net, inp) if variant == WRAPPED else copied(net)


def check(subject: Subject, plan: Plan) -> None:
    net, inp = subject.prepare(plan.device, plan.seed)
    check_identical(subject.name, copied(net), wrapped(net, inp), inp)


def check_captured(subject: Subject, plan: Plan) -> None:
    """Compare what the graphs leave behind when they are replayed."""
    net, inp = subject.prepare(plan.device, plan.seed)
    outputs = []
    with torch.no_grad():
        for variant in (UNWRAPPED, WRAPPED):
            graph = captured(forward(make(variant, net, inp), inp))
            graph.replay()
            outputs.append({"output": graph.output})
    check_equal(f"{subject.name}, captured", *outputs)


def against_control(
    name: str,
    build: Callable[[str], Work],
    *,
    check: Callable[[], None],
    grad: bool = False,
    length: float = 1.0,
) -> Trial:
    """Return a trial of an unwrapped model, a wrapped one, and another unwrapped one."""

    def report(times: Times) -> Iterator[Finding]:
        dormant = ratio(times, WRAPPED, UNWRAPPED, name)
        control = ratio(times, CONTROL, UNWRAPPED, f"{name}, A/A")
        target = f"interval includes 1.00; <= A/A + {CONTROL_MARGIN}"
        yield dormant.model_copy(update={"target": target, "met": is_free(dormant, control)})
        yield control

    variants = (UNWRAPPED, WRAPPED, CONTROL)
    works = {variant: functools.partial(build, variant) for variant in variants}
    return Trial(name, works, check, report, grad, length)


def is_free(ratio: Finding, control: Finding) -> bool:
    """Say whether a ratio of times is that of two equal things."""
    return ratio.low <= 1 <= ratio.high and ratio.value <= control.value + CONTROL_MARGIN


def step(subject: Subject, plan: Plan) -> Trial:
    """Time ``model.step()`` with nothing due."""
    net, inp = subject.prepare(plan.device, plan.seed)
    model = functools.cache(lambda: wrapped(net, inp))

    def report(times: Times) -> Iterator[Finding]:
        seeds = sum(layer.num_seeds for layer in model().kasmina_layers.values())
        name = f"model.step(), nothing due, {seeds:,} seeds"
        yield duration(times, "step", name, at_most=MAX_STEP_NS)

    return Trial(
        name=f"model.step(), {subject.name}",
        works={"step": lambda: model().step},
        check=lambda: check(subject, plan),
        report=report,
        on_host=True,
    )


def extra_device_work(subject: Subject, plan: Plan) -> Iterator[Finding]:
    """Yield what a dormant model does on the device beyond an unwrapped one: nothing."""
    net, inp = subject.prepare(plan.device, plan.seed)
    plain, planted = (
        device_work(FORWARD_BACKWARD.work(make(variant, net, inp), inp))
        for variant in (UNWRAPPED, WRAPPED)
    )
    for what, expected in plain.items():
        row = f"{subject.name}, forward+backward, extra {what}"
        yield exact(row, what, planted[what] - expected, unit=what, at_most=0)


def instructions_if_possible(plan: Plan) -> list[Finding]:
    """Return the rows of :func:`instructions`; where valgrind does not work, say so in a line."""
    try:
        return list(instructions(plan))
    except OSError as error:
        print(f"instructions are not counted: {error}", file=sys.stderr)
        return []


def instructions(plan: Plan) -> Iterator[Finding]:
    """Yield the ratios of instructions in forward, wrapped to unwrapped, and their controls."""
    make_works = f"from {__name__} import countable\nworks = countable({plan.seed})"
    counted = iter(count(make_works, 3 * len(COUNTED)))
    for subject in COUNTED:
        plain, planted, again = next(counted), next(counted), next(counted)
        name, dormant = f"{subject.name}, forward, instructions", _ratios(planted, plain)
        met = min(dormant) <= MAX_INSTRUCTIONS
        target = f"<= {MAX_INSTRUCTIONS}"
        yield _instructions_row(dormant, plain, row=name, target=target, met=met)
        yield _instructions_row(_ratios(again, plain), plain, row=f"{name}, A/A")


def countable(seed: int) -> list[Work]:
    """Return forward of an unwrapped, a wrapped and another unwrapped model, for each subject."""
    works = []
    for subject in COUNTED:
        net, inp = subject.prepare(torch.device("cpu"), seed)
        net.requires_grad_(False)
        models = (copied(net), wrapped(net, inp), copied(net))
        works += [forward(model, inp) for model in models]
    return works


def _ratios(variant: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Relate counts to the baseline's fewest: what the interpreter does only once adds to them."""
    return [one / min(baseline) for one in variant]


def _instructions_row(ratios: Sequence[float], plain: Sequence[float], **fields: Any) -> Finding:
    return Finding(
        metric="instruction ratio",
        value=min(ratios),
        low=min(ratios),
        high=max(ratios),
        unit="x",
        baseline=Baseline(name=UNWRAPPED, value=min(plain), unit="instructions"),
        **fields,
    )
