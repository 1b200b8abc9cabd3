"""Tamiyo, the strategic controller: reads telemetry, decides, and issues commands."""

from esper.tamiyo.budget import Cost
from esper.tamiyo.controller import Tamiyo
from esper.tamiyo.plateau import PlateauPolicy
from esper.tamiyo.policy import ModelView, Policy
from esper.tamiyo.replay import replay
from esper.tamiyo.simple import ManualPolicy, RandomPolicy, ScheduledPolicy

__all__ = [
    "Cost",
    "ManualPolicy",
    "ModelView",
    "PlateauPolicy",
    "Policy",
    "RandomPolicy",
    "ScheduledPolicy",
    "Tamiyo",
    "replay",
]
