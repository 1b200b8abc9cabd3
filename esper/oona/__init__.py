"""Oona, the message bus: typed messages on topics, embedded in the process by default."""

from esper.oona.bus import Oona
from esper.oona.memory import MemoryBus

__all__ = ["MemoryBus", "Oona"]
