"""Programs against the module trees they were traced from, and against files made to do harm."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import forge_samples as samples
import pytest
import torch
from forge_samples import PLANTINGS, SITES
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close, relative_error
from torch import Tensor, nn

from esper import blueprints
from esper.contracts import Design
from esper.errors import ArtifactError
from esper.kasmina import operators
from esper.kasmina.example import example_inputs
from esper.kasmina.operators import fast_bindings, operator
from esper.kasmina.program import Program
from esper.tezzeret.trace import instantiate, trace

DESIGNS = {
    "NamesDTypes": samples.NamesDTypes,
    "Shifted": samples.Shifted,
    "Stateful": samples.Stateful,
    "Tied": samples.Tied,
}


@cache
def graph_of(design_name: str, site_name: str) -> bytes:
    return trace(design_of(design_name), SITES[site_name], "float32")[1]


def design_of(name: str) -> Design:
    return samples.design(DESIGNS[name]) if name in DESIGNS else blueprints.get(name)


def traced(design_name: str, site_name: str) -> tuple[Program, nn.Module]:
    """Return the program and the module it came from, with weights that are not zero."""
    program = Program.from_json(graph_of(design_name, site_name))
    module = instantiate(design_of(design_name), SITES[site_name], "float32", program.seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return program, module


# Gradients of a convolution's weights sum some ten thousand float32 terms of both signs. What the
# compiled program computes is compared with the module tree bit by bit.
ROUNDING = 1e-4


def run_with_gradients(
    function: Callable[..., Tensor], inp: Tensor, act: Tensor, params: list[Tensor]
) -> dict[str, Tensor]:
    """Return the output and the gradients of a weighted sum of it."""
    inputs = {"act": act} | {f"param {i}": p for i, p in enumerate(params)}
    inputs |= {"inp": inp} if inp.is_floating_point() else {}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    out = function(
        leaves.get("inp", inp), leaves["act"], [leaves[f"param {i}"] for i in range(len(params))]
    )
    # Mostly of one sign: sums that cancel would measure nothing but rounding.
    random = torch.Generator().manual_seed(1)
    weights = (1 + torch.randn(out.shape, generator=random)).to(out.dtype)
    grads = torch.autograd.grad((out * weights).sum(), list(leaves.values()), allow_unused=True)
    found = {f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out} | {name: grad for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("site_name", "design_name"), PLANTINGS)
def test_agrees_with_module_and_with_float64(
    site_name: str, design_name: str, training: bool
) -> None:
    program, module = traced(design_name, site_name)
    module.train(training)
    params = list(module.parameters())
    names = [name for name, _ in module.named_parameters()]
    run = program.compile(training)
    for batch_size in (1, 7, 32):
        inp, act = example_inputs(SITES[site_name], "float32", batch_size)
        found = run_with_gradients(lambda i, a, p: run(i, a, p, ()), inp, act, params)
        expected = run_with_gradients(
            lambda i, a, p: torch.func.functional_call(
                module, dict(zip(names, p, strict=True)), (i, a)
            ),
            inp,
            act,
            params,
        )
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
        wide = [t.double() if t.is_floating_point() else t for t in (inp, act, *params)]
        reference = run_with_gradients(
            lambda i, a, p: program.interpret(i, a, p, (), training, torch.float64),
            wide[0],
            wide[1],
            wide[2:],
        )
        assert found.keys() == reference.keys()
        for name, value in reference.items():
            assert relative_error(found[name], value) < ROUNDING, name


@pytest.mark.parametrize("training", [True, False])
def test_buffers_and_dropout_are_those_of_the_module(training: bool) -> None:
    program, module = traced("Stateful", "linear")
    module.train(training)
    inp, act = example_inputs(SITES["linear"], "float32", 6)
    params = tuple(module.parameters())
    compiled_buffers = [b.clone() for b in module.buffers()]
    interpreted_buffers = [b.clone() for b in module.buffers()]
    torch.manual_seed(1)
    expected = module(inp, act)
    torch.manual_seed(1)
    compiled = program.compile(training)(inp, act, params, compiled_buffers)
    torch.manual_seed(1)
    interpreted = program.interpret(inp, act, params, interpreted_buffers, training)
    assert torch.equal(compiled, expected)
    assert torch.equal(interpreted, expected)
    for buffers in (compiled_buffers, interpreted_buffers):
        assert all(map(torch.equal, buffers, module.buffers()))


def test_interpret_replaces_the_dtypes_that_the_graph_names() -> None:
    program, module = traced("NamesDTypes", "linear")
    inp, act = (t.double() for t in example_inputs(SITES["linear"], "float32", 4))
    params = [p.double() for p in module.parameters()]
    exact = act + (inp @ params[0].T + params[1]).softmax(-1)
    assert_close(program.interpret(inp, act, params, (), True, torch.float64), exact, "float64")
    rounded = program.interpret(inp, act, params, (), True)
    assert 1e-9 < (rounded - exact).abs().max() < 1e-6


def test_tied_weights_are_one_parameter() -> None:
    program, module = traced("Tied", "linear")
    assert [spec.name for spec in program.parameters] == ["map.weight", "map.bias"]
    inp, act = example_inputs(SITES["linear"], "float32", 4)
    out = program.compile(True)(inp, act, tuple(module.parameters()), ())
    assert torch.equal(out, module(inp, act))


def test_a_program_does_not_say_where_and_how_tensors_are_placed() -> None:
    program, module = traced("Shifted", "linear")
    inp, act = example_inputs(SITES["linear"], "float32", 4)
    params = tuple(module.parameters())
    assert torch.equal(program.compile(True)(inp, act, params, ()), module(inp, act))
    assert torch.equal(program.interpret(inp, act, params, (), True), module(inp, act))
    calls = [line.split(" = ")[-1] for line in program.source(True).splitlines()]
    assert {"clone(v0)", "zeros_like(v3)"} <= set(calls)
    stateful, _ = traced("Stateful", "linear")
    assert "batch_norm(v1, p2, p3, b1, b2, True, 0.1, 1e-05, True)" in stateful.source(True)


def test_source_is_flat_and_frees_what_is_not_needed() -> None:
    program, _ = traced("residual_mlp", "linear")
    assert program.source(training=True) == (
        "def run(inp, act, params, buffers):\n"
        "    [p0, p1, p2, p3] = params\n"
        "    v0 = linear(inp, p0, p1)\n"
        "    v1 = gelu(v0)\n"
        "    del v0\n"
        "    v2 = linear(v1, p2, p3)\n"
        "    del v1\n"
        "    v3 = add(act, v2)\n"
        "    del v2\n"
        "    return v3\n"
    )
    assert program.compile(training=True) is program.compile(training=False)


@pytest.mark.parametrize(("site_name", "design_name"), PLANTINGS)
def test_json_round_trip(site_name: str, design_name: str) -> None:
    graph = graph_of(design_name, site_name)
    program = Program.from_json(graph)
    assert program.to_json() == graph
    assert Program.from_json(program.to_json()) == program


def test_round_trip_keeps_whole_floats_apart_from_integers() -> None:
    document = gated()
    document["train"]["nodes"][-1]["args"][1] = {"float": 2.0}
    again = json.loads(Program.from_json(dumps(document)).to_json())
    assert again["train"]["nodes"][-1]["args"][1] == {"float": 2}
    assert "add(act, 2.0)" in Program.from_json(dumps(document)).source(training=True)


def test_a_design_that_does_the_same_in_both_modes_has_one_graph() -> None:
    document = gated()
    program = Program.from_json(dumps(document))
    assert program.eval is program.train
    for node, literal in zip(("train", "eval"), (True, 1), strict=True):
        document[node]["nodes"] = [
            {"op": "aten.add.Tensor", "args": [{"input": "act"}, literal], "kwargs": {}}
        ]
        document[node]["output"] = {"node": 0}
    program = Program.from_json(dumps(document))
    assert program.eval is not program.train, "True == 1, and yet they are two"
    assert "act, True" in program.source(training=True)
    assert "act, 1" in program.source(training=False)


@pytest.mark.parametrize("dim", [-3, -1, 0, 2])
def test_slice_is_that_of_aten(dim: int) -> None:
    op, x = operator("aten.slice.Tensor"), torch.randn(4, 5, 6)
    for rest in ((1,), (1, 3), (None, -1), (0, None, 2)):
        assert torch.equal(op.function(x, dim, *rest), op.reference(x, dim, *rest))


def test_whitelist_writes_to_buffers_only() -> None:
    functions = fast_bindings()
    for name in operators._FUNCTIONS:
        op = operator(name)
        assert functions[op.identifier] is op.function
        if name.startswith("aten."):
            written = {a.name for a in op.reference._schema.arguments if a.is_write}
            assert written <= op.written


def gated() -> Any:
    """Return a fresh, valid document of eight nodes with references of every kind but buffers."""
    return json.loads(graph_of("gated", "linear"))


def dumps(document: Any) -> bytes:
    return json.dumps(document).encode()


def node(document: Any, index: int = 0) -> Any:
    return document["train"]["nodes"][index]


def edit(path: list[Any], value: Any) -> Callable[[Any], None]:
    def apply(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return apply


NODE = ["train", "nodes", 0]
EXIT = "__import__('os')._exit(1)"

HOSTILE: dict[str, tuple[Callable[[Any], None], str]] = {
    "other version": (edit(["format_version"], 2), "format_version must be 1, got 2"),
    "extra field": (edit(["code"], "x"), "expected an object with"),
    "unknown operator": (
        edit([*NODE, "op"], "aten.nonzero.default"),
        r"train graph: node 0 \(aten.nonzero.default\): operator .* is not on the whitelist",
    ),
    "operator as code": (edit([*NODE, "op"], EXIT), "is not on the whitelist"),
    "operator out of place": (edit([*NODE, "op"], "aten.add.out"), "is not on the whitelist"),
    "operator as list": (edit([*NODE, "op"], ["aten"]), "a node needs a string as op"),
    "later node": (edit([*NODE, "args", 0], {"node": 5}), "undefined reference to node 5"),
    "own node": (edit([*NODE, "args", 0], {"node": 0}), "undefined reference to node 0"),
    "negative node": (edit([*NODE, "args", 0], {"node": -1}), "undefined reference to node -1"),
    "unknown input": (edit([*NODE, "args", 0], {"input": "host"}), "undefined reference to input"),
    "unknown parameter": (edit([*NODE, "args", 1], {"param": EXIT}), "undefined reference to param"),
    "undefined output": (edit(["train", "output"], {"node": 99}), "the output, node 99, is not"),
    "list as output": (edit(["train", "output"], {"node": 1}), "the output, node 1, is not"),
    "literal as output": (edit(["train", "output"], 1), "the output must be a reference"),
    "too many arguments": (edit([*NODE, "args"], [{"input": "inp"}] * 9), "takes 3 positional"),
    "too few arguments": (edit([*NODE, "args"], []), "argument 'input' is missing"),
    "unknown keyword": (edit([*NODE, "kwargs"], {EXIT: 1}), "unknown argument"),
    "argument twice": (edit([*NODE, "kwargs"], {"input": {"input": "inp"}}), "is given twice"),
    "string for tensor": (edit([*NODE, "args", 0], EXIT), "argument 'input': .* is no Tensor"),
    "list for tensor": (edit([*NODE, "args", 0], [1]), "argument 'input': .* is no Tensor"),
    "boolean for list": (edit(["train", "nodes", 1, "args", 1], True), "is no int"),
    "string with code": (
        edit(["train", "nodes", 4], {"op": "aten.gelu.default", "args": [{"node": 2}],
             "kwargs": {"approximate": f"none') or {EXIT} or ('"}}),
        "argument 'approximate': .* is no str",
    ),
    "huge list": (
        edit(["train", "nodes", 4], {"op": "aten.reshape.default",
             "args": [{"node": 2}, [1] * 2000], "kwargs": {}}),
        "argument 'shape'",
    ),
    "in place on the host": (
        edit(["train", "nodes", 4], {"op": "aten.add_.Tensor", "args": [{"input": "act"}, 1],
             "kwargs": {}}),
        "would write to 'self', which is not a buffer",
    ),
    "statistics kept in the host": (
        edit(["train", "nodes", 4], {"op": "aten.batch_norm.default", "args": [{"node": 2}, None,
             None, {"input": "act"}, {"input": "act"}, True, {"float": 0.1}, {"float": 1e-5}, True],
             "kwargs": {}}),
        "would write to 'running_mean', which is not a buffer",
    ),
    "huge integer": (edit([*NODE, "args", 0], 2**60), "expected an integer of at most 53 bits"),
    "bare float": (edit([*NODE, "args", 0], 0.5), "expected an integer"),
    "infinite float": (edit([*NODE, "args", 0], {"float": 1e999}), "Infinity is not a number"),
    "unknown tag": (edit([*NODE, "args", 0], {"code": EXIT}), "not a value"),
    "unknown dtype": (edit(["parameters", 0, "dtype"], "object"), "unknown dtype 'object'"),
    "integer parameter": (edit(["parameters", 0, "dtype"], "int64"), "cannot be of dtype int64"),
    "negative size": (edit(["parameters", 0, "shape"], [-1]), "a size cannot be negative"),
    "open size": (edit(["parameters", 0, "shape"], [None]), "a weight needs a fixed shape"),
    "name with code": (edit(["parameters", 0, "name"], EXIT), "is not a valid name of a weight"),
    "duplicate name": (lambda d: d["buffers"].append(d["parameters"][0]), "duplicate name of a"),
    "names that collide": (
        lambda d: d["buffers"].append(d["parameters"][0] | {"name": "down__project__weight"}),
        "duplicate name of a weight: 'down__project__weight'",
    ),
    "inputs in another order": (lambda d: d["inputs"].reverse(), "inputs must be inp and act"),
    "no seed": (edit(["init"], {}), "expected an object with seed"),
    "too many nodes": (lambda d: d["train"].update(nodes=[node(d)] * 5000), "at most 4096"),
}  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE)
def test_refuses_hostile_files(attack: str) -> None:
    change, message = HOSTILE[attack]
    document = gated()
    change(document)
    with pytest.raises(ArtifactError, match=message):
        Program.from_json(dumps(document))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "an object repeats a key"),
        (b"[" * 100_000, "not valid JSON"),
        (b"9" * 5000, "not valid JSON"),
        (b" " * (4 * 2**20 + 1), "bytes, at most 4194304 are allowed"),
        (b"[]", "format_version must be 1, got None"),
    ],
)
def test_refuses_what_is_no_document(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Program.from_json(data)


_TRASH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(data=st.data())
def test_any_damage_is_an_artifact_error_or_harmless(data: st.DataObject) -> None:
    document = gated()
    here, steps = document, data.draw(st.integers(1, 7))
    for _ in range(steps):
        keys = sorted(here) if isinstance(here, dict) else range(len(here))
        if not keys:
            return
        parent, key = here, data.draw(st.sampled_from(keys))
        here = here[key]
        if not isinstance(here, dict | list):
            break
    parent[key] = data.draw(_TRASH)
    try:
        program = Program.from_json(dumps(document))
    except ArtifactError:
        return
    assert Program.from_json(program.to_json()) == program
    program.compile(training=True)
