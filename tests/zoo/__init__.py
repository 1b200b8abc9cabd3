"""Kernels for the evaluator's gauntlet: hostile and broken ones, and honest ones.

Each module is one specimen, and its docstring says what is special about it. ``artifact()`` makes
the artifact, a residual MLP where it is missing; ``load(manifest, files)`` makes the kernel in the
candidate's process, where it is missing the artifact's own loader does. A hostile one names the
``CHECK`` that it must fail and a pattern of the ``REASON``.
"""

import importlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType

from torch import Tensor, nn
from urabrask_artifacts import Artifact, residual_mlp

from esper.contracts import KernelManifest
from esper.kasmina.kernel import Kernel
from esper.urabrask.questions import KERNEL_LOADER

FOLDER = Path(__file__).parent

Forward = Callable[[Kernel, Tensor, Tensor], object]
Loader = Callable[[KernelManifest, dict[str, bytes]], nn.Module]

__all__ = ["Kernel", "behaving", "names", "rightly", "specimen"]


def behaving(forward: Forward) -> Loader:
    """Make a loader of what the kernel does instead of its own forward."""

    def load(manifest: KernelManifest, files: dict[str, bytes]) -> nn.Module:
        kernel = Kernel.build(manifest, files)
        kernel.forward = partial(forward, kernel)  # type: ignore[method-assign]
        return kernel

    return load


def rightly(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    return kernel.call(inp, act, kernel.weights())


def names(kind: str) -> list[str]:
    """Return the names of all ``hostile`` or ``honest`` specimens."""
    return sorted(path.stem for path in (FOLDER / kind).glob("*.py") if path.stem != "__init__")


@cache
def specimen(kind: str, name: str) -> tuple[ModuleType, Artifact, str]:
    """Return a specimen's module, its artifact and the import path of its loader."""
    module = importlib.import_module(f"zoo.{kind}.{name}")
    make: Callable[[], Artifact] = getattr(module, "artifact", residual_mlp)
    loader = f"{module.__name__}:load" if hasattr(module, "load") else KERNEL_LOADER
    return module, make(), loader
