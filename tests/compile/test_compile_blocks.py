"""esper.compile: which blocks there are, and how many variants of them are compiled."""

import copy
import itertools
import logging

import pytest
import torch
from compile_cases import (
    FORMS,
    WHOLE_LIFE,
    Block,
    asks_for_gradients,
    encoder_layer,
    germinate,
    live,
    net,
    wrapped,
)
from kasmina_library import Irregular, MemoryLibrary, Residual
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import esper
from esper.contracts import SeedState
from esper.kasmina.model import MorphableModel

pytestmark = asks_for_gradients


def test_blocks_are_the_largest_repeated_modules_else_parts_else_the_model(
    library: MemoryLibrary,
) -> None:
    encoder = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False)
    perceptron = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    stages = nn.Sequential(
        nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 2), nn.Tanh())
    )
    for host, names in [
        (net(), ["1", "2", "3"]),
        (encoder, ["layers.0", "layers.1"]),
        (perceptron, [""]),
        (stages, ["0", "1"]),
        (nn.Linear(8, 8), [""]),
    ]:
        model = esper.compile(wrapped(host, library), backend="eager")
        assert [report.name for report in model.compile_report()] == names


def test_a_model_that_has_grown_already_is_compiled_in_the_same_blocks(
    library: MemoryLibrary,
) -> None:
    model = wrapped(net(), library)
    dormant = esper.compile(copy.deepcopy(model), backend="eager")
    for name in ("1.up", "2.up"):
        germinate(model, name, 0, library.add())
    live(model, 1)
    esper.compile(model, backend="eager")
    names = [[report.name for report in m.compile_report()] for m in (dormant, model)]
    assert names[0] == names[1] == ["1", "2", "3"]


def test_named_blocks_alone_are_compiled(
    model: MorphableModel, counter: CompileCounterWithBackend
) -> None:
    esper.compile(model, blocks=["2"], backend=counter, fullgraph=True)
    live(model, 3)
    [report] = model.compile_report()
    assert (report.name, report.class_name, report.num_graphs) == ("2", "Block", 1)
    assert counter.frame_count == 1


def test_equal_blocks_share_one_graph_and_a_germination_recompiles_its_block_alone(
    model: MorphableModel, library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    esper.compile(model, backend=counter, fullgraph=True)
    live(model, 3)
    assert counter.frame_count == 1
    germinate(model, "2.up", 0, library.add())
    live(model, WHOLE_LIFE)
    assert [r.num_recompiles for r in model.compile_report()] == [0, FORMS, 0]
    assert model.compile_report()[1].stall_s > 0
    germinate(model, "3.up", 0, library.add())
    live(model, WHOLE_LIFE)
    assert counter.frame_count == 1 + FORMS


def test_every_new_form_compiles_once(model: MorphableModel, library: MemoryLibrary) -> None:
    counter = CompileCounterWithBackend("eager")  # many graphs, which are only counted
    esper.compile(model, backend=counter, fullgraph=True)
    live(model, 2)
    frames = [counter.frame_count]
    for name, seed_idx, builder in [
        ("1.up", 0, Residual),
        ("1.up", 1, Residual),
        ("2.up", 0, Irregular),
        ("3.act", 1, Residual),
    ]:
        layer = model.kasmina_layers[name]
        germinate(model, name, seed_idx, library.add(builder, layer.site(seed_idx)))
        live(model, WHOLE_LIFE)
        assert layer.state(seed_idx) is SeedState.EVALUATING
        frames.append(counter.frame_count)
    assert [b - a for a, b in itertools.pairwise(frames)] == [FORMS] * 4
    for name, layer in model.kasmina_layers.items():
        for seed_idx in (0, 1):
            if layer.state(seed_idx) is SeedState.EVALUATING:
                assert layer.kernel(seed_idx) is not None, name
                layer.cull(seed_idx, "test")
    live(model, 3)
    assert counter.frame_count == frames[-1]


def test_a_stall_is_said(
    model: MorphableModel, library: MemoryLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    esper.compile(model, backend="eager", fullgraph=True)
    live(model, 2)
    assert "stalled" not in caplog.text
    germinate(model, "2.up", 0, library.add())
    live(model, 2)
    assert "block '2': compiled another variant; this step stalled for" in caplog.text


def test_the_limit_is_warned_of_before_it_is_reached(
    model: MorphableModel, library: MemoryLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    esper.compile(model, recompile_limit=5, backend="eager")
    live(model, 2)
    germinate(model, "1.up", 0, library.add())
    live(model, 4)
    assert "compiled variants" not in caplog.text
    live(model, WHOLE_LIFE)
    assert "block '1': Block has 4 compiled variants, and torch.compile makes no more than 5" in (
        caplog.text
    )
    assert "hit config.recompile_limit" not in caplog.text


def test_more_variants_than_dynamo_allows_by_default_are_compiled(
    model: MorphableModel, library: MemoryLibrary
) -> None:
    counter = CompileCounterWithBackend("eager")  # many graphs, which are only counted
    esper.compile(model, backend=counter, fullgraph=True)
    live(model, 2)
    with torch._dynamo.config.patch(recompile_limit=8):  # the default; torch's own tests raise it
        for name in ("1.up", "2.down", "3.act"):
            layer = model.kasmina_layers[name]
            germinate(model, name, 0, library.add(Residual, layer.site(0)))
            live(model, WHOLE_LIFE)
    assert counter.frame_count == 1 + 3 * FORMS > 8


class Other(Block):
    """A class of its own, with variants of its own."""


def test_classes_of_blocks_do_not_share_a_limit(library: MemoryLibrary) -> None:
    counter = CompileCounterWithBackend("eager")
    model = wrapped(nn.Sequential(Block(), Block(), Other(), Other()), library)
    esper.compile(model, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(accumulated_recompile_limit=2 + FORMS):
        live(model, 2)
        for name in ("1.up", "3.up"):
            germinate(model, name, 0, library.add())
            live(model, WHOLE_LIFE)
    assert counter.frame_count == 3 + 2 * FORMS  # the first block's input asks for no gradient
