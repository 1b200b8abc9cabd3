"""Nested Python values as JSON, with the tensors in them set aside by name. No pickle.

What JSON lacks travels as an object with one key that begins with ``$``: ``$float`` (NaN and the
infinities), ``$tensor``, ``$tuple``, ``$counter`` and ``$dict`` (keys other than plain strings).
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Place = Callable[[str, Tensor], Tensor]  # a tensor's name, the tensor on the CPU -> where it goes


def pack(value: Any, path: str, tensors: Tensors) -> Any:
    """Return ``value`` as JSON; each tensor goes to ``tensors`` under its path (``a/b/0``).

    Raises ``TypeError`` that names the path of a value of any other kind.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, Tensor):
        return _set_aside(value, path, tensors)
    if isinstance(value, list | tuple):
        items = [pack(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict):
        return _pack_dict(value, path, tensors)
    raise TypeError(
        f"{path} is a {type(value).__name__}, which a checkpoint cannot hold: expected None, "
        "bool, int, float, str, list, tuple, dict, Counter or Tensor"
    )


def unpack(value: Any, tensors: Tensors, place: Place = lambda _, tensor: tensor) -> Any:
    """Return what :func:`pack` was given, with tensors of its own where ``place`` puts them."""
    if isinstance(value, list):
        return [unpack(item, tensors, place) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if tag == "$float":
        return float(value[tag])
    if tag == "$tensor":
        return place(value[tag], _take_back(tensors[value[tag]], value.get("stride")))
    if tag == "$tuple":
        return tuple(unpack(item, tensors, place) for item in value[tag])
    if tag in ("$dict", "$counter"):
        pairs = {
            unpack(key, tensors, place): unpack(item, tensors, place) for key, item in value[tag]
        }
        return Counter(pairs) if tag == "$counter" else pairs
    return {key: unpack(item, tensors, place) for key, item in value.items()}


def _pack_dict(value: dict[Any, Any], path: str, tensors: Tensors) -> Any:
    items = [(key, pack(item, f"{path}/{key}", tensors)) for key, item in value.items()]
    if isinstance(value, Counter):
        return {"$counter": [[pack(key, path, tensors), item] for key, item in items]}
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return dict(items)
    return {"$dict": [[pack(key, path, tensors), item] for key, item in items]}


def _set_aside(tensor: Tensor, path: str, tensors: Tensors) -> dict[str, Any]:
    name = path
    while name in tensors:  # keys such as 1 and "1" make one path
        name += "'"
    tensors[name] = tensor
    # Files hold contiguous tensors; some optimizers take another path for other strides.
    layout = {} if tensor.is_contiguous() else {"stride": list(tensor.stride())}
    return {"$tensor": name, **layout}


def _take_back(stored: Tensor, stride: list[int] | None) -> Tensor:
    if stride is None:
        return stored.clone()
    return torch.empty_strided(stored.shape, stride, dtype=stored.dtype).copy_(stored)
