"""What do seeds in TRAINING cost? Training steps with kernels that the host does not hear.

A step is forward, backward, Adam over host and kernels, and ``model.step()``.
"""

import copy
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.findings import UNWRAPPED, ratio
from benchmarks.gate import WrongResultError, check_equal, deterministic
from benchmarks.harness import Build, Plan, Times, Trial
from benchmarks.kernels import Kernels, Seeds
from benchmarks.models import CNN, MLP, SEEDS_PER_LAYER, Subject, copied, every_seed
from benchmarks.modes import training_step
from benchmarks.rows import Finding
from esper import MorphableModel

DESIGN = "low_rank"
ONE_SEED: dict[str, Seeds] = {MLP.name: {"2": [0]}, CNN.name: {"3": [0]}}  # in a hidden layer


def trials(plan: Plan, kernels: Kernels) -> list[Trial]:
    subjects = (MLP,) if plan.quick else (MLP, CNN)
    return [trial(subject, plan, kernels) for subject in subjects]


def trial(subject: Subject, plan: Plan, kernels: Kernels) -> Trial:
    net, inp = subject.prepare(plan.device, plan.seed)

    @functools.cache
    def growing(variant: str) -> MorphableModel:
        seeds = ONE_SEED[subject.name] if variant == "one seed" else every_seed(net, inp)
        return kernels.isolate(net, inp, seeds, DESIGN, seeds_per_layer=SEEDS_PER_LAYER)

    def report(times: Times) -> Iterator[Finding]:
        for variant in ("one seed", "all seeds"):
            seeds = len(growing(variant).kasmina.isolated_seats())
            row = f"{subject.name}, training step, {variant} ({seeds}) in TRAINING"
            yield ratio(times, variant, UNWRAPPED, row)

    def check() -> None:
        for variant in ("one seed", "all seeds"):
            check_isolation(f"{subject.name}, {variant}", growing(variant), net, inp)

    works: dict[str, Build] = {
        UNWRAPPED: lambda: training_step(copied(net), inp),
        "one seed": lambda: training_step(copied(growing("one seed")), inp),
        "all seeds": lambda: training_step(copied(growing("all seeds")), inp),
    }
    return Trial(f"{subject.name}, training step", works, check, report, grad=True)


def check_isolation(name: str, growing: MorphableModel, net: nn.Module, inp: Tensor) -> None:
    """Train in earnest: the host is bit-identical to one without seeds, and the kernels learn."""
    plain, planted = copy.deepcopy(net), copy.deepcopy(growing)
    seats = planted.kasmina.isolated_seats()
    drawn = [seat.kernel.weights()[0].detach().clone() for seat in seats]
    plain.load_state_dict(planted.state_dict(), strict=False)  # batch norm has counted a batch
    with deterministic(), torch.enable_grad():
        for model in (plain, planted):
            step = training_step(model, inp, learning_rate=1e-3)
            for _ in range(3):
                step()
    check_equal(f"{name}, trained", plain.state_dict(), planted.state_dict())
    for seat, before in zip(seats, drawn, strict=True):
        if torch.equal(seat.kernel.weights()[0], before):
            raise WrongResultError(f"{name}: {seat.seed} has learnt nothing")
