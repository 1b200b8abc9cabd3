"""Whose turn it is to measure: one benchmark at a time for each device of a machine."""

import asyncio
import fcntl
import logging
import os
import re
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.05


def lock_path(device: str) -> Path:
    """Return the file that this user's evaluators for ``device`` on this machine lock."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if device == "cuda" else ""
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{device} {visible}").strip("-")
    return Path(tempfile.gettempdir()) / f"esper-{os.getuid()}-{name}.lock"


@asynccontextmanager
async def device_to_itself(device: str) -> AsyncIterator[None]:
    """Keep other evaluators, of any process, from measuring on ``device`` meanwhile.

    The kernel unlocks the file when its holder dies.
    """
    descriptor = os.open(lock_path(device), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _try_lock(descriptor):
            logger.debug("another evaluator is measuring on %s", device)
            # A thread that waits in flock could not be cancelled.
            while not _try_lock(descriptor):  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_EVERY_S)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
