"""Averaging kernels' gradients over the ranks, which neither DDP nor FSDP2 does.

Both know the parameters that were there when they were made. Those of kernels, in TRAINING as well
as grafted, are averaged by one all-reduce a dtype at the end of each backward pass, so that what
comes next (clipping, unscaling, ``optimizer.step()``) finds gradients that agree.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from esper.errors import EsperError

if TYPE_CHECKING:
    from esper.kasmina.execution import Kasmina


class GradientAverage:
    """Averages what the learning kernels of one model have received. Training thread."""

    def __init__(self, kasmina: "Kasmina", process_group: dist.ProcessGroup):
        self._kasmina = kasmina
        self._process_group = process_group
        self._is_due = False  # at the end of the backward pass that is running

    def follow(self, model: nn.Module, output: Any) -> None:
        """Average at the end of each backward pass through ``output``, a forward's result.

        Every rank comes here alike, also one whose kernels have no part in this output; DDP's
        ``no_sync()`` and FSDP2's ``set_requires_gradient_sync(False)`` hold for kernels, too.
        """
        self._is_due = False  # a backward pass that raised has left it behind
        learners = self._learners()
        if not learners or not _synchronises(model, learners):
            return
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._begin)

    def _begin(self, _grad: Tensor) -> None:
        if not self._is_due:
            self._is_due = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    @torch.no_grad()
    def _finish(self) -> None:
        """Micro-batches before this one, averaged or not, are averaged right: it is linear."""
        self._is_due = False
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in self._learners():
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for parameters in by_dtype.values():
            self._average([_gradient(parameter) for parameter in parameters])

    def _average(self, grads: list[Tensor]) -> None:
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        flat /= self._process_group.size()
        dist.all_reduce(flat, group=self._process_group)
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(
            grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)]
        )

    def _learners(self) -> list[nn.Parameter]:
        """Return the kernels' parameters that learn, in the same order on all ranks."""
        return [
            parameter
            for layer in self._kasmina.layers.values()
            for seat in layer.occupants()
            for parameter in seat.kernel.parameters()
            if parameter.requires_grad
        ]


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Return the gradient, zeros where the kernel had no part in this rank's loss."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _synchronises(model: nn.Module, learners: list[nn.Parameter]) -> bool:
    """Whether the backward pass of the forward that is running ends with equal gradients."""
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is not None:
        _check_unknown_to(ddp, learners)
        return bool(ddp.require_backward_grad_sync)
    if isinstance(model, FSDPModule):
        groups = (
            group
            for module in model.modules()
            if isinstance(module, FSDPModule)
            for group in module._get_fsdp_state()._fsdp_param_groups
        )
        return next((group.reduce_grads for group in groups), True)
    return True


def _check_unknown_to(ddp: DistributedDataParallel, learners: list[nn.Parameter]) -> None:
    """Two that average the same gradients would get in each other's way at the next culling."""
    if not {id(p) for p in learners}.isdisjoint(map(id, ddp._module_parameters)):
        raise EsperError(
            "DistributedDataParallel was made around kernels in place and would average their "
            "gradients, too: make it right after esper.distribute(model)"
        )
