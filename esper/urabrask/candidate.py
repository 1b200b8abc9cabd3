"""What runs inside a candidate's process: loads the kernel, runs it and times it, as it is asked.

Everything here shares its process with the kernel under test and therefore proves nothing about
it. It returns raw results, and the evaluator draws the conclusions.
"""

import gc
import importlib
import platform
import resource
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.profiler import profile

import esper.kasmina.native as native
from esper.contracts import Contract, KernelManifest
from esper.errors import ArtifactError
from esper.kasmina.compiled import LIBRARY_FILES
from esper.kasmina.kernel import Kernel
from esper.urabrask import wire

KERNEL_LOADER = "esper.kasmina.compiled:build"

_QUESTION_LIMIT_BYTES = 2**32
_WARMUP_ROUNDS = 3

Tensors = dict[str, Tensor]
Microseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LoadQuestion(Contract):
    """Carries the artifact's files as ``file.<name>``; answered with the ``state.<name>``."""

    do: Literal["load"] = "load"
    loader: str = KERNEL_LOADER  # "module:function" with the arguments of Kernel.build
    manifest: KernelManifest


class RunQuestion(Contract):
    """One forward and backward, on ``inp``, ``act`` and ``grad_out``.

    ``act`` may be wider than the kernel's channels; the kernel is given its first channels, laid
    out as a layer lays out the chunk of a seed. Tensors ``state.<name>`` replace the values of
    parameters and buffers first.
    """

    do: Literal["run"] = "run"
    training: bool


class TimeQuestion(Contract):
    """Forward and backward of kernel and eager baseline in turn, on tensors as in a run."""

    do: Literal["time"] = "time"
    rounds: int


class Ready(Contract):
    """Answers ``{"do": "ready"}``, by which a candidate shows that it has come to life."""


class Loaded(Contract):
    device_name: str


class Ran(Contract):
    """Comes with ``out``, with those of ``grad.inp``, ``grad.act`` and ``grad.state.<parameter>``
    that exist, and with ``after.<name>`` for everything that the kernel was given."""

    out_type: str  # qualified name of the class
    out_device: str
    out_shares_memory_with: tuple[str, ...] = ()


class Timed(Contract):
    """Microseconds of each round. Forward includes the recording of the autograd graph."""

    forward_us: tuple[Microseconds, ...]
    forward_backward_us: tuple[Microseconds, ...]
    eager_forward_us: tuple[Microseconds, ...]
    memory_bytes: int = Field(ge=0)


def serve(channel: socket.socket) -> None:
    """Answer questions until the channel is closed; an exception of the kernel is an answer."""
    stream = channel.makefile("rb")
    bench = _Bench()

    def read_exactly(size: int) -> bytes:
        data = stream.read(size)
        if len(data) < size:
            raise EOFError
        return data

    while True:
        try:
            question = wire.read_frame(read_exactly, _QUESTION_LIMIT_BYTES)
        except EOFError:
            return
        try:
            answer, tensors = bench.answer(question.header, question.tensors)
            frame = wire.pack(question.nonce, answer.model_dump(), tensors)
        except Exception as error:
            frame = wire.pack(question.nonce, {"error": f"{type(error).__name__}: {error}"}, {})
        channel.sendall(frame)


class _Bench:
    """The kernel under test and what belongs to it."""

    _kernel: nn.Module
    _eager: nn.Module  # the flat eager program of the same graph
    _manifest: KernelManifest

    def answer(self, header: dict[str, Any], tensors: Tensors) -> tuple[Contract, Tensors]:
        match header["do"]:
            case "ready":
                return Ready(), {}
            case "load":
                return self._load(LoadQuestion.model_validate(header), tensors)
            case "run":
                return self._run(RunQuestion.model_validate(header), tensors)
            case "time":
                return self._time(TimeQuestion.model_validate(header), tensors)
            case unknown:
                raise ValueError(f"unknown question {unknown!r}")

    def _load(self, question: LoadQuestion, tensors: Tensors) -> tuple[Loaded, Tensors]:
        torch.backends.cudnn.allow_tf32 = False  # the reference is float64
        files = {name.removeprefix("file."): wire.as_bytes(t) for name, t in tensors.items()}
        self._manifest = question.manifest
        _write_libraries(files)
        self._kernel = _resolve(question.loader)(self._manifest, files).to(self._manifest.device)
        if self._manifest.native and getattr(self._kernel, "compiled", None) is None:
            raise ArtifactError("its machine code was not loaded")
        self._eager = Kernel.build(self._manifest, files).to(self._manifest.device)
        return Loaded(device_name=_device_name(self._manifest.device)), self._state()

    def _run(self, question: RunQuestion, tensors: Tensors) -> tuple[Ran, Tensors]:
        self._kernel.train(question.training)
        self._replace_state(tensors)
        call = _Call(self._place(tensors), self._manifest)
        out = self._kernel(call.inp, call.act)
        if type(out) is not Tensor:
            return Ran(out_type=_type_name(out), out_device=""), {}
        gradients = call.gradients(out, self._parameters())
        given = call.given | self._state()
        answer = Ran(
            out_type=_type_name(out),
            out_device=out.device.type,
            out_shares_memory_with=_sharing(out, given),
        )
        after = {f"after.{name}": tensor for name, tensor in given.items()}
        return answer, {"out": out} | gradients | after

    def _time(self, question: TimeQuestion, tensors: Tensors) -> tuple[Timed, Tensors]:
        self._kernel.train()
        self._eager.train()
        call = _Call(self._place(tensors), self._manifest)
        parameters = self._parameters()

        def forward() -> Tensor:
            out: Tensor = self._kernel(call.inp, call.act)
            return out

        def eager_forward() -> None:
            self._eager(call.inp, call.act)

        def forward_backward() -> None:
            call.gradients(forward(), parameters)

        forward_us, eager_forward_us = _in_turn((forward, eager_forward), question.rounds)
        [forward_backward_us] = _in_turn((forward_backward,), question.rounds)
        return Timed(
            forward_us=forward_us,
            eager_forward_us=eager_forward_us,
            forward_backward_us=forward_backward_us,
            memory_bytes=_peak_memory(forward_backward),
        ), {}

    def _state(self) -> Tensors:
        named = (*self._kernel.named_parameters(), *self._kernel.named_buffers())
        return {f"state.{name}": tensor for name, tensor in named}

    def _parameters(self) -> Tensors:
        return {f"state.{name}": tensor for name, tensor in self._kernel.named_parameters()}

    def _replace_state(self, tensors: Tensors) -> None:
        with torch.no_grad():
            for name, tensor in self._state().items():
                if name in tensors:
                    tensor.copy_(tensors[name])

    def _place(self, tensors: Tensors) -> Tensors:
        return {name: tensor.to(self._manifest.device) for name, tensor in tensors.items()}


def _write_libraries(files: Mapping[str, bytes]) -> None:
    """Write what has to be on disk to be loaded; this process may write to no file from then on."""
    for name in LIBRARY_FILES:
        if name in files:
            native.stage(files[name])
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


class _Call:
    """The tensors of one call, as a layer would hand them over: part of an autograd graph."""

    def __init__(self, tensors: Tensors, manifest: KernelManifest) -> None:
        site = manifest.site
        self.given = {name: _non_leaf(tensors[name]) for name in ("inp", "act")}
        self.inp = self.given["inp"]
        self.act = self.given["act"].narrow(site.channel_dim, 0, site.act_channels)
        self._grad_out = tensors["grad_out"]

    def gradients(self, out: Tensor, parameters: Mapping[str, Tensor]) -> Tensors:
        """Return the gradients that exist, by name: none for an output that cannot be right."""
        if not out.requires_grad or not _alike(out, self._grad_out):
            return {}
        wanted = {"grad.inp": self.inp, "grad.act": self.act}
        wanted |= {f"grad.{name}": parameter for name, parameter in parameters.items()}
        wanted = {name: tensor for name, tensor in wanted.items() if tensor.requires_grad}
        grads = torch.autograd.grad(out, list(wanted.values()), self._grad_out, allow_unused=True)
        return {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}


def _non_leaf(tensor: Tensor) -> Tensor:
    """Autograd refuses to modify leaves in place; a kernel must not get away with it elsewhere."""
    if not tensor.is_floating_point():
        return tensor.clone()
    return tensor.requires_grad_().clone()


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _sharing(out: Tensor, others: Mapping[str, Tensor]) -> tuple[str, ...]:
    storage = out.untyped_storage().data_ptr()
    return tuple(name for name, t in others.items() if t.untyped_storage().data_ptr() == storage)


def _in_turn(functions: Sequence[Callable[[], object]], rounds: int) -> list[tuple[float, ...]]:
    """Time the functions in turn, so that whatever slows the machine down hits all alike.

    Every other round goes backwards, since it matters who ran before.
    """
    samples: list[list[float]] = [[] for _ in functions]
    order = list(zip(functions, samples, strict=True))
    for function in tuple(functions) * _WARMUP_ROUNDS:
        function()
    gc.disable()
    for _ in range(rounds):
        for function, series in order:
            series.append(_microseconds(function))
        order.reverse()
    gc.enable()
    return [tuple(series) for series in samples]


def _microseconds(function: Callable[[], object]) -> float:
    _synchronize()
    started = time.perf_counter_ns()
    function()
    _synchronize()
    return (time.perf_counter_ns() - started) / 1000


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _peak_memory(function: Callable[[], object]) -> int:
    """Return the most bytes that ``function`` holds at once, as the allocator counts them.

    Beyond what was there before: inputs and parameters do not count, the output, everything
    saved for backward, temporaries and gradients do.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as profiler:
        function()
    held = peak = 0
    for event in sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _resolve(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
