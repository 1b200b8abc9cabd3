"""The program of a FAST kernel: two checked graphs and the weights that they name."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from esper.contracts import canonical_json
from esper.errors import ArtifactError
from esper.kasmina import bottleneck, channelwise
from esper.kasmina.bottleneck import Bottleneck
from esper.kasmina.channelwise import Channelwise
from esper.kasmina.graph import (
    DTYPES,
    DType,
    Graph,
    Ref,
    TensorSpec,
    Value,
    check_graph,
    check_weights,
)
from esper.kasmina.graph_json import (
    fields,
    integer,
    parse,
    read_graph,
    read_spec,
    sequence,
    write_graph,
    write_spec,
)
from esper.kasmina.operators import operator
from esper.kasmina.source import KernelFunction, python_function, python_source

FORMAT_VERSION = 1

_ACT = Ref("input", "act")
_SUMS = ("aten.add.Tensor", "aten.sub.Tensor")  # they keep no operand for their backward pass


@dataclass(frozen=True)
class Program:
    """A checked program; immutable, so copies of a kernel share it.

    Its functions take ``params`` and ``buffers`` in the order of the fields ``parameters`` and
    ``buffers``. ``seed`` is the init recipe: the generator seed under which the design's builder
    draws the initial parameters.
    """

    inp: TensorSpec
    act: TensorSpec
    parameters: tuple[TensorSpec, ...]
    buffers: tuple[TensorSpec, ...]
    train: Graph
    eval: Graph
    seed: int

    def __post_init__(self) -> None:
        check_weights(self.parameters, self.buffers)
        weights = [Ref("param", spec.name) for spec in self.parameters]
        weights += [Ref("buffer", spec.name) for spec in self.buffers]
        graphs = {"train": self.train}
        if self.eval is not self.train:
            graphs["eval"] = self.eval
        for mode, graph in graphs.items():
            try:
                check_graph(graph, weights)
            except ArtifactError as error:
                raise ArtifactError(f"{mode} graph: {error}") from None

    def __deepcopy__(self, memo: dict[int, object]) -> "Program":
        return self

    @classmethod
    def from_json(cls, data: bytes) -> "Program":
        """Read ``graph.json``; :class:`ArtifactError` names the first thing that is wrong."""
        try:
            return _read_program(parse(data))
        except ArtifactError as error:
            raise ArtifactError(f"graph.json: {error}") from None

    def to_json(self) -> bytes:
        """Return the canonical form, the one that digests are taken of."""
        return canonical_json(
            {
                "format_version": FORMAT_VERSION,
                "inputs": [write_spec(self.inp), write_spec(self.act)],
                "parameters": [write_spec(spec) for spec in self.parameters],
                "buffers": [write_spec(spec) for spec in self.buffers],
                "train": write_graph(self.train),
                "eval": write_graph(self.eval),
                "init": {"seed": self.seed},
            }
        )

    @cached_property
    def stochastic(self) -> bool:
        """Whether training draws random numbers: dropout is all that may."""
        return any("dropout" in node.op or "attention" in node.op for node in self.train.nodes)

    @cached_property
    def keeps_act(self) -> bool:
        """Whether the result may be ``act`` itself, or the backward pass may need it."""
        readers = [node.op for node in self.train.nodes if _ACT in node.references()]
        return self.train.output == _ACT or any(op not in _SUMS for op in readers)

    @cached_property
    def adds_to_act(self) -> bool:
        """Whether training adds something to ``act``, and reads it for nothing else."""
        readers = [node for node in self.train.nodes if _ACT in node.references()]
        if len(readers) != 1 or self.train.nodes[-1] is not readers[0]:
            return False
        [last] = readers
        is_sum = last.op == "aten.add.Tensor" and not last.kwargs
        is_result = self.train.output == Ref("node", len(self.train.nodes) - 1)
        return is_sum and is_result and last.args.count(_ACT) == 1

    @cached_property
    def bottleneck(self) -> Bottleneck | None:
        """What :func:`esper.bottleneck.bottleneck` needs to know to compute this program, if it can."""
        form = bottleneck.recognise(self.train, self.parameters, self.act)
        return form if form == bottleneck.recognise(self.eval, self.parameters, self.act) else None

    @cached_property
    def channelwise(self) -> Channelwise | None:
        """How several seeds with this program are computed side by side, if they can be."""
        if self.train != self.eval:
            return None
        return channelwise.recognise(self.train, self.parameters, self.act)

    def source(self, training: bool) -> str:
        """Return the Python source that :meth:`compile` runs, for people to read."""
        graph = self.train if training else self.eval
        params = [Ref("param", spec.name) for spec in self.parameters]
        return python_source(graph, params, [Ref("buffer", spec.name) for spec in self.buffers])

    def compile(self, training: bool) -> KernelFunction:
        """Return ``run(inp, act, params, buffers) -> out``, a function that holds no tensors.

        Programs with equal source share one function, so torch.compile works once for all seeds
        of one design.
        """
        return python_function(self.source(training))

    def interpret(
        self,
        inp: Tensor,
        act: Tensor,
        params: Sequence[Tensor],
        buffers: Sequence[Tensor],
        training: bool,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Run node by node through the ATen overloads: the reference for :meth:`compile`.

        ``dtype`` replaces every floating dtype that the graph names, so that a float64 reference
        stays in float64. Batch norm writes to ``buffers`` when training: pass copies.
        """
        graph = self.train if training else self.eval
        values: dict[Ref, Any] = {Ref("input", "inp"): inp, Ref("input", "act"): act}
        for spec, tensor in zip(self.parameters, params, strict=True):
            values[Ref("param", spec.name)] = tensor
        for spec, tensor in zip(self.buffers, buffers, strict=True):
            values[Ref("buffer", spec.name)] = tensor
        for index, node in enumerate(graph.nodes):
            args = [_evaluate(arg, values, dtype) for arg in node.args]
            kwargs = {name: _evaluate(arg, values, dtype) for name, arg in node.kwargs.items()}
            values[Ref("node", index)] = operator(node.op).reference(*args, **kwargs)
        out: Tensor = values[graph.output]
        return out


def _read_program(data: Any) -> Program:
    if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
        version = data.get("format_version") if isinstance(data, dict) else None
        raise ArtifactError(f"format_version must be {FORMAT_VERSION}, got {version!r}")
    _, inputs, parameters, buffers, train, evaluation, init = fields(
        data, "format_version", "inputs", "parameters", "buffers", "train", "eval", "init"
    )
    specs = sequence(inputs, read_spec)
    if [spec.name for spec in specs] != ["inp", "act"]:
        raise ArtifactError(f"inputs must be inp and act, got {[spec.name for spec in specs]}")
    # Told apart by repr, since True == 1. Most designs do the same in both modes: one graph is then
    # read, checked and made into a function once.
    graph = read_graph(train)
    same = repr(train) == repr(evaluation)
    return Program(
        inp=specs[0],
        act=specs[1],
        parameters=sequence(parameters, read_spec),
        buffers=sequence(buffers, read_spec),
        train=graph,
        eval=graph if same else read_graph(evaluation),
        seed=integer(*fields(init, "seed")),
    )


def _evaluate(value: Value, values: dict[Ref, Any], dtype: torch.dtype | None) -> Any:
    match value:
        case Ref():
            return values[value]
        case DType():
            named = DTYPES[value.name]
            return dtype if dtype is not None and named.is_floating_point else named
        case tuple():
            return [_evaluate(item, values, dtype) for item in value]
        case _:
            return value
