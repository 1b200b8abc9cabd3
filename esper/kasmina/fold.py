"""Folding a kernel into its host's weights, where both are linear.

The kernel's graph is run on affine maps in place of tensors. Where the result is one too, the
host's rows of weight and bias are replaced by those that compute it. Linear hosts and convolutions
are treated alike: a linear map is a convolution without spatial dimensions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.contracts import SiteSignature
from esper.kasmina.graph import Node, Ref, Value
from esper.kasmina.kernel import Kernel
from esper.kasmina.operators import operator

_PRODUCTS: dict[type, str] = {
    nn.Linear: "aten.linear.default",
    nn.Conv1d: "aten.conv1d.default",
    nn.Conv2d: "aten.conv2d.default",
    nn.Conv3d: "aten.conv3d.default",
}


Geometry = tuple[Value, Value, Value, Value]  # kernel size, stride, padding, dilation
_POINTWISE: list[Geometry] = [((1,) * n, (1,) * n, (0,) * n, (1,) * n) for n in range(4)]


@dataclass(frozen=True)
class AffineMap:
    """``from_inp * inp + from_act @ act + constant``, giving ``O`` channels, in float64."""

    from_inp: Tensor  # (O, C, *taps), a product with the host's own geometry
    from_act: Tensor  # (O, A), at each position
    constant: Tensor  # (O,)

    @property
    def width(self) -> int:
        return len(self.constant)

    def mapped(self, weight: Tensor, bias: Tensor) -> "AffineMap":
        """Return this map followed by ``weight``, (P, O), and ``bias``, (P,), at each position."""
        return AffineMap(
            torch.tensordot(weight, self.from_inp, 1),
            weight @ self.from_act,
            weight @ self.constant + bias,
        )

    def scaled(self, factor: float) -> "AffineMap":
        return AffineMap(self.from_inp * factor, self.from_act * factor, self.constant * factor)

    def plus(self, other: "AffineMap") -> "AffineMap":
        return AffineMap(
            self.from_inp + other.from_inp,
            self.from_act + other.from_act,
            self.constant + other.constant,
        )


def affine_map(kernel: Kernel, host: nn.Module) -> AffineMap | None:
    """Return what ``kernel`` computes in eval mode on ``host``, or None if that cannot be folded.

    It can where both are products: of weights that are the host's own parameters (parametrizations,
    weight norm and pruning compute theirs), without groups, padded with zeros.
    """
    if not _is_plain_product(host):
        return None
    program = kernel.program
    weights: dict[Value, Tensor] = {
        Ref("param", spec.name): weight.detach().double()
        for spec, weight in zip(program.parameters, kernel.weights(), strict=True)
    }
    reader = _Reader(_PRODUCTS[type(host)], kernel.manifest.site, weights, _act(kernel, host))
    for index, node in enumerate(program.eval.nodes):
        value = reader.read(node)
        if value is None:
            return None
        reader.values[Ref("node", index)] = value
    return reader.values.get(program.eval.output)


def fold(host: Any, start: int, kernel_map: AffineMap) -> None:
    """Have ``host`` give ``kernel_map`` of its channels from ``start`` on, in place.

    Computed in float64 and rounded once to the dtype of the weights. A host without a bias gets
    one if the map has a constant.
    """
    rows = slice(start, start + kernel_map.width)
    weight = host.weight.detach()
    if host.bias is None and kernel_map.constant.any():
        host.bias = nn.Parameter(
            weight.new_zeros(len(weight)), requires_grad=host.weight.requires_grad
        )
    act_from_inp = weight[rows].double()
    weight[rows] = (torch.tensordot(kernel_map.from_act, act_from_inp, 1) + kernel_map.from_inp).to(
        weight.dtype
    )
    if host.bias is not None:
        bias = host.bias.detach()
        bias[rows] = (kernel_map.from_act @ bias[rows].double() + kernel_map.constant).to(
            bias.dtype
        )


def _act(kernel: Kernel, host: Any) -> AffineMap:
    """Return the host's own output as a map of it."""
    width = kernel.manifest.site.act_channels
    return AffineMap(
        from_inp=torch.zeros_like(host.weight[:width], dtype=torch.float64),
        from_act=torch.eye(width, dtype=torch.float64, device=host.weight.device),
        constant=torch.zeros_like(host.weight[:width].flatten(1)[:, 0], dtype=torch.float64),
    )


def _is_plain_product(host: Any) -> bool:
    if type(host) not in _PRODUCTS or not {"weight", "bias"} <= host._parameters.keys():
        return False
    return isinstance(host, nn.Linear) or (host.groups == 1 and host.padding_mode == "zeros")


class _Reader:
    """Reads nodes as affine maps; ``values`` holds those that are known."""

    def __init__(
        self,
        product: str,
        site: SiteSignature,
        weights: Mapping[Value, Tensor],
        act: AffineMap,
    ) -> None:
        self.values: dict[Value, AffineMap] = {Ref("input", "act"): act}
        self._product_name = product
        self._site = site
        self._weights = weights

    def read(self, node: Node) -> AffineMap | None:
        """Return the node's value, or None if it is not known to be affine."""
        bound = operator(node.op).bind(node.args, node.kwargs)
        given = {parameter.name: value for parameter, value in bound}
        if node.op == self._product_name:
            return self._product(given)
        value = self.values.get(given.get("self"))
        if value is None:
            return None
        if node.op == "aten.add.Tensor" and given.get("alpha", 1) == 1:
            other = self.values.get(given["other"])
            return value.plus(other) if other is not None and other.width == value.width else None
        if node.op in {"aten.mul.Tensor", "aten.mul.Scalar"}:
            factor = given["other"]
            return value.scaled(factor) if isinstance(factor, int | float) else None
        return None

    def _product(self, given: Mapping[str, Value]) -> AffineMap | None:
        weight = self._weights.get(given["weight"])
        bias = self._bias(given.get("bias"), weight)
        if weight is None or bias is None or given.get("groups", 1) != 1:
            return None
        geometry = _geometry(weight, given)
        if given["input"] == Ref("input", "inp"):
            from_act = weight.new_zeros(len(weight), self._site.act_channels)
            return (
                AffineMap(weight, from_act, bias) if geometry == _geometry_of(self._site) else None
            )
        value = self.values.get(given["input"])
        is_pointwise = geometry == _POINTWISE[weight.dim() - 2]
        return value.mapped(weight.flatten(1), bias) if value and is_pointwise else None

    def _bias(self, ref: Value, weight: Tensor | None) -> Tensor | None:
        if ref is None and weight is not None:
            return weight.new_zeros(len(weight))
        return self._weights.get(ref)


def _geometry(weight: Tensor, given: Mapping[str, Value]) -> Geometry:
    """Return kernel size, stride, padding and dilation of a call, with nothing left out."""
    rank = weight.dim() - 2
    stride, padding, dilation = (
        (value,) * rank if isinstance(value, int) else value
        for value in (given.get("stride", 1), given.get("padding", 0), given.get("dilation", 1))
    )
    return tuple(weight.shape[2:]), stride, padding, dilation


def _geometry_of(site: SiteSignature) -> Geometry:
    return site.kernel_size, site.stride, site.padding, site.dilation
