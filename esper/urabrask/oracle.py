"""What an artifact should compute: its graph, interpreted node by node in this process.

Independent of the loader's generated source and of whatever machine code the artifact brings. The
operators are whitelisted, so interpreting a graph that nobody has vouched for runs no foreign code.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.utils.flop_counter import FlopCounterMode

from esper.contracts import KernelManifest
from esper.kasmina.graph import Ref
from esper.kasmina.kernel import Kernel
from esper.urabrask.inputs import Draw
from esper.urabrask.roofline import read_bytes

Results = dict[str, Tensor]


class Oracle:
    """Computes results under the names that a candidate gives them.

    ``state`` holds the artifact's parameters and buffers, ``parameters`` the names of the former.
    Raises :class:`ArtifactError` for files that do not make a kernel.
    """

    def __init__(self, manifest: KernelManifest, files: dict[str, bytes]) -> None:
        kernel = Kernel.build(manifest, files)
        self.manifest = manifest
        self.program = kernel.program
        self.state: Results = dict(kernel.state_dict())
        self.parameters = [name for name, _ in kernel.named_parameters()]

    @property
    def trains_differently(self) -> bool:
        """Whether training runs another graph than evaluation, or other code."""
        return self.program.train != self.program.eval or self.manifest.native is not None

    def read_bytes(self, draw: Draw) -> int:
        """Return the bytes of inputs and weights that a forward in training cannot but read."""
        tensors = {Ref("input", "inp"): draw.inp, Ref("input", "act"): draw.act}
        named = zip(self.program.parameters, self.parameters, strict=True)
        tensors |= {Ref("param", spec.name): self.state[name] for spec, name in named}
        return read_bytes(self.program.train, tensors)

    def flops(self, draw: Draw) -> int:
        """Return the floating-point operations of a forward in training, as PyTorch counts them."""
        params = [self.state[name] for name in self.parameters]
        buffers = [t.clone() for name, t in self.state.items() if name not in self.parameters]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.program.interpret(draw.inp, draw.act, params, buffers, True)
        return int(counter.get_total_flops())

    def is_random(self, draw: Draw, state: Mapping[str, Tensor]) -> bool:
        """Tell whether the training graph computes something else under another global seed."""
        with torch.random.fork_rng(devices=[]):
            outs = []
            for seed in (0, 1):
                torch.manual_seed(seed)
                outs.append(self.compute(draw, state, training=True)["out"])
        return not torch.equal(*outs)

    def compute(
        self,
        draw: Draw,
        state: Mapping[str, Tensor],
        *,
        training: bool,
        dtype: torch.dtype | None = None,
    ) -> Results:
        """Return ``out``, gradients as ``grad.*`` and the buffers afterwards as ``after.state.*``.

        In ``dtype`` throughout, or as the graph says.
        """
        inp, act = _leaf(draw.inp, dtype), _leaf(draw.act, dtype)
        weights = {name: _leaf(tensor, dtype) for name, tensor in state.items()}
        parameters = {name: weights[name] for name in self.parameters}
        buffers = {n: t.detach() for n, t in weights.items() if n not in parameters}
        out = self.program.interpret(
            inp, act, tuple(parameters.values()), tuple(buffers.values()), training, dtype=dtype
        )
        _check_form(out, act)
        leaves = {"grad.inp": inp, "grad.act": act}
        leaves |= {f"grad.state.{name}": parameter for name, parameter in parameters.items()}
        results = {"out": out.detach()} | _gradients(out, leaves, draw.grad_out.to(out.dtype))
        return results | {f"after.state.{name}": buffer for name, buffer in buffers.items()}

    def gradcheck(self, draw: Draw, state: Mapping[str, Tensor]) -> str | None:
        """Return what finite differences say against the reference's own gradients, if anything.

        In evaluation, in float64, along a random direction. A graph with ``detach`` has other
        gradients on purpose, and is let be.
        """
        if any(node.op.startswith("aten.detach") for node in self.program.eval.nodes):
            return None
        weights = {name: _leaf(tensor, torch.float64) for name, tensor in state.items()}
        buffers = tuple(t.detach() for name, t in weights.items() if name not in self.parameters)
        leaves = [_leaf(tensor, torch.float64) for tensor in (draw.inp, draw.act)]
        leaves += [weights[name] for name in self.parameters]

        def run(inp: Tensor, act: Tensor, *params: Tensor) -> Tensor:
            return self.program.interpret(inp, act, params, buffers, False, dtype=torch.float64)

        if not any(leaf.requires_grad for leaf in leaves):
            return None
        try:
            torch.autograd.gradcheck(run, tuple(leaves), fast_mode=True)
        except GradcheckError as error:
            return str(error)
        return None


def _leaf(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.clone()
    return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()


def _check_form(out: Tensor, act: Tensor) -> None:
    if out.shape != act.shape or out.dtype != act.dtype:
        raise ValueError(
            f"its output is {out.dtype} {tuple(out.shape)}, "
            f"expected {act.dtype} {tuple(act.shape)} as act"
        )


def _gradients(out: Tensor, leaves: Mapping[str, Tensor], grad_out: Tensor) -> Results:
    """Return all gradients, zero where the output does not depend on the leaf."""
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not out.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    grads = torch.autograd.grad(
        out, list(leaves.values()), grad_out, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, grads, strict=True))
