"""What holds of a model under Esper, one check a column: the tests assert it, the report prints it.

A check raises ``AssertionError`` where Esper breaks its word, and :class:`DoesNotApplyError` with a
reason where the question makes no sense for the case. To add a column, write a check and name it
in ``CHECKS``.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from compat_cases import Case
from compat_runs import (
    Caller,
    DoesNotApplyError,
    assert_identical,
    first_line,
    grow,
    kernel_of,
    loss_of,
    modes,
    plainly,
    run,
    wrapped,
)
from compat_tools import compiled, exported, saved_and_loaded
from torch import nn

from esper.contracts import SeedState
from esper.kasmina.layer import KasminaLayer

_PROOF_STEPS = 3
FAILED = "FAILED"


def dormant_identical(case: Case) -> None:
    """Outputs with dormant seeds are bit-identical, watched or not, and so is the state dict."""
    plain, model = case.build(), wrapped(case)
    for training in modes(case):
        for _ in range(_PROOF_STEPS):  # the second and third are observed, or end an observation
            ours, theirs = (run(m, case, training=training)[0] for m in (model, plain))
            assert_identical(ours, theirs, "outputs")
            model.step()
    with torch.no_grad():
        ours, theirs = (run(m, case, training=False)[0] for m in (model, plain))
    assert_identical(ours, theirs, "outputs without gradients")
    state, expected = model.state_dict(), plain.state_dict()
    assert [*state] == [*expected]
    assert_identical([*state.values()], [*expected.values()], "entries of the state dict")


def dormant_gradients(case: Case) -> None:
    """Gradients of parameters and inputs with dormant seeds are bit-identical."""
    plain, model = case.build(), wrapped(case)
    for training in modes(case):
        for _ in range(_PROOF_STEPS):
            ours, theirs = (run(m, case, training=training)[1] for m in (model, plain))
            assert_identical(ours, theirs, "gradients")
            model.step()


def active(case: Case) -> None:
    """A kernel changes the output, learns with its host in an optimizer, and stays finite."""
    _assert_speaks(case, plainly)


def culled(case: Case) -> None:
    """After culling, the model is bit-identical to one that never had a seed."""
    plain, model = case.build(), wrapped(case)
    layer = grow(model, case)
    with torch.no_grad():
        run(plain, case, training=False)  # lazy modules are shaped by the first forward
    layer.cull(0, "check")
    assert not any("esper" in name for name in model.state_dict())
    plain.load_state_dict(model.state_dict())
    for training in modes(case):
        for ours, theirs in zip(
            run(model, case, training=training), run(plain, case, training=training), strict=True
        ):
            assert_identical(ours, theirs, "outputs and gradients")
    assert type(layer.default_transform) is type(plain.get_submodule(layer.name))


def autocast(case: Case) -> None:
    """Under autocast to bfloat16: bit-identical while dormant; a kernel speaks and learns."""
    plain, model = case.build(), wrapped(case)
    for training in modes(case):
        try:
            theirs = run(plain, case, training=training, calling=_in_bfloat16)
        except Exception as error:
            reason = f"does not run under autocast without Esper either: {first_line(error)}"
            raise DoesNotApplyError(reason) from error
        ours = run(model, case, training=training, calling=_in_bfloat16)
        assert_identical(ours[0], theirs[0], "outputs")
        assert_identical(ours[1], theirs[1], "gradients")
        model.step()
    if case.no_seeds is None:
        _assert_speaks(case, _in_bfloat16)


def _in_bfloat16(model: nn.Module) -> Callable[..., Any]:
    return torch.autocast("cpu", torch.bfloat16)(model.__call__)  # type: ignore[no-any-return]


def _assert_speaks(case: Case, calling: Caller) -> None:
    model = wrapped(case)
    layer = grow(model, case)
    _check_host_is_finite(case, calling)
    weights = kernel_of(layer).weights()
    before = [weight.detach().clone() for weight in weights]
    losses = []
    for _ in range(_PROOF_STEPS):
        outputs, grads = run(model, case, training=case.trains, calling=calling)
        assert all(t.isfinite().all() for t in grads), "a gradient is not finite"
        losses.append(loss_of(outputs))
        _descend(weights)
        model.step()
    assert all(loss.isfinite() for loss in losses), f"losses {losses}"
    for weight, old in zip(weights, before, strict=True):
        if weight.dim() > 1:  # a batch norm behind takes away what a bias adds
            assert not torch.equal(weight, old), f"the kernel's {tuple(weight.shape)} did not learn"
    assert layer.state(0) is SeedState.GRAFTING, layer.quarantine_reason(0)
    _assert_heard(model, layer, case, calling)


def _assert_heard(model: nn.Module, layer: KasminaLayer, case: Case, calling: Caller) -> None:
    """The kernel reaches the model's output."""
    with torch.no_grad():
        heard, _ = run(model, case, training=False, calling=calling)
        with layer.silenced(0):
            unheard, _ = run(model, case, training=False, calling=calling)
    assert any(not torch.equal(a, b) for a, b in zip(heard, unheard, strict=True)), "no effect"


def _check_host_is_finite(case: Case, calling: Caller) -> None:
    _, grads = run(case.build(), case, training=case.trains, calling=calling)
    if not all(grad.isfinite().all() for grad in grads):
        raise DoesNotApplyError("the host's own gradients are not finite")


def _descend(weights: tuple[nn.Parameter, ...]) -> None:
    with torch.no_grad():
        for weight in weights:
            assert weight.grad is not None, "a kernel's weight has no gradient"
            weight.sub_(weight.grad, alpha=0.1)


# ---------------------------------------------------------------------- the columns


@dataclass(frozen=True)
class Check:
    """A column: what is run on a case, and on how many of a module type's cases."""

    run: Callable[[Case], None]
    every_case: bool = False  # otherwise the first one that it applies to is enough


CHECKS = {
    "dormant identical": Check(dormant_identical, every_case=True),
    "gradients": Check(dormant_gradients, every_case=True),
    "active": Check(active),
    "culled": Check(culled),
    "compile": Check(compiled),
    "autocast": Check(autocast),
    "save/load": Check(saved_and_loaded),
    "export": Check(exported),
}


def verdict(check: Check, cases: Iterable[Case]) -> str:
    """Return "yes", or "no: " or "FAILED: " with the reason."""
    found = ""
    for case in cases:
        try:
            check.run(case)
        except DoesNotApplyError as reason:
            found = found or f"no: {reason}"
        except Exception as failure:
            return f"{FAILED}: {case.name}: {type(failure).__name__}: {failure}"
        else:
            found = "yes"
            if not check.every_case:
                break
    return found
