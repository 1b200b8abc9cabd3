"""A kernel as a module: the program's functions over parameters and buffers of its own."""

from collections.abc import Sequence
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from esper.contracts import KernelManifest
from esper.errors import ArtifactError
from esper.kasmina.graph import DTYPES, TensorSpec, flat_name
from esper.kasmina.program import Program

GRAPH_FILE = "graph.json"
PARAMS_FILE = "params.safetensors"


# What the kernels of one artifact have in common: none of it holds a tensor.
_SHARED = ("manifest", "artifact_id", "program", "compiled", "_train", "_eval")


class TrainingStep(Protocol):
    """Machine code for some of the training graph's calls."""

    @property
    def keeps_act(self) -> bool:
        """Whether the backward pass may need ``act``."""

    def run(self, inp: Tensor, act: Tensor, params: Sequence[Tensor]) -> Tensor | None:
        """Return the output, or None for a call that it is not for."""


class Kernel(nn.Module):
    """``kernel(inp, act) -> out``, with ``out`` like ``act`` in shape, dtype and device.

    Weights are registered under the blueprint's names with ``__`` for each dot. The compiled
    functions take every tensor as an argument, so a copy computes with its own weights.
    """

    def __init__(
        self, manifest: KernelManifest, program: Program, tensors: dict[str, Tensor]
    ) -> None:
        super().__init__()
        self.manifest = manifest
        self.artifact_id = manifest.artifact_id  # hashed once, as it is asked for at every turn
        self.program = program
        self.compiled: TrainingStep | None = None  # for :mod:`esper.kasmina.compiled` to set
        self._compile()
        try:
            for spec in program.parameters:
                self.register_parameter(flat_name(spec.name), nn.Parameter(tensors[spec.name]))
            for spec in program.buffers:
                self.register_buffer(flat_name(spec.name), tensors[spec.name])
        except KeyError as error:
            raise ArtifactError(f"a weight cannot have this name: {error}") from None

    @classmethod
    def build(cls, manifest: KernelManifest, files: dict[str, bytes]) -> "Kernel":
        """Make a kernel on the CPU that computes by the FAST program of any artifact.

        Digests and signature are the loader's business; here everything that the files say is
        checked, and :class:`ArtifactError` raised before a kernel exists. Any thread.
        """
        missing = {GRAPH_FILE, PARAMS_FILE} - files.keys()
        if missing:
            raise ArtifactError(f"the artifact has no {min(missing)}")
        program = Program.from_json(files[GRAPH_FILE])
        return cls(manifest, program, _load(files[PARAMS_FILE], program))

    @property
    def stochastic(self) -> bool:
        """Whether training draws random numbers."""
        return self.program.stochastic

    @property
    def keeps_act(self) -> bool:
        """Whether the result may be ``act`` itself, or the backward pass may need it."""
        return self.program.keeps_act or (self.compiled is not None and self.compiled.keeps_act)

    def replica(self) -> "Kernel":
        """Return a kernel with weights and buffers of its own, for one seed. Any thread.

        It has what the artifact says and nothing that was added since, such as hooks. A deepcopy
        would make the functions of the program anew.
        """
        twin = Kernel.__new__(Kernel)
        nn.Module.__init__(twin)
        twin.__dict__ |= {name: self.__dict__[name] for name in _SHARED}
        for name, weight in self._parameters.items():
            assert weight is not None
            own = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            twin.register_parameter(name, own)
        for name, buffer in self._buffers.items():
            assert buffer is not None
            twin.register_buffer(name, buffer.clone())
        return twin.train(self.training)

    def weights(self) -> tuple[nn.Parameter, ...]:
        """Return the parameters in the program's order."""
        return tuple(self._parameters.values())  # type: ignore[arg-type]

    def call(self, inp: Tensor, act: Tensor, params: tuple[Tensor, ...]) -> Tensor:
        """Run with these parameters in place of the kernel's own, and with its own buffers."""
        # Compilers are shown operators, which they can fuse with their neighbours.
        if self.compiled is not None and self.training and not torch.compiler.is_compiling():
            out = self.compiled.run(inp, act, params)
            if out is not None:
                return out
        run = self._train if self.training else self._eval
        return run(inp, act, params, tuple(self._buffers.values()))  # type: ignore[arg-type]

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return self.call(inp, act, self.weights())

    def extra_repr(self) -> str:
        return f"{self.manifest.design.name}, {self.artifact_id[:12]}"

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in {"_train", "_eval"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._compile()

    def _compile(self) -> None:
        self._train = self.program.compile(training=True)
        same = self.program.eval is self.program.train
        self._eval = self._train if same else self.program.compile(training=False)


def _load(data: bytes, program: Program) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"{PARAMS_FILE}: {error}") from None
    specs = {spec.name: spec for spec in program.parameters + program.buffers}
    if tensors.keys() != specs.keys():
        raise ArtifactError(
            f"{PARAMS_FILE}: expected {sorted(specs)} as in {GRAPH_FILE}, got {sorted(tensors)}"
        )
    for name, spec in specs.items():
        _check_tensor(spec, tensors[name])
    return tensors


def _check_tensor(spec: TensorSpec, tensor: Tensor) -> None:
    if tuple(tensor.shape) != spec.shape or tensor.dtype is not DTYPES[spec.dtype]:
        raise ArtifactError(
            f"{PARAMS_FILE}: {spec.name!r} must be {spec.dtype} {spec.shape}, "
            f"got {tensor.dtype} {tuple(tensor.shape)}"
        )
