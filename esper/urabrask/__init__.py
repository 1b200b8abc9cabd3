"""Urabrask, the evaluation engine: the only one who may say VALIDATED."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.urabrask.evaluator import Urabrask
    from esper.urabrask.worker import UrabraskWorker

__all__ = ["Urabrask", "UrabraskWorker"]

_HOMES = {"Urabrask": "esper.urabrask.evaluator", "UrabraskWorker": "esper.urabrask.worker"}


def __getattr__(name: str) -> Any:
    """Import on first use: a candidate's process shall hold nothing of libraries and keys."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
