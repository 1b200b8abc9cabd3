"""Running a case's model, with and without a kernel, and comparing what comes out bit by bit."""

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from compat_cases import Case
from kasmina_library import MemoryLibrary
from torch import Tensor, nn

import esper
from esper.blueprints.low_rank import LowRank
from esper.config import SeedSettings
from esper.contracts import GraftingStrategy, SeedState
from esper.kasmina.kernel import Kernel
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.model import MorphableModel
from esper.kasmina.site_types import site_type

SETTINGS = SeedSettings(seeds_per_layer=2, observe_every=2, deterministic=True)
LIBRARY = MemoryLibrary()


class DoesNotApplyError(Exception):
    """The check says nothing about this case; the message is the reason."""


def wrapped(case: Case) -> MorphableModel:
    """Build the case's model with seeds on every layer that can carry them."""
    model = case.build()
    return esper.wrap(model, sites_of(model), settings=SETTINGS)


def sites_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if name and site_type(module)]


# ---------------------------------------------------------------------- what a model does


Caller = Callable[[nn.Module], Callable[..., Any]]  # how a model is called, as under autocast


def plainly(model: nn.Module) -> Callable[..., Any]:
    return model


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


def run(
    model: nn.Module, case: Case, *, training: bool, calling: Caller = plainly
) -> tuple[list[Tensor], list[Tensor]]:
    """Return outputs and gradients (of inputs and parameters) of one forward and backward."""
    model.train(training)
    torch.manual_seed(1)
    args, kwargs = case.inputs()
    model.zero_grad()
    outputs = tensors(calling(model)(*args, **kwargs))
    differentiable = [out for out in outputs if out.requires_grad]
    if differentiable:
        loss_of(differentiable).backward()
    leaves = [*tensors((args, kwargs)), *model.parameters()]
    grads = [leaf.grad for leaf in leaves if leaf.is_leaf and leaf.grad is not None]
    return [out.detach() for out in outputs], [grad.clone() for grad in grads]


def modes(case: Case) -> list[bool]:
    return [True, False] if case.trains else [False]


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


def assert_close(ours: list[Tensor], theirs: list[Tensor], what: str) -> None:
    """Equal but for the order of sums."""
    assert len(ours) == len(theirs), f"{len(ours)} {what}, expected {len(theirs)}"
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(
            one,
            other,
            rtol=1e-4,
            atol=1e-5,
            equal_nan=True,
            msg=lambda text, index=index: f"{what} {index}: {text}",
        )


# ---------------------------------------------------------------------- growing


def grow(model: MorphableModel, case: Case) -> KasminaLayer:
    """Load a kernel that says something into seed 0 of the case's layer, at a fixed alpha."""
    layer, artifact_id = kernel_for(model, case)
    assert asyncio.run(model.load_kernel(layer.name, 0, artifact_id, alpha=0.5))
    _let_it_say_something(layer)
    return layer


def germinate(model: MorphableModel, case: Case, strategy: GraftingStrategy) -> KasminaLayer:
    """As :func:`grow`, but step by step, until alpha begins to ramp."""
    layer, artifact_id = kernel_for(model, case)
    layer.request_germination(0, artifact_id, strategy)
    model.step()
    _let_it_say_something(layer)
    while layer.state(0) is SeedState.TRAINING:
        model.step()
    return layer


def kernel_for(model: MorphableModel, case: Case) -> tuple[KasminaLayer, str]:
    """Connect the model to a library with a low-rank kernel for the case's layer."""
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
    model.connect(LIBRARY)
    return layer, LIBRARY.add(LowRank, site, rank=2)


def kernel_of(layer: KasminaLayer) -> Kernel:
    kernel = layer.kernel(0)
    assert kernel is not None
    return kernel


def _let_it_say_something(layer: KasminaLayer) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in kernel_of(layer).weights():
            weight.normal_(std=0.3)


def first_line(error: Exception) -> str:
    """Return what a reason says of an error that PyTorch raised."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
