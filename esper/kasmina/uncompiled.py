"""Having compiled code run eagerly for a while: what compilers cannot trace goes on there."""

import weakref
from typing import Any

import torch

# The stance is one for the whole process, so models that are watched at the same time share it.
_under_way: set[int] = set()
_stances: list[Any] = []


class Uncompiled:
    """A stretch of time in which whatever is compiled, in the whole process, runs eagerly.

    Nothing is compiled anew for it, and nothing that is compiled is lost by it. It ends with the
    last of those that are under way, and with an owner that is forgotten before its end.
    """

    def __init__(self) -> None:
        weakref.finalize(self, _end, id(self)).atexit = False

    def begin(self) -> None:
        _under_way.add(id(self))
        stance = torch.compiler.set_stance("force_eager")  # others may have set another meanwhile
        if not _stances:
            _stances.append(stance)

    def end(self) -> None:
        """Restore what held before, unless others go on; does nothing if nothing was begun."""
        _end(id(self))


def _end(key: int) -> None:
    _under_way.discard(key)
    if _stances and not _under_way:
        _stances.pop().__exit__(None, None, None)
