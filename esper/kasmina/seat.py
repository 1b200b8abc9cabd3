"""One kernel in its place on a host layer.

``act`` is the seed's chunk of the host's output, ``out`` what its kernel makes of it. In TRAINING
the host's output passes through unchanged and the kernel receives the output's gradient as if
alpha were 1; afterwards the chunk becomes ``act + alpha * (out - act)``.
"""

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# What ends a recomputation early; torch.utils.checkpoint raises it where tensors are saved.
from torch.utils.checkpoint import _StopRecomputationError

import esper.ops as ops
from esper.kasmina.bank import SeedCells
from esper.kasmina.kernel import Kernel
from esper.kasmina.seat_mark import pack_mark
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
    """One kernel on one chunk, run operator by operator."""

    def __init__(self, seed: str, seed_idx: int, kernel: Kernel, cells: SeedCells, chunk: Chunk):
        super().__init__()
        self.seed = seed  # for messages: "seed 0 on 'blocks.2.mlp'"
        self.seed_idx = seed_idx
        self.kernel = kernel
        self.cells = cells
        self.chunk = chunk
        self.isolated = False  # TRAINING: the host does not hear the kernel
        self.learns = True
        self.bypassed = False  # for good, after an error in a FOSSILIZED seed
        self.failure: str | None = None
        # Read here, as compilers cannot trace the properties that cache them.
        self.bottleneck = kernel.program.bottleneck
        self.channelwise = kernel.program.channelwise
        self._stochastic = kernel.stochastic
        self._keeps_act = kernel.keeps_act
        self._rank = len(kernel.manifest.site.act_shape)
        self.rng_state: Tensor | None = None  # while isolated, once it has drawn

    def fits(self, host: Tensor) -> bool:
        """Whether the kernel was made for such an output; modules may be called with several."""
        rank = host.dim()
        dim = self.chunk.channel_dim(rank)
        return host.shape[dim] == self.chunk.channels and (
            rank == self._rank or self.serves_rows(rank)
        )

    def serves_rows(self, rank: int) -> bool:
        """Whether the kernel takes outputs of that rank as rows of channels."""
        return self.chunk.channel_dim(rank) == rank - 1 and self._rank in (2, rank)

    def run(self, inp: Tensor, host: Tensor) -> Tensor | None:
        """Return ``out``, or None if the kernel raises: the host's output goes on without it."""
        try:
            return self._isolated(inp, host) if self.isolated else self._guarded(inp, host)
        except _StopRecomputationError:
            raise
        except Exception as error:
            self.fail(error)
            return None

    def call_plainly(self, inp: Tensor, host: Tensor) -> Tensor:
        """Return ``out`` with nothing guarded; raises what the kernel raises."""
        return self._call(inp, self._act(host), self.weights())

    def weights(self) -> tuple[Tensor, ...]:
        """Detached while the seed is frozen, whatever ``requires_grad`` says in the meantime."""
        weights = self.kernel.weights()
        return weights if self.learns else tuple(weight.detach() for weight in weights)

    def let_learn(self, learns: bool) -> None:
        self.learns = learns
        for parameter in self.parameters():
            parameter.requires_grad_(learns)
            if not learns:
                parameter.grad = None  # optimizers skip it; a zero gradient would still decay it

    def fail(self, error: Exception) -> None:
        """Log the first error and have the seed removed at the next step.

        The kernel is called again until then: a forward that is recomputed for the backward pass
        has to go the same way as the first time.
        """
        if self.failure is not None:
            return
        self.failure = f"{type(error).__name__}: {error}"
        self.cells.quarantine(self.seed_idx)
        logger.error(
            "%s: kernel %s failed and is bypassed: %s",
            self.seed,
            self.kernel.artifact_id[:12],
            self.failure,
        )

    def get_extra_state(self) -> Tensor:
        """Return what ``state_dict()`` says of this seat: kernel, state and alpha, as uint8 (37,)."""
        cells, seed_idx = self.cells, self.seed_idx
        state = cells.bank.state(cells.first + seed_idx)
        return pack_mark(self.kernel.artifact_id, state, cells.alpha[seed_idx : seed_idx + 1])

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: the model has seen to the kernel, and lifecycle and alpha go their own way."""

    def _guarded(self, inp: Tensor, host: Tensor) -> Tensor:
        counters = self.cells.counters(self.seed_idx)
        inp, act, *weights = ops.guard(*counters, inp, self._act(host), *self.weights())
        return self._call(inp, act, tuple(weights))

    def _isolated(self, inp: Tensor, host: Tensor) -> Tensor:
        act = self._act(host.detach())
        if self._keeps_act:
            # The host may go on to modify its output in place, which would invalidate what the
            # kernel has saved for backward and raise in the user's loss.backward().
            act = act.clone()
        weights = ops.guard(*self.cells.counters(self.seed_idx), *self.weights())
        with self._own_random_numbers(inp.device):
            return self._call(inp.detach(), act, tuple(weights))

    def _act(self, host: Tensor) -> Tensor:
        chunk = self.chunk
        return host.narrow(chunk.channel_dim(host.dim()), chunk.start, chunk.length)

    def _call(self, inp: Tensor, act: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        if self._rank == 2 and act.dim() > 2:
            out = self.kernel.call(inp.flatten(0, -2), act.flatten(0, -2), weights)
            out = out.unflatten(0, act.shape[:-1])
        else:
            out = self.kernel.call(inp, act, weights)
        if out.shape != act.shape or out.dtype != act.dtype:
            raise ValueError(
                f"the kernel returned {out.dtype} {tuple(out.shape)}, "
                f"expected {act.dtype} {tuple(act.shape)}"
            )
        return out

    @contextlib.contextmanager
    def _own_random_numbers(self, device: torch.device) -> Iterator[None]:
        """Let the kernel draw from a stream of its own, so that the host draws what it would.

        Compiled code knows one stream alone, which the two then share.
        """
        if not self._stochastic or torch.compiler.is_compiling():
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
            self.rng_state = generator.get_state()
            generator.set_state(host_state)

    def _first_rng_state(self, device: torch.device) -> Tensor:
        if self.rng_state is None:
            identity = f"{self.kernel.artifact_id} {self.seed}".encode()
            seed = int.from_bytes(hashlib.sha256(identity).digest()[:6])
            self.rng_state = torch.Generator(device).manual_seed(seed).get_state()
        return self.rng_state
