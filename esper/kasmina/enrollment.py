"""Kernels' parameters in the user's optimizers: they join one when seated, and leave when culled.

A parameter joins the group that holds its layer's own parameters, or its optimizer's one group of
seeds, made when the optimizer is attached: schedulers that are made afterwards count it in.
An optimizer of sharded parameters always gets a group of seeds.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from esper.errors import EsperError
from esper.kasmina.kernel import Kernel
from esper.kasmina.optimizer_state import SEED_GROUP
from esper.kasmina.seat import Seat
from esper.kasmina.seats import SEATS

if TYPE_CHECKING:
    from esper.kasmina.layer import KasminaLayer

Group = dict[str, Any]

_NO_REASON_TO_REFUSE = frozenset(("params", "param_names", "lr", "initial_lr"))


@dataclass(frozen=True, eq=False)
class Attachment:
    """One optimizer, and the options of its group of seeds, if it has one."""

    optimizer: torch.optim.Optimizer
    group_options: dict[str, Any]

    def seed_group(self) -> Group | None:
        """Looked up each time, as ``load_state_dict`` exchanges the groups."""
        return next((g for g in self.optimizer.param_groups if g.get(SEED_GROUP)), None)

    def admit_seeds(self) -> None:
        """Give the optimizer its group of seeds, unless it has it or needs none."""
        needed = self.group_options or _is_sharded(self.optimizer)
        if not needed or self.seed_group() is not None:
            return
        optimizer = self.optimizer
        _check_can_have_seed_group(optimizer, self.group_options)
        named: Group = {"param_names": []} if "param_names" in optimizer.param_groups[0] else {}
        group = {"params": [], **self.group_options, SEED_GROUP: True, **named}
        optimizer.add_param_group(group)


@dataclass(frozen=True, eq=False)
class Place:
    """What takes a parameter in."""

    optimizer: torch.optim.Optimizer
    group: Group

    def exists(self) -> bool:
        return id(self.group) in map(id, self.optimizer.param_groups)


@dataclass(frozen=True, eq=False)
class Guide:
    """A parameter of the layer's that weights were sent after."""

    parameter: nn.Parameter
    group: Group
    position: int  # in the group, when it was found there

    def is_there(self) -> bool:
        members = self.group["params"]
        if self.position < len(members) and members[self.position] is self.parameter:
            return True  # without a walk through a large model's parameters
        return id(self.parameter) in map(id, members)


@dataclass(eq=False)
class Plan:
    """Which of a kernel's weights go where, as long as the optimizers have the same groups."""

    attachments: list[Attachment]
    places: list[tuple[Place, list[nn.Parameter]]]
    guides: list[Guide]
    taken_with: list[Group] | None = None  # options of the places, with which they take the weights

    def holds(self, attachments: list[Attachment]) -> bool:
        if self.attachments != attachments:
            return False
        for place, _ in self.places:
            if not place.exists():
                return False
        return all(map(Guide.is_there, self.guides))

    def is_checked(self) -> bool:
        """Whether the optimizers take the weights with the options that they have now."""
        return self.taken_with == [_options(place.group) for place, _ in self.places]


class Enrollment:
    """The optimizers that the user has attached, each for its own part of the model."""

    def __init__(self, layers: "Mapping[str, KasminaLayer]"):
        self.layers = layers
        self.attachments: list[Attachment] = []
        self._taken: set[tuple[Any, ...]] = set()  # what an optimizer has been seen to take
        # Of kernels that are about to be seated: finding the places takes longer the larger the
        # model is, and a loading thread has time.
        self._plans: WeakKeyDictionary[Kernel, Plan] = WeakKeyDictionary()

    def attach(self, optimizer: torch.optim.Optimizer, group_options: dict[str, Any]) -> None:
        """Take in an optimizer, in the place of those that have parameters in common with it.

        An optimizer that is attached already stays as it is. Seats whose parameters it is to
        move join it. Raises ``ValueError``, and nothing is changed, for options other than it is
        attached with or that it cannot have, and :class:`EsperError` if it refuses a seat.
        """
        present = self.attachment_of(optimizer)
        if present is None:
            self._add(Attachment(optimizer, group_options))
        elif group_options and group_options != present.group_options:
            raise ValueError(
                f"{type(optimizer).__name__} is attached with {present.group_options}, "
                f"got {group_options}; change the options in its param_groups"
            )

    def restore(self, attachments: list[Attachment]) -> None:
        """Take in optimizers whose groups hold already what they are to move, as a load made them."""
        for new in attachments:
            self.attachments = [
                a for a in self.attachments if _disjoint(a.optimizer, new.optimizer)
            ] + [new]

    def attachment_of(self, optimizer: torch.optim.Optimizer | None) -> Attachment | None:
        return next((a for a in self.attachments if a.optimizer is optimizer), None)

    def check(self, layer: "KasminaLayer", kernel: Kernel) -> None:
        """Raise :class:`EsperError` if the optimizers do not take a kernel for ``layer``.

        They are asked by a step of a new optimizer of the same class and options on zeros, once for
        each kind of kernel. Any thread.
        """
        if not self.attachments:
            return
        plan = self._plan(layer, kernel)
        if plan.is_checked():
            return
        with_options = [_options(place.group) for place, _ in plan.places]
        for (place, weights), options in zip(plan.places, with_options, strict=True):
            kind = (type(place.optimizer), repr(sorted(options.items())), *map(_described, weights))
            if kind not in self._taken:
                _check_takes(place, weights)
                self._taken.add(kind)
        plan.taken_with = with_options

    def enroll(self, layer: "KasminaLayer", seat: Seat) -> None:
        """Add a seat's parameters, if they are not there yet."""
        for place, weights in self._plan(layer, seat.kernel).places:
            place.group["params"].extend(weights)
            _begin_states(place.optimizer, place.group, weights)
            if "param_names" in place.group:
                place.group["param_names"].extend(_names(layer, seat, weights))
        del self._plans[seat.kernel]

    def dismiss(self, seat: Seat) -> None:
        """Remove a seat's parameters with their state; groups and lists stay the same objects."""
        leaving = {id(parameter) for parameter in seat.parameters()}
        for attachment in self.attachments:
            for parameter in seat.parameters():
                attachment.optimizer.state.pop(parameter, None)
            if isinstance(attachment.optimizer, torch.optim.LBFGS):
                _begin_anew(attachment.optimizer, leaving)
            for group in attachment.optimizer.param_groups:
                _remove(leaving, group)

    def _add(self, new: Attachment) -> None:
        before, num_groups = self.attachments, len(new.optimizer.param_groups)
        self.restore([new])
        try:
            new.admit_seeds()
            seats = [(layer, seat) for layer in self.layers.values() for seat in layer.occupants()]
            for layer, seat in seats:
                self.check(layer, seat.kernel)
        except Exception:
            self.attachments = before
            del new.optimizer.param_groups[num_groups:]
            raise
        for layer, seat in seats:
            self.enroll(layer, seat)

    def _plan(self, layer: "KasminaLayer", kernel: Kernel) -> Plan:
        plan = self._plans.get(kernel)
        if plan is None or not plan.holds(self.attachments):
            plan = self._new_plan(layer, [*kernel.parameters()])
            self._plans[kernel] = plan
        return plan

    def _new_plan(self, layer: "KasminaLayer", weights: list[nn.Parameter]) -> Plan:
        """Decide where those of ``weights`` go that are in no optimizer yet."""
        attachments = [*self.attachments]
        homes = {
            id(parameter): (attachment, group, position)
            for attachment in attachments
            for group in attachment.optimizer.param_groups
            for position, parameter in enumerate(group["params"])
        }
        chosen: dict[int, tuple[Place, list[nn.Parameter]]] = {}
        guides: dict[int, Guide] = {}
        for weight in weights:
            if id(weight) in homes:
                continue
            guide = self._guide(homes, layer, weight)
            if guide is None:
                attachment, group = attachments[0], attachments[0].optimizer.param_groups[0]
            else:
                attachment, group, position = homes[id(guide)]
                guides[id(guide)] = Guide(guide, group, position)
            group = attachment.seed_group() or group
            place = Place(attachment.optimizer, group)
            chosen.setdefault(id(group), (place, []))[1].append(weight)
        return Plan(attachments, list(chosen.values()), list(guides.values()))

    def _guide(
        self, homes: dict[int, tuple[Attachment, Group, int]], layer: "KasminaLayer", weight: Tensor
    ) -> nn.Parameter | None:
        """Matrices go with matrices and vectors with vectors: users part them for weight decay."""
        for near in _by_nearness(self.layers, layer):
            own = [p for p in near.default_transform.parameters() if id(p) in homes]
            alike = [p for p in own if (p.dim() > 1) == (weight.dim() > 1)]
            if own:
                return (alike or own)[0]
        return None


def _names(layer: "KasminaLayer", seat: Seat, weights: list[nn.Parameter]) -> list[str]:
    names = {id(weight): name for name, weight in seat.named_parameters()}
    prefix = f"{layer.name}." * bool(layer.name) + f"{SEATS}.{seat.seed_idx}."
    return [prefix + names[id(weight)] for weight in weights]


def _by_nearness(
    layers: "Mapping[str, KasminaLayer]", layer: "KasminaLayer"
) -> "Iterator[KasminaLayer]":
    """The layer, then those with which it shares more modules, then those closer in order.

    Activations have no parameters of their own, and join those of their surroundings.
    """
    order = list(layers.values())
    here, path = order.index(layer), layer.name.split(".")

    def distance(entry: "tuple[int, KasminaLayer]") -> tuple[bool, int, int]:
        position, other = entry
        shared = 0
        for mine, others in zip(path, other.name.split("."), strict=False):
            if mine != others:
                break
            shared += 1
        return position != here, -shared, abs(position - here)

    yield from (other for _, other in sorted(enumerate(order), key=distance))


def _options(group: Group) -> Group:
    """Return what may make an optimizer refuse a parameter; learning rates change all the time."""
    return {
        name: value
        for name, value in group.items()
        if name not in _NO_REASON_TO_REFUSE and not isinstance(value, Tensor)
    }


def _described(weight: Tensor) -> tuple[Any, ...]:
    return weight.shape, weight.dtype, weight.device


def _check_takes(place: Place, weights: list[nn.Parameter]) -> None:
    optimizer, name = place.optimizer, type(place.optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise EsperError(
            f"{name} keeps one history of all its parameters, so that none can join it"
        )
    try:
        with torch.enable_grad():
            _try_on_zeros(place, weights)
    except Exception as error:
        shapes = [tuple(weight.shape) for weight in weights]
        raise EsperError(f"{name} does not take the kernel's weights {shapes}: {error}") from error


def _try_on_zeros(place: Place, weights: list[nn.Parameter]) -> None:
    """Step a new optimizer that such weights join after its first step.

    A class that cannot be made of parameters and the options of a group is not tried.
    """
    make = type(place.optimizer)
    accepted = inspect.signature(make).parameters.keys() - {"params"}
    options = {name: value for name, value in place.group.items() if name in accepted}
    elder, *newcomers = (nn.Parameter(torch.zeros_like(w)) for w in (weights[0], *weights))
    try:
        inspect.signature(make).bind([elder], **options)
    except TypeError:
        return
    trial: Any = make([elder, *newcomers], **options)
    elder.grad = torch.zeros_like(elder)
    trial.step(lambda: 0.0)
    _begin_states(trial, trial.param_groups[0], newcomers)
    for newcomer in newcomers:
        newcomer.grad = torch.zeros_like(newcomer)
    trial.step(lambda: 0.0)


def _begin_states(
    optimizer: torch.optim.Optimizer, group: Group, newcomers: list[nn.Parameter]
) -> None:
    """Spare fused SGD a list of momenta some of which are None, at which it raises."""
    if isinstance(optimizer, torch.optim.SGD) and group["fused"] and group["momentum"]:
        for newcomer in newcomers:
            optimizer.state[newcomer]["momentum_buffer"] = torch.zeros_like(newcomer)


def _check_can_have_seed_group(
    optimizer: torch.optim.Optimizer, group_options: dict[str, Any]
) -> None:
    name, has_one_group = type(optimizer).__name__, isinstance(optimizer, torch.optim.LBFGS)
    unknown = sorted(group_options.keys() - optimizer.defaults.keys())
    if unknown:
        raise ValueError(f"{name} has no options {unknown}, only {sorted(optimizer.defaults)}")
    if has_one_group:
        raise ValueError(
            f"{name} has one parameter group alone, so seeds cannot have {group_options}"
        )
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):  # torch's mark
        raise ValueError(
            f"{name} has a learning rate scheduler already, which does not know of a group of seeds "
            f"with {group_options}: attach the optimizer before you make the scheduler"
        )


def _begin_anew(optimizer: torch.optim.LBFGS, leaving: set[int]) -> None:
    """Forget the history of a vector that held what is leaving, as it does not fit a shorter one."""
    if not leaving.isdisjoint(_members(optimizer)):
        optimizer.state.clear()
        optimizer._numel_cache = None


def _is_sharded(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it moves DTensors, which cannot be in one group with the plain tensors of kernels."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return any(hasattr(parameter, "placements") for parameter in parameters)


def _disjoint(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> bool:
    return _members(one).isdisjoint(_members(other))


def has_any(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether one of ``parameters`` is in the optimizer."""
    return not _members(optimizer).isdisjoint(map(id, parameters))


def _members(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _remove(leaving: set[int], group: Group) -> None:
    stays = [id(parameter) not in leaving for parameter in group["params"]]
    for key in ("params", "param_names"):
        if key in group:
            group[key][:] = [entry for entry, kept in zip(group[key], stays, strict=True) if kept]
