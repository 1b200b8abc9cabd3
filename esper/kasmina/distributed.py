"""``esper.distribute``: one model trained by several processes, whose seeds move in lockstep."""

import hashlib
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from esper.contracts import canonical_json
from esper.errors import DistributedError, EsperError
from esper.kasmina.capture import capture
from esper.kasmina.control_group import ControlGroup
from esper.kasmina.execution import Kasmina
from esper.kasmina.model import MorphableModel
from esper.kasmina.peers import Peers
from esper.kasmina.seats import SEATS

_TIMEOUT = timedelta(minutes=10)
_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"
# Of a KasminaRecord: what each rank has seen of shapes, and when it looks, is its own affair.
_MAY_DIFFER: Any = {
    "layers": {"__all__": {"shapes"}},
    "next_due": True,
    "observing": True,
    "observed_step": True,
    "snapshot_pending": True,
    "refresh_pending": True,
}


def distribute(
    model: MorphableModel,
    process_group: dist.ProcessGroup | None = None,
    *,
    timeout: timedelta = _TIMEOUT,
) -> MorphableModel:
    """Have the ranks of ``process_group`` (by default all) grow ``model`` together; return it.

    Call it on every rank, right after :func:`esper.wrap` or :func:`esper.load` and right before
    ``DistributedDataParallel(model)`` or ``fully_shard(model)``. From then on rank 0 decides: its
    pipeline or whoever calls ``model.kasmina.submit`` there. All ranks obey a command at the same
    step, put a kernel in place once all have loaded and verified it or give it up together, and
    average the gradients of kernels at the end of each backward pass. Methods of a layer that move
    a seed by hand, and ``load_kernel``, must be called on every rank between the same two steps.

    ``model.step()`` then waits for the slowest rank: for one small all-reduce on the CPU over gloo
    (a group of its own, no device is waited for), and for more where rank 0 has something to say
    or kernels are being loaded. It raises :class:`DistributedError` if a rank is gone, or does not
    come within ``timeout``, or if the ranks' seeds have moved apart. The gradients go over
    ``process_group`` itself.

    Raises ``TypeError`` for a model that is not wrapped, ``ValueError`` for a timeout that is not
    positive, :class:`EsperError` if the model is distributed already, and
    :class:`DistributedError` without an initialised process group, or if the ranks' models have
    other seeds or other kernels. Kernels in place become those of rank 0.
    """
    _check(model, timeout)
    kasmina = model.kasmina
    group = process_group or dist.group.WORLD
    assert group is not None
    control = ControlGroup(group, timeout)
    _check_alike(kasmina, control)
    peers = Peers(kasmina, control, group)
    peers.share_kernels()
    _hide_kernels_from_ddp(model, peers)
    # A compiler cannot trace what is to happen after the backward pass.
    hook = model.register_forward_hook(torch.compiler.disable(_follow_backward))
    peers.undo.callback(hook.remove)
    kasmina.peers = peers
    return model


def _follow_backward(model: nn.Module, _args: Any, output: Any) -> None:
    """Forward hook of the root. A plain function: copies of the model, which have it, are alone."""
    assert isinstance(model, MorphableModel)
    kasmina = model.kasmina
    if kasmina.peers is not None and kasmina.num_occupied and torch.is_grad_enabled():
        kasmina.peers.gradients.follow(model, output)


def _check(model: Any, timeout: timedelta) -> None:
    if not isinstance(model, MorphableModel):
        raise TypeError(f"{type(model).__name__} is not wrapped; call esper.wrap first")
    if timeout <= timedelta():
        raise ValueError(f"timeout must be positive, got {timeout}")
    if not dist.is_initialized():
        raise DistributedError(
            "no process group: call torch.distributed.init_process_group before esper.distribute"
        )
    if model.kasmina.peers is not None:
        raise EsperError(f"{type(model).__name__} is distributed already")
    for name, tensor in _tensors_in_seats(model):
        if isinstance(tensor, DTensor):
            raise EsperError(
                f"'{name}' is sharded, but kernels are kept whole on every rank: call fully_shard "
                "before kernels are in place"
            )


def _check_alike(kasmina: Kasmina, control: ControlGroup) -> None:
    """Compare what the seeds of all ranks are and have; weights are not looked at."""
    digest = torch.frombuffer(bytearray(_digest(kasmina)), dtype=torch.uint8)
    rows = control.concatenated(digest).view(control.size, -1)
    others = [rank for rank, row in enumerate(rows) if not torch.equal(row, rows[0])]
    if others:
        raise DistributedError(
            f"ranks {others} have other layers, settings, kernels or states of seeds than rank 0: "
            "build, wrap and load the model alike on every rank"
        )


def _digest(kasmina: Kasmina) -> bytes:
    record = capture(kasmina).model_dump(mode="json", exclude=_MAY_DIFFER)
    states = {name: layer.state_layout.lifecycle_states() for name, layer in kasmina.layers.items()}
    return hashlib.sha256(canonical_json([record, states])).digest()


def _hide_kernels_from_ddp(model: MorphableModel, peers: Peers) -> None:
    """By the attribute of the module that DDP asks for names that it is to leave alone."""
    kernels = [name for name, _ in _tensors_in_seats(model)]
    if not kernels:
        return
    others = list(getattr(model, _DDP_IGNORES, ()))
    setattr(model, _DDP_IGNORES, others + kernels)
    peers.undo.callback(setattr, model, _DDP_IGNORES, others)


def _tensors_in_seats(model: nn.Module) -> list[tuple[str, Tensor]]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in named if SEATS in name.split(".")]
