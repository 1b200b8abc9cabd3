"""Which designs there are, and how a design becomes a module.

A design is an importable builder and hyper-parameters: the forge imports the builder in a process
of its own, so a class that only the running script knows cannot be a design.
"""

import importlib
import re
from collections.abc import Callable
from typing import Any, cast

from pydantic import ValidationError
from torch import nn

from esper.contracts import Design, HyperParameter, SiteSignature
from esper.errors import BlueprintError

_designs: dict[str, Design] = {}

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_IMPORT_PATH = re.compile(r"[A-Za-z0-9_.]+:[A-Za-z0-9_.]+")


def register(
    name: str,
    builder: Callable[..., nn.Module] | str,
    *,
    hparams: dict[str, HyperParameter] | None = None,
) -> Design:
    """Add a design under ``name``, for the controller to choose from.

    ``builder`` is a class, or its import path ``"package.module:Class"``; calling it with a
    site's signature and ``hparams`` gives the module. It may have a static method
    ``fits(site) -> bool``; without one the design is offered for every site. Registering the
    same design twice does nothing. Raises ``ValueError`` for a name that is malformed or taken by
    another design, ``TypeError`` for a builder that is neither a class nor a function, and
    :class:`BlueprintError` for one that other processes cannot import.
    """
    design = _design(name, _import_path(builder), hparams or {})
    _resolve(design)
    if _designs.setdefault(name, design) != design:
        raise ValueError(f"another design is registered as {name!r}: {_designs[name].builder}")
    return design


def get(name: str) -> Design:
    """Return the registered design of that name."""
    if name not in _designs:
        raise ValueError(f"no design {name!r}; registered are {', '.join(sorted(_designs))}")
    return _designs[name]


def designs_for(site: SiteSignature) -> list[Design]:
    """Return the registered designs that fit ``site``, in the order of registration."""
    return [design for design in _designs.values() if _fits(design, site)]


def build(design: Design, site: SiteSignature) -> nn.Module:
    """Build the design's module for ``site``, on the CPU; runs the builder's code.

    Raises :class:`BlueprintError` if the builder cannot be imported, refuses the site or fails.
    """
    builder = _resolve(design)
    try:
        module = builder(site, **design.hparams)
    except BlueprintError as error:
        raise BlueprintError(f"design {design.name!r}: {error}") from error
    except Exception as error:
        raise BlueprintError(
            f"design {design.name!r}: {design.builder} failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise BlueprintError(
            f"design {design.name!r}: {design.builder} gave a {type(module).__name__}, no nn.Module"
        )
    return module


def _fits(design: Design, site: SiteSignature) -> bool:
    fits = getattr(_resolve(design), "fits", None)
    return fits is None or bool(fits(site))


def _design(name: str, path: str, hparams: dict[str, HyperParameter]) -> Design:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"a design's name is 1 to 64 letters, digits, '_', '.' or '-', got {name!r}"
        )
    if not _IMPORT_PATH.fullmatch(path):
        raise ValueError(f"design {name!r}: an import path is 'package.module:Class', got {path!r}")
    try:
        return Design(name=name, builder=path, hparams=hparams)
    except ValidationError:
        raise ValueError(
            f"design {name!r}: hyper-parameters are bools, numbers or strings by name, "
            f"got {hparams!r}"
        ) from None


def _import_path(builder: Callable[..., nn.Module] | str) -> str:
    if isinstance(builder, str):
        return builder
    if not hasattr(builder, "__qualname__"):
        raise TypeError(
            "a builder is a class or function, or its import path 'package.module:Class', "
            f"got {builder!r}"
        )
    module, name = builder.__module__, builder.__qualname__
    if module == "__main__" or "<" in name:
        raise BlueprintError(
            f"{module}.{name} cannot be imported by another process: "
            "move the class to the top level of a module of its own"
        )
    return f"{module}:{name}"


def _resolve(design: Design) -> Callable[..., Any]:
    module, name = design.builder.split(":")
    if module == "__main__":
        raise BlueprintError(f"design {design.name!r}: another process cannot import __main__")
    try:
        builder: Any = importlib.import_module(module)
        for part in name.split("."):
            builder = getattr(builder, part)
    except (ImportError, AttributeError) as error:
        raise BlueprintError(f"design {design.name!r}: no {design.builder}: {error}") from error
    if not callable(builder):
        raise BlueprintError(f"design {design.name!r}: {design.builder} cannot be called")
    return cast("Callable[..., Any]", builder)
