"""Nissa, observability: what a run did, as a record, a report, a live page, metrics and logs."""

import importlib
from typing import TYPE_CHECKING, Any

from esper.nissa.logs import JsonFormatter, log_events
from esper.nissa.progress import RunProgress, result_table
from esper.nissa.record import (
    AlphaSeries,
    KernelConsidered,
    LayerSummary,
    ResultRow,
    RunRecord,
    RunRecorder,
    SeedSummary,
    StepLoss,
)
from esper.nissa.report import write_report
from esper.nissa.run import Run

if TYPE_CHECKING:
    from esper.nissa.metrics import Metrics
    from esper.nissa.tensorboard import TensorBoardWriter

_OPTIONAL = {"Metrics": "esper.nissa.metrics", "TensorBoardWriter": "esper.nissa.tensorboard"}

__all__ = [
    "AlphaSeries",
    "JsonFormatter",
    "KernelConsidered",
    "LayerSummary",
    "Metrics",
    "ResultRow",
    "Run",
    "RunProgress",
    "RunRecord",
    "RunRecorder",
    "SeedSummary",
    "StepLoss",
    "TensorBoardWriter",
    "log_events",
    "result_table",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import what needs an extra when it is first used."""
    if name not in _OPTIONAL:
        raise AttributeError(f"module 'esper.nissa' has no attribute {name!r}")
    return getattr(importlib.import_module(_OPTIONAL[name]), name)
