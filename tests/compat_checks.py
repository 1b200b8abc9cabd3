"""What holds of a model under Esper, one check a column: the tests assert it, the report prints it.

A check raises ``AssertionError`` where Esper breaks its word, and :class:`DoesNotApplyError` with a
reason where the question makes no sense for the case. To add a column, write a check and name it
in ``CHECKS``.
"""

import asyncio
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from compat_cases import Case
from kasmina_library import MemoryLibrary
from torch import Tensor, nn

import esper
from esper.blueprints.low_rank import LowRank
from esper.config import SeedSettings
from esper.contracts import SeedState
from esper.kasmina.model import MorphableModel
from esper.kasmina.site_types import site_type

_SETTINGS = SeedSettings(seeds_per_layer=2, observe_every=2)
_PROOF_STEPS = 3
FAILED = "FAILED"
_LIBRARY = MemoryLibrary()


class DoesNotApplyError(Exception):
    """The check says nothing about this case; the message is the reason."""


def wrapped(case: Case) -> MorphableModel:
    """Build the case's model with seeds on every layer that can carry them."""
    model = case.build()
    sites = [name for name, module in model.named_modules() if name and site_type(module)]
    return esper.wrap(model, sites, settings=_SETTINGS)


# ---------------------------------------------------------------------- what a model does


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a model's output, whatever containers hold them."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):  # the outputs of transformers are ordered dicts as well
        return tensors([getattr(value, f.name) for f in dataclasses.fields(value)])
    if isinstance(value, Mapping):
        return tensors([*value.values()])
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def run(model: nn.Module, case: Case, *, training: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Return outputs and gradients (of inputs and parameters) of one forward and backward."""
    model.train(training)
    torch.manual_seed(1)
    args, kwargs = case.inputs()
    model.zero_grad()
    outputs = tensors(model(*args, **kwargs))
    differentiable = [out for out in outputs if out.requires_grad]
    if differentiable:
        loss_of(differentiable).backward()
    leaves = [*tensors((args, kwargs)), *model.parameters()]
    grads = [leaf.grad for leaf in leaves if leaf.is_leaf and leaf.grad is not None]
    return [out.detach() for out in outputs], [grad.clone() for grad in grads]


def loss_of(outputs: list[Tensor]) -> Tensor:
    """Return the distance from an arbitrary target: of what a norm gives, the square is constant."""
    floating = [out.float() for out in outputs if out.is_floating_point()]
    targets = [torch.linspace(-1, 1, out.numel()).reshape(out.shape) for out in floating]
    losses = (nn.functional.mse_loss(out, to) for out, to in zip(floating, targets, strict=True))
    return sum(losses, torch.zeros(()))


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """Return what makes a tensor bit-identical to another: also the signs of zeros and NaN."""
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    flat = dense.contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tensor.shape, flat.numpy().tobytes()


def assert_identical(ours: list[Tensor], theirs: list[Tensor], what: str) -> None:
    assert len(ours) == len(theirs), f"{len(ours)} {what}, expected {len(theirs)}"
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert bits(one) == bits(other), f"{what} {index} of {tuple(other.shape)} differ"


def _modes(case: Case) -> list[bool]:
    return [True, False] if case.trains else [False]


# ---------------------------------------------------------------------- the columns


def dormant_identical(case: Case) -> None:
    """Outputs with dormant seeds are bit-identical, watched or not, and so is the state dict."""
    plain, model = case.build(), wrapped(case)
    for training in _modes(case):
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
    for training in _modes(case):
        for _ in range(_PROOF_STEPS):
            ours, theirs = (run(m, case, training=training)[1] for m in (model, plain))
            assert_identical(ours, theirs, "gradients")
            model.step()


def active(case: Case) -> None:
    """A kernel changes the output, learns with its host in an optimizer, and stays finite."""
    model = wrapped(case)
    layer_name = grow(model, case)
    layer = model.kasmina_layers[layer_name]
    kernel = layer.kernel(0)
    assert kernel is not None
    _check_host_is_finite(case)
    before = [weight.detach().clone() for weight in kernel.weights()]
    losses = []
    for _ in range(_PROOF_STEPS):
        outputs, grads = run(model, case, training=case.trains)
        assert all(t.isfinite().all() for t in grads), "a gradient is not finite"
        losses.append(loss_of(outputs))
        _descend([*kernel.weights()])
        model.step()
    assert all(loss.isfinite() for loss in losses), f"losses {losses}"
    for weight, old in zip(kernel.weights(), before, strict=True):
        if weight.dim() > 1:  # a batch norm behind takes away what a bias adds
            assert not torch.equal(weight, old), f"the kernel's {tuple(weight.shape)} did not learn"
    assert layer.state(0) is SeedState.GRAFTING, layer.quarantine_reason(0)
    assert_heard(model, layer_name, case)


def culled(case: Case) -> None:
    """After culling, the model is bit-identical to one that never had a seed."""
    plain, model = case.build(), wrapped(case)
    layer_name = grow(model, case)
    with torch.no_grad():
        run(plain, case, training=False)  # lazy modules are shaped by the first forward
    host = model.kasmina_layers[layer_name].default_transform
    model.kasmina_layers[layer_name].cull(0, "check")
    assert not any("esper" in name for name in model.state_dict())
    plain.load_state_dict(model.state_dict())
    for training in _modes(case):
        for ours, theirs in zip(
            run(model, case, training=training), run(plain, case, training=training), strict=True
        ):
            assert_identical(ours, theirs, "outputs and gradients")
    assert type(host) is type(plain.get_submodule(layer_name))


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


# ---------------------------------------------------------------------- growing


def grow(model: MorphableModel, case: Case) -> str:
    """Load a low-rank kernel that is not zero into seed 0 of the case's layer; return its name."""
    if case.no_seeds is not None:
        raise DoesNotApplyError(case.no_seeds)
    layer = model.kasmina_layers[case.seeded]
    ranks: list[int] = []
    hook = layer.default_transform.register_forward_hook(
        lambda module, args, out: ranks.append(tensors(out)[0].dim())
    )
    with torch.no_grad():
        run(model, case, training=False)
    hook.remove()
    if layer.shapes is None or len(layer.shapes.out) not in (2, ranks[0]):
        raise DoesNotApplyError(
            "called without a batch or channels, for which there are no kernels"
        )
    site = layer.site(0)
    if not LowRank.fits(site):
        raise DoesNotApplyError(f"no built-in design fits its output {site.act_shape}")
    model.connect(_LIBRARY)
    assert asyncio.run(
        model.load_kernel(layer.name, 0, _LIBRARY.add(LowRank, site, rank=2), alpha=0.5)
    )
    kernel = layer.kernel(0)
    assert kernel is not None
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in kernel.weights():
            weight.normal_(std=0.3)
    return layer.name


def _descend(weights: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for weight in weights:
            assert weight.grad is not None, "a kernel's weight has no gradient"
            weight.sub_(weight.grad, alpha=0.1)


def _check_host_is_finite(case: Case) -> None:
    _, grads = run(case.build(), case, training=case.trains)
    if not all(grad.isfinite().all() for grad in grads):
        raise DoesNotApplyError("the host's own gradients are not finite")


def assert_heard(model: MorphableModel, layer_name: str, case: Case) -> None:
    """The kernel reaches the model's output."""
    with torch.no_grad():
        heard, _ = run(model, case, training=False)
        with model.kasmina_layers[layer_name].silenced(0):
            unheard, _ = run(model, case, training=False)
    assert any(not torch.equal(a, b) for a, b in zip(heard, unheard, strict=True)), "no effect"
