"""Chooses the transport: Redis Streams where a URL says so, else embedded in this process."""

import os

from esper.oona.bus import Oona
from esper.oona.memory import MemoryBus


def connect(url: str | None = None) -> Oona:
    """Return a bus on the Redis server at ``url``, by default at ``REDIS_URL``.

    Without either, the bus is embedded in the process. Waits until the server has answered, a few
    seconds at most. Raises :class:`BusError` if it does not, ``ValueError`` for a URL that is none.
    """
    url = url or os.environ.get("REDIS_URL")
    if not url:
        return MemoryBus()
    from esper.oona.redis import RedisBus  # takes a while to import, and most do without it

    return RedisBus(url)
