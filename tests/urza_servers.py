"""Servers of Urza's in this process, on free ports of the loopback."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from esper.urza.access import Tokens
from esper.urza.server import listen, make_server


class Houses:
    """Many applications behind one port: the first part of a path says which."""

    def __init__(self) -> None:
        self.apps: dict[str, ASGIApp] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _, name, path = scope["path"].split("/", 2)
        await self.apps[name](scope | {"path": f"/{path}"}, receive, send)


@contextmanager
def served(app: Any, tokens: Tokens = Tokens([])) -> Iterator[str]:  # noqa: B008 - it is immutable
    """Yield the URL at which the application answers."""
    listener = listen("127.0.0.1", 0, tokens)
    server = make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
