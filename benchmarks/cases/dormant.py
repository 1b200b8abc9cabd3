"""What do sleeping seeds cost? Wrapped models against the same ones unwrapped.

Each comparison has an A/A control: two unwrapped models, treated in just the same way.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.clocks import ThreadClock, Work, clock_for
from benchmarks.gate import check_identical
from benchmarks.harness import Comparison, Contest, Estimate, Plan, compare, measure
from benchmarks.instructions import count
from benchmarks.models import (
    LINEAR,
    LINEAR_RELU,
    MANY_LINEARS,
    MLP,
    SUITE,
    Subject,
    unwrapped,
    wrapped,
)
from benchmarks.rows import Baseline, Context, Row
from esper import MorphableModel

CONTROL_MARGIN = 0.01
MAX_INSTRUCTIONS = 1.001
MAX_STEP_NS = 1_000
COUNTED = (LINEAR, LINEAR_RELU)  # callgrind would take minutes for the larger ones

MakeRow = Callable[..., Row]  # Row with case and context filled in


@dataclass(frozen=True)
class Mode:
    """A way to use a model. ``work`` makes the call that is timed."""

    name: str
    grad: bool
    work: Callable[[nn.Module, Tensor], Work]


def forward(model: nn.Module, inp: Tensor) -> Work:
    return functools.partial(model.eval(), inp)


def forward_backward(model: nn.Module, inp: Tensor) -> Work:
    """Gradients accumulate, which is the same work in every call."""
    cotangent = torch.ones_like(model.train()(inp))
    return lambda: model(inp).backward(cotangent)


MODES = (Mode("forward", False, forward), Mode("forward+backward", True, forward_backward))


def run(plan: Plan, context: Context) -> list[Row]:
    """Check all models, then measure them.

    Raises :class:`benchmarks.gate.WrongResultError` if a wrapped model computes something else.
    """
    for subject in (*SUITE, LINEAR_RELU):
        check(subject, plan.device, plan.seed)
    make_row = functools.partial(Row, case="dormant", context=context)
    rng = np.random.default_rng(plan.seed)
    rows = [
        row
        for subject in SUITE
        for mode in MODES
        for row in times(subject, mode, plan, rng, make_row)
    ]
    rows += [step(subject, plan, rng, make_row) for subject in (MLP, MANY_LINEARS)]
    if plan.count_instructions:
        rows += instructions_if_possible(plan, make_row)
    return rows


def check(subject: Subject, device: torch.device, seed: int) -> None:
    net, inp = subject.prepare(device, seed)
    check_identical(subject.name, unwrapped(net), wrapped(net, inp), inp)


def times(
    subject: Subject, mode: Mode, plan: Plan, rng: np.random.Generator, make_row: MakeRow
) -> Iterator[Row]:
    """Yield the ratio of times, wrapped to unwrapped, and its control."""
    net, inp = subject.prepare(plan.device, plan.seed)

    def plain() -> Work:
        return mode.work(unwrapped(net), inp)

    def planted() -> Work:
        return mode.work(wrapped(net, inp), inp)

    contests = {"wrapped": Contest(plain, planted), "control": Contest(plain, plain)}
    with torch.set_grad_enabled(mode.grad):
        results = compare(contests, clock_for(plan.device), plan, rng)
    name, dormant, control = f"{subject.name}, {mode.name}", results["wrapped"], results["control"]
    target = f"interval includes 1.00; <= A/A + {CONTROL_MARGIN}"
    met = is_free(dormant.ratio, control.ratio)
    yield _time_row(make_row, dormant, row=name, target=target, met=met)
    yield _time_row(make_row, control, row=f"{name}, A/A")


def is_free(ratio: Estimate, control: Estimate) -> bool:
    """Say whether a ratio of times is that of two equal things."""
    return ratio.low <= 1 <= ratio.high and ratio.value <= control.value + CONTROL_MARGIN


def step(subject: Subject, plan: Plan, rng: np.random.Generator, make_row: MakeRow) -> Row:
    """Return the time of ``model.step()`` with nothing due, on the host whatever the device."""
    model = wrapped(*subject.prepare(plan.device, plan.seed))
    assert isinstance(model, MorphableModel)
    time_ns = measure(model.step, ThreadClock(), plan, rng)
    seeds = sum(layer.num_seeds for layer in model.kasmina_layers.values())
    return make_row(
        row=f"model.step(), nothing due, {seeds:,} seeds",
        metric="time",
        **asdict(time_ns),
        unit="ns",
        target=f"<= {MAX_STEP_NS:,} ns",
        met=time_ns.value <= MAX_STEP_NS,
    )


def instructions_if_possible(plan: Plan, make_row: MakeRow) -> list[Row]:
    """Return the rows of :func:`instructions`; where valgrind does not work, say so in a line."""
    try:
        return list(instructions(plan, make_row))
    except OSError as error:
        print(f"instructions are not counted: {error}", file=sys.stderr)
        return []


def instructions(plan: Plan, make_row: MakeRow) -> Iterator[Row]:
    """Yield the ratios of instructions in forward, wrapped to unwrapped, and their controls."""
    make_works = f"from {__name__} import countable\nworks = countable({plan.seed})"
    counts = iter(count(make_works, 3 * len(COUNTED)))
    for subject in COUNTED:
        plain, planted, again = next(counts), next(counts), next(counts)
        name, dormant = f"{subject.name}, forward", _ratios(planted, plain)
        met = min(dormant) <= MAX_INSTRUCTIONS
        target = f"<= {MAX_INSTRUCTIONS}"
        yield _instructions_row(make_row, dormant, plain, row=name, target=target, met=met)
        yield _instructions_row(make_row, _ratios(again, plain), plain, row=f"{name}, A/A")


def countable(seed: int) -> list[Work]:
    """Return forward of an unwrapped, a wrapped and another unwrapped model, for each subject."""
    works = []
    for subject in COUNTED:
        net, inp = subject.prepare(torch.device("cpu"), seed)
        net.requires_grad_(False)
        models = (unwrapped(net), wrapped(net, inp), unwrapped(net))
        works += [forward(model, inp) for model in models]
    return works


def _ratios(variant: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Relate counts to the baseline's fewest: what the interpreter does only once adds to them."""
    return [one / min(baseline) for one in variant]


def _time_row(make_row: MakeRow, comparison: Comparison, **fields: Any) -> Row:
    return make_row(
        metric="time ratio",
        **asdict(comparison.ratio),
        unit="x",
        baseline=Baseline(name="unwrapped", value=comparison.baseline_ns, unit="ns"),
        **fields,
    )


def _instructions_row(
    make_row: MakeRow, ratios: Sequence[float], plain: Sequence[float], **fields: Any
) -> Row:
    return make_row(
        metric="instruction ratio",
        value=min(ratios),
        low=min(ratios),
        high=max(ratios),
        unit="x",
        baseline=Baseline(name="unwrapped", value=min(plain), unit="instructions"),
        **fields,
    )
