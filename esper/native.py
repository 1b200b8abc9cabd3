"""The autograd functions in C++, where they fit the torch that runs.

They spare eager mode the way through Python, which for small tensors takes longer than the work.
They are bound to the torch that they were built with: with another one :data:`autograd` is None,
and what they do is done in Python.
"""

import importlib
import sys
from types import ModuleType

import torch

from esper._host import AUTOGRAD_TORCH


def _fitting() -> ModuleType | None:
    if str(torch.__version__) != AUTOGRAD_TORCH:
        return None
    return importlib.import_module("esper._autograd")


autograd = _fitting()


def serving() -> ModuleType | None:
    """Return :data:`autograd` if it may serve now: transforms and tracers know Python's alone."""
    transformed = torch._C._are_functorch_transforms_active()
    return None if transformed or _is_backward_traced() else autograd


def _is_backward_traced() -> bool:
    tracer = sys.modules.get("torch._dynamo.compiled_autograd")
    return tracer is not None and bool(tracer.compiled_autograd_enabled)
