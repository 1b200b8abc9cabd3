"""What does a longer time in isolation do to a seed at a plateau of its host?

    python -m benchmarks.isolation [--seeds 4]

While a seed is in TRAINING its host does not hear it, so the gradient that it follows does not
become smaller as it moves. Here the demo's narrow network is trained until it gains little, then a
``residual_mlp`` is grown on its second activation. For each time in isolation: the held-out loss
before, the highest while it is grafted, and the one when it has been, means over the seeds.
"""

import argparse
import statistics

import torch
from torch import Tensor

from esper.config import SeedSettings
from esper.contracts import GraftingStrategy, SeedState
from esper.demo import NARROW, Digits, load_digits, loss_per_sample, make_network
from esper.kasmina.model import wrap
from esper.testing import FakeLibrary
from esper.tolaria import evaluate

LAYER = "act2"
EPOCHS_BEFORE = 60
TRAINING_STEPS = (0, 60, 240, 960, 3840)
GRAFTING_STEPS = 60
LEARNING_RATE = 3e-3


def losses(digits: Digits, seed: int, training_steps: int) -> tuple[float, float, float]:
    """Return the held-out loss before, at its highest while grafting, and after it."""
    model = wrap(make_network(NARROW, seed), [LAYER], settings=SeedSettings(deterministic=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    model.attach_optimizer(optimizer)
    loader = digits.train_loader(seed)

    def train(batch: tuple[Tensor, Tensor]) -> None:
        optimizer.zero_grad()
        inp, target = batch
        loss_per_sample(model(inp), target).mean().backward()
        optimizer.step()
        model.step()

    def held_out() -> float:
        return evaluate(model, [digits.validation], loss_per_sample).loss

    for _ in range(EPOCHS_BEFORE):
        for batch in loader:
            train(batch)
    before = held_out()
    library = FakeLibrary()
    model.connect(library)
    layer = model.kasmina_layers[LAYER]
    strategy = GraftingStrategy(training_steps=training_steps, grafting_steps=GRAFTING_STEPS)
    layer.request_germination(0, library.add(site=layer.site(0)), strategy)
    highest = before
    while True:
        for batch in loader:
            train(batch)
            if layer.state(0) is SeedState.GRAFTING:
                highest = max(highest, held_out())
            elif layer.state(0) is SeedState.STABILIZATION:
                return before, highest, held_out()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    digits = load_digits()
    print("| training_steps | before | highest while grafting | after |")
    print("|---|---|---|---|")
    for steps in TRAINING_STEPS:
        of_seeds = [losses(digits, seed, steps) for seed in range(options.seeds)]
        means = [statistics.mean(column) for column in zip(*of_seeds, strict=True)]
        print(f"| {steps} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |", flush=True)


if __name__ == "__main__":
    main()
