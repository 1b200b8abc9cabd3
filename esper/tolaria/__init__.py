"""Tolaria, the training ground: a ready-made loop, and the pieces for other people's loops."""

from esper.tolaria.evaluation import Evaluation, evaluate, measure_epoch, validate
from esper.tolaria.flops import FlopMeter, training_flops
from esper.tolaria.loop import Callback, Tolaria

__all__ = [
    "Callback",
    "Evaluation",
    "FlopMeter",
    "Tolaria",
    "evaluate",
    "measure_epoch",
    "training_flops",
    "validate",
]
