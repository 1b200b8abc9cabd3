"""Urabrask, the evaluation engine: the only one who may say VALIDATED."""

from esper.urabrask.evaluator import Urabrask
from esper.urabrask.worker import UrabraskWorker

__all__ = ["Urabrask", "UrabraskWorker"]
