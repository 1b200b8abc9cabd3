"""The host as it was before it heard a seed: weights, buffers and optimizers' states, on the CPU."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.transfer import host_copy


class HostState:
    """Copies of all that training has written to, begun on the current stream and not waited for.

    Tensors are known by themselves and not by names: what has left the model or an optimizer since
    is left alone. On the CPU the copy is made at once, and costs what an optimizer's step does.
    """

    def __init__(self, root: nn.Module, optimizers: Iterable[torch.optim.Optimizer]):
        tensors = [*root.parameters(), *root.buffers()]
        self._tensors = [(tensor, _copied(tensor)) for tensor in tensors]
        self._optimizers = [
            (optimizer, {p: _copied_state(optimizer.state.get(p, {})) for p in _members(optimizer)})
            for optimizer in optimizers
        ]

    def restore(self) -> None:
        """Write all of it back, in place, so that addresses stay what they are. Does not wait."""
        with torch.no_grad():
            for tensor, kept in self._tensors:
                _local(tensor).copy_(kept, non_blocking=True)
            for optimizer, states in self._optimizers:
                for parameter in _members(optimizer):
                    if parameter in states:
                        _restore_state(optimizer.state, parameter, states[parameter])


def num_bytes(root: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Return the size of a copy, of sharded tensors as a whole: the same in all processes."""
    tensors: list[Tensor] = [*root.parameters(), *root.buffers()]
    for optimizer in optimizers:
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _members(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _copied(tensor: Tensor) -> Tensor:
    return host_copy(_local(tensor))


def _local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that lies in this process."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()


def _copied_state(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _copied(value) if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in state.items()
    }


def _restore_state(states: Any, parameter: Tensor, kept: dict[str, Any]) -> None:
    """Give a parameter its state back; one that had none has none again."""
    if not kept:
        states.pop(parameter, None)
        return
    present = states[parameter]
    for name in present.keys() - kept.keys():
        del present[name]
    for name, value in kept.items():
        if isinstance(value, Tensor):
            _local(present[name]).copy_(value, non_blocking=True)
        else:
            present[name] = copy.deepcopy(value)
