"""``esper.wrap``: planting seeds on a model, and the model that it becomes.

Only the root's class is exchanged, for a cached subclass whose ``forward`` is the host's own, as
FSDP2 does. The layers stay as they are until a seed germinates.
"""

import contextlib
import logging
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from esper.config import SeedSettings
from esper.errors import EsperError
from esper.kasmina.enrollment import has_any
from esper.kasmina.execution import SEEDED, Kasmina
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.lifecycle import OCCUPIED
from esper.kasmina.loader import KernelSource
from esper.kasmina.morph import WRAPPED_FROM, copy_module, made_once, reduce_to_own_class
from esper.kasmina.selection import Targets, aliases, find_sites
from esper.kasmina.state_dict import check_kernels_in_place, seat_missing_kernels

if TYPE_CHECKING:
    from rich.console import Console

if TYPE_CHECKING:
    from esper.kasmina.compiled_block import BlockReport

logger = logging.getLogger(__name__)

_KASMINA = "_esper_kasmina"
_LOOKED_UP = ("forward", "__iter__")  # by dynamo, on the class of a model or of a Sequential


class MorphableModel(nn.Module):
    """A wrapped model: the user's own module with these methods added. Made by :func:`wrap`."""

    @property
    def kasmina(self) -> Kasmina:
        """The execution layer: all seeds of this model."""
        kasmina: Kasmina = self.__dict__[_KASMINA]
        return kasmina

    @property
    def kasmina_layers(self) -> dict[str, KasminaLayer]:
        """Handles of all layers that carry seeds, by FQN; a shared layer's by each of its FQNs."""
        return self.kasmina.layers

    def connect(self, library: KernelSource) -> None:
        """Let kernels be loaded from ``library``, for example an :class:`esper.Urza`."""
        self.kasmina.connect(library)

    def attach_optimizer(self, optimizer: torch.optim.Optimizer, **group_options: Any) -> None:
        """Have the parameters of kernels, present and future, moved by ``optimizer``.

        They join the group of their layer's own parameters, matrices that of matrices and vectors
        that of vectors, or, with ``group_options`` such as ``lr``, one group of all seeds that is
        added at once: make schedulers afterwards. They leave, with their state, when their seed is
        culled. A kernel that the optimizer does not take is culled as it is loaded.

        Several optimizers, each for its own part of the model, may be attached; one that shares
        parameters with another takes its place. Raises ``ValueError`` for options that the
        optimizer cannot have, or if it has none of the model's parameters, and :class:`EsperError`
        if it does not take a kernel in place; nothing is changed then.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        own = [
            *self.parameters(),
            *(p for s in self.kasmina.isolated_seats() for p in s.parameters()),
        ]
        if own and not has_any(optimizer, own):
            raise ValueError(
                f"{type(optimizer).__name__} has none of the parameters of this "
                f"{type(self).__name__}: make it of model.parameters(), or of a part of them"
            )
        self.kasmina.enrollment.attach(optimizer, group_options)

    async def load_kernel(
        self, layer_name: str, seed_idx: int, artifact_id: str, *, alpha: float = 0.3
    ) -> bool:
        """Load a kernel by hand; see :meth:`KasminaLayer.load_kernel`.

        Raises ``ValueError`` for an unknown layer, a seed index or an alpha out of range, and
        :class:`EsperError` if no library is connected.
        """
        return await self.kasmina.layer(layer_name).load_kernel(seed_idx, artifact_id, alpha=alpha)

    def print_seeds(self, console: "Console | None" = None) -> None:
        """Print a table of the layers that carry seeds: type, width, seeds and their states.

        Reads the mirror of the seed bank, so it does not synchronise with the device.
        """
        from rich.console import Console

        from esper.kasmina.overview import seed_table

        (console or Console()).print(seed_table(self.kasmina_layers))

    def step(self) -> None:
        """Apply what is due between two steps. Call it after ``optimizer.step()``.

        Never waits and never synchronises with the device; about a microsecond or less when
        nothing is due. Errors of single seeds are logged and recorded, not raised. In a distributed
        run it waits for the other ranks; see :func:`esper.distribute`.
        """
        kasmina = self.__dict__[_KASMINA]
        kasmina.step_count += 1
        kasmina.training_thread = threading.get_ident()
        if (
            kasmina.num_occupied
            or kasmina.tenancies
            or kasmina.inbox
            or kasmina.step_count >= kasmina.next_due
            or kasmina.peers is not None
        ):
            kasmina.advance()

    def compile(self, **torch_compile_options: Any) -> None:
        """Compile the model as one block, in place; :func:`esper.compile` does it in parts."""
        from esper.kasmina.compilation import compile as compile_blocks

        compile_blocks(self, blocks=[""], **torch_compile_options)

    def compile_report(self) -> "list[BlockReport]":
        """What compiling has cost each block; empty unless :func:`esper.compile` was called."""
        return [block.report() for block in self.kasmina.compiled_blocks]

    @property
    def _initialize_hook(self) -> bool:
        """Torch.compile calls ``_infer_parameters`` before each forward of a module that has this.

        That is its way with lazy modules, which like layers of unknown width have to see a forward
        that no compiler sees. The others are not to pay for it.
        """
        kasmina = self.kasmina
        if kasmina.to_be_shown:
            kasmina.to_be_shown = any(layer.shapes is None for layer in kasmina.layers.values())
        if not kasmina.to_be_shown:
            raise AttributeError("all widths are known")
        return True

    def _infer_parameters(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.kasmina.to_be_shown and not torch.compiler.is_compiling():
            self._show(args, kwargs)

    def _show(self, args: Any, kwargs: Any) -> None:
        """Show the layers of unknown width a forward of fake tensors: nothing is computed.

        Lazy modules get real parameters by it, as they do by the first forward without Esper.
        """
        from torch._subclasses.fake_tensor import FakeTensorMode  # half a compiler to import

        self.kasmina.to_be_shown = False
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        lazy = any(is_lazy(tensor) for tensor in (*self.parameters(), *self.buffers()))
        try:
            args, kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
            with contextlib.nullcontext() if lazy else mode, torch.no_grad():
                self(*args, **kwargs)
        except Exception as error:
            logger.info("layers of unknown width remain so until they are observed: %s", error)
            self.kasmina.release()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``nn.Module.zero_grad``, also for kernels in TRAINING, which are no submodules."""
        super().zero_grad(set_to_none)
        for seat in self.kasmina.isolated_seats():
            seat.zero_grad(set_to_none)

    def _apply(self, fn: Any, recurse: bool = True) -> "MorphableModel":
        """The seeds follow where ``.to()`` and its kin take the model."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.kasmina.follow(fn, _device_of(self))
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As ``nn.Module.load_state_dict``, also from a grown model.

        Kernels that are not in place come from the connected library, verified, on the calling
        thread; they are seated in the state and at the alpha that they had, to be moved on by hand.
        Kernels that are in place keep both. Raises :class:`EsperError`, before anything is changed,
        if a kernel cannot be had or, with ``strict``, if one is in place that ``state_dict`` has no
        weights for. Between two steps only.
        """
        if strict:
            check_kernels_in_place(self.kasmina, state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """The part of ``load_state_dict`` that a module around this one calls, too."""
        seat_missing_kernels(self.kasmina, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MorphableModel":
        twin = cast(MorphableModel, copy_module(self, memo))
        twin.kasmina.plant(twin)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the plain host model; a grown one is refused, its kernels being code."""
        grown = self.kasmina.seeds_in(OCCUPIED)
        if grown:
            raise EsperError(
                f"a model with kernels in place cannot be pickled: {grown}; "
                "esper.save it, save its state_dict() or torch.export it"
            )
        if self.kasmina.peers is not None:
            raise EsperError("a distributed model cannot be pickled; save its state_dict()")
        return reduce_to_own_class(self, protocol)


def wrap(
    net: nn.Module,
    target_layers: Targets | None = None,
    *,
    seeds_per_layer: int = 4,
    telemetry_enabled: bool = True,
    settings: SeedSettings | None = None,
) -> MorphableModel:
    """Plant dormant seeds on the layers of ``net``, in place, and return it as MorphableModel.

    By default linear layers, convolutions, activations, norms, embeddings, attention and recurrent
    layers get seeds; docs/compatibility.md lists the types, and :func:`register_site` adds others.
    ``target_layers`` is a list of FQNs, patterns over FQNs (``"encoder.*.linear1"``; ``*`` also
    matches dots), module types and predicates ``(name, module) -> bool``, or one predicate. A FQN
    plants seeds on any layer that can carry them; the others on the layers by default among their
    matches, or, if there are none, on those that carry seeds only where they are named, such as
    dropout, pooling and Transformer layers. A module that the model holds under several names has
    one set of seeds. While the seeds are dormant, outputs, gradients and ``state_dict()`` are
    bit-identical to the unwrapped model's, and the layers run the very same code. ``settings``
    replaces all other options at once.

    Raises ``TypeError`` if ``net`` is no module or a target nothing of that kind, ``ValueError`` if
    the model is already wrapped, has no layer that can carry seeds, a target matches none, or an
    option is out of range. A refused call changes nothing.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"esper.wrap expects a torch.nn.Module, got {type(net).__name__}")
    for name, module in net.named_modules():
        if isinstance(module, MorphableModel) or module in SEEDED:
            raise ValueError(f"{type(net).__name__} is already wrapped (at '{name}')")
    if settings is None:
        if isinstance(seeds_per_layer, bool) or not isinstance(seeds_per_layer, int):
            raise TypeError(f"seeds_per_layer must be an int, got {seeds_per_layer!r}")
        if seeds_per_layer < 1:
            raise ValueError(f"seeds_per_layer must be at least 1, got {seeds_per_layer}")
        settings = SeedSettings(
            seeds_per_layer=seeds_per_layer, telemetry_enabled=telemetry_enabled
        )
    _check_names_are_free(net)
    sites = find_sites(net, target_layers)
    kasmina = Kasmina(sites, settings, _device_of(net), aliases(net, sites))
    net.__dict__[_KASMINA] = kasmina
    net.__class__ = _morphable_class(type(net))
    kasmina.plant(net)
    return cast(MorphableModel, net)


def unwrap(model: nn.Module, *, discard_kernels: bool = False) -> nn.Module:
    """Take the seeds off again; the model is exactly what it was, with its trained weights.

    Raises ``TypeError`` if the model is not wrapped, and :class:`EsperError` if kernels are in
    place, unless ``discard_kernels`` says that they may be lost.
    """
    if not isinstance(model, MorphableModel):
        raise TypeError(f"{type(model).__name__} is not wrapped by esper.wrap")
    kasmina = model.kasmina
    grown = kasmina.seeds_in(OCCUPIED)
    if grown and not discard_kernels:
        raise EsperError(
            f"kernels are in place at {grown}; unwrap(model, discard_kernels=True) removes them"
        )
    for name, seed_idx in grown:
        kasmina.layer(name).evict(seed_idx)
    kasmina.uproot()
    del model.__dict__[_KASMINA]
    net: nn.Module = model
    net.__class__ = type(model).__dict__[WRAPPED_FROM]
    return net


@made_once
def _morphable_class(host: type[nn.Module]) -> type[nn.Module]:
    # The host's own name: nn.Module looks parameters up through an AttributeError whose text holds
    # the class name, so a longer one cost nn.Linear(128, 64) 0.2 % of its instructions.
    members = {
        "__module__": host.__module__,
        "__qualname__": f"Morphable{host.__qualname__}",
        WRAPPED_FROM: host,
        # The host's own functions. Found further up, they made dynamo guard on every class on the way
        # that they are not there: five guards each, 1 % of a compiled nn.Linear(128, 64).
        **{name: getattr(host, name) for name in _LOOKED_UP if hasattr(host, name)},
    }
    return type(host.__name__, (MorphableModel, host), members)


def _check_names_are_free(net: nn.Module) -> None:
    ours = {name for name in vars(MorphableModel) if not hasattr(nn.Module, name)}
    taken = sorted(name for name in ours if not name.startswith("_") and hasattr(net, name))
    if taken:
        raise ValueError(
            f"{type(net).__name__} has attributes that a MorphableModel needs: {', '.join(taken)}"
        )


def _device_of(net: nn.Module) -> torch.device:
    parameter = next(net.parameters(), None)
    if parameter is None or parameter.is_meta:
        return torch.device("cpu")
    return parameter.device
