"""The bus against the dumbest correct model: a list for each group."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from redis_servers import MakeBus

from esper.contracts import KernelReady, OonaMessage, Topic

GROUPS = ("one", "two", "three")
MAX_DELIVERIES = 3
TOPIC = Topic.KERNEL_READY
PATIENCE_S = 20

T = TypeVar("T")


class ModelGroup:
    """One consumer's view: what its group is owed, oldest first, and what it is busy with."""

    def __init__(self, history: list[str], stream: AsyncGenerator[OonaMessage, None]):
        self.owed = list(history)
        self.stream = stream
        self.is_busy = False  # with the first one
        self.begun: dict[str, int] = {}

    def has_next(self) -> bool:
        return len(self.owed) > self.is_busy

    def next(self) -> str:
        """Finish what it is busy with, and begin what comes next."""
        del self.owed[: self.is_busy]
        self.is_busy = True
        event_id = self.owed[0]
        self.begun[event_id] = self.begun.get(event_id, 0) + 1
        return event_id

    def leave(self) -> str | None:
        """Stop in the middle; return the message if that was its last chance."""
        self.is_busy = False
        if self.begun[self.owed[0]] < MAX_DELIVERIES:
            return None
        return self.owed.pop(0)


class BusMachine(RuleBasedStateMachine):
    make_bus: MakeBus

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.bus = type(self).make_bus(max_deliveries=MAX_DELIVERIES)
        self.sent: list[OonaMessage] = []
        self.groups: dict[str, ModelGroup] = {}
        self.dead: list[str] = []

    @rule()
    def publish(self) -> None:
        payload = KernelReady(artifact_id=f"{len(self.sent):064x}")
        self.sent.append(self.bus.publish(TOPIC, "test", payload))
        for group in self.groups.values():
            group.owed.append(self.sent[-1].event_id)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def send_again(self, data: st.DataObject) -> None:
        self.bus.send(data.draw(st.sampled_from(self.sent)))

    @rule(name=st.sampled_from(GROUPS))
    def join(self, name: str) -> None:
        if name not in self.groups:
            history = [message.event_id for message in self.sent]
            self.groups[name] = ModelGroup(history, self.bus.subscribe(TOPIC, name))

    @precondition(lambda self: any(group.has_next() for group in self.groups.values()))
    @rule(data=st.data())
    def take_next(self, data: st.DataObject) -> None:
        names = [name for name, group in self.groups.items() if group.has_next()]
        self.take(self.groups[data.draw(st.sampled_from(names))])

    @precondition(lambda self: any(group.is_busy for group in self.groups.values()))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([n for n, g in self.groups.items() if g.is_busy]))
        group = self.groups[name]
        self.run(group.stream.aclose())
        group.stream = self.bus.subscribe(TOPIC, name)
        given_up = group.leave()
        if given_up is not None:
            self.dead.append(given_up)

    def teardown(self) -> None:
        """Finish everything; then nothing more is there than what is published now."""
        self.publish()
        for group in self.groups.values():
            while group.has_next():
                self.take(group)
        self.run(self.everyone_asks_once_more())
        letters = self.run(self.bus.dead_letters(TOPIC))
        assert sorted(letter.event_id for letter in letters) == sorted(self.dead)
        self.bus.close()
        self.runner.close()

    async def everyone_asks_once_more(self) -> None:
        asking = [asyncio.ensure_future(anext(g.stream)) for g in self.groups.values()]
        await self.bus.drained()
        for ask in asking:
            ask.cancel()
        ends = await asyncio.gather(*asking, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends)

    def take(self, group: ModelGroup) -> None:
        assert self.run(anext(group.stream)).event_id == group.next()

    def run(self, work: Awaitable[T]) -> T:
        async def patiently() -> T:
            async with asyncio.timeout(PATIENCE_S):
                return await work

        return self.runner.run(patiently())


@pytest.mark.timeout(300)
def test_the_bus_behaves_as_a_list_for_each_group(make_bus: MakeBus) -> None:
    machine = type("Machine", (BusMachine,), {"make_bus": staticmethod(make_bus)})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=30))
