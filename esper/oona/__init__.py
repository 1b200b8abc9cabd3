"""Oona, the message bus: typed messages on topics, in the process or over Redis Streams."""

from esper.oona.bus import Oona
from esper.oona.connect import connect
from esper.oona.memory import MemoryBus

__all__ = ["MemoryBus", "Oona", "connect"]
