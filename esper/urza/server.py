"""Urza over HTTP: one library, for trainers, forges and evaluators on other machines."""

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from esper.errors import LibraryError
from esper.oona import Oona
from esper.urza.access import Tokens
from esper.urza.failures import STATUS_OF, Failure
from esper.urza.gate import Gate, is_loopback, refuse, refuse_invalid, refuse_unroutable
from esper.urza.library import Urza
from esper.urza.metrics import Measured, Metrics
from esper.urza.routes import library_routes
from esper.urza.run_routes import run_routes

MAX_BODY_BYTES = 64 * 2**20
_BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
_DRAINING_TIME_S = 10  # that requests under way have at the end


def create_app(
    library: Urza,
    tokens: Tokens,
    *,
    buses: Mapping[str, Oona] | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """Return the ASGI application. Without tokens everyone who can reach it may do everything.

    ``buses`` leads, by name of the run, to controllers that may be asked.
    """
    app = _Application(
        title="Urza",
        summary="Esper's library of blueprints, kernels and what became of them",
        version="1",
        redoc_url=None,
        responses={status: {"model": Failure} for status in STATUS_OF.values()},
    )
    metrics = Metrics(library.forge_status)
    app.include_router(library_routes(library, by_token=bool(tokens)))
    app.include_router(run_routes(buses or {}, by_token=bool(tokens)))

    @app.get("/metrics", include_in_schema=False)
    def get_metrics() -> Response:
        return Response(metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    for kind in STATUS_OF:
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(RequestValidationError, refuse_invalid)
    app.add_exception_handler(HTTPException, refuse_unroutable)
    app.add_middleware(Gate, tokens=tokens, max_body_bytes=max_body_bytes)
    app.add_middleware(Measured, metrics=metrics)
    return app


class _Application(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """Describe numbers as they are: those that are not finite are strings."""
        description: dict[str, Any] = _with_non_finite(super().openapi())
        return description


def _with_non_finite(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_with_non_finite(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "number" and not _BOUNDS & schema.keys():
        return {"anyOf": [schema, {"enum": ["NaN", "Infinity", "-Infinity"]}]}
    return {key: _with_non_finite(value) for key, value in schema.items()}


def make_server(
    app: FastAPI, *, certificate: Path | None = None, certificate_key: Path | None = None
) -> uvicorn.Server:
    """Return what answers until SIGINT or SIGTERM, and then ends what is under way."""
    config = uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        access_log=False,  # what is refused, the gate has logged
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=_DRAINING_TIME_S,
        ssl_certfile=certificate,
        ssl_keyfile=certificate_key,
    )
    return uvicorn.Server(config)


def listen(host: str, port: int, tokens: Tokens) -> socket.socket:
    """Return a socket that listens; LibraryError off loopback without tokens, or if it cannot be.

    Port 0 is any free one.
    """
    if not (tokens or is_loopback(host)):
        raise LibraryError(
            f"{host} can be reached from other machines: serving there takes tokens, see "
            "`esper urza token`"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise LibraryError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    # Connections inherit it; asyncio does not set it for a socket that was made without a protocol,
    # and then an answer's body waits 40 ms for its head to be acknowledged.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
