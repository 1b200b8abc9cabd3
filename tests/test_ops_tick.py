"""esper::tick: faults, quarantine and ramps of all seeds in one step."""

import itertools
import math

import pytest
import torch
from seed_fields import fields_of
from torch import Tensor

from esper import ops, reference
from esper._host import SeedBlock
from esper.contracts import RampCurve, SeedState

RUNNING = range(SeedState.TRAINING, SeedState.FOSSILIZED + 1)


def bank(num_seeds: int, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    arena, seeds = fields_of(SeedBlock(num_seeds), device)
    seeds["lifecycle_states"][:num_seeds] = SeedState.GRAFTING
    return arena, seeds


def start_ramp(seeds: dict[str, Tensor], curve: RampCurve, steps: int, target: float) -> None:
    seeds["ramp_curve"].fill_(curve)
    seeds["alpha_slope"].fill_(1 / steps)
    seeds["alpha_target"].fill_(target)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        (RampCurve.LINEAR, [0.2, 0.4, 0.6, 0.8]),
        (RampCurve.COSINE, [0.8 * (1 - math.cos(math.pi * p)) / 2 for p in (0.25, 0.5, 0.75, 1)]),
        (RampCurve.SIGMOID, [0.0361413, 0.4, 0.7638587, 0.8]),
    ],
)
def test_ramp_literals(curve: RampCurve, expected: list[float], device: str) -> None:
    arena, seeds = bank(3, device)
    start_ramp(seeds, curve, 4, 0.8)
    alphas = []
    for _ in range(4):
        ops.tick(arena, 3, 5)
        alphas.append(seeds["alpha_blend"][1].item())
    assert alphas == pytest.approx(expected, abs=1e-5)
    assert alphas[-1] == torch.tensor(0.8).item()
    assert seeds["alpha_slope"][:3].tolist() == [0.0] * 3
    assert seeds["ramp_progress"][:3].tolist() == [1.0] * 3


@pytest.mark.parametrize("curve", RampCurve)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 49, 60, 61, 100, 997])
def test_ramp_rises_and_arrives_on_time(curve: RampCurve, steps: int) -> None:
    arena, seeds = bank(1, "cpu")
    start_ramp(seeds, curve, steps, 1.0)
    alphas = [0.0]
    for _ in range(steps):
        assert seeds["alpha_slope"][0].item() != 0
        ops.tick(arena, 1, 5)
        alphas.append(seeds["alpha_blend"][0].item())
    assert alphas[-1] == 1.0
    assert seeds["alpha_slope"][0].item() == 0
    assert all(low <= high for low, high in itertools.pairwise(alphas))


@pytest.mark.parametrize("curve", RampCurve)
def test_curves_follow_the_float64_formula(curve: RampCurve, device: str) -> None:
    """All places of a block and the seeds after the last full one, over the whole curve."""
    num_seeds = 64 * 50 + 7
    arena, seeds = bank(num_seeds, device)
    seeds["ramp_curve"].fill_(curve)
    seeds["alpha_target"].fill_(1.0)
    seeds["alpha_slope"].fill_(1e-7)
    start = torch.linspace(0, 0.999, num_seeds)
    seeds["ramp_progress"][:num_seeds] = start.to(device)
    ops.tick(arena, num_seeds, 5)
    progress = (start + torch.tensor(1e-7)).double()
    expected = reference.ramp(curve, progress)
    actual = seeds["alpha_blend"][:num_seeds].cpu()
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("quiet", ["dormant", "arrived"])
def test_quiet_seeds_keep_every_bit(quiet: str, device: str) -> None:
    arena, seeds = bank(200, device)
    for name in ("alpha_blend", "alpha_target", "ramp_progress"):
        seeds[name].uniform_()
    seeds["error_count"].fill_(2)
    if quiet == "dormant":
        seeds["lifecycle_states"].fill_(SeedState.DORMANT)
        seeds["alpha_slope"].fill_(0.25)
        seeds["fault"].fill_(1)
    before = arena.clone()
    ops.tick(arena, 200, 3)
    assert torch.equal(arena, before)


def test_ramp_moves_in_running_states_only(device: str) -> None:
    arena, seeds = bank(len(SeedState), device)
    for state in SeedState:
        seeds["lifecycle_states"][state] = state
    start_ramp(seeds, RampCurve.LINEAR, 2, 1.0)
    seeds["fault"].fill_(1)
    ops.tick(arena, len(SeedState), 5)
    for state in SeedState:
        moved = state in RUNNING
        assert seeds["alpha_blend"][state].item() == (0.5 if moved else 0.0)
        assert seeds["error_count"][state].item() == moved
        assert seeds["fault"][state].item() == (not moved)


def test_quarantine_after_max_errors(device: str) -> None:
    arena, seeds = bank(2, device)
    seeds["alpha_blend"].fill_(0.7)
    for errors in (1, 2):
        seeds["fault"][0] = 1
        ops.tick(arena, 2, 3)
        assert seeds["error_count"][0].item() == errors
        assert seeds["fallback_active"][0].item() == 0
        assert seeds["alpha_blend"][0].item() == pytest.approx(0.7)
    seeds["fault"][0] = 1
    seeds["alpha_slope"].fill_(0.25)
    seeds["alpha_target"].fill_(1.0)
    ops.tick(arena, 2, 3)
    assert seeds["fallback_active"][:2].tolist() == [1, 0]
    assert seeds["alpha_blend"][:2].tolist() == [0.0, 0.25]
    assert seeds["alpha_slope"][:2].tolist() == [0.0, 0.25]
    assert seeds["fault"][:2].tolist() == [0, 0]


def test_seeds_beyond_the_last_are_left_alone(device: str) -> None:
    arena, seeds = bank(64, device)
    start_ramp(seeds, RampCurve.LINEAR, 2, 1.0)
    ops.tick(arena, 3, 5)
    assert seeds["alpha_blend"].count_nonzero() == 3


@pytest.mark.parametrize("num_seeds", [1, 63, 64, 65, 5000, 70_001])
def test_matches_the_reference(num_seeds: int, device: str) -> None:
    block = SeedBlock(num_seeds)
    _, expected = fields_of(block)
    generator = torch.Generator().manual_seed(num_seeds)
    capacity = block.capacity

    def draw(high: int) -> Tensor:
        return torch.randint(high, (capacity,), generator=generator)

    expected["lifecycle_states"].copy_(draw(len(SeedState)))
    expected["lifecycle_states"][num_seeds:] = 0
    expected["ramp_curve"].copy_(draw(len(RampCurve)))
    expected["fallback_active"].copy_(draw(4) == 0)
    expected["error_count"].copy_(draw(3))
    expected["alpha_target"].copy_(torch.rand(capacity, generator=generator))
    expected["alpha_slope"].copy_(draw(3) * 0.15)
    arena, actual = fields_of(block)
    arena = arena.clone().to(device)
    actual = {
        name: arena[offset : offset + expected[name].nbytes].view(expected[name].dtype).view(shape)
        for name, (offset, _, shape) in block.fields().items()
    }
    for _ in range(8):
        fault = draw(3) == 0
        expected["fault"].copy_(fault)
        actual["fault"].copy_(fault)
        ops.tick(arena, num_seeds, 4)
        reference.tick(expected, 4)
    for name, value in expected.items():
        if name in ("alpha_blend", "ramp_progress"):
            torch.testing.assert_close(actual[name].cpu(), value, rtol=0, atol=1e-6)
        else:
            assert torch.equal(actual[name].cpu(), value), name


def test_opcheck(device: str) -> None:
    arena, seeds = bank(70, device)
    start_ramp(seeds, RampCurve.LINEAR, 4, 1.0)
    torch.library.opcheck(torch.ops.esper.tick, (arena, 70, 3))


WRONG = {
    "floats": ((torch.zeros(4096), 10, 3), r"arena must be Byte, got Float"),
    "too small": (
        (torch.zeros(4096, dtype=torch.uint8), 65, 3),
        r"arena must be contiguous with 8192 bytes for 65 seeds, got shape \(4096, \)",
    ),
    "no seeds": (
        (torch.zeros(4096, dtype=torch.uint8), 0, 3),
        r"num_seeds must lie in \[1, 16777216\], got 0",
    ),
    "no errors allowed": (
        (torch.zeros(4096, dtype=torch.uint8), 10, 0),
        r"max_errors must be at least 1, got 0",
    ),
    "misaligned": (
        (torch.zeros(4097, dtype=torch.uint8)[1:], 10, 3),
        r"arena must be aligned to 8 bytes, got offset 1",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(arguments: tuple[Tensor, int, int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.tick(*arguments)
