"""Weights of several seeds side by side in memory, as an op wants them that computes all at once.

Only the memory moves, between two steps: the parameters stay what they are to everybody else,
optimizers included. Memory that somebody else has a hand in is left where it is: what is shared
between processes, what lies in a flat buffer, what was assigned since.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

# Parameter -> address of the stack that its memory was moved into.
_moved = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Stack:
    """One tensor a kind of weight, stacked along the rows over the seeds."""

    tensors: list[Tensor]
    addresses: list[int]  # of the parameters, one seed's after the other's, while they are here


def stacked(kinds: Sequence[Sequence[nn.Parameter]]) -> Stack | None:
    """Move parameters, given by kind and seed, side by side; None if they must stay apart."""
    if not all(_can_be_stacked(parameters) for parameters in kinds):
        return None
    # Outside of inference mode, whatever the caller is in: the parameters are to go on learning.
    with torch.inference_mode(False), torch.no_grad():
        tensors = [_side_by_side(parameters) for parameters in kinds]
    seeds = zip(*kinds, strict=True)
    return Stack(tensors, [parameter.data_ptr() for seed in seeds for parameter in seed])


def apart(parameters: Sequence[nn.Parameter]) -> None:
    """Give parameters that were stacked memory of their own again, so that the stack can be freed."""
    moved = [parameter for parameter in parameters if _is_in_a_stack(parameter)]
    if moved:
        with torch.inference_mode(False), torch.no_grad():
            for parameter in moved:
                parameter.data = parameter.detach().clone()


def _side_by_side(parameters: Sequence[nn.Parameter]) -> Tensor:
    tensor = torch.cat([parameter.detach() for parameter in parameters])
    rows = tensor.split([len(parameter) for parameter in parameters])
    for parameter, part in zip(parameters, rows, strict=True):
        parameter.data = part
        _moved[parameter] = tensor.data_ptr()
    return tensor


def _can_be_stacked(parameters: Sequence[nn.Parameter]) -> bool:
    alike = {(p.dtype, p.device, p.shape) for p in parameters}
    distinct = len({id(parameter) for parameter in parameters}) == len(parameters)
    return len(alike) == 1 and distinct and all(_may_be_moved(p) for p in parameters)


def _may_be_moved(parameter: nn.Parameter) -> bool:
    if parameter.device.type not in ("cpu", "cuda") or parameter.is_inference():
        return False
    if parameter.is_cpu and parameter.is_shared():
        return False
    is_alone = parameter.untyped_storage().nbytes() == parameter.nbytes
    return is_alone or _is_in_a_stack(parameter)


def _is_in_a_stack(parameter: nn.Parameter) -> bool:
    return bool(_moved.get(parameter) == parameter.untyped_storage().data_ptr())
