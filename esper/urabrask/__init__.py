"""Urabrask, the evaluation engine: the only one who may say VALIDATED."""

from esper.urabrask.evaluator import Urabrask

__all__ = ["Urabrask"]
