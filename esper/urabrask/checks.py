"""The checks on one call of a kernel: pure decisions about raw results, cheapest first."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from esper.contracts import Check, KernelManifest
from esper.urabrask.candidate import Ran
from esper.urabrask.inputs import Case, Draw
from esper.urabrask.judge import TOLERANCES, Triple, compare, first_difference
from esper.urabrask.ledger import failed, passed
from esper.urabrask.oracle import Results

_PLAIN_TENSOR = "torch.Tensor"


@dataclass(frozen=True)
class Trial:
    """One call: what the kernel was given, and what came back."""

    case: Case
    given: Draw
    state: Mapping[str, Tensor]  # parameters and buffers before the call
    ran: Ran
    results: Results


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
    return passed("output", "the output is like act in shape, dtype and device")


def check_unmodified(trial: Trial, parameters: list[str]) -> Check:
    """Buffers may change in training; their values are then judged with the output's."""
    kept = parameters if trial.case.training else list(trial.state)
    before = {"after.inp": trial.given.inp, "after.act": trial.given.wide_act}
    before |= {f"after.state.{name}": trial.state[name] for name in kept}
    if name := first_difference(trial.results, before):
        what = name.removeprefix("after.").removeprefix("state.")
        return failed("unmodified", f"{what} was modified by the call ({trial.case})")
    return passed("unmodified", "inputs and parameters are left as they were")


def check_alias(trial: Trial) -> Check:
    if shared := trial.ran.out_shares_memory_with:
        names = ", ".join(name.removeprefix("state.") for name in shared)
        return failed("alias", f"the output shares its memory with {names} ({trial.case})")
    return passed("alias", "the output has memory of its own")


def check_finite(trial: Trial, reference: Results) -> Check:
    for name, expected in reference.items():
        if not expected.isfinite().all():
            reason = f"{name} is not finite in float64 on ordinary inputs"
            return failed("finite", f"{reason} ({trial.case})")
        got = trial.results.get(name)
        # As double, since there are floating dtypes that isfinite does not know.
        if got is not None and (bad := int((~got.double().isfinite()).sum())):
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


def check_repeated(trial: Trial, again: Results, names: list[str]) -> Check:
    """Compare two calls on the same tensors; the kernel was called otherwise in between."""
    if name := first_difference(again, {name: trial.results[name] for name in names}):
        return failed("deterministic", f"{name} is different when run again ({trial.case})")
    return passed("deterministic", "the same bits when run again")


def _compare(
    check: str,
    names: list[str],
    trial: Trial,
    reference: Results,
    yardstick: Results,
    manifest: KernelManifest,
) -> Check:
    triples = []
    for name in names:
        got, alike = trial.results.get(name), yardstick[name]
        if got is None or (got.shape, got.dtype) != (alike.shape, alike.dtype):
            found = "missing" if got is None else f"{got.dtype} {tuple(got.shape)}"
            reason = f"{name} is {found}, expected {alike.dtype} {tuple(alike.shape)}"
            return failed(check, f"{reason} ({trial.case})")
        triples.append(Triple(name, got, reference[name], alike))
    return compare(check, str(trial.case), triples, TOLERANCES[manifest.dtype])


def _described(tensor: Tensor, device: str) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {device}"
