"""The no man's land around a tensor shows what was written there, and fresh memory is poisoned."""

import pytest
import torch
from torch import nn

from esper.urabrask.guarded import Guarded, guard, poisoned_memory


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_holds_a_tensor(shape: tuple[int, ...], dtype: torch.dtype, strided: bool) -> None:
    like = torch.ones(shape, dtype=dtype)
    memory = Guarded(like, strided=strided)
    tensor = memory.tensor().copy_(like)
    assert torch.equal(tensor, like)
    assert not memory.overrun()
    assert memory.fits(like, strided=strided)
    assert not memory.fits(like, strided=not strided)
    assert not memory.fits(like.double() if dtype is not torch.float64 else like, strided=strided)


@pytest.mark.parametrize("offset", [-1, 4, -1000, 1000])
def test_what_is_written_beside_it_shows(offset: int) -> None:
    memory = Guarded(torch.empty(4), strided=False)
    tensor = memory.tensor()
    tensor.as_strided((1,), (1,), tensor.storage_offset() + offset).zero_()
    assert memory.overrun()


def test_what_is_written_into_a_gap_shows() -> None:
    memory = Guarded(torch.empty(4), strided=True)
    tensor = memory.tensor()
    tensor.as_strided((1,), (1,), tensor.storage_offset() + 3).zero_()
    assert memory.overrun()


def test_what_lies_beside_it_is_nan() -> None:
    tensor = Guarded(torch.empty(4), strided=False).tensor()
    assert tensor.as_strided((2,), (5,), tensor.storage_offset() - 1).isnan().all()


def test_a_module_keeps_its_weights() -> None:
    module = nn.BatchNorm1d(3)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    memories = guard(module)
    assert memories.keys() == {f"state.{name}" for name in before}
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert isinstance(module.weight, nn.Parameter)
    assert module.weight.is_leaf


def test_fresh_memory_is_poisoned() -> None:
    with poisoned_memory():
        assert torch.empty(100).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
