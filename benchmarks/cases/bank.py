"""What does the seed bank cost? Tick, snapshot, creation and memory, from ten to a million seeds."""

import functools
from collections.abc import Callable, Iterator, Mapping

import torch

import esper.reference as reference
from benchmarks.clocks import Work
from benchmarks.findings import duration, exact
from benchmarks.gate import WrongResultError, check_close, check_equal
from benchmarks.harness import Build, Plan, Times, Trial
from benchmarks.kernels import Kernels
from benchmarks.rows import Finding, Point
from esper.contracts import RampCurve, SeedState
from esper.kasmina.bank import SeedBank, Snapshot

NUMBERS = (10, 1_000, 100_000, 1_000_000)
AXIS = "number of seeds"
MAX_ERRORS = 3
MAX_BYTES_PER_SEED = 64
MAX_TICK_US = {"cpu": 2_000.0, "cuda": 25.0}  # of a million seeds
FOR_EVER = 1e7  # steps, so that no ramp arrives while it is measured


def trials(plan: Plan, kernels: Kernels) -> list[Trial]:
    numbers = NUMBERS[:2] if plan.quick else NUMBERS
    makes = (dormant_tick, ramping_tick, snapshot, creation)
    return [make(number, plan) for make in makes for number in numbers]


def counts(plan: Plan) -> Iterator[Finding]:
    """Yield the memory a seed, not counting that banks are padded to multiples of 64 seeds.

    On the CPU host and device share one block.
    """
    for number in NUMBERS:
        bank = SeedBank(number, plan.device)
        places = bank.block.capacity
        nbytes = {"host": bank.block.nbytes}
        if plan.device.type != "cpu":
            nbytes["device"] = bank.arena.nbytes
        for where, size in nbytes.items():
            row = f"{where} memory of a seed, {number:,} seeds in {places:,} places"
            yield exact(row, "memory", size / places, unit="B", at_most=MAX_BYTES_PER_SEED)


def dormant_tick(number: int, plan: Plan) -> Trial:
    bank = functools.cache(lambda: SeedBank(number, plan.device))

    def check() -> None:
        before = bank().arena.clone()
        bank().tick(MAX_ERRORS)
        if not torch.equal(before, bank().arena):
            raise WrongResultError(f"tick changed a bank of {number} dormant seeds")

    return trial("tick, all dormant", number, plan, lambda: ticking(bank()), check, MAX_TICK_US)


def ramping_tick(number: int, plan: Plan) -> Trial:
    bank = functools.cache(lambda: ramping_bank(number, plan.device, FOR_EVER))
    return trial(
        "tick, all ramping",
        number,
        plan,
        lambda: ticking(bank()),
        lambda: check_ramps(number, plan.device),
        MAX_TICK_US,
    )


def snapshot(number: int, plan: Plan) -> Trial:
    """Time a snapshot from its beginning until it can be read."""
    bank = functools.cache(lambda: ramping_bank(number, plan.device, FOR_EVER))

    def take() -> Snapshot:
        bank().begin_snapshot()
        while (taken := bank().take_snapshot()) is None:
            pass
        return taken

    def check() -> None:
        for field, seen in take().fields.items():
            check_equal(
                f"snapshot of {number} seeds", {field: bank().fields[field].cpu()}, {field: seen}
            )

    return trial("snapshot", number, plan, lambda: take, check)


def creation(number: int, plan: Plan) -> Trial:
    def check() -> None:
        if SeedBank(number, plan.device).arena.any():
            raise WrongResultError(f"a new bank of {number} seeds is not all zero")

    return trial("creation", number, plan, lambda: lambda: SeedBank(number, plan.device), check)


def trial(
    what: str,
    number: int,
    plan: Plan,
    build: Build,
    check: Callable[[], None],
    max_us: Mapping[str, float] | None = None,
) -> Trial:
    """Return a trial of one work, whose target holds for the largest bank."""

    def report(times: Times) -> Iterator[Finding]:
        at_most = max_us[plan.device.type] if max_us and number == NUMBERS[-1] else None
        point = Point(curve=what, axis=AXIS, x=number)
        row = f"{what}, {number:,} seeds"
        yield duration(times, what, row, unit="us", at_most=at_most, point=point)

    return Trial(f"{what}, {number:,} seeds", {what: build}, check, report, length=0.3)


def ticking(bank: SeedBank) -> Work:
    return functools.partial(bank.tick, MAX_ERRORS)


def ramping_bank(number: int, device: torch.device, ramp_steps: float) -> SeedBank:
    """Return a bank whose seeds are all on the way to alpha 1, along the default curve."""
    bank = SeedBank(number, device)
    bank.fields["lifecycle_states"].fill_(SeedState.GRAFTING)
    bank.fields["ramp_curve"].fill_(RampCurve.COSINE)
    bank.fields["alpha_target"].fill_(1.0)
    bank.fields["alpha_slope"].fill_(1 / ramp_steps)
    return bank


def check_ramps(number: int, device: torch.device) -> None:
    """Compare five ticks of short ramps with the reference."""
    bank = ramping_bank(number, device, ramp_steps=4)
    expected = {field: values[..., :number].clone() for field, values in bank.fields.items()}
    for _ in range(5):
        bank.tick(MAX_ERRORS)
        reference.tick(expected, MAX_ERRORS)
        for field, values in expected.items():
            seen = bank.fields[field][..., :number]
            what = f"tick, {number} seeds: {field}"
            if field in ("alpha_blend", "ramp_progress"):
                check_close(what, values, seen)
            else:
                check_equal(what, {field: values}, {field: seen})
