"""The checks on one call of a kernel: pure decisions about raw results, cheapest first."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from esper.contracts import Check, KernelManifest
from esper.urabrask.inputs import Band, Case, Draw
from esper.urabrask.judge import (
    TOLERANCES,
    Triple,
    compare,
    first_difference,
    relative_norm,
)
from esper.urabrask.ledger import failed, passed
from esper.urabrask.oracle import Results
from esper.urabrask.questions import Held, Ran
from esper.urabrask.surroundings import TORCH_RANDOM

_PLAIN_TENSOR = "torch.Tensor"
_EXTREME_YARDSTICKS = 8.0  # where rounding decides which way an attention looks, or a pool
_AUTOCAST_YARDSTICKS = 4.0
_LEAK_BYTES = 16  # with each call
_LEAK_BLOCKS = 1.0


@dataclass(frozen=True)
class Trial:
    """One call: what the kernel was given, and what came back."""

    case: Case
    given: Draw
    state: Mapping[str, Tensor]  # parameters and buffers before the call
    ran: Ran
    results: Results

    @property
    def is_extreme(self) -> bool:
        """Whether even plain PyTorch may overflow, or divide by the number of samples."""
        return self.case.band is not Band.ORDINARY or self.case.batch_size == 0


def check_output(trial: Trial, manifest: KernelManifest) -> Check:
    out = trial.results.get("out")
    if trial.ran.out_type != _PLAIN_TENSOR or out is None:
        reason = f"the output is a {trial.ran.out_type}, expected a torch.Tensor"
        return failed("output", f"{reason} ({trial.case})")
    act = trial.given.act
    found = _described(out, trial.ran.out_device)
    expected = _described(act, manifest.device)
    if found != expected:
        return failed("output", f"the output is {found}, expected {expected} ({trial.case})")
    if _overlaps(out.shape, trial.ran.out_strides):
        reason = f"elements of the output share memory: {tuple(out.shape)} has strides"
        return failed("output", f"{reason} {trial.ran.out_strides} ({trial.case})")
    return passed(
        "output", "like act in shape, dtype, layout and device, each element in its place"
    )


def check_unmodified(trial: Trial, parameters: list[str]) -> Check:
    """Buffers may change in training; their values are then judged with the output's."""
    kept = parameters if trial.case.training else list(trial.state)
    before = {"after.inp": trial.given.inp, "after.act": trial.given.wide_act}
    before |= {f"after.state.{name}": trial.state[name] for name in kept}
    if name := first_difference(trial.results, before):
        what = name.removeprefix("after.").removeprefix("state.")
        return failed("unmodified", f"{what} was modified by the call ({trial.case})")
    return passed("unmodified", "inputs and parameters are left as they were")


def check_bounds(trial: Trial) -> Check:
    if overrun := trial.ran.overrun:
        names = ", ".join(name.removeprefix("state.") for name in overrun)
        return failed("bounds", f"memory beside {names} was written to ({trial.case})")
    return passed("bounds", "nothing beside inputs and parameters was written to")


def check_alias(trial: Trial) -> Check:
    if shared := trial.ran.out_shares_memory_with:
        names = ", ".join(name.removeprefix("state.") for name in shared)
        return failed("alias", f"the output shares its memory with {names} ({trial.case})")
    return passed("alias", "the output has memory of its own")


def check_surroundings(changed: Sequence[str], *, may_draw: bool, when: str) -> Check:
    """``may_draw``: a kernel that trains at random moves on PyTorch's random numbers."""
    found = [name for name in changed if not (may_draw and name == TORCH_RANDOM)]
    if found:
        return failed("surroundings", f"changed {', '.join(found)} ({when})")
    return passed("surroundings", "flags, random numbers, signal handlers and functions are kept")


def check_threads(before: int, now: int, when: str) -> Check:
    if now > before:
        return failed("threads", f"{now - before} threads are left running ({when})")
    return passed("threads", "no thread is left running")


def check_finite(trial: Trial, reference: Results, yardstick: Results) -> Check:
    """Demand finite results; where numbers are extreme, as far as plain PyTorch's are."""
    for name, expected in reference.items():
        finite = expected.isfinite()
        if trial.is_extreme:
            finite &= yardstick[name].double().isfinite()
        elif not finite.all():
            reason = f"{name} is not finite in float64 on ordinary inputs"
            return failed("finite", f"{reason} ({trial.case})")
        got = trial.results.get(name)
        if got is None or got.shape != expected.shape:
            continue
        # As double, since there are floating dtypes that isfinite does not know.
        if bad := int((~got.double().isfinite() & finite).sum()):
            reason = f"{bad} of {expected.numel()} elements of {name} are not finite"
            return failed("finite", f"{reason} ({trial.case})")
    return passed("finite", "outputs and gradients are finite")


def check_forward(
    trial: Trial, reference: Results, yardstick: Results, manifest: KernelManifest
) -> Check:
    """Judge the output and the buffers."""
    names = [name for name in reference if not name.startswith("grad.")]
    return _compare("forward", names, trial, reference, yardstick, manifest)


def check_gradients(
    trial: Trial, reference: Results, yardstick: Results, manifest: KernelManifest
) -> Check:
    """Judge the gradients of both inputs and of every parameter.

    One that autograd does not have counts as zero.
    """
    names = [name for name in reference if name.startswith("grad.")]
    missing = {n: torch.zeros_like(yardstick[n]) for n in names if n not in trial.results}
    for name in missing:
        if reference[name].any():
            return failed("gradients", f"{name} is missing ({trial.case})")
    whole = replace(trial, results=missing | trial.results)
    return _compare("gradients", names, whole, reference, yardstick, manifest)


def check_second_backward(trial: Trial, names: Sequence[str]) -> Check:
    """A second backward may be refused by a RuntimeError, as autograd does, or be right."""
    refusal = trial.ran.second_backward
    if refusal:
        return passed("second_backward", "refused")
    first = {f"again.{name}": trial.results[name] for name in names if name in trial.results}
    if name := first_difference(trial.results, first):
        reason = f"{name.removeprefix('again.')} is different in a second backward"
        return failed("second_backward", f"{reason} ({trial.case})")
    return passed("second_backward", "the same bits")


def check_autocast(trial: Trial, reference: Results, yardstick: Results) -> Check:
    """Judge the output under autocast to bfloat16 by what plain PyTorch makes of the graph there."""
    got, alike = trial.results.get("out"), yardstick["out"]
    dtypes = (alike.dtype, trial.given.act.dtype)
    if got is None or got.shape != alike.shape or got.dtype not in dtypes:
        found = "missing" if got is None else f"{got.dtype} {tuple(got.shape)}"
        reason = f"out is {found}, expected {alike.dtype} {tuple(alike.shape)}"
        return failed("autocast", f"{reason} ({trial.case})")
    error, own = (
        relative_norm(out.double() - reference["out"], reference["out"]) for out in (got, alike)
    )
    allowed = TOLERANCES["bfloat16"].norm + _AUTOCAST_YARDSTICKS * own
    if not error <= allowed:
        reason = f"out is off by {error:.1e} where {allowed:.1e} of its norm is allowed"
        return failed("autocast", f"{reason} ({trial.case})", autocast_error=error)
    return passed("autocast", "as plain PyTorch in bfloat16", autocast_error=error)


def check_same(check: str, trial: Trial, again: Results, names: Sequence[str], what: str) -> Check:
    """Compare two calls on the same tensors bit for bit; ``what`` was otherwise."""
    if name := first_difference(again, {name: trial.results[name] for name in names}):
        return failed(check, f"{name} is different {what} ({trial.case})")
    return passed(check, f"the same bits {what}")


def check_held(held: Sequence[Held], few: int, many: int) -> Check:
    """Look for memory that grows with every call.

    ``held`` are what the process held before, after ``few`` calls, after ``many`` more, after
    ``few`` more, and so on: what a question itself leaves behind does not depend on how many calls
    it asks for.
    """
    calls = many - few
    for name, least in (("allocated_bytes", _LEAK_BYTES), ("python_blocks", _LEAK_BLOCKS)):
        values: list[int] = [getattr(state, name) for state in held]
        growth = [after - before for before, after in pairwise(values)]
        excess = [of_many - of_few for of_few, of_many in _in_pairs(growth)]
        if min(excess) >= least * calls:
            reason = f"{name} grow by {min(excess) / calls:.1f} or more with each call"
            return failed("memory", reason, **{name: float(values[-1] - values[0])})
    return passed("memory", f"does not grow over {len(held) // 2 * (few + many)} calls")


def _in_pairs(values: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(values[::2], values[1::2], strict=True))


def _compare(
    check: str,
    names: list[str],
    trial: Trial,
    reference: Results,
    yardstick: Results,
    manifest: KernelManifest,
) -> Check:
    triples = []
    tolerance = TOLERANCES[manifest.dtype]
    if trial.is_extreme:
        tolerance = replace(tolerance, yardsticks=_EXTREME_YARDSTICKS, ceiling=math.inf)
    for name in names:
        got, alike = trial.results.get(name), yardstick[name]
        if got is None or (got.shape, got.dtype) != (alike.shape, alike.dtype):
            found = "missing" if got is None else f"{got.dtype} {tuple(got.shape)}"
            reason = f"{name} is {found}, expected {alike.dtype} {tuple(alike.shape)}"
            return failed(check, f"{reason} ({trial.case})")
        triples.append(Triple(name, *_where_finite(got, reference[name], alike)))
    return compare(check, str(trial.case), triples, tolerance)


def _where_finite(got: Tensor, reference: Tensor, yardstick: Tensor) -> tuple[Tensor, ...]:
    """Leave out what overflows in plain PyTorch too; all of ordinary results is finite."""
    finite = reference.isfinite() & yardstick.double().isfinite()
    return tuple(tensor[finite] for tensor in (got, reference, yardstick))


def _overlaps(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two elements may lie in one place, as in an expanded tensor."""
    reach = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size == 0:
            return False
        if size > 1 and stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def _described(tensor: Tensor, device: str) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {device}"
