"""The handles of a model's layers by name: a shared module has one, which all its names find."""

from collections.abc import Mapping
from typing import Any

from esper.kasmina.layer import KasminaLayer


class LayerHandles(dict[str, KasminaLayer]):
    """Handles by the first name of each layer; looking up a further name finds the same handle.

    Iteration and length count each handle once, under its first name.
    """

    def __init__(self, handles: Mapping[str, KasminaLayer], first_names: Mapping[str, str]):
        super().__init__(handles)
        self.first_names = first_names

    def __missing__(self, name: str) -> KasminaLayer:
        if name not in self.first_names:
            raise KeyError(name)
        return super().__getitem__(self.first_names[name])

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.first_names

    def get(self, name: str, default: Any = None) -> Any:
        """Return the handle under any of its names, or ``default``."""
        return super().get(self.first_names.get(name, name), default)
