"""Tolaria, the training ground: a ready-made loop, and the pieces for other people's loops."""

from esper.tolaria.evaluation import Evaluation, evaluate, evaluate_seeds
from esper.tolaria.flops import FlopMeter, training_flops
from esper.tolaria.loop import Callback, Tolaria

__all__ = [
    "Callback",
    "Evaluation",
    "FlopMeter",
    "Tolaria",
    "evaluate",
    "evaluate_seeds",
    "training_flops",
]
