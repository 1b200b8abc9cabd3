"""Work under a lease: it is renewed while the work lasts, and the work ends when it is lost."""

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from esper.errors import LeaseError, LibraryError

logger = logging.getLogger(__name__)

_RENEWALS_PER_LEASE = 3
_ResultT = TypeVar("_ResultT")


def unique_owner(role: str) -> str:
    """Return a name for an owner of leases, that tells people where it is."""
    return f"{role}@{socket.gethostname()}:{os.getpid()}-{secrets.token_hex(3)}"


async def while_leased(
    work: Coroutine[Any, Any, _ResultT], renew: Callable[[float], None], lease_s: float
) -> _ResultT:
    """Return what comes of ``work``; ``renew(lease_s)`` is called in a thread, time and again.

    Raises LeaseError if somebody else has taken the lease over; the work is then cancelled, and
    has ended. A library that cannot be reached is asked again: it may be back in time.
    """
    working = asyncio.create_task(work)
    renewing = asyncio.create_task(_renew_again_and_again(renew, lease_s))
    try:
        await asyncio.wait({working, renewing}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else renewing.result()
    finally:
        working.cancel()
        renewing.cancel()
        await asyncio.gather(working, renewing, return_exceptions=True)


async def _renew_again_and_again(renew: Callable[[float], None], lease_s: float) -> NoReturn:
    while True:
        await asyncio.sleep(lease_s / _RENEWALS_PER_LEASE)
        try:
            await asyncio.to_thread(renew, lease_s)
        except LeaseError:
            raise
        except (LibraryError, OSError) as error:
            logger.warning("a lease was not renewed: %s", error)
