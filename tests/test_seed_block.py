"""SeedBlock: the seed bank's layout, its buffer, and the mirror that Python decides from."""

import gc

import pytest
import torch
from seed_fields import fields_of

from esper import _host, contracts
from esper._host import SeedBlock


def test_states_and_curves_agree_with_the_contracts() -> None:
    assert {s.name: s.value for s in contracts.SeedState} == _host.SEED_STATES
    assert {c.name: c.value for c in contracts.RampCurve} == _host.RAMP_CURVES


@pytest.mark.parametrize(
    ("num_seeds", "capacity"), [(1, 64), (10, 64), (64, 64), (65, 128), (1_000_000, 1_000_000)]
)
def test_size(num_seeds: int, capacity: int) -> None:
    block = SeedBlock(num_seeds)
    assert block.num_seeds == num_seeds
    assert block.capacity == capacity
    assert block.nbytes == 64 * capacity == memoryview(block).nbytes
    assert _host.BYTES_PER_SEED == 64


def test_fields_tile_the_block_without_gaps() -> None:
    block = SeedBlock(100)
    fields = block.fields()
    assert list(fields) == [
        "active_kernel_id",
        "health_accumulator",
        "alpha_blend",
        "alpha_target",
        "alpha_slope",
        "ramp_progress",
        "exec_latency_us",
        "last_update_epoch",
        "error_count",
        "lifecycle_states",
        "fallback_active",
        "ramp_curve",
        "fault",
    ]
    assert fields["active_kernel_id"] == (0, "int64", (128,))
    assert fields["health_accumulator"] == (1024, "float32", (6, 128))
    end = 0
    for offset, dtype, shape in fields.values():
        assert offset == end
        assert offset % 64 == 0
        end += torch.Size(shape).numel() * getattr(torch, dtype).itemsize
    assert end == block.nbytes


def test_block_is_zeroed_aligned_and_writable() -> None:
    block = SeedBlock(1000)
    view = memoryview(block)
    assert not any(view)
    assert not view.readonly
    assert view.format == "B"
    assert torch.frombuffer(block, dtype=torch.uint8).data_ptr() % 64 == 0


def test_tensor_and_mirror_are_the_same_memory() -> None:
    block = SeedBlock(10)
    _, seeds = fields_of(block)
    block.set_state(3, contracts.SeedState.GRAFTING)
    assert seeds["lifecycle_states"].tolist()[:5] == [0, 0, 0, 4, 0]
    seeds["lifecycle_states"][9] = contracts.SeedState.CULLED
    assert block.state(9) == contracts.SeedState.CULLED
    assert block.count(contracts.SeedState.GRAFTING) == 1


def test_count_ignores_the_padding() -> None:
    block = SeedBlock(10)
    assert block.count(contracts.SeedState.DORMANT) == 10
    assert [block.state(i) for i in range(10)] == [0] * 10


def test_memory_outlives_the_block() -> None:
    tensor = torch.frombuffer(SeedBlock(10), dtype=torch.uint8)
    gc.collect()
    tensor.fill_(7)
    assert tensor.sum().item() == 7 * 4096


@pytest.mark.parametrize("index", [-1, 10, 63, 2**40])
def test_index_out_of_range(index: int) -> None:
    block = SeedBlock(10)
    message = rf"seed index must lie in \[0, 9\], got {index}"
    with pytest.raises(IndexError, match=message):
        block.state(index)
    with pytest.raises(IndexError, match=message):
        block.set_state(index, 0)


@pytest.mark.parametrize("state", [-1, 12, 256])
def test_state_out_of_range(state: int) -> None:
    block = SeedBlock(10)
    message = rf"state must lie in \[0, 11\], got {state}"
    with pytest.raises(ValueError, match=message):
        block.set_state(0, state)
    with pytest.raises(ValueError, match=message):
        block.count(state)
    assert block.state(0) == 0


@pytest.mark.parametrize("num_seeds", [0, -5, 2**24 + 1])
def test_num_seeds_out_of_range(num_seeds: int) -> None:
    with pytest.raises(
        ValueError, match=rf"num_seeds must lie in \[1, 16777216\], got {num_seeds}"
    ):
        SeedBlock(num_seeds)
