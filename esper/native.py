"""The autograd functions in C++, where they fit the torch that runs.

They spare eager mode the way through Python, which for small tensors takes longer than the work.
They are bound to the torch that they were built with: with another one :data:`autograd` is None,
and what they do is done in Python.
"""

import importlib
from types import ModuleType

import torch

from esper._host import AUTOGRAD_TORCH


def _fitting() -> ModuleType | None:
    if str(torch.__version__) != AUTOGRAD_TORCH:
        return None
    return importlib.import_module("esper._autograd")


autograd = _fitting()
