"""Nissa, observability: what a run did, as a record, a report and a progress display."""

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

__all__ = [
    "AlphaSeries",
    "KernelConsidered",
    "LayerSummary",
    "ResultRow",
    "RunProgress",
    "RunRecord",
    "RunRecorder",
    "SeedSummary",
    "StepLoss",
    "result_table",
    "write_report",
]
