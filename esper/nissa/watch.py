"""``esper watch FOLDER``: the report of a run while it goes on, served on this machine alone."""

import argparse
import contextlib
import hashlib
import http.server
import threading
from http import HTTPStatus
from importlib import resources
from pathlib import Path
from urllib.parse import urlsplit

import esper.command_line as command_line
from esper.nissa.journal import JournalReader
from esper.nissa.report import render_report, render_waiting

_LOCAL = "127.0.0.1"
_LOCAL_NAMES = {_LOCAL, "localhost"}
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SCRIPT = '<script src="/watch.js" defer></script>'


class WatchServer(http.server.ThreadingHTTPServer):
    """Serves the run in ``folder`` at :attr:`url` until it is shut down.

    Listens on the loopback interface alone; port 0 is a free one. It only reads, and answers no
    request that names another host: a page from elsewhere cannot look in.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__((_LOCAL, port), _Handler)
        self.script = resources.files(__package__).joinpath("watch.js").read_bytes()
        self._name = folder.resolve().name
        self._reader = JournalReader(folder)
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://{_LOCAL}:{self.server_port}/"

    def page(self) -> bytes:
        """Return the report as of now, with the script that keeps it so."""
        with self._lock:
            record = self._reader.record()
        html = render_report(record) if record else render_waiting(self._name)
        return html.replace("</head>", f"{_SCRIPT}</head>", 1).encode()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: WatchServer
    server_version, sys_version = "esper", ""

    def do_GET(self) -> None:
        if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in _LOCAL_NAMES:
            self.send_error(HTTPStatus.FORBIDDEN, "this page is for the local host")
        elif self.path == "/":
            self._send_page()
        elif self.path == "/watch.js":
            self._send(self.server.script, "text/javascript; charset=utf-8")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send_page(self) -> None:
        try:
            page = self.server.page()
        except (OSError, ValueError) as error:
            reason = "the run's record cannot be read"
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, reason, str(error))
            return
        tag = f'"{hashlib.sha256(page).hexdigest()}"'
        if self.headers.get("If-None-Match") == tag:
            self.send_response(HTTPStatus.NOT_MODIFIED)
            self.end_headers()
        else:
            self._send(page, "text/html; charset=utf-8", tag)

    def _send(self, body: bytes, kind: str, tag: str | None = None) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        """Say nothing: whoever watches asks every two seconds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="of the run, for example runs/demo")
    parser.add_argument(
        "--port",
        type=command_line.port,
        default=0,
        help="of this machine (default: a free one)",
    )


def main(options: argparse.Namespace) -> None:
    """Serve until Ctrl-C; a folder that is not there or a port that is taken is one line."""
    if not options.folder.is_dir():
        command_line.refuse(
            "watch", f"{options.folder}: there is no such folder; a run makes it when it begins"
        )
    try:
        server = WatchServer(options.folder, options.port)
    except OSError as error:
        command_line.refuse(
            "watch", f"port {options.port} of this machine cannot be served: {error}"
        )
    with server, contextlib.suppress(KeyboardInterrupt):
        print(f"{options.folder}: open {server.url} (Ctrl-C ends this, not the run)", flush=True)
        server.serve_forever()
