"""Having compiled code run eagerly for a while: what compilers cannot trace goes on there."""

from typing import Any

import torch


class Uncompiled:
    """A stretch of time in which whatever is compiled, in the whole process, runs eagerly.

    Nothing is compiled anew for it, and nothing that is compiled is lost by it.
    """

    def __init__(self) -> None:
        self._stance: Any = None

    def begin(self) -> None:
        if self._stance is None:
            self._stance = torch.compiler.set_stance("force_eager")

    def end(self) -> None:
        """Restore what held before; does nothing if nothing was begun."""
        stance, self._stance = self._stance, None
        if stance is not None:
            stance.__exit__(None, None, None)
