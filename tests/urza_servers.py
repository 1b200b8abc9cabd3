"""Servers of Urza's on the loopback, in this process or in one of their own."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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


def start_server(folder: Path, port: int, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "esper", "urza", "serve", str(folder), "--port", str(port)]
    server = subprocess.Popen([*command, *options], stdout=subprocess.PIPE)
    assert server.stdout is not None
    line = server.stdout.readline().decode()
    assert line.startswith("serving on http://"), line
    return server
