"""The door of Urza's server: who comes in, and the one way in which anything is refused."""

import logging
from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from esper.errors import LibraryError, RoleError, TokenError, TooLargeError
from esper.urza.access import Role, Tokens
from esper.urza.failures import ERROR_OF, Failure, told

logger = logging.getLogger(__name__)

_OPEN_PATHS = frozenset({"/docs", "/openapi.json"})  # what the API is, not what the library holds


class Gate:
    """Settles whose request it is, and that it is not too large, before it is read: middleware.

    The roles go to the routes as ``request.state.roles``. Without tokens everybody on this machine
    is an operator; a web page that had its own name point here still calls us by that name, and one
    that calls us by ours still has its own origin: both are refused.
    """

    def __init__(self, app: ASGIApp, tokens: Tokens, max_body_bytes: int) -> None:
        self._app = app
        self._tokens = tokens
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            headers = Headers(scope=scope)
            try:
                scope.setdefault("state", {})["roles"] = self._roles(headers)
                if int(headers.get("content-length", 0)) > self._max_body_bytes:
                    raise self._too_large()
            except (TokenError, RoleError, TooLargeError) as error:
                await refuse(Request(scope), error)(scope, receive, send)
                return
            receive = self._limited(receive)
        await self._app(scope, receive, send)

    def _limited(self, receive: Receive) -> Receive:
        """For bodies that do not say how long they are."""
        left_bytes = self._max_body_bytes

        async def receive_some() -> Message:
            nonlocal left_bytes
            message = await receive()
            left_bytes -= len(message.get("body", b""))
            if left_bytes < 0:
                raise HTTPException(413, str(self._too_large()))  # FastAPI hides any other
            return message

        return receive_some

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"a request may have {self._max_body_bytes} bytes here, and has more")

    def _roles(self, headers: Headers) -> frozenset[Role]:
        if self._tokens:
            return self._tokens.roles(headers.get("authorization"))
        host = headers.get("host", "")
        if not is_loopback(_hostname(f"//{host}")):
            raise RoleError(f"without tokens this library is for its own machine, not for {host!r}")
        # Browsers let any page send a request without a body, and only keep the answer from it.
        origin = headers.get("origin")
        if origin is not None and not is_loopback(_hostname(origin)):
            raise RoleError(f"without tokens this library is not for pages of {origin!r}")
        return frozenset({Role.OPERATOR})


def is_loopback(host: str) -> bool:
    """Tell whether a name or an address means this machine, without looking a name up."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # half of an IPv6 address
        return ""


def refuse(request: Request, error: Exception) -> Response:
    """Answer with what went wrong, and log it: the only place where either is done."""
    status, failure = told(error)
    return _answer(request, status, failure)


def refuse_invalid(request: Request, error: Exception) -> Response:
    """The request is not what its route takes."""
    assert isinstance(error, RequestValidationError)
    faults = "; ".join(
        f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
        for fault in error.errors()
    )
    return refuse(request, ValueError(faults))


def refuse_unroutable(request: Request, error: Exception) -> Response:
    """There is no such route, or the framework has another reason for which it does not take it."""
    assert isinstance(error, HTTPException)
    kind = TooLargeError if error.status_code == 413 else LibraryError
    failure = Failure(error=kind.__name__, message=str(error.detail))
    return _answer(request, error.status_code, failure, dict(error.headers or {}))


def _answer(
    request: Request, status: int, failure: Failure, headers: dict[str, str] | None = None
) -> Response:
    logger.warning(
        "%s %r refused, %d %s: %s",
        request.method,
        request.scope["path"],
        status,
        failure.error,
        " ".join(failure.message.split()),  # one refusal, one line
    )
    if ERROR_OF.get(status) is TokenError:
        headers = {"WWW-Authenticate": "Bearer"}
    return Response(failure.canonical(), status, headers, media_type="application/json")
