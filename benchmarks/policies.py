"""Which policy makes most of the same budget, on the demo's digits?

    python -m benchmarks.policies [--seeds 4] [--epochs 100] [--max-parameters 600]

Every policy trains the demo's narrow network from the same weights on the same batches, with the
same designs, strategy, judgement and budget; they differ in when, where and with which kernel they
grow. The test set is looked at once a run. The last lines compare each policy with RandomPolicy,
seed by seed: the mean difference in test loss and its standard error.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from esper.config import SeedSettings, TamiyoSettings
from esper.contracts import GraftingStrategy, Outcome
from esper.demo import NARROW, Digits, load_digits, loss_per_sample, make_network
from esper.kasmina.model import wrap
from esper.pipeline import Pipeline
from esper.tamiyo import ManualPolicy, PlateauPolicy, Policy, RandomPolicy, ScheduledPolicy
from esper.tolaria import Tolaria, evaluate
from esper.urza import Urza

SEEDS = SeedSettings(seeds_per_layer=2, observe_every=16, embargo_steps=150, deterministic=True)
STRATEGY = GraftingStrategy(
    training_steps=100, grafting_steps=100, stabilization_steps=40, fine_tuning_steps=100
)
LEARNING_RATE = 3e-3
BASELINE = "RandomPolicy"


@dataclass(frozen=True)
class Result:
    test_loss: float
    test_accuracy: float
    parameters: int
    kept: int
    tried: int


def policies(settings: TamiyoSettings, epochs: int) -> dict[str, Callable[[int], Policy]]:
    """Return what makes each policy, given the number of the run."""
    schedule = range(epochs // 8, epochs, max(1, epochs // 8))
    return {
        "never": lambda run: ManualPolicy(),
        BASELINE: lambda run: RandomPolicy(run, settings=settings, strategy=STRATEGY),
        "ScheduledPolicy": lambda run: ScheduledPolicy(schedule, settings, STRATEGY),
        "PlateauPolicy": lambda run: PlateauPolicy(settings, STRATEGY),
    }


def train(
    policy: Policy, settings: TamiyoSettings, library: Urza, digits: Digits, seed: int, epochs: int
) -> Result:
    model = wrap(make_network(NARROW, seed), settings=SEEDS)
    model(digits.train[0][:1])  # shows the widths of the activations
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    already = len(library.field_reports())
    pipeline = Pipeline(model, library, policy=policy, controller=settings, synchronous=True)
    with pipeline:
        train_loader = digits.train_loader(seed)
        held_out = [digits.validation]
        Tolaria(model, optimizer, loss_per_sample, train_loader, held_out, [pipeline]).fit(epochs)
    reports = library.field_reports()[already:]
    result = evaluate(model, [digits.test], loss_per_sample)
    assert result.accuracy is not None
    return Result(
        result.loss,
        result.accuracy,
        sum(parameter.numel() for parameter in model.parameters()),
        sum(report.outcome is Outcome.FOSSILIZED for report in reports),
        len(reports),
    )


def print_row(name: str, results: list[Result]) -> None:
    losses = [result.test_loss for result in results]
    columns = [
        f"{statistics.mean(losses):.4f}",
        f"{statistics.mean(r.test_accuracy for r in results):.1%}",
        f"{statistics.mean(r.parameters for r in results):.0f}",
        f"{sum(r.kept for r in results)} of {sum(r.tried for r in results)}",
        " ".join(f"{loss:.3f}" for loss in losses),
    ]
    print("| " + " | ".join([name, *columns]) + " |", flush=True)


def print_comparison(name: str, results: list[Result], baseline: list[Result]) -> None:
    gains = [b.test_loss - r.test_loss for r, b in zip(results, baseline, strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    better = sum(gain > 0 for gain in gains)
    print(
        f"{name}: test loss {statistics.mean(gains):+.4f} (standard error {error:.4f}) below "
        f"{BASELINE}'s, better in {better} of {len(gains)} runs"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--max-parameters", type=int, default=600)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = TamiyoSettings(
        window_epochs=5,
        min_relative_improvement=0.05,
        warmup_epochs=8,
        max_parameters=options.max_parameters,
        last_epoch=options.epochs - 1,
    )
    digits = load_digits()
    print("| policy | test loss | test accuracy | parameters | kept | test losses |")
    print("|---|---|---|---|---|---|")
    results: dict[str, list[Result]] = {}
    with tempfile.TemporaryDirectory() as folder, Urza(Path(folder)) as library:
        for name, make in policies(settings, options.epochs).items():
            results[name] = [
                train(make(seed), settings, library, digits, seed, options.epochs)
                for seed in range(options.seeds)
            ]
            print_row(name, results[name])
    for name, of_policy in results.items():
        if name != BASELINE:
            print_comparison(name, of_policy, results[BASELINE])


if __name__ == "__main__":
    main()
