"""Requests to a server of Urza's, asked until they are answered: the client's asynchronous core."""

import asyncio
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit

import httpx

from esper.errors import LibraryError
from esper.urza.failures import failure_in, heard

logger = logging.getLogger(__name__)

Params = Mapping[str, str | Sequence[str]]  # a sequence: the name once for each

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_GATEWAY_STATUSES = frozenset({502, 503, 504})
# The server has not seen a request that ended so.
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class _GatewayError(httpx.TransportError):
    """A proxy answered in the server's stead, which may have seen the request or not."""


class Exchange:
    """One server. All methods belong to one event loop.

    Args:
        url: of the server, ``http://host:port``, with a path if a proxy puts it below one.
        token: what to show it.
        timeout_s: for which one answer is waited for.
        patience_s: for which a server that is away is asked again.
    """

    def __init__(self, url: str, token: str | None, *, timeout_s: float, patience_s: float) -> None:
        self._url = url.rstrip("/")
        self.shown_url = without_password(self._url)
        self._timeout_s, self._patience_s = timeout_s, patience_s
        # What may not be repeated has a connection of its own: one that was kept could be about to be
        # closed by the server, and then nobody knows whether the request was heard.
        tls = httpx.create_ssl_context()
        kept = httpx.Limits(max_connections=100, max_keepalive_connections=20)
        one_each = httpx.Limits(max_connections=100, max_keepalive_connections=0)
        self._kept, self._fresh = (
            httpx.AsyncClient(
                headers={} if token is None else {"Authorization": f"Bearer {token}"},
                limits=limits,
                verify=tls,
            )
            for limits in (kept, one_each)
        )

    async def ask(
        self,
        method: str,
        path: str,
        *,
        params: Params | None = None,
        body: bytes | None = None,
        repeatable: bool = True,
        patience_s: float | None = None,
    ) -> bytes:
        """Return the body of the answer, or raise the exception that it tells of.

        Without an answer a ``repeatable`` request is sent again, with growing pauses; another one
        only if it cannot have reached the server. LibraryError when the patience, by default the
        exchange's own, is over. A patience that is given bounds the wait for an answer as well.
        """
        deadline_s = time.monotonic() + (self._patience_s if patience_s is None else patience_s)
        pauses_s = _pauses_s()
        http = self._kept if repeatable else self._fresh
        while True:
            timeout_s = self._timeout_s
            if patience_s is not None:
                timeout_s = min(timeout_s, deadline_s - time.monotonic())
            try:
                return await self._ask_once(http, method, path, params, body, timeout_s)
            except httpx.RequestError as error:
                pause_s = next(pauses_s)
                may_repeat = repeatable or isinstance(error, _NEVER_SENT)
                if not may_repeat or time.monotonic() + pause_s > deadline_s:
                    reason = str(error) or type(error).__name__
                    raise LibraryError(f"{method} {self.shown_url}{path}: {reason}") from error
                logger.debug("%s %s is asked again: %r", method, path, error)
            await asyncio.sleep(pause_s)

    async def close(self) -> None:
        await self._kept.aclose()
        await self._fresh.aclose()

    async def _ask_once(
        self,
        http: httpx.AsyncClient,
        method: str,
        path: str,
        params: Params | None,
        body: bytes | None,
        timeout_s: float,
    ) -> bytes:
        headers = {} if body is None else {"Content-Type": "application/json"}
        response = await http.request(
            method,
            f"{self._url}{path}",
            params=params,
            content=body,
            headers=headers,
            timeout=timeout_s,
        )
        if response.is_success:
            return response.content
        if response.status_code in _GATEWAY_STATUSES and failure_in(response.content) is None:
            raise _GatewayError(f"answered by {response.status_code} {response.reason_phrase}")
        what = f"{method} {self.shown_url}{path}"
        raise heard(response.status_code, response.content, what)


def without_password(url: str) -> str:
    """Return the URL for people to see."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    name, colon, _ = user.partition(":")
    return parts._replace(netloc=f"{name}{colon and ':***'}{at}{host}").geturl()


def _pauses_s() -> Iterator[float]:
    """Yield growing pauses, each of a random length: clients of a server that was away spread."""
    longest_s = _FIRST_PAUSE_S
    while True:
        yield random.uniform(longest_s / 2, longest_s)
        longest_s = min(2 * longest_s, _LONGEST_PAUSE_S)
