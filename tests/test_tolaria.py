"""The training loop, held-out losses and the counterfactual."""

import asyncio
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from kasmina_library import MemoryLibrary
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.config import SeedSettings
from esper.contracts import EpochEvent
from esper.kasmina.model import MorphableModel
from esper.tolaria import Tolaria, evaluate, measure_epoch, training_flops, validate

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
    with_seed, [result] = validate(model, data, loss_per_sample)
    assert torch.equal(with_seed.losses, evaluate(model, data, loss_per_sample).losses)
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


def shuffling(data: list[Batch]) -> DataLoader[tuple[Tensor, ...]]:
    samples = TensorDataset(*map(torch.cat, zip(*data, strict=True)))
    return DataLoader(samples, batch_size=4, shuffle=True)


def test_losses_are_paired_also_when_the_loader_shuffles() -> None:
    model, data = grown()
    _, [expected] = validate(model, data, loss_per_sample)
    for _ in range(3):
        _, [result] = validate(model, shuffling(data), loss_per_sample)
        assert result.contribution == pytest.approx(expected.contribution, rel=1e-4)
        assert result.standard_error == pytest.approx(expected.standard_error, rel=1e-4)


def test_losses_are_paired_also_when_the_model_changes_its_input() -> None:
    model, data = grown()
    _, [expected] = validate(model, data, loss_per_sample)
    unscaled = [(inp * 255, target) for inp, target in data]
    model.register_forward_pre_hook(lambda _, args: (args[0].div_(255),))
    _, [result] = validate(model, unscaled, loss_per_sample)
    assert result.contribution == pytest.approx(expected.contribution, rel=1e-4)


def test_validation_draws_as_many_random_numbers_as_one_pass_over_the_loader() -> None:
    model, data = grown()
    loader = shuffling(data)
    torch.manual_seed(0)
    list(loader)
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    validate(model, loader, loss_per_sample)
    assert torch.equal(torch.get_rng_state(), expected)


def test_losses_with_more_dimensions_are_averaged_for_each_sample() -> None:
    model, data = grown()
    per_token = evaluate(model, data, lambda output, target: (output - target).square())
    expected = evaluate(model, data, loss_per_sample).losses
    torch.testing.assert_close(per_token.losses, expected, rtol=1e-6, atol=1e-6)


def test_measuring_an_epoch_gives_its_event_and_changes_nothing() -> None:
    model, data = grown()
    model.kasmina.epoch = 3
    before = state(model)
    event = measure_epoch(model, data, loss_per_sample, epoch=7, train_loss=0.5)
    held_out, evaluations = validate(model, data, loss_per_sample)
    assert event == EpochEvent(
        epoch=7,
        step=model.kasmina.step_count,
        train_loss=0.5,
        val_loss=held_out.loss,
        val_loss_standard_error=held_out.standard_error,
        evaluations=evaluations,
    )
    assert model.kasmina.epoch == 3
    for old, new in zip(before, state(model), strict=True):
        assert torch.equal(old, new)


def test_training_flops_are_counted_on_a_copy() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
    batch = torch.randn(5, 8), torch.randn(5, 2)
    # Forward, and the gradients of weights and (from the second layer on) of inputs, each 2mnk.
    expected = 2 * 5 * (2 * 8 * 4 + 3 * 4 * 2)
    assert training_flops(net, batch, loss_per_sample) == expected
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_counting_flops_draws_no_random_numbers(device: str) -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.5), nn.Linear(4, 2)).to(device)
    batch = torch.randn(5, 8, device=device), torch.randn(5, 2, device=device)
    torch.manual_seed(0)
    expected = torch.rand(3), torch.rand(3, device=device)
    torch.manual_seed(0)
    training_flops(net, batch, loss_per_sample)
    assert torch.equal(torch.rand(3), expected[0])
    assert torch.equal(torch.rand(3, device=device), expected[1])


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


def tolaria_for(
    train: Iterable[Batch], held_out: Iterable[Batch], loss_fn: nn.Module | None = None
) -> Tolaria:
    model = esper.wrap(nn.Sequential(nn.Linear(8, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Tolaria(model, optimizer, loss_fn or loss_per_sample, train, held_out)


BATCH = torch.randn(5, 8), torch.randn(5, 2)


@pytest.mark.parametrize(
    ("loss_fn", "got"),
    [(nn.MSELoss(), "a scalar"), (lambda out, target: out[:1], r"shape \(1, 2\)")],
    ids=["scalar", "shape"],
)
def test_a_loss_that_is_not_one_per_sample_is_refused_at_the_first_step(
    loss_fn: nn.Module, got: str
) -> None:
    tolaria = tolaria_for([BATCH], [BATCH], loss_fn)
    message = rf"loss_fn must return one loss per sample, shape \(5,\), got {got}; use reduction='"
    with pytest.raises(ValueError, match=message):
        tolaria.fit(1)
    assert tolaria.model.kasmina.step_count == 0
    with pytest.raises(ValueError, match=message):
        evaluate(tolaria.model, [BATCH], loss_fn)
    with pytest.raises(ValueError, match=message):
        training_flops(tolaria.model, BATCH, loss_fn)


def test_a_loader_without_batches_is_named() -> None:
    with pytest.raises(ValueError, match="the training loader gave no batch: it must be non-empty"):
        tolaria_for([], [BATCH]).fit(1)
    with pytest.raises(ValueError, match=r"the validation loader gave no batch: .* re-iterable"):
        tolaria_for([BATCH], []).fit(1)
    with pytest.raises(ValueError, match="the loader gave no batch"):
        evaluate(nn.Linear(8, 2), [], loss_per_sample)


INP, TARGET = BATCH


@pytest.mark.parametrize(
    ("loader", "found"),
    [
        (None, "NoneType"),
        (INP, r"Tensor \(5, "),
        ((INP, TARGET), r"Tensor \(5, "),
        ([{"x": INP, "y": TARGET}], "dict"),
        ([(INP, 1)], "tuple of Tensor, int"),
        ([(INP[0], TARGET[0].sum())], "tuple of Tensor, Tensor"),
    ],
)
def test_a_loader_of_something_else_is_named(loader: Any, found: str) -> None:
    message = f"^the loader must give pairs of an input and a tensor of targets.*found {found}"
    with pytest.raises(TypeError, match=message):
        evaluate(nn.Linear(8, 2), loader, loss_per_sample)
    with pytest.raises(TypeError, match=message.replace("loader", "validation loader")):
        tolaria_for([BATCH], loader).fit(1)


def test_a_generator_is_found_out_in_its_second_epoch() -> None:
    tolaria = tolaria_for((batch for batch in [BATCH]), [BATCH])
    tolaria.fit(1)
    with pytest.raises(
        ValueError, match=r"the training loader gave no batch: .* a generator is not"
    ):
        tolaria.fit(1)


def test_a_model_that_is_not_wrapped_is_refused() -> None:
    net = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    message = "Linear is not wrapped; call esper.wrap first"
    with pytest.raises(TypeError, match=message):
        Tolaria(net, optimizer, loss_per_sample, [BATCH], [BATCH])
    with pytest.raises(TypeError, match=message):
        validate(net, [BATCH], loss_per_sample)


def test_a_negative_number_of_epochs_is_refused() -> None:
    tolaria = tolaria_for([BATCH], [BATCH])
    assert tolaria.fit(0) == []
    with pytest.raises(ValueError, match="epochs must be at least 0, got -1"):
        tolaria.fit(-1)
