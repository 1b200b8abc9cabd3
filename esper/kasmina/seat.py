"""Kernels in their places on one host layer: what an active layer computes after the host.

``act`` is a seed's chunk of the host's output, ``out`` what its kernel makes of it. In TRAINING
the host's output passes through unchanged and the kernel receives the output's gradient as if
alpha were 1; afterwards the chunk becomes ``act + alpha * (out - act)``.
"""

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

import esper.ops as ops
from esper.kasmina.bank import SeedCell
from esper.kasmina.kernel import Kernel
from esper.kasmina.site import ChannelDim

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """Where a seed sits in its layer's output."""

    channel_dim: ChannelDim
    channels: int  # of the whole output
    start: int
    length: int


class Seat(nn.Module):
    """One kernel on one chunk."""

    def __init__(self, seed: str, kernel: Kernel, cell: SeedCell, chunk: Chunk):
        super().__init__()
        self.seed = seed  # for messages: "seed 0 on 'blocks.2.mlp'"
        self.kernel = kernel
        self.cell = cell
        self.chunk = chunk
        self.isolated = False  # TRAINING: the host does not hear the kernel
        self.learns = True
        self.bypassed = False  # for good, after an error in a FOSSILIZED seed
        self.failure: str | None = None
        self._rank = len(kernel.manifest.site.act_shape)
        self._rng_state: Tensor | None = None

    def forward(self, inp: Tensor, host: Tensor, out: Tensor) -> Tensor:
        """Return ``out`` with this seat's chunk of the host's output ``host`` blended in."""
        if self.bypassed or (self.isolated and not torch.is_grad_enabled()):
            return out
        dim = self.chunk.channel_dim(host.dim())
        if host.shape[dim] != self.chunk.channels or self._rank not in (2, host.dim()):
            return out  # a module called with several shapes: the kernel was made for another one
        try:
            take = self._isolated if self.isolated else self._blended
            return take(inp, host, out, dim)
        except Exception as error:  # whatever a kernel raises, the host's output goes on
            self._fail(error)
            return out

    def _blended(self, inp: Tensor, host: Tensor, out: Tensor, dim: int) -> Tensor:
        cell = self.cell
        act = host.narrow(dim, self.chunk.start, self.chunk.length)
        inp, act, *weights = ops.guard(cell.non_finite, cell.fault, inp, act, *self._weights())
        made = self._run(inp, act, tuple(weights))
        starts = [self.chunk.start]
        return ops.blend(out, [made], [0], starts, cell.alpha, dim, cell.non_finite, cell.fault)

    def _isolated(self, inp: Tensor, host: Tensor, out: Tensor, dim: int) -> Tensor:
        cell = self.cell
        # A copy: the host may go on to modify its output in place, which would invalidate what
        # the kernel has saved for backward and raise in the user's loss.backward().
        act = host.detach().narrow(dim, self.chunk.start, self.chunk.length).clone()
        weights = ops.guard(cell.non_finite, cell.fault, *self._weights())
        with self._own_random_numbers(inp.device):
            made = self._run(inp.detach(), act, tuple(weights))
        return ops.isolate(out, made, dim, self.chunk.start)

    def _weights(self) -> tuple[Tensor, ...]:
        """Detached while the seed is frozen, whatever ``requires_grad`` says in the meantime."""
        weights = self.kernel.weights()
        return weights if self.learns else tuple(weight.detach() for weight in weights)

    def _run(self, inp: Tensor, act: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        if self._rank == 2 and act.dim() > 2:
            made = self.kernel.call(inp.flatten(0, -2), act.flatten(0, -2), weights)
            made = made.unflatten(0, act.shape[:-1])
        else:
            made = self.kernel.call(inp, act, weights)
        if made.shape != act.shape or made.dtype != act.dtype:
            raise ValueError(
                f"the kernel returned {made.dtype} {tuple(made.shape)}, "
                f"expected {act.dtype} {tuple(act.shape)}"
            )
        return made

    @contextlib.contextmanager
    def _own_random_numbers(self, device: torch.device) -> Iterator[None]:
        """Let the kernel draw from a stream of its own, so that the host draws what it would."""
        if not self.kernel.stochastic:
            yield
            return
        generator = torch.default_generator
        if device.type == "cuda":
            generator = torch.cuda.default_generators[device.index or 0]
        host_state = generator.get_state()
        generator.set_state(self._first_rng_state(device))
        try:
            yield
        finally:
            self._rng_state = generator.get_state()
            generator.set_state(host_state)

    def _first_rng_state(self, device: torch.device) -> Tensor:
        if self._rng_state is None:
            identity = f"{self.kernel.artifact_id} {self.seed}".encode()
            seed = int.from_bytes(hashlib.sha256(identity).digest()[:6])
            self._rng_state = torch.Generator(device).manual_seed(seed).get_state()
        return self._rng_state

    def _fail(self, error: Exception) -> None:
        """Log the first error and have the seed removed at the next step.

        The kernel is called again until then: a forward that is recomputed for the backward pass
        has to go the same way as the first time.
        """
        if self.failure is not None:
            return
        self.failure = f"{type(error).__name__}: {error}"
        self.cell.quarantine()
        logger.error(
            "%s: kernel %s failed and is bypassed: %s",
            self.seed,
            self.kernel.artifact_id[:12],
            self.failure,
        )


def _keep_off_fast_paths(seats: nn.Module, args: Any) -> None:
    """Do nothing: that a hook exists stops TransformerEncoderLayer from bypassing its children."""


class Seats(nn.ModuleDict):
    """The occupied seats of one layer, by seed index; registered on the layer as ``esper_seeds``.

    Seats in TRAINING are kept out of the module tree: what walks over ``model.parameters()``,
    such as gradient clipping or an average of the weights, must not let them touch the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.isolated: dict[str, Seat] = {}
        self.register_forward_pre_hook(_keep_off_fast_paths)  # never called, so it costs nothing

    def occupants(self) -> list[Seat]:
        return [*cast(Iterable[Seat], self._modules.values()), *self.isolated.values()]

    def occupant(self, seed_idx: int) -> Seat | None:
        key = str(seed_idx)
        return self.isolated.get(key) or cast(Seat | None, self._modules.get(key))

    def isolate(self, seed_idx: int, seat: Seat) -> None:
        seat.isolated = True
        self.isolated[str(seed_idx)] = seat

    def admit(self, seed_idx: int, seat: Seat) -> None:
        """Let the host hear a seat; its parameters become the model's."""
        self.isolated.pop(str(seed_idx), None)
        seat.isolated = False
        self[str(seed_idx)] = seat

    def remove(self, seed_idx: int) -> None:
        self.isolated.pop(str(seed_idx), None)
        self._modules.pop(str(seed_idx), None)

    def apply_to(self, inp: Tensor, host: Tensor) -> Tensor:
        """Return the layer's output given the host's input and output."""
        out = host
        for seat in self._modules.values():
            out = cast(Seat, seat).forward(inp, host, out)
        for seat in self.isolated.values():
            if seat.training is not self.training:
                seat.train(self.training)
            out = seat.forward(inp, host, out)
        return out


SEATS = "esper_seeds"


def seats_of(module: nn.Module) -> Seats | None:
    """Return the seats of an active layer, or None."""
    return cast(Seats | None, module._modules.get(SEATS))
