"""Where a library can lie, as fixtures: SQLite and a folder, PostgreSQL and S3, behind a server.

``urza`` is an empty library and ``place`` says where it is; tests that take either run once for
each, but for those marked ``LOCAL``. All servers are real ones, on free ports of the loopback; they start when the first test
asks for them and stop with the session. What cannot be had is skipped with the reason.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pytest
from sqlalchemy import Connection, create_engine, make_url, text
from sqlalchemy.exc import OperationalError
from urza_servers import Houses, served

from esper.urza import Library, Urza
from esper.urza.access import Tokens
from esper.urza.client import UrzaClient
from esper.urza.server import create_app

START_TIMEOUT_S = 60
BUCKET = "esper"
# What aiobotocore needs to ask the test's server and no other.
S3_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tester",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@dataclass(frozen=True)
class Place:
    """The parts of one library, and the ways to tamper with them behind its back."""

    url: str
    blobs: str
    key_path: Path

    def open(self) -> Library:
        return Urza(url=self.url, blobs=self.blobs, key_path=self.key_path)

    def environment(self) -> dict[str, str]:
        """What has a process open it."""
        return {"URZA_URL": self.url, "URZA_BLOBS": self.blobs, "URZA_KEY": str(self.key_path)}

    @contextmanager
    def tampering(self) -> Iterator[Connection]:
        """A transaction in which neither triggers nor foreign keys count."""
        url = make_url(self.url)
        engine = create_engine(url)
        with engine.begin() as connection:
            if url.get_backend_name() == "postgresql":
                connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
            else:
                for verb in ("UPDATE", "DELETE"):
                    connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS audit_log_refuses_{verb}")
            yield connection
        engine.dispose()

    def execute(self, statement: str, **values: object) -> None:
        """Change the database behind the library's back."""
        with self.tampering() as connection:
            connection.execute(text(statement), values)

    def write_blob(self, digest: str, data: bytes) -> None:
        store, key = self._blob(digest)
        store.pipe_file(key, data)

    def remove_blob(self, digest: str) -> None:
        store, key = self._blob(digest)
        store.rm_file(key)

    def _blob(self, digest: str) -> tuple[fsspec.AbstractFileSystem, str]:
        return fsspec.url_to_fs(f"{self.blobs}/{digest[:2]}/{digest}", use_listings_cache=False)


@dataclass(frozen=True)
class RemotePlace(Place):
    """The same behind a server, which has the key's file but not its private half's use."""

    api_url: str

    def open(self) -> Library:
        return UrzaClient(self.api_url, key_path=self.key_path)

    def environment(self) -> dict[str, str]:
        return {"URZA_API_URL": self.api_url, "URZA_KEY": str(self.key_path)}


def sqlite_place(root: Path) -> Place:
    """The place that ``Urza(root)`` opens."""
    return Place(
        url=f"sqlite:///{root}/library.sqlite",
        blobs=str(root / "blobs"),
        key_path=root / "keys/evaluator.pem",
    )


@pytest.fixture(autouse=True)
def _no_library_of_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "URZA_URL",
        "URZA_BLOBS",
        "URZA_KEY",
        "URZA_TRUSTED_KEY",
        "URZA_API_URL",
        "URZA_API_TOKEN",
        "URZA_TOKENS",
    ):
        monkeypatch.delenv(name, raising=False)


# For what only who has the database in hand can do or see.
LOCAL = pytest.mark.parametrize("place", ["sqlite+folder", "postgres+s3"], indirect=True)


@pytest.fixture(params=["sqlite+folder", "postgres+s3", "http"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Where a library may be made; there is none yet."""
    if request.param == "sqlite+folder":
        yield sqlite_place(tmp_path / "library")
    elif request.param == "postgres+s3":
        server = request.getfixturevalue("postgres_server")
        blobs = request.getfixturevalue("s3_bucket")
        name = f"urza_{uuid.uuid4().hex}"
        yield Place(
            url=make_schema(server, name),
            blobs=f"{blobs}/{name}",
            key_path=tmp_path / "evaluator.pem",
        )
    else:
        houses, url = request.getfixturevalue("server_of_many")
        behind = sqlite_place(tmp_path / "library")
        with Urza(url=behind.url, blobs=behind.blobs, key_path=behind.key_path) as library:
            name = uuid.uuid4().hex
            houses.apps[name] = create_app(library, Tokens([]))
            yield RemotePlace(behind.url, behind.blobs, behind.key_path, f"{url}/{name}")
            del houses.apps[name]


@pytest.fixture(scope="session")
def server_of_many() -> Iterator[tuple[Houses, str]]:
    """A server that is started once, for libraries that come and go, each below a path."""
    houses = Houses()
    with served(houses) as url:
        yield houses, url


@pytest.fixture
def urza(place: Place) -> Iterator[Library]:
    with closing(place.open()) as library:
        yield library


def make_schema(server: str, name: str) -> str:
    """Return the URL of an empty schema, which is as good as a database and made much faster."""
    engine = create_engine(server)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    engine.dispose()
    return f"{server}?options=-csearch_path%3D{name}"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a database on a PostgreSQL server, of a user who may do everything."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL: initdb is not on PATH, and pgserver is not installed")
    if find_spec("psycopg") is None:
        pytest.skip("no driver for PostgreSQL: psycopg is not installed")
    user = server_user()
    folder = Path(tempfile.mkdtemp(prefix="esper-postgres-"))
    try:
        if user is not None:
            shutil.chown(folder, user)
        data, port = folder / "data", free_port()
        run = {"user": user, "cwd": folder, "stdout": subprocess.DEVNULL}
        initialise = [programs / "initdb", "-D", data, "-U", "esper", "-A", "trust", "-E", "UTF8"]
        subprocess.run([*initialise, "--no-sync"], check=True, **run)
        serve = [programs / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1"]
        settings = ["-c", "fsync=off", "-c", "max_connections=300", "-k", folder]
        with (
            (folder / "log").open("wb") as log,
            stopped(
                subprocess.Popen([*serve, *settings], stderr=log, **run), signal.SIGQUIT
            ) as server,
        ):
            url = f"postgresql+psycopg://esper@127.0.0.1:{port}/postgres"
            wait_until(lambda: accepts_sql(url), server, folder / "log")
            yield url
    finally:
        shutil.rmtree(folder)


def postgres_programs() -> Path | None:
    """Return the folder of initdb and postgres: the system's, else the one that pgserver has."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin")):
        return folder
    package = find_spec("pgserver")
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parent / "pginstall/bin"


def server_user() -> str | None:
    """PostgreSQL refuses to run as root; a user without rights is there on every system."""
    return "nobody" if os.getuid() == 0 else None


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """URL of an empty bucket on an S3 server that the environment points to."""
    for module in ("moto", "s3fs"):
        if find_spec(module) is None:
            pytest.skip(f"no S3: {module} is not installed")
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.NamedTemporaryFile() as log,
        stopped(subprocess.Popen(command, stdout=log, stderr=log), signal.SIGTERM) as server,
    ):
        for name, value in S3_CREDENTIALS.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        wait_until(lambda: accepts_connections(port), server, Path(log.name))
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield f"s3://{BUCKET}"


@contextmanager
def stopped(
    process: subprocess.Popen[bytes], by: signal.Signals
) -> Iterator[subprocess.Popen[bytes]]:
    """Stop a server at the end of the block, by a signal that it obeys at once."""
    try:
        yield process
    finally:
        process.send_signal(by)
        process.wait(START_TIMEOUT_S)


def wait_until(ready: Callable[[], bool], server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{server.args} did not start: {log.read_text(errors='replace')}")
        time.sleep(0.05)


def accepts_sql(url: str) -> bool:
    engine = create_engine(url)
    try:
        engine.connect().close()
    except OperationalError:
        return False
    finally:
        engine.dispose()
    return True


def accepts_connections(port: int) -> bool:
    with closing(socket.socket()) as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
