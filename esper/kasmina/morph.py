"""Exchanging the class of a module, the one change that costs nothing once it is undone.

A module's forward is changed by giving the instance another class: a subclass of its own, made
once per host class and state kind and cached, with a class-level ``forward``. Closures or
instance-level forwards would break deepcopy (the copy would compute with the original's weights),
pickling and scripting; FSDP2 exchanges classes in the same way.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from esper.kasmina.seat import SEATS, Seats

Derive = Callable[[type[nn.Module]], type[nn.Module]]

OBSERVER = "_esper_observer"  # attribute of a module while it is being observed


def made_once(make: Derive) -> Derive:
    """Cache what ``make`` derives from a class. (Typed here, as mypy finds classes unhashable.)"""
    cached: Any = functools.cache(make)
    return cast(Derive, cached)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the layer's input: its first argument, positional or named."""
    inp = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(inp, Tensor)
    return inp


@made_once
def active_class(host: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of ``host`` whose forward lets the layer's seats speak."""
    host_forward = host.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        inp = first_tensor(args, kwargs)
        if not self._parameters:
            # A parameterless host need not have saved its input, so others may modify it in
            # place after this call; what the kernels save must not change under them.
            inp = inp.clone()
        seats = cast(Seats, self._modules[SEATS])
        return seats.apply_to(inp, host_forward(self, *args, **kwargs))

    return _subclass(host, "Active", forward)


@made_once
def observing_class(host: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of ``host`` that reports each forward to the module's observer."""
    host_forward = host.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        timer = DeviceTimer(first_tensor(args, kwargs).device)
        out: Tensor = host_forward(self, *args, **kwargs)
        timer.stop()
        self.__dict__[OBSERVER].observe(first_tensor(args, kwargs), out, timer)
        return out

    return _subclass(host, "Observing", forward)


def _subclass(host: type[nn.Module], prefix: str, forward: Any) -> type[nn.Module]:
    forward.__qualname__ = f"{prefix}{host.__name__}.forward"
    return type(f"{prefix}{host.__name__}", (host,), {"forward": forward, "__module__": __name__})


class DeviceTimer:
    """Measures one stretch of work on a device without waiting for it."""

    def __init__(self, device: torch.device):
        self._on_cuda = device.type == "cuda"
        self._start = self._mark()
        self._stop = self._start

    def stop(self) -> None:
        self._stop = self._mark()

    def elapsed_us(self) -> float:
        """Microseconds; on CUDA only once both events have completed."""
        if self._on_cuda:
            return float(self._start.elapsed_time(self._stop)) * 1e3
        return float(self._stop - self._start) / 1e3

    def _mark(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
