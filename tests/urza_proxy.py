"""A proxy that does to answers what a test wants done: it works on sockets, byte by byte."""

import socket
import socketserver
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO
from urllib.parse import urlsplit

Fault = Callable[[bytes], bytes]


class Proxy(socketserver.ThreadingTCPServer):
    """Spoils as many answers as there are ``faults``, and ends each spoilt connection.

    With ``hangs_up`` it ends a connection that it has kept when the next request comes on it, as a
    server does whose time to keep it runs out meanwhile.
    """

    daemon_threads = True

    def __init__(self, upstream: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.upstream = upstream
        self.faults: deque[Fault] = deque()
        self.hangs_up = False
        self.requests: list[bytes] = []  # their first lines


class _Connection(socketserver.StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        with socket.create_connection(self.server.upstream) as upstream:
            answers = upstream.makefile("rb")
            while request := _message(self.rfile):
                self.server.requests.append(request.partition(b"\r\n")[0])
                upstream.sendall(request)
                answer = _message(answers)
                if self.server.faults:
                    self.wfile.write(self.server.faults.popleft()(answer))
                    return
                self.wfile.write(answer)
                if self.server.hangs_up:
                    _message(self.rfile)
                    return


def _message(stream: BinaryIO) -> bytes:
    """Return a message with its body, empty at the end of the stream."""
    head = b""
    length = 0
    while line := stream.readline():
        head += line
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
        if line == b"\r\n":
            break
    return head + stream.read(length)


def lost(_: bytes) -> bytes:
    return b""


def truncated(answer: bytes) -> bytes:
    return answer[:-1]


def corrupted(answer: bytes) -> bytes:
    return answer[:-3] + bytes([answer[-3] ^ 1]) + answer[-2:]


def replaced_by(status: bytes) -> Fault:
    body = b"<html>it is me, your proxy</html>"
    return lambda _: b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


@contextmanager
def proxied(url: str) -> Iterator[tuple[Proxy, str]]:
    """Yield a proxy to the server at ``url``, and its own URL."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    with Proxy((parts.hostname, parts.port)) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.01,))
        thread.start()
        yield proxy, f"http://127.0.0.1:{proxy.server_address[1]}"
        proxy.shutdown()
        thread.join()
