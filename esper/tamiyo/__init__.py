"""Tamiyo, the strategic controller: reads telemetry, decides, and issues commands."""

from esper.tamiyo.controller import Tamiyo
from esper.tamiyo.policy import ModelView, PlateauPolicy, Policy

__all__ = ["ModelView", "PlateauPolicy", "Policy", "Tamiyo"]
