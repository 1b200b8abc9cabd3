"""What runs inside a candidate's process: loads the kernel, runs it and times it, as it is asked.

Everything here shares its process with the kernel under test and therefore proves nothing about
it. It returns raw results, and the evaluator draws the conclusions.
"""

import importlib
import platform
import resource
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

import esper.urabrask.seccomp as seccomp
import esper.urabrask.stopwatch as stopwatch
import esper.urabrask.wire as wire
from esper.contracts import Contract, KernelManifest
from esper.errors import ArtifactError
from esper.kasmina.kernel import Kernel
from esper.urabrask.guarded import Guarded, guard, poisoned_memory
from esper.urabrask.questions import (
    Held,
    HoldQuestion,
    Loaded,
    LoadQuestion,
    Prepared,
    PrepareQuestion,
    Ran,
    Ready,
    RunQuestion,
    Timed,
    TimeQuestion,
    freshened,
)
from esper.urabrask.roofline import Ceilings
from esper.urabrask.surroundings import Surroundings

_QUESTION_LIMIT_BYTES = 2**32
_HARNESS = (wire, stopwatch, sys.modules[__name__])
_OUTPUTS_KEPT = 4  # in which a later output must not lie
_MOST_FLOPS = 16384  # a clock and multiprocessor: twice what tensor cores do up to compute 10.0

Tensors = dict[str, Tensor]


def serve(channel: socket.socket, key: bytes, *, writes: bool) -> None:
    """Answer questions until the channel is closed; an exception of the kernel is an answer.

    ``key`` seals the answers. ``writes``: whether files may be opened for writing, where Landlock
    lets them.
    """
    stream = channel.makefile("rb")
    bench = _Bench(writes)

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
            frame = wire.seal(key, question.nonce, answer.model_dump(), tensors)
        except Exception as error:
            what = {"error": f"{type(error).__name__}: {error}"}
            frame = wire.seal(key, question.nonce, what, {})
        channel.sendall(frame)


class _Bench:
    """The kernel under test and what belongs to it."""

    _kernel: nn.Module
    _eager: nn.Module  # the flat eager program of the same graph
    _manifest: KernelManifest

    def __init__(self, writes: bool) -> None:
        self._writes = writes
        self._guards: dict[str, Guarded] = {}
        self._memories: dict[str, Guarded] = {}  # of the last run
        self._outputs: list[Tensor] = []

    def answer(self, header: dict[str, Any], tensors: Tensors) -> tuple[Contract, Tensors]:
        match header["do"]:
            case "ready":
                return Ready(), {}
            case "prepare":
                return self._prepare(PrepareQuestion.model_validate(header))
            case "load":
                return self._load(LoadQuestion.model_validate(header), tensors)
            case "run":
                return self._run(RunQuestion.model_validate(header), tensors)
            case "time":
                return self._time(TimeQuestion.model_validate(header), tensors)
            case "hold":
                return self._hold(HoldQuestion.model_validate(header), tensors)
            case unknown:
                raise ValueError(f"unknown question {unknown!r}")

    def _prepare(self, question: PrepareQuestion) -> tuple[Prepared, Tensors]:
        torch.backends.cudnn.allow_tf32 = False  # the reference is float64
        # The threads of autograd and of the profiler are not to be laid at the kernel's door.
        probe = torch.ones(1, device=question.device, requires_grad=True)
        stopwatch.peak_memory(lambda: probe.sum().backward())
        stopwatch.prepare()
        seccomp.confine(writes=self._writes)
        return _described(question.device), {}

    def _load(self, question: LoadQuestion, tensors: Tensors) -> tuple[Loaded, Tensors]:
        files = {name.removeprefix("file."): wire.as_bytes(t) for name, t in tensors.items()}
        self._manifest = question.manifest
        self._eager = Kernel.build(self._manifest, files).to(self._manifest.device)
        load = _resolve(question.loader)
        surroundings = Surroundings(_HARNESS)
        self._kernel = load(self._manifest, files).to(self._manifest.device)
        if self._manifest.native and getattr(self._kernel, "compiled", None) is None:
            raise ArtifactError("its machine code was not loaded")
        # A loader may unpack files into the scratch folder; nobody else writes any.
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        state = {name: tensor.clone() for name, tensor in self._state().items()}
        self._guards = guard(self._kernel)
        guard(self._eager)  # timed against each other, both are to have the same kind of memory
        return Loaded(changed=surroundings.changed()), state

    def _run(self, question: RunQuestion, tensors: Tensors) -> tuple[Ran, Tensors]:
        self._kernel.train(question.training)
        self._replace_state(tensors)
        call = self._call(tensors, question)
        torch.manual_seed(question.random_seed)
        surroundings = Surroundings(_HARNESS)
        with ExitStack() as stack:
            if question.poisoned:
                stack.enter_context(poisoned_memory())
            out, gradients, again, refusal = self._forward_and_backward(call, question)
        changed = surroundings.changed()
        if type(out) is not Tensor or out.layout is not torch.strided:
            return Ran(out_type=_type_name(out), out_device="", changed=changed), {}
        given = call.given | self._state()
        answer = Ran(
            out_type=_type_name(out),
            out_device=out.device.type,
            out_strides=out.stride(),
            out_shares_memory_with=_sharing(out, given, self._outputs),
            overrun=_overrun(self._memories | self._guards),
            changed=changed,
            second_backward=refusal,
        )
        self._outputs = [*self._outputs, out][-_OUTPUTS_KEPT:]
        after = {f"after.{name}": tensor for name, tensor in given.items()}
        return answer, {"out": out} | gradients | again | after

    def _forward_and_backward(
        self, call: "_Call", question: RunQuestion
    ) -> tuple[object, Tensors, Tensors, str]:
        """Return output, gradients, those of a second backward, and why it was refused."""
        device = self._manifest.device
        with torch.autocast(device, torch.bfloat16, enabled=question.autocast):
            out = self._kernel(call.inp, call.act)
        if type(out) is not Tensor or out.layout is not torch.strided:
            return out, {}, {}, ""
        parameters = self._parameters()
        gradients = call.gradients(out, parameters)
        if not question.twice:
            return out, gradients, {}, ""
        try:
            again = call.gradients(out, parameters)
        except RuntimeError as error:  # as autograd itself refuses it
            return out, gradients, {}, str(error) or "refused"
        return out, gradients, {f"again.{name}": grad for name, grad in again.items()}, ""

    def _time(self, question: TimeQuestion, tensors: Tensors) -> tuple[Timed, Tensors]:
        call, kept = self._timed_call(question, tensors)
        forward, both = self._rounds(self._kernel, call, kept.offer)
        eager_forward, eager_both = self._rounds(self._eager, call, _forget)
        surroundings = Surroundings(_HARNESS)
        forward_us, eager_forward_us = stopwatch.in_turn(
            (forward, eager_forward), question.rounds, kept.before
        )
        forward_backward_us, eager_forward_backward_us = stopwatch.in_turn(
            (both, eager_both), question.rounds, kept.before
        )
        peak = stopwatch.peak_memory(both) if question.profiled else 0
        return Timed(
            forward_us=forward_us,
            forward_backward_us=forward_backward_us,
            eager_forward_us=eager_forward_us,
            eager_forward_backward_us=eager_forward_backward_us,
            memory_bytes=peak,
            changed=surroundings.changed(),
        ), {"out": kept.out}

    def _hold(self, question: HoldQuestion, tensors: Tensors) -> tuple[Held, Tensors]:
        call, kept = self._timed_call(TimeQuestion(rounds=question.rounds, kept_round=-1), tensors)
        _, forward_and_backward = self._rounds(self._kernel, call, _forget)
        for index in range(question.rounds):
            kept.before(index)
            forward_and_backward()
        allocated_bytes, python_blocks = stopwatch.held()
        return Held(allocated_bytes=allocated_bytes, python_blocks=python_blocks), {}

    def _timed_call(self, question: TimeQuestion, tensors: Tensors) -> tuple["_Call", "_Kept"]:
        self._kernel.train()
        self._eager.train()
        self._replace_state(tensors)
        call = self._call(tensors, RunQuestion(training=True, random_seed=0))
        return call, _Kept(call, question.kept_round)

    def _rounds(
        self, kernel: nn.Module, call: "_Call", offer: Callable[[Tensor], None]
    ) -> tuple[stopwatch.Round, stopwatch.Round]:
        """Return a forward, and a forward with backward."""
        parameters = {f"state.{name}": p for name, p in kernel.named_parameters()}

        def forward() -> None:
            offer(kernel(call.inp, call.act))

        def forward_and_backward() -> None:
            call.gradients(kernel(call.inp, call.act), parameters)

        return forward, forward_and_backward

    def _call(self, tensors: Tensors, question: RunQuestion) -> "_Call":
        memories = self._memories if question.same_memory else {}
        placed = {name: tensor.to(self._manifest.device) for name, tensor in tensors.items()}
        call = _Call(placed, self._manifest, memories, strided=question.strided)
        self._memories = call.memories
        return call

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


class _Call:
    """The tensors of one call, as a layer would hand them over: part of an autograd graph."""

    def __init__(
        self,
        tensors: Tensors,
        manifest: KernelManifest,
        memories: Mapping[str, Guarded],
        *,
        strided: bool,
    ) -> None:
        site = manifest.site
        self.memories = {
            name: _memory(memories.get(name), tensors[name], strided=strided and name == "inp")
            for name in ("inp", "act")
        }
        self.given = {
            name: _non_leaf(tensors[name], memory) for name, memory in self.memories.items()
        }
        self.inp = self.given["inp"]
        self.act = self.given["act"].narrow(site.channel_dim, 0, site.act_channels)
        self._fresh_inp = tensors["inp"]
        self._grad_out = tensors["grad_out"]

    def freshen(self, factor: float) -> None:
        """Give the input other numbers, in the same memory."""
        if self.inp.is_floating_point():
            with torch.no_grad():
                torch.mul(self._fresh_inp.detach(), factor, out=self.inp.detach())

    def gradients(self, out: Tensor, parameters: Mapping[str, Tensor]) -> Tensors:
        """Return the gradients that exist, by name: none for an output that cannot be right."""
        if not out.requires_grad or not _alike(out, self._grad_out):
            return {}
        wanted = {"grad.inp": self.inp, "grad.act": self.act}
        wanted |= {f"grad.{name}": parameter for name, parameter in parameters.items()}
        wanted = {name: tensor for name, tensor in wanted.items() if tensor.requires_grad}
        grads = torch.autograd.grad(out, list(wanted.values()), self._grad_out, allow_unused=True)
        return {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}


class _Kept:
    """Freshens the input before each call, and keeps the output of one round."""

    def __init__(self, call: _Call, kept_round: int) -> None:
        self._call = call
        self._kept_round = kept_round
        self._round = -1
        self.out = torch.empty(0)

    def before(self, index: int) -> None:
        self._round = index
        self._call.freshen(freshened(index))

    def offer(self, out: Tensor) -> None:
        if self._round == self._kept_round:
            self.out = out


def _forget(out: Tensor) -> None:
    """Offer an output to nobody, at the same price."""


def _memory(earlier: Guarded | None, like: Tensor, *, strided: bool) -> Guarded:
    if earlier is not None and earlier.fits(like, strided=strided):
        return earlier
    return Guarded(like, strided=strided)


def _non_leaf(tensor: Tensor, memory: Guarded) -> Tensor:
    """Autograd refuses to modify leaves in place; a kernel must not get away with it elsewhere."""
    source = tensor.requires_grad_() if tensor.is_floating_point() else tensor
    return memory.tensor().copy_(source)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _sharing(out: Tensor, given: Mapping[str, Tensor], outputs: list[Tensor]) -> tuple[str, ...]:
    if out.numel() == 0:
        return ()
    storage = out.untyped_storage().data_ptr()
    shared = [name for name, t in given.items() if t.untyped_storage().data_ptr() == storage]
    if any(earlier.untyped_storage().data_ptr() == storage for earlier in outputs):
        shared.append("an earlier output")
    return tuple(shared)


def _overrun(memories: Mapping[str, Guarded]) -> tuple[str, ...]:
    return tuple(name for name, memory in memories.items() if memory.overrun())


def _resolve(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]


def _described(device: str) -> Prepared:
    if device != "cuda":
        return Prepared(device_name=platform.machine())
    gpu = torch.cuda.get_device_properties()
    transfers_per_s = 2e3 * gpu.memory_clock_rate  # of two a clock, which is in kHz
    return Prepared(
        device_name=gpu.name,
        device_uuid=str(gpu.uuid),
        ceilings=Ceilings(
            memory_bytes_per_s=transfers_per_s * gpu.memory_bus_width / 8,
            flops_per_s=_MOST_FLOPS * 1e3 * gpu.clock_rate * gpu.multi_processor_count,
        ),
    )


def _type_name(value: Any) -> str:
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    plain = getattr(value, "layout", torch.strided) is torch.strided
    return name if plain else f"{name} of layout {value.layout}"
