"""One block that runs compiled, and what the blocks of one class share.

What dynamo guards on are types, shapes and the attributes of seats, not who a block is, so the
variant that one block needed serves the others of its class too.
"""

import copy
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from esper.errors import ArtifactMismatchError
from esper.kasmina.background import BackgroundCompiler, BackgroundVariants, Variant
from esper.kasmina.forms import Form, form_of, num_forms
from esper.kasmina.growth import Growth, later, one_by_one, seated
from esper.kasmina.kernel import Kernel
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.model import MorphableModel

logger = logging.getLogger(__name__)

OnGermination = Literal["stall", "eager", "background"]
Place = tuple[str, int, str]  # a layer by its name in the block, a seed there, an artifact for it


@dataclass(frozen=True)
class BlockReport:
    """What compiling has cost one block so far. Dynamo's graphs of the backward are not counted."""

    name: str  # FQN; empty for the whole model
    class_name: str
    num_graphs: int  # compiled when this block was called, ahead ones included
    num_recompiles: int  # calls after the first compiled one that compiled again
    stall_s: float  # seconds of those recompiles, in which training stood still
    runs_compiled: bool  # False until the first compile, and while it waits for one
    num_pending: int  # variants that are compiled in the background, or wait for it


class Blocks:
    """Blocks of one class: what is compiled for one serves all."""

    def __init__(
        self,
        class_name: str,
        on_germination: OnGermination,
        recompile_limit: int,
        ahead_limit: int,
        options: dict[str, Any],
        compiler: BackgroundCompiler | None,
    ):
        self.class_name = class_name
        self.on_germination = on_germination
        self.known: set[Form] = {()}
        options = {**options, "recompile_limit": recompile_limit}
        isolated: Any = torch.compile  # whose annotations lack what isolates
        self.run: Callable[..., Any] = isolated(own_call(), isolate_recompiles=True, **options)
        self.compiler = compiler
        self.background = (
            None if compiler is None else BackgroundVariants(own_call(), compiler, options)
        )
        self.foreseen: dict[Place, Kernel] = {}
        self.traced_ahead: set[tuple[Place, int, Variant]] = set()
        self._ahead_limit = ahead_limit
        self._limit = min(recompile_limit, torch._dynamo.config.accumulated_recompile_limit)
        self._num_compiled_calls = 0

    def may_compile(self, form: Form) -> bool:
        """Whether what is missing for a form may be compiled in the step that needs it."""
        return self.on_germination == "stall" or form in self.known

    def looks_ahead(self) -> bool:
        """Whether there is a child that may compile what may germinate."""
        return self.background is not None and self._ahead_limit > 0

    def may_foresee(self, place: Place) -> bool:
        has_room = place in self.foreseen or len(self.foreseen) < self._ahead_limit
        return self.looks_ahead() and has_room

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


def own_call() -> Callable[..., Any]:
    """Return a function that calls a module, with code that no other function has.

    Dynamo's accumulated limit counts the variants of one code object, whoever they are isolated for.
    """
    return FunctionType(_call.__code__.replace(), globals(), _call.__name__)


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
        self._is_in_cache = False  # the variant that was called last; in the background alone
        self._to_trace: deque[Growth] = deque()  # forms to come
        self._foreseen: deque[tuple[Place, int, Growth]] = deque()  # forms that may come
        self._places: set[Place] = set()  # of what may come

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Somebody compiles what the block is part of, or its layers report to observers.
        if torch.compiler.is_compiling() or self._kasmina.observing:
            return self.module._call_impl(*args, **kwargs)
        if self._to_be_shown:
            # Layers that do not know their width watch this forward, which compilers cannot trace.
            self._to_be_shown = False
            return self.module._call_impl(*args, **kwargs)
        if self._ahead and self._is_training():
            artifacts, self._ahead = self._ahead, ()
            self._grow_ahead(artifacts, args, kwargs)
        if self._as_of != self._kasmina.num_transitions:
            self._look_up_form()
        if self._foreseen and self._has_run and self._is_training():
            self._look_ahead(args, kwargs)
        if self.blocks.may_compile(self._form):
            return self._run(self.module, args, kwargs)
        if self.blocks.background is not None:
            return self._call_in_background(self.blocks.background, args, kwargs)
        return self.module._call_impl(*args, **kwargs)

    @property
    def runs_compiled(self) -> bool:
        return self._is_in_cache or self.blocks.may_compile(self._form)

    def release(self) -> None:
        """Give the block back uncompiled."""
        del self.module._compiled_call_impl
        if self.blocks.compiler is not None:
            self.blocks.compiler.close()

    def catch_up(self) -> None:
        """Let the next forward compile the form that the block has."""
        self._look_up_form()
        self.blocks.known.add(self._form)

    def looks_ahead(self) -> bool:
        """Whether :meth:`foresee` does anything."""
        return self.blocks.looks_ahead()

    def foresee(self, layer: KasminaLayer, seed_idx: int, artifact_id: str) -> None:
        """Have what a germination would make of the block compiled, as long as it is dormant.

        The kernel is loaded here; the training thread will trace one form at a time, whenever the
        child has nothing else to do. Any thread, but one at a time. Raises :class:`EsperError` if
        the kernel cannot be loaded.
        """
        name = next((name for name, inside in self._layers if inside is layer), None)
        if name is None or self._form:
            return
        place = (name, seed_idx, artifact_id)
        if place in self._places or not self.blocks.may_foresee(place):
            return
        kernel = self.blocks.foreseen.get(place)
        if kernel is None:
            kernel = self._kasmina.loads.load(layer, seed_idx, artifact_id)
            self.blocks.foreseen[place] = kernel
        growths = one_by_one(seated(name, layer, seed_idx, kernel), num_forms(kernel))
        self._foreseen.extend((place, *numbered) for numbered in enumerate(growths))
        self._places.add(place)

    def report(self) -> BlockReport:
        return BlockReport(
            self.name,
            self.blocks.class_name,
            self.num_graphs,
            self.num_recompiles,
            self.stall_s,
            self._has_run and self.runs_compiled,
            0
            if self.blocks.background is None
            else self.blocks.background.num_pending + len(self._foreseen),
        )

    def _is_training(self) -> bool:
        return self.module.training and torch.is_grad_enabled()

    def _look_up_form(self) -> None:
        self._as_of = self._kasmina.num_transitions
        form = form_of((name, layer.default_transform) for name, layer in self._layers)
        if form == self._form:
            return
        self._form = form
        self._is_in_cache = False
        self._places.clear()
        self._foreseen.clear()
        if self.blocks.may_compile(form):
            self._to_trace.clear()
        elif self.blocks.background is not None:
            self._to_trace = deque(self._growths_to_come())
        else:
            logger.info("block '%s': runs uncompiled in its new form until catch_up()", self.name)

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
        if self.blocks.background is None:
            self.blocks.known.add(self._form)
        self.blocks.count(self.name)

    # ------------------------------------------------------------------ in the background

    def _call_in_background(self, background: BackgroundVariants, args: Any, kwargs: Any) -> Any:
        """Run compiled if the variant is in the cache, else uncompiled, traced the first time."""
        variant = _variant(self._form, self.module, args, kwargs)
        if not background.is_known(variant):
            logger.info("block '%s': runs uncompiled until a child has compiled it", self.name)
            return self._trace(background, variant, self.module, args, kwargs)
        if self._to_trace and self._is_training():  # the present form first, and one in a step
            self._run_copy(self._to_trace.popleft(), args, kwargs)
        self._is_in_cache = background.is_ready(variant)
        if self._is_in_cache:
            return self._run_from_cache(args, kwargs)
        error = background.take_failure(variant)
        if error is not None:
            logger.warning(
                "block '%s': runs uncompiled until catch_up(), since it could not be compiled in "
                "the background: %s",
                self.name,
                error,
            )
        return self.module._call_impl(*args, **kwargs)

    def _run_from_cache(self, args: Any, kwargs: Any) -> Any:
        misses = _num_cache_misses()
        out = self._run(self.module, args, kwargs)
        if _num_cache_misses() > misses:
            logger.warning(
                "block '%s': what was compiled in the background was not found in Inductor's cache",
                self.name,
            )
        return out

    def _trace(
        self,
        background: BackgroundVariants,
        variant: Variant,
        module: nn.Module,
        args: Any,
        kwargs: Any,
    ) -> Any:
        start_s = time.perf_counter()
        out = background.trace(variant, module, args, kwargs)
        seconds = time.perf_counter() - start_s
        self.stall_s += seconds
        logger.info("block '%s': traced a variant in %.2f s", self.name, seconds)
        return out

    def _growths_to_come(self) -> Iterator[Growth]:
        """Yield what makes of a copy of the block each of the forms that its seats will give it."""
        for name, layer in self._layers:
            for seat in layer.occupants():
                yield from one_by_one(later(name, seat.seed_idx), seat.isolated + seat.learns)

    def _look_ahead(self, args: Any, kwargs: Any) -> None:
        """Have the child compile one form that may come, if it has nothing to do.

        Nothing has germinated yet, so that whatever goes wrong is no reason to end training.
        """
        assert self.blocks.compiler is not None
        while self._foreseen and self.blocks.compiler.is_idle():
            place, number, growth = self._foreseen.popleft()
            ahead = (place, number, _variant(self._form, self.module, args, kwargs))
            if ahead in self.blocks.traced_ahead:
                continue
            self.blocks.traced_ahead.add(ahead)
            try:
                self._run_copy(growth, args, kwargs)
            except Exception:
                self._foreseen.clear()
                logger.exception("block '%s': what may germinate is not compiled ahead", self.name)
            return

    # ------------------------------------------------------------------ copies in other forms

    def _grow_ahead(self, artifacts: Sequence[str], args: Any, kwargs: Any) -> None:
        """Run a copy of the block through all forms that one seed gives it, layer by layer."""
        start_s = time.perf_counter()
        for name, layer in self._layers:
            for kernel in self._kernels(layer, artifacts):
                self._run_copy(seated(name, layer, 0, kernel), args, kwargs)
        logger.info(
            "block '%s': %s ahead in %.2f s",
            self.name,
            "compiled" if self.blocks.background is None else "traced",
            time.perf_counter() - start_s,
        )

    def _kernels(self, layer: KasminaLayer, artifacts: Sequence[str]) -> Iterator[Kernel]:
        for artifact_id in artifacts:
            try:
                yield self._kasmina.loads.load(layer, 0, artifact_id)
            except ArtifactMismatchError:
                continue

    def _run_copy(self, growth: Growth, args: Any, kwargs: Any) -> None:
        """Compile, or have compiled, the forms through which ``growth`` takes a copy of the block."""
        twin = copy.deepcopy(self.module)
        parts = dict(twin.named_modules())
        layers = [(name, parts[name]) for name, _ in self._layers]
        args, kwargs = pytree.tree_map_only(Tensor, _as_leaf, (args, kwargs))
        with torch.random.fork_rng():
            for _ in growth(twin):
                self._prepare(twin, form_of(layers), args, kwargs)

    def _prepare(self, twin: nn.Module, form: Form, args: Any, kwargs: Any) -> None:
        if self.blocks.background is None:
            _backward(self._run(twin, args, kwargs))
            self.blocks.known.add(form)
            return
        variant = _variant(form, twin, args, kwargs)
        if not self.blocks.background.is_known(variant):
            self._trace(self.blocks.background, variant, twin, args, kwargs)


def _num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _num_cache_misses() -> int:
    return int(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_miss"])


def _variant(form: Form, module: nn.Module, args: Any, kwargs: Any) -> Variant:
    """Return what a compiled block depends on, as far as it may change from call to call."""
    inputs = tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.requires_grad)
        for leaf in pytree.tree_leaves((args, kwargs))
        if isinstance(leaf, Tensor)
    )
    return form, module.training, torch.is_grad_enabled(), inputs


def _backward(out: Any) -> None:
    tensors = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
    torch.autograd.backward([t.sum() for t in tensors])


def _as_leaf(t: Tensor) -> Tensor:
    """Return a copy from which no gradient goes further."""
    return t.detach().clone().requires_grad_(t.requires_grad)
