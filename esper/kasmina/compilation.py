"""``esper.compile``: torch.compile block by block, so that what grows is compiled anew alone."""

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch
import torch._inductor.config
from torch import nn

from esper.errors import EsperError
from esper.kasmina.background import BackgroundCompiler
from esper.kasmina.compiled_block import Blocks, CompiledBlock, OnGermination
from esper.kasmina.model import MorphableModel
from esper.kasmina.morph import own_class
from esper.kasmina.seats import SEATS

logger = logging.getLogger(__name__)

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
BACKENDS_ON_DISK = {"inductor"}  # that find in their cache what another process has compiled

_MEANWHILE = {
    "stall": "stalls its step",
    "eager": "runs uncompiled until catch_up()",
    "background": "runs uncompiled until a child process has compiled it",
}


def compile(  # noqa: A001 - as torch.compile
    model: nn.Module,
    *,
    blocks: Iterable[str] | None = None,
    ahead: Iterable[str] = (),
    on_germination: OnGermination = "stall",
    recompile_limit: int = 64,
    ahead_limit: int = 8,
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
    runs the block uncompiled until :func:`catch_up`, ``"background"`` until a child process has
    compiled it into Inductor's cache on disk, from where it is then loaded; ``ahead`` and the forms
    that a seed is still to take are compiled there, too. So is, while an :class:`esper.Pipeline`
    runs, what the controller may germinate next, before it does: for the blocks of one class at
    most ``ahead_limit`` kernels at one seed each. ``recompile_limit`` is the number of variants
    that the blocks of one class may have together; the last but one is warned of.

    Raises ``TypeError`` if the model is not wrapped, ``ValueError`` for an unknown block or option,
    :class:`EsperError` for a model that is compiled already, for ``ahead`` without a library,
    for ``"background"`` without Inductor's cache, and for a torch without ``isolate_recompiles``
    (before 2.13).
    """
    if not isinstance(model, MorphableModel):
        raise TypeError(f"esper.compile expects a wrapped model, got {type(model).__name__}")
    if on_germination not in get_args(OnGermination):
        raise ValueError(
            f"on_germination must be 'stall', 'eager' or 'background', got {on_germination!r}"
        )
    backend = torch_compile_options.get("backend", "inductor")
    if on_germination == "background" and backend not in BACKENDS_ON_DISK:
        raise ValueError(
            f"on_germination='background' needs backend='inductor', got backend={backend!r}"
        )
    if on_germination == "background" and not torch._inductor.config.fx_graph_cache:
        raise EsperError(
            "on_germination='background' needs Inductor's cache on disk, which is turned off "
            "(torch._inductor.config.fx_graph_cache)"
        )
    if recompile_limit < 2:
        raise ValueError(f"recompile_limit must be at least 2, got {recompile_limit}")
    if ahead_limit < 0:
        raise ValueError(f"ahead_limit must be at least 0, got {ahead_limit}")
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
    compiler = BackgroundCompiler() if on_germination == "background" else None
    by_class: dict[type[nn.Module], Blocks] = {}
    for name, module in chosen.items():
        cls = own_class(type(module))
        if cls not in by_class:
            by_class[cls] = Blocks(
                cls.__name__,
                on_germination,
                recompile_limit,
                ahead_limit,
                torch_compile_options,
                compiler,
            )
        block = CompiledBlock(name, module, model, by_class[cls], artifacts)
        kasmina.compiled_blocks.append(block)
        module._compiled_call_impl = block
    logger.info(
        "compiled block by block: %s; a germination in a form that is not compiled %s",
        ", ".join(f"'{name}'" for name in chosen),
        _MEANWHILE[on_germination],
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
    hosts = (module for name, module in model.named_modules() if SEATS not in name.split("."))
    classes = Counter(own_class(type(module)) for module in hosts if _parts(module))
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
    parts = _parts(module)
    if not parts:
        return
    num_before = len(found)
    if not is_block(own_class(type(module))):
        for child_name, child in parts.items():
            _collect(f"{name}.{child_name}" if name else child_name, child, is_block, found)
    is_callable = not isinstance(module, nn.ModuleList | nn.ModuleDict)
    if len(found) == num_before and is_callable:
        found[name] = module


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    """Return a module's children but its seats, which are never called."""
    return {name: child for name, child in module.named_children() if name != SEATS}
