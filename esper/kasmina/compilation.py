"""``esper.compile``: torch.compile block by block, so that what grows is compiled anew alone.

Blocks of one class share one cache of compiled variants. What dynamo guards on are types, shapes
and the attributes of seats, not who a block is, so the variant that one block needed serves the
others too. A seed has three variants, whatever becomes of it: in isolation (TRAINING), heard and
learning (GRAFTING, FINE_TUNING), heard and frozen (STABILIZATION, EVALUATING, FOSSILIZED).
"""

import copy
import inspect
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from esper.errors import ArtifactMismatchError, EsperError
from esper.kasmina.bank import SeedBank, SeedCells
from esper.kasmina.kernel import Kernel
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.model import MorphableModel
from esper.kasmina.morph import lend_class, own_class
from esper.kasmina.seat import Seat
from esper.kasmina.seats import SEATS, Seats

logger = logging.getLogger(__name__)

OnGermination = Literal["stall", "eager"]
Form = tuple[Any, ...]  # which seats a block has, in what state; () while all are dormant

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class BlockReport:
    """What compiling has cost one block so far. Dynamo's graphs of the backward are not counted."""

    name: str  # FQN; empty for the whole model
    class_name: str
    num_graphs: int  # compiled when this block was called, ahead ones included
    num_recompiles: int  # calls after the first compiled one that compiled again
    stall_s: float  # seconds of those recompiles, in which training stood still
    runs_compiled: bool  # False until the first compile, and while it waits for catch_up


class Blocks:
    """Blocks of one class: what is compiled for one serves all."""

    def __init__(
        self,
        class_name: str,
        on_germination: OnGermination,
        recompile_limit: int,
        options: dict[str, Any],
    ):
        self.class_name = class_name
        self.on_germination = on_germination
        self.known: set[Form] = {()}
        isolated: Any = torch.compile  # whose annotations lack what isolates
        self.run: Callable[..., Any] = isolated(
            _call, recompile_limit=recompile_limit, isolate_recompiles=True, **options
        )
        self._limit = min(recompile_limit, torch._dynamo.config.accumulated_recompile_limit)
        self._num_compiled_calls = 0

    def count(self, block: str) -> None:
        """Count one call that compiled, and warn at the last one before the limit."""
        self._num_compiled_calls += 1
        if self._num_compiled_calls == self._limit - 1:
            logger.warning(
                "block '%s': %s has %d compiled variants, and torch.compile makes no more than %d: "
                "with the next but one new variant it is left uncompiled (or raises, under "
                "fullgraph); esper.compile(..., recompile_limit=...) sets the limit",
                block,
                self.class_name,
                self._num_compiled_calls,
                self._limit,
            )


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # A function outside torch.nn, whose own modules dynamo would otherwise decline to compile.
    return module._call_impl(*args, **kwargs)


class CompiledBlock:
    """What is called instead of a block: its compiled form, or the block itself."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        model: MorphableModel,
        blocks: Blocks,
        ahead: Sequence[str],
    ):
        self.name = name
        self.module = module
        self.blocks = blocks
        self.num_graphs = 0
        self.num_recompiles = 0
        self.stall_s = 0.0
        self._kasmina = model.kasmina
        inside = {id(part): part_name for part_name, part in module.named_modules()}
        self._layers: list[tuple[str, KasminaLayer]] = [
            (inside[id(layer.default_transform)], layer)
            for layer in model.kasmina_layers.values()
            if id(layer.default_transform) in inside
        ]
        self._to_be_shown = any(layer.shapes is None for _, layer in self._layers)
        self._ahead = ahead
        self._has_run = False  # compiled
        self._form: Form = ()
        self._as_of = -1  # the transition after which the form was looked up

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Somebody compiles what the block is part of, or its layers report to observers.
        if torch.compiler.is_compiling() or self._kasmina.observing:
            return self.module._call_impl(*args, **kwargs)
        if self._to_be_shown:
            # Layers that do not know their width watch this forward, which compilers cannot trace.
            self._to_be_shown = False
            return self.module._call_impl(*args, **kwargs)
        if self._ahead and self.module.training and torch.is_grad_enabled():
            artifacts, self._ahead = self._ahead, ()
            self._compile_ahead(artifacts, args, kwargs)
        if self._as_of != self._kasmina.num_transitions:
            self._look_up_form()
        if not self.runs_compiled:
            return self.module._call_impl(*args, **kwargs)
        return self._run(self.module, args, kwargs)

    @property
    def runs_compiled(self) -> bool:
        return self.blocks.on_germination == "stall" or self._form in self.blocks.known

    def release(self) -> None:
        """Give the block back uncompiled."""
        del self.module._compiled_call_impl

    def catch_up(self) -> None:
        """Let the next forward compile the form that the block has."""
        self._look_up_form()
        self.blocks.known.add(self._form)

    def report(self) -> BlockReport:
        return BlockReport(
            self.name,
            self.blocks.class_name,
            self.num_graphs,
            self.num_recompiles,
            self.stall_s,
            self._has_run and self.runs_compiled,
        )

    def _look_up_form(self) -> None:
        self._as_of = self._kasmina.num_transitions
        form = tuple(
            (name, *_form_of(seat)) for name, layer in self._layers for seat in layer.occupants()
        )
        if form != self._form:
            self._form = form
            if not self.runs_compiled:
                logger.info(
                    "block '%s': runs uncompiled in its new form until catch_up()", self.name
                )

    def _run(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call the compiled code, and book what had to be compiled for that."""
        before = _num_graphs()
        start_s = time.perf_counter()
        result = self.blocks.run(module, *args, **kwargs)
        new = _num_graphs() - before
        if new and module is self.module:
            self._book(new, time.perf_counter() - start_s)
        elif new:
            self.num_graphs += new
            self.blocks.count(self.name)
        self._has_run |= module is self.module
        return result

    def _book(self, new_graphs: int, seconds: float) -> None:
        if self._has_run:
            self.num_recompiles += 1
            self.stall_s += seconds
            logger.info(
                "block '%s': compiled another variant; this step stalled for %.2f s",
                self.name,
                seconds,
            )
        self.num_graphs += new_graphs
        self.blocks.known.add(self._form)
        self.blocks.count(self.name)

    # ------------------------------------------------------------------ compiling ahead

    def _compile_ahead(self, artifacts: Sequence[str], args: Any, kwargs: Any) -> None:
        """Run a copy of the block through all forms that one seed gives it, layer by layer."""
        start_s = time.perf_counter()
        twin = copy.deepcopy(self.module)
        parts = dict(twin.named_modules())
        with torch.random.fork_rng():
            for name, layer in self._layers:
                for kernel in self._kernels(layer, artifacts):
                    self._grow_ahead(twin, parts[name], name, layer, kernel, args, kwargs)
        logger.info(
            "block '%s': compiled ahead in %.2f s", self.name, time.perf_counter() - start_s
        )

    def _kernels(self, layer: KasminaLayer, artifacts: Sequence[str]) -> Iterator[Kernel]:
        for artifact_id in artifacts:
            try:
                yield self._kasmina.load(layer, 0, artifact_id)
            except ArtifactMismatchError:
                continue

    def _grow_ahead(
        self,
        twin: nn.Module,
        host: nn.Module,
        name: str,
        layer: KasminaLayer,
        kernel: Kernel,
        args: Any,
        kwargs: Any,
    ) -> None:
        cells = SeedCells(SeedBank(layer.num_seeds, layer.device), 0, layer.num_seeds)
        seat = layer.make_seat(0, kernel, cells)
        seats = Seats()
        host.add_module(SEATS, seats)
        lend_class(host)
        for _ in _forms(seats, seat):
            self._run_ahead(twin, args, kwargs)
            self.blocks.known.add(((name, *_form_of(seat)),))
        del host._modules[SEATS]
        lend_class(host)

    def _run_ahead(self, twin: nn.Module, args: Any, kwargs: Any) -> None:
        args, kwargs = pytree.tree_map_only(Tensor, _as_leaf, (args, kwargs))
        out = self._run(twin, args, kwargs)
        tensors = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
        torch.autograd.backward([t.sum() for t in tensors])


def _num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _form_of(seat: Seat) -> Form:
    return (
        seat.seed_idx,
        seat.kernel.artifact_id,
        seat.isolated,
        seat.learns,
        seat.bypassed,
    )


def _forms(seats: Seats, seat: Seat) -> Iterator[None]:
    """Take a seat through its forms: in isolation, heard and learning, heard and frozen."""
    if seat.kernel.weights():
        seats.isolate(seat)
        yield
    seats.admit(seat)
    yield
    seat.let_learn(False)
    yield


def _as_leaf(t: Tensor) -> Tensor:
    """Return a copy from which no gradient goes further."""
    return t.detach().clone().requires_grad_(t.requires_grad)


def compile(  # noqa: A001 - as torch.compile
    model: nn.Module,
    *,
    blocks: Iterable[str] | None = None,
    ahead: Iterable[str] = (),
    on_germination: OnGermination = "stall",
    recompile_limit: int = 64,
    **torch_compile_options: Any,
) -> MorphableModel:
    """Compile a wrapped model block by block, in place, and return it.

    ``blocks`` names the modules to compile by FQN; by default these are the largest ones whose
    class occurs more than once, else the parts of containers, else the whole model. Layers outside
    of all blocks run uncompiled, as do observed steps, and the first forward if a layer's width is
    unknown. ``torch_compile_options`` go to ``torch.compile``: backend, mode, fullgraph, dynamic.

    ``ahead`` names artifacts, of the connected library, for each of which the variants of every
    layer that they fit are compiled for one seed, the layer's first, in the first training forward
    of each block; a germination there then switches to them without a stall. Anything else is
    met as ``on_germination`` says: ``"stall"`` compiles in the step that needs it, ``"eager"``
    runs the block uncompiled until :func:`catch_up`. ``recompile_limit`` is the number of variants
    that the blocks of one class may have together; the last but one is warned of.

    Raises ``TypeError`` if the model is not wrapped, ``ValueError`` for an unknown block or option,
    :class:`EsperError` for a model that is compiled already, for ``ahead`` without a library, and
    for a torch without ``isolate_recompiles`` (before 2.13).
    """
    if not isinstance(model, MorphableModel):
        raise TypeError(f"esper.compile expects a wrapped model, got {type(model).__name__}")
    if on_germination not in ("stall", "eager"):
        raise ValueError(f"on_germination must be 'stall' or 'eager', got {on_germination!r}")
    if recompile_limit < 2:
        raise ValueError(f"recompile_limit must be at least 2, got {recompile_limit}")
    if isinstance(ahead, str):
        raise TypeError(f"ahead must be a list of artifact ids, got {ahead!r}")
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        raise EsperError(f"esper.compile needs torch 2.13 or later, this is {torch.__version__}")
    kasmina, artifacts = model.kasmina, tuple(ahead)
    if kasmina.compiled_blocks:
        raise EsperError(f"{type(model).__name__} is compiled already")
    if artifacts and kasmina.library is None:
        raise EsperError("ahead needs a library: call model.connect(library) first")
    chosen = _chosen(model, blocks)
    by_class: dict[type[nn.Module], Blocks] = {}
    for name, module in chosen.items():
        cls = own_class(type(module))
        if cls not in by_class:
            by_class[cls] = Blocks(
                cls.__name__, on_germination, recompile_limit, torch_compile_options
            )
        block = CompiledBlock(name, module, model, by_class[cls], artifacts)
        kasmina.compiled_blocks.append(block)
        module._compiled_call_impl = block
    logger.info(
        "compiled block by block: %s; a germination in a form that is not compiled %s",
        ", ".join(f"'{name}'" for name in chosen),
        "stalls its step" if on_germination == "stall" else "runs uncompiled until catch_up()",
    )
    return model


def catch_up(model: MorphableModel) -> None:
    """Let the next forward compile what runs uncompiled since it germinated; it will stall."""
    for block in model.kasmina.compiled_blocks:
        block.catch_up()


def _chosen(model: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    if names is None:
        return _blocks_of(model)
    if isinstance(names, str):
        raise TypeError(f"blocks must be a list of names, got {names!r}")
    chosen = {}
    for name in names:
        if name not in modules:
            raise ValueError(f"block '{name}' is no module of {type(model).__name__}")
        chosen[name] = modules[name]
    if not chosen:
        raise ValueError("blocks must name at least one module, got none")
    return chosen


def _blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the largest repeated modules, else parts of containers, else the model itself."""
    classes = Counter(type(module) for module in model.modules() if any(module.children()))
    repeated = {cls for cls, count in classes.items() if count > 1 and cls not in _CONTAINERS}
    found: dict[str, nn.Module] = {}
    _collect("", model, repeated.__contains__, found)
    return found or {"": model}


def _collect(
    name: str,
    module: nn.Module,
    is_block: Callable[[type[nn.Module]], bool],
    found: dict[str, nn.Module],
) -> None:
    """Add the blocks at or below ``module``; single layers are too small to be one."""
    if not any(module.children()):
        return
    num_before = len(found)
    if not is_block(type(module)):
        for child_name, child in module.named_children():
            _collect(f"{name}.{child_name}" if name else child_name, child, is_block, found)
    is_callable = not isinstance(module, nn.ModuleList | nn.ModuleDict)
    if len(found) == num_before and is_callable:
        found[name] = module
