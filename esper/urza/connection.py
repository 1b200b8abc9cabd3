"""Opens a library, wherever it lies."""

import os
from pathlib import Path

from esper.errors import LibraryError
from esper.urza.library import Urza
from esper.urza.protocol import Library

_PATIENCE_S = 10.0  # enough for a server that is just being started


def connect(place: Path | str | None = None, *, create: bool = True) -> Library:
    """Open the library in a folder, or behind the server at an ``http://`` or ``https://`` URL.

    Without ``place`` it is behind ``URZA_API_URL``, and without that where ``URZA_URL`` and
    ``URZA_BLOBS`` say. ValueError if nothing says it, LibraryError if it cannot be used. A library
    that is not there is made, or without ``create`` LibraryError; a server always has one, and is
    waited for, ten seconds at most.
    """
    url = os.environ.get("URZA_API_URL") if place is None else str(place)
    if url is not None and (place is None or url.startswith(("http://", "https://"))):
        return _client(url)
    return Urza(place, create=create)


def _client(url: str) -> Library:
    try:
        from esper.urza.client import UrzaClient
    except ModuleNotFoundError as error:
        raise LibraryError(
            f"a library behind a server needs {error.name}: pip install 'esper-torch[client]'"
        ) from error
    client = UrzaClient(url)
    try:
        client.reach(patience_s=_PATIENCE_S)
    except BaseException:
        client.close()
        raise
    return client
