"""Known traps: attention, the fast path of encoder layers, tools that look at exact types."""

import asyncio
from typing import Any

import pytest
import torch
from compile_cases import asks_for_gradients, encoder_layer, germinate, live, wrapped
from kasmina_library import MemoryLibrary, Residual
from torch import nn

import esper
from esper.kasmina.model import MorphableModel

pytestmark = asks_for_gradients


@pytest.mark.parametrize("blockwise", [False, True])
def test_an_active_seed_is_heard_by_a_compiled_encoder_layer_in_eval_mode(
    blockwise: bool, library: MemoryLibrary
) -> None:
    host = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False).eval()
    model = wrapped(host, library)
    inp = torch.randn(2, 3, 8)
    run: Any = model
    if blockwise:
        esper.compile(model, backend="aot_eager", fullgraph=True)
    else:
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        dormant = model(inp)
        torch.testing.assert_close(run(inp), dormant)
        site = model.kasmina_layers["layers.0.linear1"].site(0)
        assert asyncio.run(
            model.load_kernel("layers.0.linear1", 0, library.add(Residual, site), alpha=1.0)
        )
        grown = run(inp)
        assert not torch.allclose(grown, dormant)
        torch.compiler.set_stance("force_eager")
        expected = model(inp)
        torch.compiler.set_stance("default")
    torch.testing.assert_close(grown, expected)


def test_the_output_projection_of_attention_carries_no_seeds(library: MemoryLibrary) -> None:
    model = esper.compile(wrapped(encoder_layer(), library), backend="aot_eager", fullgraph=True)
    assert not any(name.endswith("out_proj") for name in model.kasmina_layers)
    inp = torch.randn(2, 3, 8)
    model(inp)
    torch.testing.assert_close(model(inp), encoder_layer()(inp))


def test_tools_that_look_at_exact_types_see_the_host_type_once_a_seed_is_culled(
    model: MorphableModel, library: MemoryLibrary
) -> None:
    esper.compile(model, backend="aot_eager", fullgraph=True)
    live(model, 2)
    assert type(model[1].up) is nn.Linear
    germinate(model, "1.up", 0, library.add())
    live(model, 2)
    assert type(model[1].up) is not nn.Linear
    assert isinstance(model[1].up, nn.Linear)
    model.kasmina_layers["1.up"].cull(0, "test")
    assert type(model[1].up) is nn.Linear
