"""Training steps of a kernel by machine code: two libraries, forward and backward, as one function.

They take over where they compute what the FAST program does, and where they were measured to be
faster: in training, on plain tensors of the layout and with the demand for gradients that they were
compiled for. For every other call :meth:`CompiledStep.run` declines, and the FAST program runs.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import esper.kasmina.native as native
import esper.ops as ops
from esper.contracts import KernelManifest, canonical_json
from esper.errors import ArtifactError
from esper.kasmina.graph import DTYPES, TensorSpec
from esper.kasmina.graph_json import fields, integer, parse, sequence
from esper.kasmina.kernel import Kernel
from esper.kasmina.layout import Layout
from esper.kasmina.program import Program

logger = logging.getLogger(__name__)

PLAN_FILE = "native.json"
FORWARD_FILE = "forward.so"
BACKWARD_FILE = "backward.so"
LIBRARY_FILES = (FORWARD_FILE, BACKWARD_FILE)
NATIVE_FILES = (PLAN_FILE, *LIBRARY_FILES)

FORMAT_VERSION = 1
_MAX_REMEMBERED = 256  # layouts of inputs; batches may have any size
_ALIGNMENT_BYTES = 16  # which Triton takes for granted
_GRAIN_SIZE = 32768  # elements up to which ATen too leaves a loop to one thread
_PLAIN = (Tensor, nn.Parameter)


def build(manifest: KernelManifest, files: Mapping[str, bytes]) -> Kernel:
    """Make a kernel on the CPU of an artifact's verified files, with its machine code if it fits.

    Where that was compiled for another machine, or cannot be loaded, one log line says so and the
    kernel computes by its FAST program. Raises as :meth:`Kernel.build` does, and
    :class:`ArtifactError` for a plan of the libraries that is malformed. Any thread; loading a
    library runs its code.
    """
    kernel = Kernel.build(manifest, dict(files))
    if manifest.native is None:
        return kernel
    reason = native.mismatch(manifest.native.target, manifest.device)
    if reason is None:
        try:
            kernel.compiled = load_step(manifest, kernel.program, files)
        except (OSError, RuntimeError) as error:
            reason = f"its machine code cannot be loaded: {error}"
    if reason is not None:
        logger.warning("kernel %s runs as FAST: %s", manifest.artifact_id[:12], reason)
    return kernel


def load_step(
    manifest: KernelManifest, program: Program, files: Mapping[str, bytes]
) -> "CompiledStep":
    """Load the libraries of an artifact whose files are verified and whose target is this one."""
    missing = set(NATIVE_FILES) - files.keys()
    if missing or manifest.native is None:
        raise ArtifactError(f"the artifact has no {min(missing or {'native build'})}")
    try:
        plan = StepPlan.from_json(files[PLAN_FILE], num_inputs=2 + len(program.parameters))
    except ArtifactError as error:
        raise ArtifactError(f"{PLAN_FILE}: {error}") from None
    step = CompiledStep(program, plan, files, manifest.native.speedups)
    # A CUDA kernel is built on the CPU and then moved; on another device its first call loads.
    step.libraries_for(torch.empty(0, device=manifest.device).device)
    return step


@dataclass(frozen=True)
class StepPlan:
    """How the libraries are put together; inputs are inp, act and the parameters, in this order.

    The forward library takes the inputs, and gives the output and what is saved. The backward one
    takes ``saved_inputs``, then what is saved, then the output's gradient. ``gradients`` tells for
    each input which of its results is the gradient; -1 is the output's gradient itself, None none.
    """

    layout: Layout  # of inp and act
    saved_inputs: tuple[int, ...]
    num_saved: int
    gradients: tuple[int | None, ...]

    def to_json(self) -> bytes:
        return canonical_json(
            {
                "format_version": FORMAT_VERSION,
                "layout": self.layout.to_json(),
                "saved_inputs": self.saved_inputs,
                "num_saved": self.num_saved,
                "gradients": self.gradients,
            }
        )

    @classmethod
    def from_json(cls, data: bytes, num_inputs: int) -> "StepPlan":
        version, layout, saved_inputs, num_saved, gradients = fields(
            parse(data), "format_version", "layout", "saved_inputs", "num_saved", "gradients"
        )
        if version != FORMAT_VERSION:
            raise ArtifactError(f"format_version must be {FORMAT_VERSION}, got {version!r}")
        plan = cls(
            Layout.from_json(layout),
            sequence(saved_inputs, integer),
            integer(num_saved),
            sequence(gradients, _read_gradient),
        )
        known = all(0 <= number < num_inputs for number in plan.saved_inputs)
        if len(plan.layout.tensors) != 2 or len(plan.gradients) != num_inputs or not known:
            raise ArtifactError(f"it is not for {num_inputs} inputs")
        return plan


def _read_gradient(data: Any) -> int | None:
    return None if data is None else integer(data)


@dataclass(frozen=True)
class _Libraries:
    forward: Callable[[list[Tensor]], list[Tensor]]
    backward: Callable[[list[Tensor]], list[Tensor]]


class CompiledStep:
    """The libraries of one artifact; holds no weights, so all copies of a kernel share it.

    ``demands`` for gradients, such as ``"act+weights"``, are those that it is used for.
    """

    def __init__(
        self,
        program: Program,
        plan: StepPlan,
        files: Mapping[str, bytes],
        demands: Iterable[str],
    ) -> None:
        self.program = program
        self.plan = plan
        self.fast = program.compile(training=True)
        self._files = {name: files[name] for name in LIBRARY_FILES}
        self._demands = {_demand(text) for text in demands}
        self._dtypes = DTYPES[program.inp.dtype], DTYPES[program.act.dtype]
        self._weights = [_described(spec) for spec in program.parameters]
        self._libraries: dict[torch.device, _Libraries] = {}
        self._known: dict[tuple[Any, ...], _Libraries | None] = {}
        # The gradients of a sum do not depend on its operands.
        self.held = tuple(
            number
            for number in range(2 + len(program.parameters))
            if number not in plan.saved_inputs and not (number == 1 and program.adds_to_act)
        )

    @property
    def keeps_act(self) -> bool:
        """Whether the backward pass may need ``act``."""
        return 1 in self.plan.saved_inputs or 1 in self.held

    def run(self, inp: Tensor, act: Tensor, params: Sequence[Tensor]) -> Tensor | None:
        """Return the kernel's output, or None where the FAST program has to compute it."""
        if not (torch.is_grad_enabled() and self._is_demanded(inp, act, params)):
            return None
        if not _is_plain_call(inp, act, params):
            return None
        libraries = self._libraries_for_call(inp, act)
        if libraries is None or not self._fit(params, inp.device):
            return None
        return cast(Tensor, _apply_step(self, libraries, inp, act, *params))

    def libraries_for(self, device: torch.device) -> _Libraries:
        """Load the libraries for a device, unless they are."""
        if device not in self._libraries:
            forward, backward = (native.load(self._files[name], device) for name in LIBRARY_FILES)
            self._libraries[device] = _Libraries(forward.run, backward.run)
        return self._libraries[device]

    def __deepcopy__(self, memo: dict[int, object]) -> "CompiledStep":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Machine code is not pickled: a kernel comes back with its FAST program."""
        return _nothing, ()

    def _is_demanded(self, inp: Tensor, act: Tensor, params: Sequence[Tensor]) -> bool:
        learn = [param.requires_grad for param in params]
        uniform = all(learn) or not any(learn)
        return uniform and (inp.requires_grad, act.requires_grad, any(learn)) in self._demands

    def _libraries_for_call(self, inp: Tensor, act: Tensor) -> _Libraries | None:
        key = (
            (inp.shape, inp.stride(), inp.dtype, inp.device),
            (act.shape, act.stride(), act.dtype, act.device),
            torch.get_num_threads(),
        )
        if key not in self._known:
            if len(self._known) >= _MAX_REMEMBERED:
                self._known.clear()
            serves = (inp.dtype, act.dtype) == self._dtypes and inp.device == act.device
            serves &= self.plan.layout.admits([(x.shape, x.stride()) for x in (inp, act)])
            serves &= _suits_threads(inp, act)
            self._known[key] = self.libraries_for(inp.device) if serves else None
        return self._known[key]

    def _fit(self, params: Sequence[Tensor], device: torch.device) -> bool:
        return len(params) == len(self._weights) and all(
            (p.shape, p.stride(), p.dtype) == expected and p.device == device
            for p, expected in zip(params, self._weights, strict=True)
        )


def _suits_threads(inp: Tensor, act: Tensor) -> bool:
    """Whether the FAST program would not have a loop on the CPU done by more threads."""
    undivided = torch.get_num_threads() <= native.NUM_THREADS
    return undivided or act.is_cuda or max(inp.numel(), act.numel()) <= _GRAIN_SIZE


def _nothing() -> None:
    return None


def _demand(text: str) -> tuple[bool, bool, bool]:
    wanted = text.split("+")
    return "inp" in wanted, "act" in wanted, "weights" in wanted


def _described(spec: TensorSpec) -> tuple[Any, ...]:
    contiguous = torch.empty(cast(tuple[int, ...], spec.shape), device="meta")
    return contiguous.shape, contiguous.stride(), DTYPES[spec.dtype]


def _is_plain_call(inp: Tensor, act: Tensor, params: Sequence[Tensor]) -> bool:
    """Whether nobody but autograd watches, records or changes what operators do."""
    return (
        type(inp) in _PLAIN
        and type(act) in _PLAIN
        and all(type(param) in _PLAIN for param in params)
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and forward_ad._current_level < 0
        and not ops.is_exporting()
        and not torch.is_autocast_enabled(act.device.type)
        and not (inp.is_neg() or act.is_neg())
        and (act.device.type == "cpu" or _are_aligned(inp, act, *params))
    )


def _are_aligned(*tensors: Tensor) -> bool:
    return all(tensor.data_ptr() % _ALIGNMENT_BYTES == 0 for tensor in tensors)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: CompiledStep, libraries: _Libraries, *inputs: Tensor) -> Tensor:
        out, *saved = libraries.forward([*inputs])
        ctx.save_for_backward(*(inputs[number] for number in step.plan.saved_inputs), *saved)
        # What only a second derivative needs; to save it would forbid the host to modify it.
        ctx.held = [(inputs[number], inputs[number]._version) for number in step.held]
        ctx.step, ctx.libraries = step, libraries
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or type(grad) is not Tensor:
            return None, None, *_differentiable_gradients(ctx, grad, saved, needs)
        results = ctx.libraries.backward([*saved, grad.resolve_neg().contiguous()])
        results.append(grad)
        return (
            None,
            None,
            *(
                results[place] if need and place is not None else None
                for place, need in zip(ctx.step.plan.gradients, needs, strict=True)
            ),
        )


# What Function.apply does before it calls this one serves functorch alone, and takes a microsecond.
_apply_step: Any = super(torch.autograd.Function, _Step).apply


def _differentiable_gradients(
    ctx: Any, grad: Tensor, saved: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of the FAST program, which can be differentiated again."""
    step: CompiledStep = ctx.step
    known = dict(zip(step.plan.saved_inputs, saved, strict=False))
    for number, (tensor, version) in zip(step.held, ctx.held, strict=True):
        if tensor._version != version:
            raise RuntimeError(
                "a tensor needed for a second derivative has been modified by an in-place "
                f"operation: input {number} of a kernel, at version {tensor._version}, expected "
                f"version {version}"
            )
        known[number] = tensor
    twice = torch.is_grad_enabled()
    with torch.set_grad_enabled(twice):
        inputs = [
            _alias(known.get(number, grad.detach())) if need else known[number]
            for number, need in enumerate(needs)
        ]
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    with torch.enable_grad():
        out = step.fast(inputs[0], inputs[1], inputs[2:], ())
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=twice, allow_unused=True))
    return [next(found) if need else None for need in needs]


def _alias(tensor: Tensor) -> Tensor:
    """Return it under a variable of its own, since one tensor may come in twice."""
    alias = tensor.view_as(tensor)
    return alias if alias.requires_grad else tensor.detach().requires_grad_()
