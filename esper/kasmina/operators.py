"""The operators that a kernel's graph may call, each with the fastest Python function for it.

A graph names operators by their ATen overload (``aten.linear.default``) or, for arithmetic on
sizes, by their name in :mod:`operator`. What is missing here cannot be called by an artifact:
there is nothing in place (but batch norm's buffers), nothing random but dropout, nothing whose
output shape depends on data, and nothing that indexes with data, since an index out of range
aborts a CUDA process.
"""

import operator as python_operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from esper.errors import ArtifactError

_nn: Any = torch._C._nn
_vf: Any = torch._VF

NUMBER_TYPES = frozenset({"int", "float", "number"})


@dataclass(frozen=True)
class Parameter:
    """One argument of an operator; ``type`` is written as in the ATen schema."""

    name: str
    type: str
    required: bool
    keyword_only: bool


@dataclass(frozen=True)
class Operator:
    """What a graph may call under one name.

    ``function`` is the fast binding that generated source calls, ``reference`` the overload that
    the interpreter calls instead. Both take the arguments of ``parameters``, in this order.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    parameters: tuple[Parameter, ...]
    returns: str  # "Tensor", "List[Tensor]" or "number"
    written: frozenset[str]  # the arguments that it writes to, hence buffers

    @property
    def identifier(self) -> str:
        """Name of ``function`` in generated source."""
        namespace, name, *_ = self.name.split(".")
        return name if namespace == "aten" else f"{namespace}_{name}"

    def bind(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Iterator[tuple[Parameter, Any]]:
        """Match the given arguments with the parameters; wrong arity raises."""
        positional = [p for p in self.parameters if not p.keyword_only]
        if len(args) > len(positional):
            raise ArtifactError(f"takes {len(positional)} positional arguments, got {len(args)}")
        given = dict(zip((p.name for p in positional), args, strict=False))
        unknown = kwargs.keys() - {p.name for p in self.parameters}
        if unknown:
            raise ArtifactError(f"unknown argument {min(unknown)!r}")
        twice = given.keys() & kwargs.keys()
        if twice:
            raise ArtifactError(f"argument {min(twice)!r} is given twice")
        given |= kwargs
        for parameter in self.parameters:
            if parameter.name in given:
                yield parameter, given[parameter.name]
            elif parameter.required:
                raise ArtifactError(f"argument {parameter.name!r} is missing")


def _slice(x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Tensor:
    piece = slice(start, end, step)
    if dim < 0:
        return x[(..., piece) + (slice(None),) * (-dim - 1)]
    return x[(slice(None),) * dim + (piece,)]


def _named(module: Any, names: str, overloads: str = "default") -> dict[str, tuple[Any, str]]:
    return {name: (getattr(module, name), overloads) for name in names.split()}


# ATen name -> (fast binding, permitted overloads)
_ATEN: dict[str, tuple[Callable[..., Any], str]] = {
    # products
    "linear": (_nn.linear, "default"),
    "einsum": (_vf.einsum, "default"),
    **_named(torch, "matmul mm bmm addmm baddbmm"),
    **_named(torch, "conv1d conv2d conv3d", "default padding"),
    **_named(torch, "conv_transpose1d"),
    "conv_transpose2d": (torch.conv_transpose2d, "input"),
    "conv_transpose3d": (torch.conv_transpose3d, "input"),
    "scaled_dot_product_attention": (_nn.scaled_dot_product_attention, "default"),
    # activations
    **_named(_nn, "elu gelu glu hardsigmoid hardswish hardtanh leaky_relu log_sigmoid mish relu6"),
    **_named(_nn, "silu softplus softshrink"),
    **_named(torch, "celu hardshrink prelu relu selu sigmoid tanh threshold"),
    **_named(torch, "softmax log_softmax", "int"),
    **_named(torch, "dropout feature_dropout alpha_dropout feature_alpha_dropout"),
    # norms and pooling
    **_named(torch, "batch_norm group_norm instance_norm layer_norm rms_norm"),
    **_named(torch, "adaptive_avg_pool1d avg_pool1d max_pool1d max_pool2d max_pool3d"),
    **_named(_nn, "adaptive_avg_pool2d adaptive_avg_pool3d avg_pool2d avg_pool3d pad"),
    "upsample_nearest2d": (_nn.upsample_nearest2d, "vec"),
    "upsample_bilinear2d": (_nn.upsample_bilinear2d, "vec"),
    **_named(torch, "pixel_shuffle pixel_unshuffle"),
    # arithmetic
    **_named(torch, "add mul sub", "Tensor Scalar"),
    "rsub": (torch.rsub, "Tensor Scalar"),
    "div": (torch.div, "Tensor Scalar Tensor_mode Scalar_mode"),
    "pow": (torch.pow, "Tensor_Scalar Tensor_Tensor Scalar"),
    **_named(torch, "eq ne lt le gt ge", "Tensor Scalar"),
    **_named(torch, "abs cos erf exp expm1 log log1p neg reciprocal rsqrt sign sin sqrt square"),
    **_named(torch, "maximum minimum logical_and logical_not logical_or addcmul"),
    **_named(torch, "clamp", "default Tensor"),
    **_named(torch, "clamp_min clamp_max", "default Tensor"),
    "lerp": (torch.lerp, "Tensor Scalar"),
    "where": (torch.where, "self ScalarOther ScalarSelf"),
    "masked_fill": (torch.masked_fill, "Scalar Tensor"),
    "add_": (Tensor.add_, "Tensor"),
    # reductions
    "mean": (torch.mean, "default dim"),
    "sum": (torch.sum, "default dim_IntList"),
    "var": (torch.var, "default dim correction"),
    "std": (torch.std, "default dim correction"),
    **_named(torch, "amax amin"),
    "logsumexp": (torch.logsumexp, "default"),
    "cumsum": (torch.cumsum, "default"),
    "linalg_vector_norm": (torch.linalg.vector_norm, "default"),
    # shapes
    "sym_size": (Tensor.size, "int"),
    **_named(Tensor, "contiguous expand expand_as repeat type_as view view_as"),
    **_named(torch, "clone detach permute reshape roll t tile unsqueeze"),
    "flatten": (torch.flatten, "using_ints"),
    "unflatten": (_vf.unflatten, "int"),
    "transpose": (torch.transpose, "int"),
    "squeeze": (torch.squeeze, "default dim dims"),
    "movedim": (torch.movedim, "int intlist"),
    **_named(torch, "cat stack chunk"),
    "split": (_vf.split, "Tensor"),
    "split_with_sizes": (_vf.split_with_sizes, "default"),
    "unbind": (torch.unbind, "int"),
    "slice": (_slice, "Tensor"),
    "select": (torch.select, "int"),
    "flip": (torch.flip, "default"),
    "tril": (torch.tril, "default"),
    "triu": (torch.triu, "default"),
    "to": (Tensor.to, "dtype"),
    **_named(torch, "zeros_like ones_like"),
}

_ON_SIZES = ("add", "sub", "mul", "floordiv", "truediv", "mod")

_WRITTEN = {
    "add_": frozenset({"self"}),
    "batch_norm": frozenset({"running_mean", "running_var"}),
    "instance_norm": frozenset({"running_mean", "running_var"}),
}


def _names() -> Mapping[str, Callable[..., Any]]:
    aten = {
        f"aten.{name}.{overload}": function
        for name, (function, overloads) in _ATEN.items()
        for overload in overloads.split()
    }
    on_sizes = {f"operator.{name}": getattr(python_operator, name) for name in _ON_SIZES}
    return aten | on_sizes | {"operator.getitem": python_operator.getitem}


_FUNCTIONS = _names()


@cache
def operator(name: str) -> Operator:
    """Return the whitelisted operator of that name, or raise :class:`ArtifactError`."""
    if name not in _FUNCTIONS:
        raise ArtifactError(f"operator {name!r} is not on the whitelist")
    return _from_python(name) if name.startswith("operator.") else _from_aten(name)


@cache
def fast_bindings() -> dict[str, Callable[..., Any]]:
    """Return what generated source may call, by :attr:`Operator.identifier`."""
    return {operator(name).identifier: function for name, function in _FUNCTIONS.items()}


def _from_aten(name: str) -> Operator:
    _, packet, overload = name.split(".")
    reference = getattr(getattr(torch.ops.aten, packet), overload)
    schema = reference._schema
    returned = str(schema.returns[0].type)
    return Operator(
        name=name,
        function=_FUNCTIONS[name],
        reference=reference,
        parameters=tuple(
            Parameter(a.name, str(a.real_type), not a.has_default_value(), a.kwarg_only)
            for a in schema.arguments
        ),
        returns="number" if returned in NUMBER_TYPES else returned,
        written=_WRITTEN.get(packet, frozenset()),
    )


def _from_python(name: str) -> Operator:
    function = _FUNCTIONS[name]
    picks = name == "operator.getitem"
    first, second = ("List[Tensor]", "int") if picks else ("number", "number")
    return Operator(
        name=name,
        function=function,
        reference=function,
        parameters=(Parameter("a", first, True, False), Parameter("b", second, True, False)),
        returns="Tensor" if picks else "number",
        written=frozenset(),
    )
