"""The training loop, held-out losses and the counterfactual."""

import asyncio
import math

import pytest
import torch
from kasmina_library import MemoryLibrary
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import esper
from esper.config import SeedSettings
from esper.contracts import EpochEvent
from esper.kasmina.model import MorphableModel
from esper.tolaria import Tolaria, evaluate, evaluate_seeds, training_flops

Batch = tuple[Tensor, Tensor]


def loss_per_sample(output: Tensor, target: Tensor) -> Tensor:
    return mse_loss(output, target, reduction="none").mean(1)


def grown(alpha: float = 1.0) -> tuple[MorphableModel, list[Batch]]:
    """A model with a seed in EVALUATING, and data on which it matters."""
    library = MemoryLibrary()
    net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2))
    model = esper.wrap(net, settings=SeedSettings(seeds_per_layer=2, deterministic=True))
    model.connect(library)
    asyncio.run(model.load_kernel("0", 1, library.add(), alpha=alpha))
    layer = model.kasmina_layers["0"]
    layer.stabilize(1)
    layer.evaluate(1)
    return model, [(torch.randn(5, 8), torch.randn(5, 2)) for _ in range(3)]


def state(model: nn.Module) -> list[Tensor]:
    tensors = [t.clone() for t in (*model.parameters(), *model.buffers())]
    return [*tensors, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_evaluation_gives_one_loss_per_sample_and_changes_nothing() -> None:
    model, data = grown()
    model.train()
    model[1].eval()
    before, modes = state(model), [m.training for m in model.modules()]
    result = evaluate(model, data, loss_per_sample)
    assert result.losses.shape == (15,)
    assert result.accuracy is None
    assert [m.training for m in model.modules()] == modes
    for old, new in zip(before, state(model), strict=True):
        assert torch.equal(old, new)
    model.eval()
    with torch.no_grad():
        expected = torch.cat([loss_per_sample(model(x), y) for x, y in data]).double()
    torch.testing.assert_close(result.losses, expected)
    assert result.standard_error == pytest.approx(float(expected.std()) / math.sqrt(15))


def test_accuracy_is_that_of_the_arg_max() -> None:
    class Fixed(nn.Module):
        def forward(self, inp: Tensor) -> Tensor:
            return inp

    data = [(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 0, 0]))]
    result = evaluate(Fixed(), data, lambda out, y: out[:, 0])
    assert result.accuracy == pytest.approx(2 / 3)


def test_a_seeds_contribution_is_the_paired_difference_without_it() -> None:
    model, data = grown()
    with_seed = evaluate(model, data, loss_per_sample)
    [result] = evaluate_seeds(model, data, loss_per_sample, with_seed)
    layer = model.kasmina_layers["0"]
    assert layer.state_layout.value("alpha_blend", 1) == 1.0
    layer.cull(1, "test")
    without = evaluate(model, data, loss_per_sample)
    gains = without.losses - with_seed.losses
    assert gains.abs().max() > 0
    assert result.contribution == pytest.approx(float(gains.mean()))
    assert result.standard_error == pytest.approx(float(gains.std()) / math.sqrt(15))
    assert result.num_samples == 15
    assert result.loss_without - result.loss_with == pytest.approx(result.contribution)


def test_training_flops_are_counted_on_a_copy() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
    batch = torch.randn(5, 8), torch.randn(5, 2)
    # Forward, and the gradients of weights and (from the second layer on) of inputs, each 2mnk.
    expected = 2 * 5 * (2 * 8 * 4 + 3 * 4 * 2)
    assert training_flops(net, batch, loss_per_sample) == expected
    assert all(p.grad is None for p in net.parameters())


def test_kernels_cost_flops_too() -> None:
    model, data = grown()
    with_kernel = training_flops(model, data[0], loss_per_sample)
    esper.unwrap(model, discard_kernels=True)
    without = training_flops(model, data[0], loss_per_sample)
    # The kernel is frozen: forward of 8 > 3 > 4, and back through both to the layer's input...
    assert with_kernel - without == 2 * 5 * (8 * 3 + 3 * 4)
    # ...which the model's first layer does not need.


class Recorder:
    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.epochs: list[tuple[EpochEvent, int]] = []

    def on_step(self, step: int, epoch: int) -> None:
        self.steps.append((step, epoch))

    def on_epoch(self, event: EpochEvent, step_losses: list[float]) -> None:
        self.epochs.append((event, len(step_losses)))


def test_the_loop_trains_like_a_loop_written_by_hand() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(8, 2)
    model = esper.wrap(nn.Linear(8, 2))
    model.load_state_dict(plain.state_dict())
    data = [(torch.randn(5, 8), torch.randn(5, 2)) for _ in range(3)]
    recorder = Recorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tolaria = Tolaria(model, optimizer, loss_per_sample, data, data[:1], [recorder])
    history = tolaria.fit(2) + tolaria.fit(1)

    by_hand = torch.optim.SGD(plain.parameters(), lr=0.1)
    for inp, target in data * 3:
        by_hand.zero_grad()
        loss_per_sample(plain(inp), target).mean().backward()
        by_hand.step()
    assert torch.equal(model.weight, plain.weight)
    assert [event.epoch for event in history] == [0, 1, 2]
    assert [event for event, _ in recorder.epochs] == history
    assert recorder.steps == [(s, (s - 1) // 3) for s in range(1, 10)]
    assert history[-1].val_loss == pytest.approx(
        float(loss_per_sample(plain(data[0][0]), data[0][1]).detach().mean())
    )
