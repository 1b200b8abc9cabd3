"""``esper urza``: look into a library, serve it, and make the tokens and the key that go with it.

``esper urza list`` shows what it holds; ``esper urza serve FOLDER`` serves on the loopback;
``esper urza token FILE ROLE...`` makes a token and prints it, once; ``esper urza key`` prints the
public half of the evaluator's key.
"""

import argparse
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from rich.console import Console

import esper.command_line as command_line
import esper.oona as oona
import esper.urza.listing as listing
from esper.errors import EsperError, LibraryError
from esper.oona import Oona
from esper.oona.address import parse_address
from esper.urza.access import Role, add_token, load_tokens
from esper.urza.connection import connect
from esper.urza.keys import Keys
from esper.urza.library import Urza

_PORT = 8420
_MAX_BODY_MIB = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    serve = actions.add_parser("serve", help="serve a library over HTTP")
    serve.add_argument(
        "library", nargs="?", type=Path, help="its folder (default: $URZA_URL and $URZA_BLOBS)"
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on")
    serve.add_argument("--port", type=command_line.port, default=_PORT, help="0 takes a free one")
    serve.add_argument("--tokens", type=Path, help="file of known tokens, beside $URZA_TOKENS")
    serve.add_argument(
        "--trusted-key", type=Path, help="the evaluator's public key (default: $URZA_TRUSTED_KEY)"
    )
    serve.add_argument(
        "--bus",
        action="append",
        metavar="URL",
        help="Redis server of a run whose controller may be asked; the run is called as the URL's "
        "namespace; may be given again (default: $REDIS_URL)",
    )
    serve.add_argument(
        "--max-body-mib",
        type=command_line.count_above_zero,
        default=_MAX_BODY_MIB,
        help="refuse larger requests",
    )
    serve.add_argument("--certificate", type=Path, help="PEM file, to serve over TLS")
    serve.add_argument("--certificate-key", type=Path, help="PEM file of its private key")
    serve.set_defaults(act=_serve)
    token = actions.add_parser("token", help="make a token and print it")
    token.add_argument("file", type=Path, help="where its digest is added")
    token.add_argument("role", nargs="+", type=Role, choices=list(Role), help="what it may do")
    token.set_defaults(act=_token)
    key = actions.add_parser("key", help="print the evaluator's public key, for those who trust it")
    key.add_argument(
        "private",
        nargs="?",
        type=Path,
        help="the private key, made if missing (default: $URZA_KEY)",
    )
    key.set_defaults(act=_key)
    show = actions.add_parser("list", help="show the blueprints and kernels of a library")
    show.add_argument(
        "--library",
        help="its folder, or URL of its server (default: $URZA_API_URL, else where $URZA_URL and "
        "$URZA_BLOBS say)",
    )
    show.add_argument("--json", action="store_true", help="print the whole records as JSON")
    show.set_defaults(act=_list)


def main(options: argparse.Namespace) -> None:
    """Run the chosen action; what is wrong ends in one line and exit status 2."""
    try:
        options.act(options)
    except (EsperError, ValueError, OSError) as error:
        command_line.refuse("urza", error)


def _serve(options: argparse.Namespace) -> None:
    try:
        from esper.urza.server import create_app, listen, make_server
    except ModuleNotFoundError as error:
        raise LibraryError(
            f"serving a library needs {error.name}: pip install 'esper-torch[server]'"
        ) from error
    for pem in filter(None, (options.certificate, options.certificate_key)):
        pem.open("rb").close()  # ssl does not name the file that it misses
    command_line.configure_logging("%(asctime)s %(levelname)s %(name)s: %(message)s")
    tokens = load_tokens(options.tokens)
    with (
        listen(options.host, options.port, tokens) as listener,
        Urza(options.library, trusted_key=options.trusted_key) as library,
        _buses(options.bus or filter(None, [os.environ.get("REDIS_URL")])) as buses,
    ):
        scheme = "https" if options.certificate else "http"
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(f"serving on {scheme}://{host}:{listener.getsockname()[1]}", flush=True)
        app = create_app(library, tokens, buses=buses, max_body_bytes=options.max_body_mib * 2**20)
        server = make_server(
            app, certificate=options.certificate, certificate_key=options.certificate_key
        )
        signal.signal(
            signal.SIGTERM, signal.default_int_handler
        )  # uvicorn raises it again at the end
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


@contextmanager
def _buses(urls: Iterable[str]) -> Iterator[dict[str, Oona]]:
    """Connect to the buses of runs, by their names."""
    buses: dict[str, Oona] = {}
    with ExitStack() as stack:
        for url in urls:
            run = parse_address(url).namespace
            if run in buses:
                raise ValueError(f"two buses of the namespace {run!r}, which is a run's name")
            buses[run] = stack.enter_context(closing(oona.connect(url)))
        yield buses


def _list(options: argparse.Namespace) -> None:
    with closing(connect(options.library, create=False)) as library:
        if options.json:
            print(listing.as_json(library))
        else:
            listing.show(library, Console())


def _token(options: argparse.Namespace) -> None:
    print(add_token(options.file, frozenset(options.role)))


def _key(options: argparse.Namespace) -> None:
    print(Keys(options.private).evaluator_key.trusted().pem().decode(), end="")
