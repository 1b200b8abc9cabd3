"""A compiled model is still a model: copies, pickles, state dicts, unwrapping, bad arguments."""

import copy
import pickle

import pytest
import torch
from compile_cases import asks_for_gradients, batch, live, net
from kasmina_library import MemoryLibrary
from torch._dynamo.testing import CompileCounterWithBackend

import esper
from esper.errors import EsperError
from esper.kasmina.model import MorphableModel

pytestmark = asks_for_gradients


def test_a_copy_and_a_pickle_of_a_compiled_model_are_not_compiled(model: MorphableModel) -> None:
    esper.compile(model, blocks=["", "2"], backend="aot_eager", fullgraph=True)
    live(model, 2)
    inp = batch()
    twin = copy.deepcopy(model)
    assert twin.compile_report() == []
    torch.testing.assert_close(twin(inp), model(inp))
    with torch.no_grad():
        model[0].weight.zero_()
    assert not torch.allclose(twin(inp), model(inp))
    restored = pickle.loads(pickle.dumps(twin))
    torch.testing.assert_close(restored(inp), twin(inp))
    pickle.dumps(model)


def test_an_unwrapped_model_is_uncompiled(
    model: MorphableModel, counter: CompileCounterWithBackend
) -> None:
    esper.compile(model, backend=counter, fullgraph=True)
    plain = esper.unwrap(model)
    assert all("_compiled_call_impl" not in module.__dict__ for module in plain.modules())
    plain(batch())
    plain(batch())
    assert counter.frame_count == 0


def test_state_dict_keys_are_those_of_the_unwrapped_model(model: MorphableModel) -> None:
    esper.compile(model, backend="aot_eager")
    live(model, 2)
    assert list(model.state_dict()) == list(net().state_dict())


def test_bad_arguments_are_refused_and_change_nothing(
    model: MorphableModel, library: MemoryLibrary
) -> None:
    with pytest.raises(TypeError, match="expects a wrapped model, got Sequential"):
        esper.compile(net())
    for options, message in [
        ({"blocks": ["9"]}, "block '9' is no module of Sequential"),
        ({"blocks": []}, "blocks must name at least one module"),
        (
            {"on_germination": "wait"},
            "on_germination must be 'stall', 'eager' or 'background', got 'wait'",
        ),
        ({"recompile_limit": 1}, "recompile_limit must be at least 2, got 1"),
        (
            {"on_germination": "background", "backend": "eager"},
            "on_germination='background' needs backend='inductor', got backend='eager'",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            esper.compile(model, **options)
    for options, message in [
        ({"blocks": "1"}, "blocks must be a list of names, got '1'"),
        ({"ahead": "f"}, "ahead must be a list of artifact ids, got 'f'"),
    ]:
        with pytest.raises(TypeError, match=message):
            esper.compile(model, **options)
    with pytest.raises(EsperError, match="ahead needs a library"):
        esper.compile(esper.wrap(net()), ahead=["f" * 64])
    assert model.compile_report() == []
    esper.compile(model, backend="eager")
    with pytest.raises(EsperError, match="is compiled already"):
        esper.compile(model)
