"""What does an observed step cost, and what do all steps cost when one in 64 is observed?

A step is forward, backward, Adam and ``model.step()``, which for an observed one also clears the
statistics, takes the snapshot and hands it out.
"""

import copy
from collections.abc import Iterator

import torch

import esper
from benchmarks.clocks import Work
from benchmarks.findings import UNWRAPPED, ratio
from benchmarks.gate import WrongResultError, check_equal, deterministic
from benchmarks.harness import Build, Plan, Times, Trial
from benchmarks.kernels import Kernels
from benchmarks.models import CNN, ENCODER, MLP, Subject, copied, wrapped
from benchmarks.modes import training_step
from benchmarks.rows import Finding
from esper.config import SeedSettings
from esper.kasmina.observation import Observation

SUBJECTS = (MLP, CNN, ENCODER)
OBSERVED = "observed"
EVERY = 64
# Of a step that is observed, and of the average over 64 steps, by the kind of device.
TARGETS = {"cpu": (1.10, 1.002), "cuda": (1.05, 1.001)}
# On CUDA the host runs ahead of the device, so a snapshot comes some steps after it was begun.
SHORTEST_BLOCK = {"cpu": 1, "cuda": 8}


def trials(plan: Plan, kernels: Kernels) -> list[Trial]:
    shortest = SHORTEST_BLOCK[plan.device.type]
    lengths = (shortest,) if plan.quick else (shortest, EVERY)
    return [trial(subject, plan, steps) for subject in SUBJECTS for steps in lengths]


def trial(subject: Subject, plan: Plan, steps: int) -> Trial:
    """Compare blocks of ``steps`` training steps, of which the wrapped model observes one."""
    net, inp = subject.prepare(plan.device, plan.seed)
    settings = SeedSettings(observe_every=steps)

    def unwrapped() -> Work:
        return block(training_step(copied(net), inp), steps, plan.device)

    def observed() -> Work:
        return block(training_step(wrapped(net, inp, settings), inp), steps, plan.device)

    def report(times: Times) -> Iterator[Finding]:
        of_one, of_average = TARGETS[plan.device.type]
        average = f"{subject.name}, one step in {EVERY} observed"
        if steps == EVERY:
            yield ratio(times, OBSERVED, UNWRAPPED, average, at_most=of_average)
            return
        row = f"{subject.name}, an observed step"
        if steps > 1:
            row += f" (derived from blocks of {steps})"
        yield ratio(times, OBSERVED, UNWRAPPED, row, at_most=of_one, diluted=1 / steps)
        row = f"{average} (derived from the row above)"
        yield ratio(times, OBSERVED, UNWRAPPED, row, at_most=of_average, diluted=EVERY / steps)

    works: dict[str, Build] = {UNWRAPPED: unwrapped, OBSERVED: observed}
    return Trial(
        name=f"{subject.name}, block of {steps}",
        works=works,
        check=lambda: check(subject, plan, steps),
        report=report,
        grad=True,
        length=3.0,
    )


def block(step: Work, steps: int, device: torch.device) -> Work:
    """Run ``steps`` steps; on CUDA the host then waits, so that the snapshot has arrived."""

    def run() -> None:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def check(subject: Subject, plan: Plan, steps: int) -> None:
    """Train both models in earnest: the same weights, bit for bit, and one observation a block."""
    net, inp = subject.prepare(plan.device, plan.seed)
    plain = copy.deepcopy(net)
    planted = esper.wrap(copy.deepcopy(net), settings=SeedSettings(observe_every=steps))
    planted(inp)
    plain(inp)  # batch norm counts its batches
    observations: list[Observation] = []
    planted.kasmina.emit_observation = observations.append
    states = []
    with deterministic(), torch.enable_grad():
        for model in (plain, planted):
            torch.manual_seed(plan.seed)  # for dropout
            run = block(training_step(model, inp, learning_rate=1e-3), steps, plan.device)
            for _ in range(3):
                run()
            states.append(model.state_dict())
    check_equal(f"{subject.name}, trained", *states)
    if len(observations) != 2:  # the first one begins as the first block ends
        raise WrongResultError(
            f"{subject.name}: expected 2 observations in 3 blocks of {steps} steps, "
            f"got {len(observations)}"
        )
    check_statistics(subject.name, observations[-1])


def check_statistics(name: str, observation: Observation) -> None:
    counts = observation.snapshot.fields["health_accumulator"][0]
    for layer in observation.layers:
        if not counts[layer.first_seed : layer.first_seed + layer.num_seeds].all():
            raise WrongResultError(f"{name}: layer {layer.name!r} has seeds without statistics")
