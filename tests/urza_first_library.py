"""A library as the first Esper wrote it, which knew no alembic, no leases and no archive.

``urza_schema_1`` holds its database as SQL, and its blobs. Its verdicts are signed by the key that
is made of the numbers from 0 to 31.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from esper.urza.blobs import FolderBlobs

CONTENT = Path(__file__).with_name("urza_schema_1")


def make_first_library(root: Path) -> None:
    """Put it into the folder ``root``, which is made."""
    blobs = FolderBlobs(root / "blobs")
    for file in CONTENT.iterdir():
        if file.suffix != ".sql":
            blobs.put(file.read_bytes())
    (root / "keys").mkdir()
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    (root / "keys/evaluator.pem").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    with closing(sqlite3.connect(root / "library.sqlite")) as connection:
        connection.executescript((CONTENT / "library.sql").read_text())
