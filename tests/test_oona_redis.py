"""The bus over Redis when things go wrong: a server absent, killed, frozen, emptied, full or late."""

import asyncio
import contextlib
import logging
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from redis.exceptions import OutOfMemoryError
from redis_servers import LateProxy, RedisServer

from esper.config import BusSettings
from esper.contracts import HealthBatch, KernelReady, OonaMessage, Topic
from esper.errors import BusError
from esper.oona import MemoryBus, connect
from esper.oona.address import parse_address
from esper.oona.redis import RedisBus
from esper.oona.spool import Spool, read_spool
from esper.oona.streams import Streams, Taken

pytestmark = pytest.mark.redis

PATIENCE_S = 20
WORKER = Path(__file__).with_name("oona_worker_child.py")
STREAM = f"{{esper}}:stream:{Topic.KERNEL_READY}"
DEAD = f"{{esper}}:dead:{Topic.KERNEL_READY}"
QUICK = BusSettings(timeout_s=0.3, poll_s=0.05, lease_s=0.3)


def ready(number: int) -> KernelReady:
    return KernelReady(artifact_id=f"{number:064x}")


def number(message: OonaMessage) -> int:
    assert isinstance(message.payload, KernelReady)
    return int(message.payload.artifact_id, 16)


Open = Callable[..., RedisBus]


@pytest.fixture
def open_bus(redis_server: RedisServer, tmp_path: Path) -> Iterator[Open]:
    """Open buses that lose patience soon; they are closed at the end."""
    made: list[RedisBus] = []

    def make(url: str | None = None, **changes: object) -> RedisBus:
        settings = QUICK.model_copy(update={"spool_folder": tmp_path / "log", **changes})
        made.append(RedisBus(url or redis_server.url(), settings))
        return made[-1]

    yield make
    for bus in made:
        bus.close()


async def take(stream: AsyncGenerator[OonaMessage, None], count: int) -> list[int]:
    """Return the next messages; the last one is not acknowledged."""
    async with asyncio.timeout(PATIENCE_S):
        return [number(await anext(stream)) for _ in range(count)]


async def eventually(condition: Callable[[], bool]) -> None:
    """Look again and again: what Redis knows cannot be awaited."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def soon(work: Awaitable[None]) -> None:
    await asyncio.wait_for(work, PATIENCE_S)


@contextlib.contextmanager
def child(program: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, program, *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def publish(bus: RedisBus, *numbers: int) -> None:
    for each in numbers:
        bus.publish(Topic.KERNEL_READY, "test", ready(each))


# ------------------------------------------------------------------ connecting


def test_an_absent_server_is_one_clear_error_without_the_password() -> None:
    with pytest.raises(BusError, match=r"cannot reach Redis at redis://me:\*\*\*@127.0.0.1:1/0"):
        connect("redis://me:secret@127.0.0.1:1/0")


def test_the_environment_chooses_the_transport(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(connect(), MemoryBus)
    monkeypatch.setenv("REDIS_URL", redis_server.url())
    bus = connect()
    assert isinstance(bus, RedisBus)
    bus.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "http://localhost",
            "the bus is at redis://, rediss:// or unix://, got 'http://localhost'",
        ),
        ("redis://:pw@h?namespace=", "a namespace is not empty and holds no braces, got ''"),
        ("redis://h?namespace={a}", "a namespace is not empty and holds no braces, got '{a}'"),
    ],
)
def test_a_bad_url_is_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        parse_address(url)


def test_an_address_hides_every_password_and_keeps_what_redis_py_reads() -> None:
    address = parse_address("unix://u:one@/run/redis.sock?password=two&db=3&namespace=run-7")
    assert address.namespace == "run-7"
    assert address.shown == "unix://u:***@/run/redis.sock?password=***&db=3"
    assert address.url == "unix://u:one@/run/redis.sock?password=two&db=3"


async def test_namespaces_hear_nothing_of_each_other(
    redis_server: RedisServer, open_bus: Open
) -> None:
    one, other = open_bus(redis_server.url("one")), open_bus(redis_server.url("other"))
    publish(one, 1)
    publish(other, 2)
    assert await take(other.subscribe(Topic.KERNEL_READY, "g"), 1) == [2]
    assert await take(one.subscribe(Topic.KERNEL_READY, "g"), 1) == [1]


async def test_a_consumer_that_waits_does_not_have_redis_asked_all_the_time(
    open_bus: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Topic] = []
    take_entries = Streams.take

    async def counted(streams: Streams, topic: Topic, group: str, count: int) -> list[Taken]:
        asked.append(topic)
        return await take_entries(streams, topic, group, count)

    monkeypatch.setattr(Streams, "take", counted)
    bus = open_bus(poll_s=PATIENCE_S)
    idle = bus.subscribe(Topic.BLUEPRINT_SUBMITTED, "idle")
    waiting = asyncio.create_task(anext(idle))
    await eventually(lambda: Topic.BLUEPRINT_SUBMITTED in asked)
    busy = bus.subscribe(Topic.KERNEL_READY, "busy")
    for each in range(30):  # meanwhile
        publish(bus, each)
        assert await take(busy, 1) == [each]
    assert asked.count(Topic.BLUEPRINT_SUBMITTED) < 10
    assert not waiting.done()
    bus.close()
    with pytest.raises(StopAsyncIteration):
        await waiting


# ------------------------------------------------------------------ several processes


async def test_members_of_a_group_on_two_buses_share_the_work(open_bus: Open) -> None:
    buses = [open_bus(), open_bus()]
    taken: list[int] = []

    async def consume(bus: RedisBus) -> None:
        async for message in bus.subscribe(Topic.KERNEL_READY, "g"):
            taken.append(number(message))

    consumers = [asyncio.create_task(consume(bus)) for bus in buses]
    publish(buses[0], *range(50))
    await soon(buses[0].drained())
    for bus in buses:
        bus.close()
    await asyncio.gather(*consumers)
    assert sorted(taken) == list(range(50))


async def test_long_work_keeps_its_lease_and_a_dead_worker_loses_it(
    redis_server: RedisServer, open_bus: Open
) -> None:
    publisher = open_bus()
    publish(publisher, 1)
    with child(WORKER, redis_server.url()) as worker:
        assert worker.stdout is not None
        assert await asyncio.to_thread(worker.stdout.readline) == "working\n"
        stream = open_bus(lease_s=1.0).subscribe(Topic.KERNEL_READY, "g")
        taking = asyncio.create_task(take(stream, 1))
        done, _ = await asyncio.wait([taking], timeout=3.0)
        assert not done
        worker.kill()
        assert await taking == [1]


async def test_a_message_left_by_one_bus_goes_to_the_next_at_once(open_bus: Open) -> None:
    first, second = open_bus(lease_s=600.0, poll_s=60.0), open_bus(lease_s=600.0, poll_s=60.0)
    publish(first, 1)
    left = first.subscribe(Topic.KERNEL_READY, "g")
    assert await take(left, 1) == [1]
    waiting = asyncio.create_task(take(second.subscribe(Topic.KERNEL_READY, "g"), 1))
    await left.aclose()
    assert await waiting == [1]


async def test_closing_a_bus_gives_back_what_it_holds(open_bus: Open) -> None:
    first, second = open_bus(lease_s=600.0), open_bus(lease_s=600.0)
    publish(first, 1)
    held = first.subscribe(Topic.KERNEL_READY, "g")
    assert await take(held, 1) == [1]
    first.close()
    assert await take(second.subscribe(Topic.KERNEL_READY, "g"), 1) == [1]


async def test_what_a_consumer_publishes_is_in_redis_before_its_message_is_acknowledged(
    redis_server: RedisServer, open_bus: Open
) -> None:
    bus = open_bus()
    publish(bus, 1)
    stream = bus.subscribe(Topic.KERNEL_READY, "g")
    assert await take(stream, 1) == [1]
    client = redis_server.client()
    client.config_set("maxmemory", 1)  # nothing can be published, but acknowledged
    publish(bus, 2)
    waiting = asyncio.create_task(take(stream, 1))
    await eventually(lambda: bus._outbox.outage is not None)
    assert client.xpending(STREAM, "g")["pending"] == 1
    client.config_set("maxmemory", 0)
    assert await waiting == [2]
    entries = [entry_id for entry_id, _ in client.xrange(STREAM)]
    await eventually(lambda: client.xpending(STREAM, "g")["min"] == entries[1])


# ------------------------------------------------------------------ outages


async def test_a_killed_server_loses_nothing_and_delays_nobody(
    redis_server: RedisServer,
    open_bus: Open,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    bus = open_bus()
    stream = bus.subscribe(Topic.KERNEL_READY, "g")
    publish(bus, 0)
    assert await take(stream, 1) == [0]
    redis_server.kill()
    publish(bus, 1, 2)
    bus.publish(Topic.SEED_HEALTH, "test", HealthBatch(signals=()))
    await eventually(lambda: bus.stats()[Topic.SEED_HEALTH].dropped == 1)
    [log] = (tmp_path / "log").iterdir()
    await eventually(lambda: len(list(read_spool(log))) == 3)
    topics = {message.topic for message in read_spool(log)}
    assert topics == {Topic.KERNEL_READY, Topic.SEED_HEALTH}
    redis_server.start()
    assert await take(stream, 2) == [1, 2]
    waiting = asyncio.create_task(anext(stream))
    await soon(bus.drained())
    publish(bus, 3)
    assert number(await waiting) == 3
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len([line for line in told if "does not answer" in line]) == 1
    assert len([line for line in told if "is back after" in line]) == 1
    assert "1 telemetry messages were dropped" in told[-1]


async def test_a_frozen_server_is_the_same_as_an_absent_one(
    redis_server: RedisServer, open_bus: Open
) -> None:
    bus = open_bus()
    stream = bus.subscribe(Topic.KERNEL_READY, "g")
    publish(bus, 0)
    assert await take(stream, 1) == [0]
    redis_server.freeze()
    publish(bus, *range(1, 40))
    await eventually(lambda: bus._outbox.outage is not None)
    publish(bus, *range(40, 50))
    redis_server.thaw()
    assert await take(stream, 49) == list(range(1, 50))


async def test_a_server_that_lost_everything_gets_it_again(
    redis_server: RedisServer, open_bus: Open
) -> None:
    bus = open_bus()
    stream = bus.subscribe(Topic.KERNEL_READY, "g")
    publish(bus, *range(10))
    assert await take(stream, 3) == [0, 1, 2]
    await eventually(lambda: redis_server.client().xlen(STREAM) == 10)
    redis_server.client().flushall()
    publish(bus, 10)
    assert await take(stream, 8) == list(range(3, 11))
    redis_server.lose_everything()
    redis_server.start()
    assert await take(stream, 0) == []
    publish(bus, 11)
    assert await take(stream, 1) == [11]
    waiting = asyncio.create_task(take(stream, 1))
    await soon(bus.drained())
    publish(bus, 12)
    assert await waiting == [12]


async def test_a_server_set_back_to_yesterday_gets_what_it_forgot(
    redis_server: RedisServer, open_bus: Open
) -> None:
    """As with a snapshot: it starts again with some of the entries, and without others."""
    bus = open_bus()
    stream = bus.subscribe(Topic.KERNEL_READY, "g")
    publish(bus, *range(4))
    assert await take(stream, 1) == [0]
    client = redis_server.client()
    await eventually(lambda: client.xlen(STREAM) == 4)
    newest, fields = client.xrevrange(STREAM, count=1)[0]
    client.xdel(STREAM, newest)
    client.zrem(f"{{esper}}:seen:{Topic.KERNEL_READY}", fields[b"event_id"])
    assert await take(stream, 3) == [1, 2, 3]


async def test_a_destroyed_group_is_made_again_and_nothing_is_done_twice(
    redis_server: RedisServer, open_bus: Open
) -> None:
    bus = open_bus()
    stream = bus.subscribe(Topic.KERNEL_READY, "g")
    publish(bus, 1, 2)
    assert await take(stream, 2) == [1, 2]
    redis_server.client().xgroup_destroy(STREAM, "g")
    publish(bus, 3)
    assert await take(stream, 1) == [3]
    waiting = asyncio.create_task(take(stream, 1))
    await soon(bus.drained())
    publish(bus, 4)
    assert await waiting == [4]


async def test_a_full_server_is_waited_for(redis_server: RedisServer, open_bus: Open) -> None:
    bus = open_bus()
    stream = bus.subscribe(Topic.KERNEL_READY, "g")
    publish(bus, 0)
    assert await take(stream, 1) == [0]
    client = redis_server.client()
    client.config_set("maxmemory", 1)
    publish(bus, 1, 2)
    bus.publish(Topic.SEED_HEALTH, "test", HealthBatch(signals=()))
    await eventually(lambda: bus.stats()[Topic.SEED_HEALTH].dropped == 1)
    assert "memory" in (bus._outbox.outage or "")
    client.config_set("maxmemory", 0)
    assert await take(stream, 2) == [1, 2]


async def test_an_outage_that_only_a_consumer_meets_is_told_of_once(
    open_bus: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to send, so the courier finds nothing wrong meanwhile."""
    bus = open_bus(poll_s=0.02)
    attempts = 0
    really_take = bus._streams.take

    async def take_or_fail(topic: Topic, group: str, count: int) -> list[Taken]:
        nonlocal attempts
        attempts += 1
        if attempts <= 5:
            raise OutOfMemoryError("used memory > 'maxmemory'")
        return await really_take(topic, group, count)

    monkeypatch.setattr(bus._streams, "take", take_or_fail)
    stream = bus.subscribe(Topic.KERNEL_READY, "g")
    waiting = asyncio.create_task(take(stream, 1))
    await eventually(lambda: attempts > 5)
    publish(bus, 1)
    assert await waiting == [1]
    await eventually(lambda: "is back" in caplog.text)
    assert caplog.text.count("does not answer as it should") == 1
    assert caplog.text.count("is back") == 1


async def test_answers_that_come_too_late_are_never_taken_for_others(
    redis_server: RedisServer, open_bus: Open
) -> None:
    async with LateProxy(redis_server.socket, redis_server.socket.parent) as proxy:
        bus = await asyncio.to_thread(open_bus, f"unix://{proxy.socket}")
        stream = bus.subscribe(Topic.KERNEL_READY, "g")
        publish(bus, 0)
        assert await take(stream, 1) == [0]
        # Carried out, but the answer is never seen.
        proxy.be_late_from(f"{19:064x}".encode(), 2 * QUICK.timeout_s)
        publish(bus, *range(1, 20))
        await eventually(lambda: bus._outbox.outage is not None)
        await eventually(lambda: redis_server.client().xlen(STREAM) == 20)
        proxy.delay_s = 0.0
        assert await take(stream, 19) == list(range(1, 20))
        assert redis_server.client().xlen(STREAM) == 20  # sent again, and recognised
        await asyncio.to_thread(bus.close)


# ------------------------------------------------------------------ limits


async def test_telemetry_drops_the_oldest_and_counts_control_refuses(
    redis_server: RedisServer, open_bus: Open
) -> None:
    bus = open_bus(capacity=3, telemetry_capacity=2, timeout_s=10.0)
    redis_server.freeze()  # the sender hangs in its first attempt
    publish(bus, 0)
    await asyncio.sleep(0)
    for _ in range(7):
        bus.publish(Topic.SEED_HEALTH, "test", HealthBatch(signals=()))
    assert bus.stats()[Topic.SEED_HEALTH].dropped == 5
    publish(bus, 1, 2)
    with pytest.raises(BusError, match=r"3 unacknowledged messages on compilation.kernel.ready"):
        publish(bus, 3)
    redis_server.thaw()
    assert await take(bus.subscribe(Topic.KERNEL_READY, "g"), 3) == [0, 1, 2]


async def test_a_group_that_falls_hopelessly_behind_is_named(open_bus: Open) -> None:
    bus = open_bus(capacity=3)
    stream = bus.subscribe(Topic.KERNEL_READY, "slow")
    publish(bus, 0)
    assert await take(stream, 1) == [0]
    publish(bus, 1, 2)
    await eventually(lambda: bus.stats()[Topic.KERNEL_READY].waiting == 3)
    with pytest.raises(BusError, match="group 'slow' falls behind"):
        publish(bus, 3)
    assert await take(stream, 1) == [1]
    await eventually(lambda: bus.stats()[Topic.KERNEL_READY].waiting == 2)
    publish(bus, 3)
    assert await take(stream, 2) == [2, 3]


async def test_control_is_trimmed_but_never_what_a_group_still_needs(
    redis_server: RedisServer, open_bus: Open
) -> None:
    bus, client = open_bus(capacity=10), redis_server.client()
    fast = bus.subscribe(Topic.KERNEL_READY, "fast")
    slow = bus.subscribe(Topic.KERNEL_READY, "slow")
    publish(bus, *range(8))
    assert await take(slow, 2) == [0, 1]  # 1 stays pending
    for each in range(8, 10):
        publish(bus, each)
    assert await take(fast, 10) == list(range(10))
    await eventually(lambda: bus.stats()[Topic.KERNEL_READY].waiting == 1 + 9)
    assert client.xlen(STREAM) == 10
    publish(bus, 10)
    assert await take(fast, 1) == [10]
    assert await take(slow, 9) == list(range(2, 11))
    await eventually(lambda: bus.stats()[Topic.KERNEL_READY].waiting == 2)  # both have 10
    publish(bus, *range(11, 15))
    assert await take(fast, 4) == list(range(11, 15))
    assert await take(slow, 4) == list(range(11, 15))
    await eventually(lambda: client.xlen(STREAM) == 10)


async def test_telemetry_streams_stay_short(redis_server: RedisServer, open_bus: Open) -> None:
    bus, client = open_bus(telemetry_capacity=100), redis_server.client()
    for _ in range(20):
        for _ in range(50):
            bus.publish(Topic.SEED_HEALTH, "test", HealthBatch(signals=()))
        await soon(bus.drained())
    assert 100 <= client.xlen(f"{{esper}}:stream:{Topic.SEED_HEALTH}") <= 300


async def test_a_group_that_nobody_has_served_for_long_is_forgotten(
    redis_server: RedisServer, open_bus: Open
) -> None:
    first = open_bus()
    publish(first, 1)
    assert await take(first.subscribe(Topic.KERNEL_READY, "gone"), 1) == [1]
    first.close()
    second = open_bus(forget_group_s=0.2)
    publish(second, 2)
    await soon(second.drained())
    await eventually(lambda: redis_server.client().xinfo_groups(STREAM) == [])


async def test_what_is_no_message_becomes_a_dead_letter(
    redis_server: RedisServer, open_bus: Open, caplog: pytest.LogCaptureFixture
) -> None:
    bus, client = open_bus(), redis_server.client()
    client.xadd(STREAM, {"event_id": "x", "message": "{}"})
    publish(bus, 1)
    assert await take(bus.subscribe(Topic.KERNEL_READY, "g"), 1) == [1]
    await eventually(lambda: client.xlen(DEAD) == 1)
    assert bus.stats()[Topic.KERNEL_READY].dead_letters == 1
    assert "is no message" in caplog.text


# ------------------------------------------------------------------ the local log


def test_the_log_starts_anew_when_it_is_full(tmp_path: Path) -> None:
    messages = [
        OonaMessage(topic=Topic.KERNEL_READY, sender_id="test", payload=ready(n)) for n in range(3)
    ]
    size = len(messages[0].to_json()) + 1
    spool = Spool(tmp_path / "log" / "a.jsonl", limit_bytes=2 * size + 8)
    for message in messages:
        spool.write([message])
    assert list(read_spool(Path(f"{spool.path}.1"))) == messages[:2]
    assert list(read_spool(spool.path)) == messages[2:]


def test_a_torn_last_line_of_the_log_is_left_out(tmp_path: Path) -> None:
    message = OonaMessage(topic=Topic.KERNEL_READY, sender_id="test", payload=ready(1))
    path = tmp_path / "a.jsonl"
    path.write_bytes(message.to_json() + b"\n" + message.to_json()[:40])
    assert list(read_spool(path)) == [message]
    path.write_bytes(b"{}\n" + message.to_json())
    with pytest.raises(ValueError, match="validation error"):
        list(read_spool(path))


def test_a_log_that_cannot_be_written_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    spool = Spool(tmp_path / "file" / "log.jsonl", limit_bytes=1000)
    for _ in range(2):
        spool.write([OonaMessage(topic=Topic.KERNEL_READY, sender_id="t", payload=ready(1))])
    assert len(caplog.records) == 1


async def test_messages_of_a_log_that_are_sent_again_are_applied_once(
    open_bus: Open, tmp_path: Path
) -> None:
    bus = open_bus()
    stream = bus.subscribe(Topic.KERNEL_READY, "g")
    message = bus.publish(Topic.KERNEL_READY, "test", ready(1))
    assert await take(stream, 1) == [1]
    Spool(tmp_path / "a.jsonl", limit_bytes=1000).write([message])
    for logged in read_spool(tmp_path / "a.jsonl"):
        bus.send(logged)
    publish(bus, 2)
    assert await take(stream, 1) == [2]


def test_publishing_never_waits_for_a_frozen_server(
    redis_server: RedisServer, open_bus: Open
) -> None:
    bus = open_bus(timeout_s=10.0, close_timeout_s=0.1)
    redis_server.freeze()
    publish(bus, *range(1000))
    assert bus.stats()[Topic.KERNEL_READY].waiting == 1000  # and none was sent
