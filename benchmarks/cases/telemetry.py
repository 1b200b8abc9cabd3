"""What does telling the controller cost: the training step, the way there, and how much goes through?

The way is the pipeline's: the training thread hands over an observation, the loop of another thread
has signals made of it and publishes them, and a consumer on that loop reads them as Tamiyo does.
"""

import asyncio
import atexit
import copy
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

import esper
from benchmarks.cases.observed import EVERY, block
from benchmarks.clocks import WallClock, Work
from benchmarks.findings import ratio
from benchmarks.gate import WrongResultError
from benchmarks.harness import CONFIDENCE, RESAMPLES, Build, Plan, Samples, Times, Trial
from benchmarks.kernels import Kernels
from benchmarks.models import MLP, Subject, wrapped
from benchmarks.modes import training_step
from benchmarks.redis_server import NO_REDIS, redis_program, redis_url
from benchmarks.rows import Finding
from esper.config import BusSettings, SeedSettings
from esper.contracts import HealthBatch, OonaMessage, Topic
from esper.kasmina.health import health_batch, health_batch_beside
from esper.kasmina.observation import Observation
from esper.oona import MemoryBus, Oona
from esper.oona.redis import RedisBus

SUBJECT: Subject = MLP
NOWHERE = "signals go nowhere"
SIGNALS_PER_S = 1_000  # at which latencies are taken
MAX_LATENCY_US = {50: 1_000.0, 99: 10_000.0}
MIN_SIGNALS_PER_S = 50_000
MAX_STEP_RATIO = 1.002
BATCH_SIGNALS = 100
PATIENCE_S = 60.0


class Way:
    """A bus with a publisher at one end and a consumer at the other, in a thread of their own."""

    def __init__(self, bus: Oona):
        self.arrivals: list[tuple[float, HealthBatch]] = []  # seconds
        self._bus = bus
        self._loop = asyncio.new_event_loop()
        self._observations: asyncio.Queue[Observation] = asyncio.Queue()
        threading.Thread(target=self._serve, daemon=True).start()

    def tell(self, observation: Observation) -> None:
        """Send an observation on its way. Any thread."""
        self._loop.call_soon_threadsafe(self._observations.put_nowait, observation)

    def wait_for(self, count: int) -> list[tuple[float, HealthBatch]]:
        """Take out that many arrivals."""
        deadline_s = time.monotonic() + PATIENCE_S
        while len(self.arrivals) < count:
            if time.monotonic() > deadline_s:
                raise WrongResultError(f"{len(self.arrivals)} of {count} batches have arrived")
            time.sleep(0.001)
        taken, self.arrivals = self.arrivals, []
        return taken

    def publish(self, batch: HealthBatch) -> None:
        self._bus.publish(Topic.SEED_HEALTH, "kasmina", batch)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._work())

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._publish())
            tasks.create_task(self._follow())

    async def _publish(self) -> None:
        while True:
            observation = await self._observations.get()
            self.publish(await health_batch_beside(observation))

    async def _follow(self) -> None:
        message: OonaMessage
        async for message in self._bus.subscribe(Topic.SEED_HEALTH, "tamiyo"):
            assert isinstance(message.payload, HealthBatch)
            self.arrivals.append((time.perf_counter(), message.payload))


@functools.cache
def way(transport: str) -> Way:
    patient = BusSettings(timeout_s=PATIENCE_S)  # an outage on a loaded machine would drop signals
    bus = MemoryBus() if transport == "memory" else RedisBus(redis_url(), patient)
    atexit.register(bus.close)
    return Way(bus)


def transports() -> list[str]:
    return ["memory"] if redis_program() is None else ["memory", "redis"]


def trials(plan: Plan, kernels: Kernels) -> list[Trial]:
    """Compare blocks of training steps, of which one is observed and told."""
    if plan.device.type != "cpu":
        return []  # the same threads and the same interpreter
    works: dict[str, Build] = {NOWHERE: lambda: told_block(plan, None)}
    for transport in transports():
        works[transport] = functools.partial(told_block, plan, transport)

    def report(times: Times) -> Iterator[Finding]:
        for transport in transports():
            row = f"{SUBJECT.name}, one step in {EVERY} told over {transport}"
            yield ratio(times, transport, NOWHERE, row, at_most=MAX_STEP_RATIO)

    return [
        Trial(
            name=f"{SUBJECT.name}, block of {EVERY}",
            works=works,
            check=lambda: [check(plan, transport) for transport in transports()],
            report=report,
            grad=True,
            length=6.0,
            clock=WallClock(),
        )
    ]


def counts(plan: Plan) -> Iterator[Finding]:
    if plan.device.type != "cpu":
        return
    rng = np.random.default_rng(plan.seed)
    for transport in transports():
        samples = latencies_us(way(transport), observed(plan), seconds=0.2 if plan.quick else 10.0)
        for percentile, at_most in MAX_LATENCY_US.items():
            row = f"snapshot to Tamiyo over {transport}, {SIGNALS_PER_S:,} signals/s, p{percentile}"
            yield bounded(row, samples, percentile, "us", rng, lambda us, most=at_most: us <= most)
    if redis_program() is None:
        print(NO_REDIS)
        return
    samples = throughputs(way("redis"), observed(plan), rounds=2 if plan.quick else 20)
    row = f"signals through Redis, {BATCH_SIGNALS} in a message"
    yield bounded(row, samples, 50, "signals/s", rng, lambda rate: rate >= MIN_SIGNALS_PER_S)


def told_block(plan: Plan, transport: str | None) -> Work:
    net, inp = SUBJECT.prepare(plan.device, plan.seed)
    model = wrapped(net, inp, SeedSettings(observe_every=EVERY))
    if transport is not None:
        model.kasmina.emit_observation = way(transport).tell
    return block(training_step(model, inp), EVERY, plan.device)


@functools.cache
def observed(plan: Plan) -> Observation:
    """Return one observation of the model, with 20 seeds."""
    net, inp = SUBJECT.prepare(plan.device, plan.seed)
    model = esper.wrap(copy.deepcopy(net), settings=SeedSettings(observe_every=1))
    model(inp)
    seen: list[Observation] = []
    model.kasmina.emit_observation = seen.append
    with torch.enable_grad():
        step = training_step(model, inp)
        for _ in range(3):
            step()
    return seen[-1]


def numbered(observation: Observation, step: int) -> Observation:
    """Return the observation as one of that step, so that what arrives can be told apart."""
    return dataclasses.replace(observation, step=step, handed_out_step=step + 1)


def check(plan: Plan, transport: str) -> None:
    """What arrives is what was sent, all of it and in order."""
    seen = observed(plan)
    observations = [numbered(seen, n) for n in range(20)]
    for observation in observations:
        way(transport).tell(observation)
    arrived = [batch for _, batch in way(transport).wait_for(len(observations))]
    if arrived != [health_batch(observation) for observation in observations]:
        raise WrongResultError(f"{transport}: what arrived is not what was sent")


def latencies_us(way: Way, observation: Observation, seconds: float) -> Samples:
    """Send observations at a steady pace; return how long each took to arrive."""
    pause_s = len(health_batch(observation).signals) / SIGNALS_PER_S
    way.arrivals.clear()  # of the blocks
    begun: dict[int, float] = {}
    start = time.perf_counter()
    for step in range(max(10, round(seconds / pause_s))):
        time.sleep(max(0.0, start + step * pause_s - time.perf_counter()))
        begun[step] = time.perf_counter()
        way.tell(numbered(observation, step))
    arrivals = way.wait_for(len(begun))
    return np.asarray([1e6 * (at - begun[batch.signals[0].step]) for at, batch in arrivals])


def throughputs(way: Way, observation: Observation, rounds: int) -> Samples:
    """Send 500 messages at once and wait for all; return the signals a second, of each round."""
    signals = health_batch(observation).signals
    batch = HealthBatch(signals=(signals * BATCH_SIGNALS)[:BATCH_SIGNALS])
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(500):
            way.publish(batch)
        last, _ = way.wait_for(500)[-1]
        rates.append(500 * BATCH_SIGNALS / (last - start))
    return np.asarray(rates)


def bounded(
    row: str,
    samples: Samples,
    percentile: int,
    unit: str,
    rng: np.random.Generator,
    is_met: Callable[[float], bool],
) -> Finding:
    """Return a percentile with its bootstrap interval."""
    drawn = np.percentile(rng.choice(samples, (RESAMPLES // 10, len(samples))), percentile, axis=1)
    value = float(np.percentile(samples, percentile))
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(bound) for bound in np.quantile(drawn, (tail, 1 - tail)))
    q20, q80 = (float(bound) for bound in np.quantile(samples, (0.2, 0.8)))
    target = (
        f">= {MIN_SIGNALS_PER_S:,} {unit}"
        if unit == "signals/s"
        else f"<= {MAX_LATENCY_US[percentile]:,g} {unit}"
    )
    return Finding(
        row=row,
        metric="latency" if unit == "us" else "rate",
        value=value,
        low=min(low, value),
        high=max(high, value),
        spread=(q20, q80),
        samples=len(samples),
        unit=unit,
        target=target,
        met=is_met(value),
    )
