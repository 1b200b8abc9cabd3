"""Esper: networks that grow while they train.

``esper.wrap(model)`` plants dormant seeds on a model's layers, for free. A background pipeline
turns designs into compiled, tested and signed kernels, and a controller has them loaded where the
model needs them. See the README for the names.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.contracts import Blueprint
    from esper.kasmina.checkpoint import load, save
    from esper.kasmina.compilation import compile  # noqa: A004 - as torch.compile
    from esper.kasmina.distributed import distribute
    from esper.kasmina.export import export
    from esper.kasmina.layer import KasminaLayer
    from esper.kasmina.model import MorphableModel, unwrap, wrap
    from esper.kasmina.site_types import register_site
    from esper.oona import Oona
    from esper.pipeline import Pipeline
    from esper.tamiyo import Tamiyo
    from esper.tezzeret import Tezzeret
    from esper.tolaria import Tolaria
    from esper.urabrask import Urabrask
    from esper.urza import Urza

_HOMES = {
    "Blueprint": "esper.contracts",
    "KasminaLayer": "esper.kasmina.layer",
    "MorphableModel": "esper.kasmina.model",
    "Oona": "esper.oona",
    "Pipeline": "esper.pipeline",
    "Tamiyo": "esper.tamiyo",
    "Tezzeret": "esper.tezzeret",
    "Tolaria": "esper.tolaria",
    "Urabrask": "esper.urabrask",
    "Urza": "esper.urza",
    "compile": "esper.kasmina.compilation",
    "distribute": "esper.kasmina.distributed",
    "export": "esper.kasmina.export",
    "load": "esper.kasmina.checkpoint",
    "register_site": "esper.kasmina.site_types",
    "save": "esper.kasmina.checkpoint",
    "unwrap": "esper.kasmina.model",
    "wrap": "esper.kasmina.model",
}

__all__ = [
    "Blueprint",
    "KasminaLayer",
    "MorphableModel",
    "Oona",
    "Pipeline",
    "Tamiyo",
    "Tezzeret",
    "Tolaria",
    "Urabrask",
    "Urza",
    "compile",
    "distribute",
    "export",
    "load",
    "register_site",
    "save",
    "unwrap",
    "wrap",
]


_MODULES = {
    "blueprints",
    "config",
    "contracts",
    "errors",
    "nissa",
    "oona",
    "tamiyo",
    "testing",
    "tezzeret",
    "tolaria",
    "urabrask",
    "urza",
}

# What a program wants to see of the library's log is for the program to say.
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a worker process needs only its own part."""
    if name in _MODULES:
        return importlib.import_module(f"esper.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'esper' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
