"""Exchanging the class of a module, the one change that costs nothing once it is undone.

A module's forward is changed by giving the instance another class: a subclass of its own, made
once per host class and state kind and cached, with a class-level ``forward``. Closures or
instance-level forwards would break deepcopy (the copy would compute with the original's weights),
pickling and scripting; FSDP2 exchanges classes in the same way.

Others exchange classes too (parametrizations, FSDP2), before us or on top of us. So no class is
remembered: what a module goes back to is read off the class that it has.
"""

import copy
import functools
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from esper.errors import EsperError
from esper.kasmina.ragged import Batch, as_batch, padded, unpadded
from esper.kasmina.seats import SEATS, seats_of

Derive = Callable[[type[nn.Module]], type[nn.Module]]

OBSERVER = "_esper_observer"  # attribute of a module while it is being observed
_BORROWED_FROM = "_esper_borrowed_from"  # attribute of a class that is made here
# Attributes of the classes that are made here, and so of all that are put on top.
_ACTIVE, _OBSERVING = "_esper_active", "_esper_observing"
WRAPPED_FROM = "_esper_wrapped_from"  # attribute of the class of a wrapped root


def made_once(make: Derive) -> Derive:
    """Cache what ``make`` derives from a class: there is one, whichever thread asks first."""
    made: dict[Any, type[nn.Module]] = {}
    making = threading.Lock()

    @functools.wraps(make)
    def derive(cls: Any) -> type[nn.Module]:
        known = made.get(cls)
        if known is None:
            with making:
                known = made.get(cls)
                if known is None:
                    known = made[cls] = make(cls)
        return known

    return derive


def lend_class(module: nn.Module) -> None:
    """Give ``module`` the class that it needs unwatched: active if it has seats, else its own.

    A class that somebody has put on top of one of ours stays as it is.
    """
    needed = own_class(type(module))
    if seats_of(module) is not None and not hasattr(needed, _ACTIVE):
        needed = active_class(needed)
    module.__dict__.pop(OBSERVER, None)
    if type(module) is not needed:
        _exchange(module, "__class__", needed)


def watch(modules: Iterable[nn.Module], observers: Iterable[Any]) -> None:
    """Have each module report its forwards to its observer.

    The module's present class is taken for the one that :func:`lend_class` gave it. All layers of
    a model go through here on each observed step, hence no function call per module.
    """
    watched: dict[type[nn.Module], type[nn.Module]] = {}
    for module, observer in zip(modules, observers, strict=True):
        cls = type(module)
        if cls not in watched:
            watched[cls] = cls if hasattr(cls, _OBSERVING) else observing_class(cls)
        module.__dict__[OBSERVER] = observer
        _exchange(module, "__class__", watched[cls])


def unwatch(modules: Iterable[nn.Module]) -> None:
    """Take back what :func:`watch` did, also where it did nothing."""
    resting: dict[type[nn.Module], type[nn.Module]] = {}
    for module in modules:
        cls = type(module)
        if cls not in resting:
            resting[cls] = cls.__dict__[_BORROWED_FROM] if _OBSERVING in cls.__dict__ else cls
        module.__dict__.pop(OBSERVER, None)
        if resting[cls] is not cls:
            _exchange(module, "__class__", resting[cls])


# Assigned plainly, a class would go through the checks of nn.Module.__setattr__, 1 us a module.
_exchange = object.__setattr__


def own_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return ``cls`` without the classes that are lent here."""
    while _BORROWED_FROM in cls.__dict__:
        cls = cls.__dict__[_BORROWED_FROM]
    return cls


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch | None:
    """Return the layer's input: its first argument, positional or named, if that is a tensor."""
    return as_batch(args[0] if args else next(iter(kwargs.values()), None))


def first_output(out: Any) -> Batch | None:
    """Return the output that carries seeds: the first of several, if it is floating-point."""
    several = isinstance(out, tuple) and out and not isinstance(out, PackedSequence)
    host = as_batch(out[0] if several else out)
    return host if host is not None and _data(host).is_floating_point() else None


def with_first_output(out: Any, blended: Batch) -> Any:
    """Return a layer's output with ``blended`` in the place of its first tensor."""
    if not isinstance(out, tuple) or isinstance(out, PackedSequence):
        return blended
    outputs = (blended, *out[1:])
    return type(out)(*outputs) if hasattr(out, "_fields") else outputs


def _data(batch: Batch) -> Tensor:
    return batch.data if isinstance(batch, PackedSequence) else batch


@made_once
def active_class(host: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of ``host`` whose forward lets the layer's seats speak."""
    host_forward = host.forward
    is_map = host in _MAPS

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seats = seats_of(self)
        inp = first_input(args, kwargs)
        # Without seats: culled, under a class that somebody has put on top of this one.
        if seats is None or inp is None:
            return host_forward(self, *args, **kwargs)
        if self.__dict__.get("inplace") and isinstance(inp, Tensor):
            inp = inp.clone()
        out = host_forward(self, *args, **kwargs)
        host = first_output(out)
        if host is None:
            return out
        if isinstance(host, Tensor) and isinstance(inp, Tensor) and not host.is_nested:
            if torch.is_grad_enabled() and not (is_map and _has_saved(self, inp, host)):
                # Others may modify it in place after this call, as they may not where the host has
                # saved it; what the kernels save must not change under them.
                inp = inp.clone()
            in_place = is_map and _may_be_written_over(host)
            return with_first_output(out, seats.apply_to(inp, host, in_place))
        batch_first = getattr(self, "batch_first", True)
        blended = seats.apply_to(padded(inp, batch_first), padded(host, batch_first), False)
        return with_first_output(out, unpadded(blended, host, batch_first))

    return _subclass(host, "Active", _ACTIVE, forward)


# What these return is new memory that they do not save for their backward pass, so that nobody
# misses it when it is written over; and while their weight learns, they save their input. Their
# subclasses may do otherwise.
_MAPS = {
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
}


def _may_be_written_over(out: Tensor) -> bool:
    """Whether it costs nothing more and nobody looks on: autograd copies the base of a view, and
    selective checkpointing, for one, keeps what operators return."""
    looked_on = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return not looked_on and not out._is_view()


def _has_saved(host: nn.Module, inp: Tensor, out: Tensor) -> bool:
    """Whether a map keeps ``inp`` itself for its backward pass, and no copy in another form.

    Autocast makes a copy of another dtype, matrix products one of what is not contiguous.
    """
    weight = host._parameters.get("weight")
    learns = weight is not None and weight.requires_grad
    return learns and out.dtype is inp.dtype and inp.is_contiguous()


@made_once
def observing_class(host: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of ``host`` that reports each forward to the module's observer.

    A plain ReLU is computed and observed in one pass where the observer can do so.
    """
    host_forward = host.forward
    is_relu = host is nn.ReLU

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        observer = self.__dict__.get(OBSERVER)
        if observer is None or torch.compiler.is_compiling():
            return host_forward(self, *args, **kwargs)
        timer = DeviceTimer(observer.device)
        if is_relu and args and not self.inplace:
            fused = observer.relu(args[0], timer)
            if fused is not None:
                return fused
        out = host_forward(self, *args, **kwargs)
        timer.stop()
        observer.see(args, kwargs, out, timer)
        return out

    return _subclass(host, "Observing", _OBSERVING, forward)


def _subclass(host: type[nn.Module], prefix: str, mark: str, forward: Any) -> type[nn.Module]:
    forward.__qualname__ = f"{prefix}{host.__name__}.forward"
    members = {
        "forward": forward,
        "__module__": __name__,
        "__deepcopy__": copy_module,
        "__reduce_ex__": reduce_to_own_class,
        _BORROWED_FROM: host,
        mark: True,
    }
    return type(f"{prefix}{host.__name__}", (host,), members)


def copy_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Deepcopy with seeds, unobserved. The default would go through ``__reduce_ex__``."""
    twin = nn.Module.__new__(type(module))
    memo[id(module)] = twin
    for name, value in module.__dict__.items():
        if name not in (OBSERVER, "_compiled_call_impl"):  # which holds on to the original
            twin.__dict__[name] = copy.deepcopy(value, memo)
    lend_class(twin)
    return twin


def reduce_to_own_class(module: nn.Module, protocol: Any) -> Any:
    """Pickle as what the module is without us; with kernels in place, which are code, refuse."""
    if SEATS in module._modules:
        raise EsperError(
            f"a {own_class(type(module)).__name__} with kernels in place cannot be pickled; "
            "esper.save the model, save its state_dict() or torch.export it"
        )
    state = {k: v for k, v in module.__dict__.items() if not k.startswith("_esper_")}
    state.pop("_compiled_call_impl", None)
    own = own_class(type(module))
    return new_module, (own.__dict__.get(WRAPPED_FROM, own),), state


def new_module(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


class DeviceTimer:
    """Measures one stretch of work on a device without waiting for it. Copies share it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "DeviceTimer":
        return self

    def __init__(self, device: torch.device):
        self._now: Callable[[], Any] = (
            _recorded_event if device.type == "cuda" else time.perf_counter_ns
        )
        self._start: Any = self._now()
        self._stop: Any = self._start

    def stop(self) -> None:
        self._stop = self._now()

    def elapsed_us(self) -> float:
        """Microseconds; on CUDA only once both events have completed."""
        if isinstance(self._start, torch.cuda.Event):
            return float(self._start.elapsed_time(self._stop)) * 1e3
        return float(self._stop - self._start) / 1e3


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
