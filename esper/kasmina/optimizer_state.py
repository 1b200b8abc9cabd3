"""Optimizers' states by parameter names: groups with all options, and each parameter's state.

``optimizer.load_state_dict`` goes by positions, casts states to their parameter's dtype and cannot
know the parameters of kernels that are not in the new optimizer yet.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from esper.errors import CheckpointError
from esper.kasmina.tree import Place, Tensors, unpack

SEED_GROUP = "esper_seeds"  # the option that marks a group made for seeds

Optimizer = torch.optim.Optimizer
Optimizers = Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer]


def named_optimizers(given: Optimizers | None) -> dict[str, Optimizer]:
    """Return optimizers by name, those of a list by their number, a single one as that of a list.

    Raises ``TypeError`` for anything else, ``ValueError`` for an optimizer that is given twice.
    """
    several = [] if given is None else [given] if isinstance(given, Optimizer) else given
    if isinstance(several, Mapping):
        named = dict(several)
    elif isinstance(several, Sequence):
        named = {str(number): optimizer for number, optimizer in enumerate(several)}
    else:
        raise TypeError(
            f"expected an optimizer, a list or a dict of optimizers, got {type(given).__name__}"
        )
    for name, optimizer in named.items():
        if not isinstance(name, str) or not isinstance(optimizer, Optimizer):
            kinds = f"{type(name).__name__}: {type(optimizer).__name__}"
            raise TypeError(f"expected optimizers by names, got {kinds} ({name!r})")
        twice = [other for other in named if named[other] is optimizer]
        if len(twice) > 1:
            raise ValueError(f"optimizers {twice} are one and the same")
    return named


def optimizer_states(
    optimizers: Mapping[str, Optimizer], parameters: dict[str, Tensor]
) -> dict[str, Any]:
    """Return the state of each optimizer, with the names of ``parameters`` in their places.

    Raises ``ValueError`` if one holds a parameter that is not among them.
    """
    names = _names_of(parameters)
    return {name: _state(optimizer, names) for name, optimizer in optimizers.items()}


def check_optimizers(
    saved: dict[str, Any],
    optimizers: Mapping[str, Optimizer],
    parameters: dict[str, Tensor],
    kernels: set[str],
) -> None:
    """Raise :class:`CheckpointError` unless ``optimizers`` are none, or fit to take on ``saved``.

    They must have the saved names, be of the same classes and have the same parameters in the same
    groups; ``kernels`` names those that they do not have yet.
    """
    if optimizers and not saved:
        raise CheckpointError("the checkpoint was saved without an optimizer, but one is given")
    if optimizers and optimizers.keys() != saved.keys():
        raise CheckpointError(f"the checkpoint has optimizers {[*saved]}, got {[*optimizers]}")
    for name, optimizer in optimizers.items():
        try:
            _check(saved[name], optimizer, _names_of(parameters), kernels)
        except (CheckpointError, ValueError) as error:
            error.add_note(f"This concerns optimizer '{name}'.")
            raise


def restore_optimizers(
    saved: dict[str, Any],
    optimizers: Mapping[str, Optimizer],
    parameters: dict[str, Tensor],
    tensors: Tensors,
) -> None:
    """Give each optimizer its saved groups, in the same order, and states.

    Group objects and lists of parameters stay the same objects, which schedulers and LBFGS keep.
    """
    for name, optimizer in optimizers.items():
        _restore(saved[name], optimizer, parameters, tensors)


def _state(optimizer: Optimizer, names: dict[int, str]) -> dict[str, Any]:
    groups = [
        {
            "params": _named(group["params"], names, f"group {number}"),
            "options": {key: value for key, value in group.items() if key != "params"},
        }
        for number, group in enumerate(optimizer.param_groups)
    ]
    state = {names[id(p)]: kept for p, kept in optimizer.state.items() if id(p) in names}
    return {"class": _class_name(optimizer), "groups": groups, "state": state}


def _check(
    saved: dict[str, Any], optimizer: Optimizer, names: dict[int, str], kernels: set[str]
) -> None:
    if _class_name(optimizer) != saved["class"]:
        raise CheckpointError(
            f"the checkpoint's optimizer is a {saved['class']}, got a {_class_name(optimizer)}"
        )
    given = [
        set(_named(group["params"], names, f"group {number}"))
        for number, group in enumerate(optimizer.param_groups)
        if not group.get(SEED_GROUP)
    ]
    wanted = [set(group["params"]) - kernels for group in _host_groups(saved)]
    if len(given) != len(wanted):
        raise CheckpointError(
            f"the optimizer has {len(given)} parameter groups, the checkpoint has {len(wanted)}"
        )
    for number, (found, expected) in enumerate(zip(given, wanted, strict=True)):
        if found != expected:
            raise CheckpointError(
                f"group {number} of the optimizer lacks {sorted(expected - found)} "
                f"and has {sorted(found - expected)} more than the checkpoint's"
            )


def _restore(
    saved: dict[str, Any], optimizer: Optimizer, parameters: dict[str, Tensor], tensors: Tensors
) -> None:
    host_groups = (group for group in optimizer.param_groups if not group.get(SEED_GROUP))
    seed_groups = (group for group in optimizer.param_groups if group.get(SEED_GROUP))
    groups = [
        _restored_group(
            next(seed_groups, {"params": []}) if _is_for_seeds(group) else next(host_groups),
            group,
            parameters,
            tensors,
        )
        for group in saved["groups"]
    ]
    optimizer.param_groups[:] = groups
    optimizer.state.clear()
    names = _names_of(parameters)
    for group in groups:
        for parameter in group["params"]:
            kept = saved["state"].get(names[id(parameter)])
            if kept is not None:
                place = _beside(parameter, group)
                optimizer.state[parameter] = unpack(kept, tensors, place)


def _restored_group(
    group: dict[str, Any], saved: dict[str, Any], parameters: dict[str, Tensor], tensors: Tensors
) -> dict[str, Any]:
    members = group["params"]
    members[:] = [parameters[name] for name in saved["params"]]
    options = unpack(saved["options"], tensors, _like_the_option_in(dict(group)))
    group.clear()
    group.update({"params": members, **options})
    return group


def _beside(parameter: Tensor, group: dict[str, Any]) -> Place:
    """States lie on their parameter's device, but a step count that no kernel reads on the CPU."""
    on_device = group.get("capturable") or group.get("fused")

    def place(name: str, tensor: Tensor) -> Tensor:
        if name.endswith("/step") and not on_device:
            return tensor
        return tensor.to(parameter.device)

    return place


def _like_the_option_in(group: dict[str, Any]) -> Place:
    """A learning rate that is a tensor stays on the device where the user has put it."""

    def place(name: str, tensor: Tensor) -> Tensor:
        present = group.get(name.rpartition("/")[2])
        return tensor.to(present.device) if isinstance(present, Tensor) else tensor

    return place


def _host_groups(saved: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The groups that the user made."""
    return (group for group in saved["groups"] if not _is_for_seeds(group))


def _is_for_seeds(group: dict[str, Any]) -> bool:
    return bool(group["options"].get(SEED_GROUP))


def _named(members: Iterable[Tensor], names: dict[int, str], place: str) -> list[str]:
    named = []
    for position, parameter in enumerate(members):
        if id(parameter) not in names:
            raise ValueError(
                f"parameter {position} of {place} of the optimizer, of shape "
                f"{tuple(parameter.shape)}, is none of the model's"
            )
        named.append(names[id(parameter)])
    return named


def _names_of(parameters: dict[str, Tensor]) -> dict[int, str]:
    return {id(parameter): name for name, parameter in parameters.items()}


def _class_name(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
