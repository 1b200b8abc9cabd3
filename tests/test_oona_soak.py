"""Redis killed, frozen, filled and cut off at random: no control event is lost or applied twice.

``pytest tests/test_oona_soak.py --soak-s 600 -s`` runs it for ten minutes and prints what happened.
"""

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from redis_servers import RedisServer

from esper.config import BusSettings
from esper.contracts import HealthBatch, KernelReady, Topic
from esper.oona.redis import RedisBus

pytestmark = pytest.mark.redis

LONGEST_OUTAGE_S = 1.0
PUBLISHING_PAUSE_S = 0.01  # Redis is away for two thirds of the time, and all has to get through
SETTLING_TIME_S = 60


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    duration_s = metafunc.config.getoption("--soak-s")
    limit = pytest.mark.timeout(duration_s + 2 * SETTLING_TIME_S)
    metafunc.parametrize("duration_s", [pytest.param(duration_s, marks=limit)], ids=["soak"])


class Trainer:
    """A thread that publishes as a training loop does, and notes how long the longest call took."""

    def __init__(self, bus: RedisBus):
        self.published = 0
        self.longest_s = 0.0
        self._bus = bus
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(PUBLISHING_PAUSE_S):
            began_s = time.perf_counter()
            payload = KernelReady(artifact_id=f"{self.published:064x}")
            self._bus.publish(Topic.KERNEL_READY, "test", payload)
            self._bus.publish(Topic.SEED_HEALTH, "test", HealthBatch(signals=()))
            self.longest_s = max(self.longest_s, time.perf_counter() - began_s)
            self.published += 1


async def consume(bus: RedisBus, group: str, applied: Counter[str]) -> None:
    async for message in bus.subscribe(Topic.KERNEL_READY, group):
        assert isinstance(message.payload, KernelReady)
        applied[message.payload.artifact_id] += 1


async def kill(server: RedisServer, rest_s: float) -> None:
    await asyncio.to_thread(server.kill)
    await asyncio.sleep(rest_s)
    await asyncio.to_thread(server.start)


async def freeze(server: RedisServer, rest_s: float) -> None:
    server.freeze()
    await asyncio.sleep(rest_s)
    server.thaw()


async def fill(server: RedisServer, rest_s: float) -> None:
    with server.client() as client:
        client.config_set("maxmemory", 1)
        await asyncio.sleep(rest_s)
        client.config_set("maxmemory", 0)


async def cut_off(server: RedisServer, rest_s: float) -> None:
    with server.client() as client:
        for kind in ("normal", "pubsub"):
            client.client_kill_filter(_type=kind, skipme=True)
    await asyncio.sleep(rest_s)


async def misfortunes(server: RedisServer, rng: random.Random, until_s: float) -> Counter[str]:
    ways: list[Callable[[RedisServer, float], object]] = [kill, freeze, fill, cut_off]
    happened: Counter[str] = Counter()
    while time.monotonic() < until_s:
        way = rng.choice(ways)
        await asyncio.sleep(rng.uniform(0, LONGEST_OUTAGE_S / 2))
        await way(server, rng.uniform(0, LONGEST_OUTAGE_S))
        happened[way.__name__] += 1
    return happened


async def test_nothing_is_lost_or_applied_twice_whatever_happens_to_redis(
    redis_server: RedisServer, tmp_path: Path, duration_s: float
) -> None:
    settings = BusSettings(timeout_s=0.3, poll_s=0.1, spool_folder=tmp_path)
    publisher, *workers = (RedisBus(redis_server.url(), settings) for _ in range(3))
    applied: dict[str, Counter[str]] = {"shared": Counter(), "alone": Counter()}
    members = [(workers[0], "shared"), (workers[1], "shared"), (workers[0], "alone")]
    consumers = [asyncio.create_task(consume(bus, name, applied[name])) for bus, name in members]
    trainer = Trainer(publisher)
    try:
        happened = await misfortunes(redis_server, random.Random(0), time.monotonic() + duration_s)
    finally:
        trainer.stop()
    async with asyncio.timeout(SETTLING_TIME_S):
        await publisher.drained([Topic.KERNEL_READY])
    for bus in (publisher, *workers):
        bus.close()
    await asyncio.gather(*consumers)
    print(
        f"\n{trainer.published} control events, {dict(happened)}; "
        f"longest publish {1e3 * trainer.longest_s:.1f} ms; "
        f"telemetry dropped {publisher.stats()[Topic.SEED_HEALTH].dropped}"
    )
    expected = Counter(f"{number:064x}" for number in range(trainer.published))
    for name, seen in applied.items():
        assert seen == expected, f"group {name}: lost {expected - seen}, twice {seen - expected}"
