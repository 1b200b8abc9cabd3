"""A seed as plain PyTorch: its weights on the host module, its arithmetic in a forward hook.

The host keeps its class, its parameters and their names. What the seed computes are ``torch.fx``
graphs, which hold no tensors: they are handed the module to read them from, so that a copy
computes with its own weights. Unpickling traces such graphs anew, hence every choice in them is
made by indexing what comes in as an argument (``paths[fits]``), never by ``if``.
"""

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

import esper.reference as reference
from esper.kasmina.kernel import Kernel
from esper.kasmina.site import ChannelDim

fx.wrap("hasattr")  # called when a graph runs, not when it is traced

_MAX_RANK = 8  # of an output that a kernel made for rank 2 is applied to


@dataclass(frozen=True)
class Voice:
    """A kernel that the layer's output hears, on which channels, and how loud."""

    name: str
    kernel: Kernel
    alpha: float
    start: int
    length: int
    channels: int  # of the layer's whole output
    channel_dim: ChannelDim
    device: torch.device

    @property
    def by_row(self) -> bool:
        """Whether the kernel was made for rows ``(N, C)``, and so serves outputs of any rank."""
        return len(self.kernel.manifest.site.act_shape) == 2

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the output at which the kernel is called."""
        if not self.by_row:
            return (len(self.kernel.manifest.site.act_shape),)
        ranks = range(1, _MAX_RANK + 1)
        return tuple(rank for rank in ranks if self.channel_dim(rank) == rank - 1)

    @property
    def dim(self) -> int:
        return -1 if self.by_row else self.channel_dim(self.ranks[0])


def attach(host: nn.Module, voices: list[Voice]) -> str:
    """Have ``host`` speak with these voices, by a forward hook that comes before all others.

    Returns the name of the submodule that holds them: ``grown``, or ``grown2`` and so on where the
    host has something of that name, such as the seeds of an earlier export.
    """
    if getattr(host, "inplace", False):
        host.inplace = False  # type: ignore[assignment]  # the kernels need its input as it came
    names = itertools.chain(["grown"], (f"grown{number}" for number in itertools.count(2)))
    name = next(name for name in names if not hasattr(host, name))
    seeds = nn.ModuleDict({voice.name: _seed(voice) for voice in voices})
    seeds["forms"] = nn.ModuleList([fx.symbolic_trace(form) for form in _forms(voices)])
    host.add_module(name, seeds.train(host.training))
    hook = fx.symbolic_trace(_hook(name, _input_name(host)))
    # The handle is kept because unpickling one reserves its id, which a hook that is registered
    # afterwards would otherwise be given as well.
    seeds.handle = host.register_forward_hook(hook, prepend=True, with_kwargs=True)  # type: ignore[assignment]
    return name


def _input_name(host: nn.Module) -> str:
    """Return the name of the forward's first parameter, by which callers may pass it."""
    return next(iter(inspect.signature(host.forward).parameters))


def _seed(voice: Voice) -> nn.Module:
    """Return the module that holds what a voice needs: weights, alpha and graphs."""
    seed: Any = nn.Module()
    seed.weights = _weights(voice.kernel)
    if voice.alpha != 1:
        # With a dimension, so that type promotion has it blend in float32 at least.
        seed.register_buffer("alpha", torch.tensor([voice.alpha], device=voice.device))
    seed.ranks = voice.ranks
    seed.widths = ((voice.channels,),)
    paths = [fx.symbolic_trace(_pass_through)]
    paths += [fx.symbolic_trace(_path(voice, training)) for training in (False, True)]
    seed.paths = nn.ModuleList(paths)
    return seed  # type: ignore[no-any-return]


def _weights(kernel: Kernel) -> nn.Module:
    """Return plain modules with the kernel's parameters and buffers, under the design's names."""
    root = nn.Module()
    for spec, weight in zip(kernel.program.parameters, kernel.weights(), strict=True):
        parent, name = _parent(root, spec.name)
        parent.register_parameter(name, nn.Parameter(weight.detach().clone()))
    for spec, buffer in zip(kernel.program.buffers, kernel.buffers(), strict=True):
        parent, name = _parent(root, spec.name)
        parent.register_buffer(name, buffer)
    return root


def _parent(root: nn.Module, dotted_name: str) -> tuple[nn.Module, str]:
    *path, name = dotted_name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root, name


def _hook(name: str, input_name: str) -> Callable[..., Any]:
    """Return the forward hook; what kind of value the output is decides which form speaks."""

    nothing = (None,)

    def call_seeds(host: Any, args: Any, kwargs: Any, out: Any) -> Any:
        inp = kwargs.get(input_name, (args + nothing)[0])
        seeds = getattr(host, name)
        is_tensor, is_named = hasattr(out, "shape"), hasattr(out, "_make")
        return seeds.forms[is_tensor + is_named * 2].forward(seeds, inp, out)

    return call_seeds


def _forms(voices: list[Voice]) -> tuple[Callable[..., Any], ...]:
    """Return what speaks on a tuple, a tensor and a named tuple; of several outputs, on the first.

    The output's shape and the mode decide which path a seed takes.
    """

    def on_tensor(seeds: Any, inp: Any, out: Any) -> Any:
        for voice in voices:
            seed = getattr(seeds, voice.name)
            width = out.shape[slice(voice.dim, voice.dim + 1 or None)]
            fits = seed.ranks.count(out.ndim) * seed.widths.count(width)
            out = seed.paths[fits * (1 + seed.training)].forward(seed, inp, out)
        return out

    def on_tuple(seeds: Any, inp: Any, out: Any) -> Any:
        return (on_tensor(seeds, inp, out[0]),) + out[1:]  # noqa: RUF005  # traced, not iterable

    def on_named_tuple(seeds: Any, inp: Any, out: Any) -> Any:
        return out._make(on_tuple(seeds, inp, out))

    return on_tuple, on_tensor, on_named_tuple


def _pass_through(seed: Any, inp: Any, out: Any) -> Any:
    return out


def _path(voice: Voice, training: bool) -> Callable[..., Any]:
    """Return the function that blends the kernel's output into the voice's channels of ``out``."""

    def blend(seed: Any, inp: Any, out: Any) -> Any:
        act = out.narrow(voice.dim, voice.start, voice.length)
        made = _call_kernel(voice, seed.weights, inp, act, training)
        made = torch.where(torch.isfinite(made), made, act)
        if voice.alpha != 1:
            made = reference.lerp(act, made, seed.alpha).to(out.dtype)
        if voice.length == voice.channels:
            return made
        return torch.slice_scatter(out, made, voice.dim, voice.start, voice.start + voice.length)

    return blend


def _call_kernel(voice: Voice, weights: Any, inp: Any, act: Any, training: bool) -> Any:
    program = voice.kernel.program
    params = [_attribute(weights, spec.name) for spec in program.parameters]
    buffers = [_attribute(weights, spec.name) for spec in program.buffers]
    if not voice.by_row:
        return program.interpret(inp, act, params, buffers, training)
    rows = _rows(inp), _rows(act)
    return program.interpret(*rows, params, buffers, training).reshape(act.shape)


def _rows(x: Any) -> Any:
    """``(..., C)`` to ``(N, C)``."""
    return torch.atleast_2d(x).flatten(0, -2)


def _attribute(root: Any, dotted_name: str) -> Any:
    for part in dotted_name.split("."):
        root = getattr(root, part)
    return root
