"""The bus: its promises, on every transport."""

import asyncio
import contextlib
import threading

import pytest
from redis_servers import MakeBus

from esper.contracts import (
    BlueprintSubmitted,
    EpochEvent,
    HealthBatch,
    KernelReady,
    OonaMessage,
    RequestKind,
    TamiyoStatus,
    Topic,
)
from esper.errors import BusError
from esper.oona import MemoryBus, Oona
from esper.oona.inquiry import Inquiry


def ready(number: int) -> KernelReady:
    return KernelReady(artifact_id=f"{number:064x}")


async def take(bus: Oona, group: str, count: int, topic: Topic = Topic.KERNEL_READY) -> list:
    """Consume ``count`` messages, acknowledge them all and stop."""
    taken = []
    stream = bus.subscribe(topic, group)
    async for message in stream:
        taken.append(message.payload)
        if len(taken) == count:
            break
    # The last one is acknowledged by asking for the next, which is not awaited for long.
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(anext(stream), 0.01)
    await stream.aclose()
    return taken


async def test_a_group_sees_everything_in_order_from_the_beginning(make_bus: MakeBus) -> None:
    bus = make_bus()
    for number in range(3):
        bus.publish(Topic.KERNEL_READY, "test", ready(number))
    assert await take(bus, "early", 3) == [ready(n) for n in range(3)]
    bus.publish(Topic.KERNEL_READY, "test", ready(3))
    assert await take(bus, "late", 4) == [ready(n) for n in range(4)]
    assert await take(bus, "early", 1) == [ready(3)]


async def test_consumers_of_one_group_share_the_work(make_bus: MakeBus) -> None:
    bus = make_bus()
    taken: list[str] = []

    async def consume() -> None:
        async for message in bus.subscribe(Topic.KERNEL_READY, "group"):
            taken.append(message.event_id)
            await asyncio.sleep(0)

    consumers = [asyncio.create_task(consume()) for _ in range(3)]
    await asyncio.sleep(0)
    sent = [bus.publish(Topic.KERNEL_READY, "test", ready(n)).event_id for n in range(20)]
    await bus.drained()
    bus.close()
    await asyncio.gather(*consumers)
    assert sorted(taken) == sorted(sent)


async def test_a_message_sent_twice_is_delivered_once(make_bus: MakeBus) -> None:
    bus = make_bus()
    message = bus.publish(Topic.KERNEL_READY, "test", ready(1))
    bus.send(message)
    assert await take(bus, "group", 1) == [ready(1)]
    bus.send(message)
    bus.publish(Topic.KERNEL_READY, "test", ready(2))
    assert await take(bus, "group", 1) == [ready(2)]


async def test_what_a_consumer_left_unfinished_goes_to_the_next_then_to_the_dead_letters(
    make_bus: MakeBus,
) -> None:
    bus = make_bus(max_deliveries=2)
    bus.publish(Topic.KERNEL_READY, "test", ready(1))
    bus.publish(Topic.KERNEL_READY, "test", ready(2))
    for _ in range(2):
        stream = bus.subscribe(Topic.KERNEL_READY, "group")
        assert (await anext(stream)).payload == ready(1)
        await stream.aclose()  # as when the consumer fails
    assert await take(bus, "group", 1) == [ready(2)]
    assert [m.payload for m in await bus.dead_letters(Topic.KERNEL_READY)] == [ready(1)]
    assert bus.stats()[Topic.KERNEL_READY].dead_letters == 1
    await asyncio.wait_for(bus.drained(), 1)


async def test_drained_waits_for_what_a_consumer_publishes_in_turn(make_bus: MakeBus) -> None:
    bus = make_bus()
    done = []

    async def forward() -> None:
        async for message in bus.subscribe(Topic.BLUEPRINT_SUBMITTED, "forge"):
            await asyncio.sleep(0)
            bus.publish(Topic.KERNEL_READY, "forge", ready(int(message.payload.blueprint_id, 16)))

    async def finish() -> None:
        async for message in bus.subscribe(Topic.KERNEL_READY, "evaluator"):
            await asyncio.sleep(0)
            done.append(message.payload)

    tasks = [asyncio.create_task(forward()), asyncio.create_task(finish())]
    await asyncio.sleep(0)
    for number in range(5):
        bus.publish(
            Topic.BLUEPRINT_SUBMITTED, "test", BlueprintSubmitted(blueprint_id=f"{number:064x}")
        )
    await bus.drained()
    assert done == [ready(n) for n in range(5)]
    bus.close()
    await asyncio.gather(*tasks)


async def test_waiting_for_the_bus_to_drain_ends_when_it_is_closed(make_bus: MakeBus) -> None:
    bus = make_bus()
    stream = bus.subscribe(Topic.KERNEL_READY, "group")
    bus.publish(Topic.KERNEL_READY, "test", ready(1))
    await anext(stream)
    waiting = asyncio.create_task(bus.drained())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 0.1)
    bus.close()
    await asyncio.wait_for(waiting, 10)


def test_askers_that_are_gone_leave_no_group_behind() -> None:
    """Else answers to others pile up for them, and in the end the bus refuses one."""
    bus = MemoryBus(capacity=2)
    status = TamiyoStatus(
        paused=False,
        policy="ManualPolicy",
        epoch=None,
        adapting=(),
        num_adaptations=0,
        num_parameters=0,
        flops_per_sample=0,
        memory_bytes=0,
    )

    async def ask() -> None:
        with pytest.raises(TimeoutError):
            await Inquiry(bus, "http").ask(RequestKind.STATUS, 0.0)

    for _ in range(3):
        asyncio.run(ask())
    for _ in range(3):
        bus.publish(Topic.TAMIYO_STATUS, "tamiyo", status)
    assert bus.stats()[Topic.TAMIYO_STATUS].waiting == 0


def test_telemetry_drops_the_oldest_and_counts_control_refuses() -> None:
    bus = MemoryBus(capacity=2)
    bus.subscribe(Topic.SEED_HEALTH, "g")
    bus.subscribe(Topic.KERNEL_READY, "g")
    for _ in range(5):
        bus.publish(Topic.SEED_HEALTH, "test", HealthBatch(signals=()))
    assert bus.stats()[Topic.SEED_HEALTH].dropped == 3
    bus.publish(Topic.KERNEL_READY, "test", ready(1))
    bus.publish(Topic.KERNEL_READY, "test", ready(2))
    with pytest.raises(BusError, match=r"group 'g' has 2 unread messages on compilation.kernel"):
        bus.publish(Topic.KERNEL_READY, "test", ready(3))


async def test_publishing_from_other_threads_wakes_the_consumer(make_bus: MakeBus) -> None:
    bus = make_bus()
    consumer = asyncio.create_task(take(bus, "group", 40))
    await asyncio.sleep(0)
    threads = [
        threading.Thread(
            target=lambda k=k: [
                bus.publish(Topic.KERNEL_READY, "test", ready(10 * k + n)) for n in range(10)
            ]
        )
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    taken = await asyncio.wait_for(consumer, 10)
    assert sorted(p.artifact_id for p in taken) == [ready(n).artifact_id for n in range(40)]


def test_a_payload_must_belong_to_its_topic() -> None:
    with pytest.raises(ValueError, match="carries EpochEvent, got KernelReady"):
        MemoryBus().publish(Topic.EPOCH, "test", ready(1))


def test_messages_survive_json_even_when_a_loss_has_diverged() -> None:
    event = EpochEvent(
        epoch=1, step=2, train_loss=float("inf"), val_loss=0.5, val_loss_standard_error=0.1
    )
    message = OonaMessage(topic=Topic.EPOCH, sender_id="test", payload=event)
    assert OonaMessage.from_json(message.to_json()) == message
