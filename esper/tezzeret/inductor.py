"""From a program to machine code: the joint graph of a training step, cut in two, by AOTInductor.

The parameters are inputs of both libraries, so one pair serves every kernel of a design. Sizes that
the site leaves open, and the stride from sample to sample of ``act``, stay open in the libraries.
"""

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import (
    min_cut_rematerialization_partition,
)
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx_aot
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils._sympy.functions import FloorDiv, Max, Mod, PythonMod

from esper.contracts import HyperParameter
from esper.kasmina.compiled import BACKWARD_FILE, FORWARD_FILE, PLAN_FILE, StepPlan
from esper.kasmina.kernel import Kernel
from esper.kasmina.layout import OPERATIONS, Expression, Layout, TensorLayout
from esper.kasmina.native import NUM_THREADS

OUTPUT_GRADIENT = -1  # in the plan: the gradient that came in


class UnsuitableError(Exception):
    """A program cannot be compiled, for a reason that can stand in a log."""


@dataclass(frozen=True)
class Variant:
    """A way to compile."""

    name: str
    options: Mapping[str, HyperParameter]  # of torch._inductor.config


# The memory format of what is saved must be the one that the backward library was compiled for.
_FIXED_OPTIONS: dict[str, HyperParameter] = {
    "cpp.threads": NUM_THREADS,
    "layout_optimization": False,
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.embed_kernel_binary": True,
}


def compile_step(kernel: Kernel, inp: Tensor, act: Tensor, variant: Variant) -> dict[str, bytes]:
    """Return the libraries of a kernel's training step and their plan, by file name.

    ``inp`` and ``act`` are an example of what the kernel is called with, on its device. Blocks for
    as long as a C++ compiler takes, twice; one compiler at a time. Raises
    :class:`UnsuitableError`, and whatever Inductor's many layers raise.
    """
    refuse_unsuitable(kernel)
    traced = _Traced(kernel, inp, act)
    forward, backward = _partition(traced.joint)
    saved_inputs, num_saved = _hand_over(forward, backward)
    gradients = _keep_new_results(backward)
    with tempfile.TemporaryDirectory(prefix="esper-forge-") as folder:
        libraries = {
            FORWARD_FILE: traced.compile(forward, variant, Path(folder) / "forward"),
            BACKWARD_FILE: traced.compile(backward, variant, Path(folder) / "backward"),
        }
    # Only now, as Inductor too makes assumptions about sizes.
    traced.refuse_fixed_sizes()
    plan = StepPlan(traced.layout(), saved_inputs, num_saved, gradients)
    return libraries | {PLAN_FILE: plan.to_json()}


def refuse_unsuitable(kernel: Kernel) -> None:
    """Raise :class:`UnsuitableError` for what no library may compute."""
    if kernel.program.buffers:
        raise UnsuitableError("it has buffers, which a compiled step neither reads nor writes")
    if any("dropout" in node.op for node in kernel.program.train.nodes):
        raise UnsuitableError("it draws random numbers, which compiled code draws differently")
    if kernel.program.train.output.kind != "node":
        raise UnsuitableError("it computes nothing")


class _Traced:
    """The joint graph of forward and backward pass over fake tensors with open sizes."""

    def __init__(self, kernel: Kernel, inp: Tensor, act: Tensor) -> None:
        self.sizes = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.sizes)
        site = kernel.manifest.site
        self._shapes = (site.inp_shape, site.act_shape)
        self.inputs = [
            self._open(inp, site.inp_shape),
            self._open(act, site.act_shape),
            *(self.mode.from_tensor(w.detach(), static_shapes=True) for w in kernel.weights()),
        ]
        self.strides = _free_symbols(x for t in self.inputs for x in t.stride())
        self.strides -= _free_symbols(x for t in self.inputs for x in t.shape)
        for tensor in self.inputs:
            tensor.requires_grad_(tensor.is_floating_point())
        self.joint = self._trace(kernel)

    def layout(self) -> Layout:
        """Return what ``inp`` and ``act`` have to look like, as far as is known by now."""
        tensors = tuple(
            TensorLayout(*(tuple(self._written(n) for n in ns) for ns in (t.shape, t.stride())))
            for t in self.inputs[:2]
        )
        return Layout(tensors, tuple(self._relations()))

    def refuse_fixed_sizes(self) -> None:
        """Raise :class:`UnsuitableError` where a size that the site leaves open no longer is."""
        for tensor, shape in zip(self.inputs, self._shapes, strict=False):
            for size, given in zip(tensor.shape, shape, strict=True):
                if given is None and isinstance(number := self._written(size), int):
                    raise UnsuitableError(f"the compiler fixes a size that varies, to {number}")

    def compile(self, graph: fx.GraphModule, variant: Variant, folder: Path) -> bytes:
        """Return the library that computes ``graph``."""
        given = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
        options = {**_FIXED_OPTIONS, **variant.options, "aot_inductor.output_path": str(folder)}
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            stack.enter_context(tracing(TracingContext(self.mode)))
            stack.enter_context(self.mode)
            stack.enter_context(torch.no_grad())
            stack.enter_context(inductor_config.patch(compile_threads=1))
            path = compile_fx_aot(graph, given, config_patches=options)
        return Path(str(path)).read_bytes()

    def _open(self, tensor: Tensor, shape: Sequence[int | None]) -> Tensor:
        sizes = [DimDynamic.DYNAMIC if n is None else DimDynamic.STATIC for n in shape]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        return self.mode.from_tensor(tensor.detach(), symbolic_context=context)

    def _trace(self, kernel: Kernel) -> fx.GraphModule:
        run = kernel.program.compile(training=True)

        def joint(
            primals: list[Tensor], tangents: list[Tensor]
        ) -> tuple[list[Tensor], list[Tensor | None]]:
            out = run(primals[0], primals[1], primals[2:], ())
            leaves = [x for x in primals if x.requires_grad]
            found = iter(torch.autograd.grad(out, leaves, tangents, allow_unused=True))
            return [out], [next(found) if x.requires_grad else None for x in primals]

        contiguous = torch.contiguous_format
        with self.mode, torch.enable_grad(), warnings.catch_warnings(action="ignore"):
            tangent = torch.empty_like(self.inputs[1].detach(), memory_format=contiguous)
            decompose = select_decomp_table()
            traced = make_fx(joint, decompose, "symbolic", _allow_non_fake_inputs=True)
            return traced(self.inputs, [tangent])

    def _relations(self) -> list[Expression]:
        """Return what was assumed of the sizes, beyond what they are equal to.

        Of strides the tracing asks whether they are those of contiguous memory. Code for those that
        are not is right for these as well.
        """
        relations = []
        for guard in self.sizes.guards:
            relation = self.sizes.replace(guard.expr).simplify()
            asks_for_contiguity = isinstance(relation, sympy.Ne) and (
                relation.free_symbols & self.strides
            )
            if relation is not sympy.true and not asks_for_contiguity:
                relations.append(_relation(relation))
        return relations

    def _written(self, number: int | torch.SymInt) -> Expression:
        if isinstance(number, int):
            return number
        return _expression(self.sizes.replace(number.node.expr))


def _free_symbols(numbers: Any) -> set[sympy.Symbol]:
    symbolic = (n for n in numbers if isinstance(n, torch.SymInt))
    return {symbol for n in symbolic for symbol in n.node.expr.free_symbols}


_RELATIONS = {
    sympy.Eq: "eq",
    sympy.Ne: "ne",
    sympy.StrictLessThan: "lt",
    sympy.LessThan: "le",
    sympy.StrictGreaterThan: "gt",
    sympy.GreaterThan: "ge",
}


def _relation(relation: sympy.Basic) -> Expression:
    name = _RELATIONS.get(type(relation))
    if name is None:
        raise UnsuitableError(f"it is only right where {relation}")
    return name, *(_expression(side) for side in relation.args)


def _expression(expression: sympy.Basic) -> Expression:
    """Write a size that Inductor computes as one of ours."""
    match expression:
        case sympy.Integer():
            return int(expression)
        case sympy.Symbol():
            return str(expression)
        case sympy.Add() | sympy.Mul() | Max():
            name = type(expression).__name__.lower()
            first, *others = (_expression(operand) for operand in expression.args)
            for other in others:
                first = (name, first, other)
            return first
        case FloorDiv() | Mod() | PythonMod() if isinstance(expression.args[1], sympy.Integer):
            name = "floordiv" if isinstance(expression, FloorDiv) else "mod"
            return name, *(_expression(operand) for operand in expression.args)
        case sympy.Pow(exp=sympy.Integer(p=2)):
            base = _expression(expression.base)
            return "mul", base, base
    raise UnsuitableError(f"one of its sizes is {expression}")


def _partition(joint: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
    with functorch_config.patch(recompute_views=True):
        forward, backward = min_cut_rematerialization_partition(joint, (), num_fwd_outputs=1)
    return forward, backward


def _hand_over(forward: fx.GraphModule, backward: fx.GraphModule) -> tuple[tuple[int, ...], int]:
    """Have the forward graph give, and the backward graph take, tensors that are new to both.

    Sizes are read off the tensors. Returns which inputs the backward graph takes in front, and how
    many tensors of the forward graph's follow.
    """
    inputs = [node.name for node in forward.graph.find_nodes(op="placeholder")]
    [output] = forward.graph.find_nodes(op="output")
    out, *saved = output.args[0]
    _derive_sizes(backward)
    taken = list(backward.graph.find_nodes(op="placeholder"))
    names = {node.name for node in taken}
    new = [node for node in saved if node.name in names and node.name not in inputs]
    if out.op == "placeholder" or out in new:
        raise UnsuitableError("its output is one of its inputs, or is kept for the backward pass")
    output.args = ((out, *new),)
    forward.recompile()
    saved_inputs = [inputs.index(node.name) for node in taken if node.name in inputs]
    in_order = [inputs[n] for n in saved_inputs] + [node.name for node in new] + [taken[-1].name]
    _reorder(backward, in_order)
    return tuple(saved_inputs), len(new)


def _reorder(backward: fx.GraphModule, names: Sequence[str]) -> None:
    placeholders = {node.name: node for node in backward.graph.find_nodes(op="placeholder")}
    if sorted(names) != sorted(placeholders):
        raise UnsuitableError(f"its backward pass takes {sorted(placeholders)}")
    first = next(iter(backward.graph.nodes))
    for name in names:
        if placeholders[name] is not first:
            first.prepend(placeholders[name])
        else:
            first = first.next
    backward.recompile()


def _derive_sizes(backward: fx.GraphModule) -> None:
    """Replace the sizes among the backward graph's inputs by what its tensors say."""
    graph = backward.graph
    placeholders = graph.find_nodes(op="placeholder")
    tensors = [node for node in placeholders if isinstance(node.meta["val"], Tensor)]
    with graph.inserting_after(placeholders[-1]):
        anchor = graph.call_function(torch.ops.aten.alias.default, (tensors[-1],))
    with graph.inserting_before(anchor):
        read = _SizeReader(graph, tensors)
        for node in placeholders:
            if node not in tensors:
                node.replace_all_uses_with(read.node(_expression(node.meta["val"].node.expr)))
                graph.erase_node(node)
    graph.erase_node(anchor)
    backward.recompile()


class _SizeReader:
    """Adds nodes to a graph that compute sizes from those of its tensors."""

    def __init__(self, graph: fx.Graph, tensors: Sequence[fx.Node]) -> None:
        self._graph = graph
        self._places: dict[str, tuple[fx.Node, int]] = {}
        for node in tensors:
            for dim, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    self._places.setdefault(str(size.node.expr), (node, dim))

    def node(self, expression: Expression) -> Any:
        match expression:
            case int():
                return expression
            case str():
                return self._size(expression)
        name, *operands = expression
        nodes = [self.node(operand) for operand in operands]
        values = [n.meta["val"] if isinstance(n, fx.Node) else n for n in nodes]
        function: Callable[..., Any] = torch.sym_max if name == "max" else OPERATIONS[name]
        result = self._graph.call_function(function, tuple(nodes))
        result.meta["val"] = function(*values)
        return result

    def _size(self, symbol: str) -> fx.Node:
        if symbol not in self._places:
            raise UnsuitableError("its backward pass needs the size of a tensor that is not kept")
        tensor, dim = self._places[symbol]
        result = self._graph.call_function(torch.ops.aten.sym_size.int, (tensor, dim))
        result.meta["val"] = tensor.meta["val"].shape[dim]
        return result


def _keep_new_results(backward: fx.GraphModule) -> tuple[int | None, ...]:
    """Have the backward graph give each new gradient once; return where each input's is."""
    [output] = backward.graph.find_nodes(op="output")
    [*_, tangent] = backward.graph.find_nodes(op="placeholder")
    new: list[fx.Node] = []
    places: list[int | None] = []
    for node in output.args[0]:
        if node is None or node is tangent:
            places.append(None if node is None else OUTPUT_GRADIENT)
            continue
        if node.op == "placeholder":
            raise UnsuitableError("one of its gradients is one of its inputs")
        if node not in new:
            new.append(node)
        places.append(new.index(node))
    if not new:
        raise UnsuitableError("its gradient is its output's")
    output.args = (tuple(new),)
    backward.recompile()
    return tuple(places)
