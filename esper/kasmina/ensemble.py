"""How the seats of one layer compute together.

An ensemble is some of a layer's seats that take one way: :class:`Bottlenecks` all at once in one
op, :class:`SideBySide` operator by operator on the channels of all, :class:`Individuals` one after
the other, with one blend for all. Their chunks are disjoint, so it makes no difference that one
ensemble blends into what another has left.
"""

import logging
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Protocol

import torch
from torch import Tensor

import esper.bottleneck as bottleneck
import esper.ops as ops
from esper.channels import (
    guard_chunks,
    isolated_convolution,
    shared_convolution,
    stack_weights,
)
from esper.kasmina.bottleneck import Bottleneck
from esper.kasmina.channelwise import Channelwise, Tail
from esper.kasmina.seat import Seat
from esper.kasmina.source import KernelFunction
from esper.kasmina.stack import Stack, apart, stacked

logger = logging.getLogger(__name__)

_MAX_RANK = 8  # of a layer's output, that of the largest being (N, T, ..., C)


class Ensemble(Protocol):
    seats: Sequence[Seat]

    def blend(self, inp: Tensor, host: Tensor, in_place: bool) -> Tensor:
        """Return the layer's output ``host`` with the seats' chunks blended in.

        ``in_place``: nobody else needs ``host`` any more.
        """

    def isolate(self, inp: Tensor, host: Tensor) -> Tensor:
        """Return ``host`` as it is, such that the seats will receive its gradient."""


def ensembles(seats: Iterable[Seat], formed: Iterable[Ensemble] = ()) -> list[Ensemble]:
    """Divide seats into those that compute as one and the rest.

    Those of ``formed`` that have exactly the seats that compute as one are taken as they are.
    """
    ready = {tuple(ensemble.seats): ensemble for ensemble in formed}
    together: list[Ensemble] = []
    alone: list[Seat] = []
    for _, same in groupby(sorted(seats, key=_place), key=_artifact):
        group = tuple(same)
        ensemble = ready.get(group) or _as_one(group)
        if ensemble is None or isinstance(ensemble, Individuals):
            alone += group
        else:
            together.append(ensemble)
    return [*together, Individuals(alone)] if alone else together


def _as_one(group: Sequence[Seat]) -> Ensemble | None:
    """Form an ensemble of seats with one artifact, or return None if they compute one by one."""
    first = group[0]
    if not all(_has_plain_weights(seat) for seat in group):
        return None
    if first.bottleneck is not None:
        return Bottlenecks(group, first.bottleneck)
    if first.channelwise is not None and (len(group) > 1 or _ends_unheard(first)):
        return SideBySide(group, first.channelwise)
    return None


def _ends_unheard(seat: Seat) -> bool:
    """Whether side by side, and there alone, the seat is spared a convolution at its end."""
    form = seat.kernel.program.channelwise
    has_tail = form is not None and form.tail is not None
    return seat.isolated and has_tail and seat.kernel.compiled is None


def _has_plain_weights(seat: Seat) -> bool:
    """Whether nobody has put a parametrization in a weight's place."""
    kernel = seat.kernel
    return len(kernel.weights()) == len(kernel.program.parameters)


def _artifact(seat: Seat) -> tuple[str, int]:
    return seat.kernel.artifact_id, seat.chunk.length


def _place(seat: Seat) -> tuple[str, int, int]:
    return *_artifact(seat), seat.chunk.start


class Individuals:
    """Seats that run one after the other, and are blended by one op."""

    def __init__(self, seats: Sequence[Seat]):
        self.seats = seats
        self.cells = seats[0].cells
        self.chunk = seats[0].chunk
        self.keeps_act = any(seat.kernel.keeps_act for seat in seats)

    def blend(self, inp: Tensor, host: Tensor, in_place: bool) -> Tensor:
        ran = self._run(inp, host)
        if not ran:
            return host
        cells = self.cells
        return ops.blend(
            host,
            [out for _, out in ran],
            [seat.seed_idx for seat, _ in ran],
            [seat.chunk.start for seat, _ in ran],
            cells.alpha,
            self.chunk.channel_dim(host.dim()),
            cells.non_finite,
            cells.fault,
            in_place=in_place and not self.keeps_act,
        )

    def isolate(self, inp: Tensor, host: Tensor) -> Tensor:
        dim = self.chunk.channel_dim(host.dim())
        result = host
        for seat, out in self._run(inp, host):
            result = ops.isolate(result, out, dim, seat.chunk.start)
        return result

    def _run(self, inp: Tensor, host: Tensor) -> list[tuple[Seat, Tensor]]:
        outs = ((seat, seat.run(inp, host)) for seat in self.seats if seat.fits(host))
        return [(seat, out) for seat, out in outs if out is not None]


class Bottlenecks:
    """Seats with one and the same bottleneck: one op computes and blends them all.

    A compiler is shown their operators one by one instead, which it can fuse with their neighbours.

    For several seats the op wants their weights stacked, see :mod:`esper.kasmina.stack`. Where
    they are not, or no longer, the seats run one by one.
    """

    def __init__(self, seats: Sequence[Seat], form: Bottleneck):
        self.seats = seats
        self.form = form
        self.individuals = Individuals(seats)
        self.cells = seats[0].cells
        self.seeds = [seat.seed_idx for seat in seats]
        self.starts = [seat.chunk.start for seat in seats]
        # Children of a module are found slowly.
        self._learners = [(seat, seat.kernel) for seat in seats]
        self._in_order = itemgetter(*form.order)
        self._group = self._grouped()
        self._usable = True

    def blend(self, inp: Tensor, host: Tensor, in_place: bool) -> Tensor:
        if self._runs_as_one(host):
            try:
                out = self._group.blend(host, inp, self._leaves(), in_place)
            except bottleneck.RefusedError as error:
                self._give_up(error)
            else:
                if out is not None:
                    return out
        return self.individuals.blend(inp, host, in_place)

    def isolate(self, inp: Tensor, host: Tensor) -> Tensor:
        if self._runs_as_one(host):
            try:
                out = self._group.isolate(host, inp, self._leaves())
            except bottleneck.RefusedError as error:
                self._give_up(error)
            else:
                if out is not None:
                    return out
        return self.individuals.isolate(inp, host)

    def _runs_as_one(self, host: Tensor) -> bool:
        # What C++ returns is of no subclass.
        return (
            self._usable
            and type(host) is Tensor
            and not torch.compiler.is_compiling()
            and not ops.is_exporting()
        )

    def _leaves(self) -> list[Tensor]:
        """Return the seats' weights, one seat after the other, each in the op's order."""
        leaves: list[Tensor] = []
        for seat, kernel in self._learners:
            leaves += self._in_order(kernel.weights() if seat.learns else seat.weights())
        return leaves

    def _give_up(self, error: bottleneck.RefusedError) -> None:
        """Run one by one from now on, which also shows whose fault it is."""
        self._usable = False
        names = ", ".join(seat.seed for seat in self.seats)
        logger.warning("%s: not run as one: %s", names, error)

    def _grouped(self) -> bottleneck.Bottlenecks:
        seat, stack = self.seats[0], self._stacked()
        ranks = [rank for rank in range(2, _MAX_RANK) if seat.serves_rows(rank)]
        return bottleneck.group(
            self.form.places,
            None if stack is None else stack.tensors,
            [] if stack is None else stack.addresses,
            seat.chunk.channels,
            min(ranks, default=_MAX_RANK),
            max(ranks, default=0),
            bottleneck.activation_code(self.form.activation),
            self.seeds,
            self.starts,
            self.cells.alpha,
            self.cells.non_finite,
            self.cells.fault,
        )

    def _stacked(self) -> Stack | None:
        weights = [kernel.weights() for _, kernel in self._learners]
        if len(weights) == 1:
            apart(weights[0])
            return None
        return stacked([[seed[position] for seed in weights] for position in self.form.order])


class SideBySide:
    """Seats with one and the same program, computed operator by operator on the channels of all.

    A compiler is shown the operators of each seat instead. Where the weights no longer fit one
    another the seats run one by one, which also shows whose fault it is.
    """

    def __init__(self, seats: Sequence[Seat], form: Channelwise):
        self.seats = seats
        self.entry = form.entry
        self.individuals = Individuals(seats)
        self.cells = seats[0].cells
        self.seeds = [seat.seed_idx for seat in seats]
        self.starts = [seat.chunk.start for seat in seats]
        length = seats[0].chunk.length
        end = self.starts[0] + length * len(seats)
        self._is_adjacent = self.starts == [*range(self.starts[0], end, length)]
        self._run = form.compile(len(seats))
        self._tail = form.tail
        self._run_trunk = form.compile_trunk(len(seats))
        # Children of a module are found slowly.
        self._learners = [(seat, seat.kernel) for seat in seats]
        self._shapes = [weight.shape for weight in seats[0].kernel.weights()] * len(seats)
        self._device_type = self.cells.bank.device.type
        self._usable = True

    def blend(self, inp: Tensor, host: Tensor, in_place: bool) -> Tensor:
        out = self._out(inp, host)
        if out is None:
            return self.individuals.blend(inp, host, in_place)
        cells = self.cells
        return ops.blend(
            host,
            out.tensor_split(len(self.seeds), 1),
            self.seeds,
            self.starts,
            cells.alpha,
            1,
            cells.non_finite,
            cells.fault,
            in_place=in_place and not self.individuals.keeps_act,
        )

    def isolate(self, inp: Tensor, host: Tensor) -> Tensor:
        if self._tail is not None and self._is_adjacent:
            result = self._isolated_by_tail(self._tail, inp.detach(), host)
            return self.individuals.isolate(inp, host) if result is None else result
        out = self._out(inp.detach(), host.detach())
        if out is None:
            return self.individuals.isolate(inp, host)
        if self._is_adjacent:
            return ops.isolate(host, out, 1, self.starts[0])
        for start, part in zip(self.starts, out.tensor_split(len(self.seeds), 1), strict=True):
            host = ops.isolate(host, part, 1, start)
        return host

    def _isolated_by_tail(self, tail: Tail, inp: Tensor, host: Tensor) -> Tensor | None:
        """Return ``host``, or None if the seats must run one by one."""
        leaves = self._leaves_for(inp, host)
        if leaves is None:
            return None
        assert self._run_trunk is not None
        try:
            x, weights = self._compute(self._run_trunk, inp, self._act(host.detach()), leaves)
            bias = None if tail.bias is None else weights[tail.bias]
            groups = tail.groups * len(self.seats)
            return isolated_convolution(
                host, x, weights[tail.weight], bias, tail.geometry, groups, self.starts[0]
            )
        except RuntimeError as error:
            self._give_up(error)
            return None

    def _out(self, inp: Tensor, host: Tensor) -> Tensor | None:
        """Return what the kernels make of their chunks, or None if they must run one by one."""
        leaves = self._leaves_for(inp, host)
        if leaves is None:
            return None
        try:
            act = self._act(host)
            out, _ = self._compute(self._run, inp, act, leaves)
        except RuntimeError as error:
            self._give_up(error)
            return None
        return out if out.shape == act.shape else None

    def _leaves_for(self, inp: Tensor, host: Tensor) -> list[Tensor] | None:
        """Return the seats' weights if they can be computed side by side here, else None."""
        if not self._usable or torch.compiler.is_compiling() or ops.is_exporting():
            return None
        leaves = [
            weight
            for seat, kernel in self._learners
            for weight in (kernel.weights() if seat.learns else seat.weights())
        ]
        fits = (
            self.seats[0].fits(host)
            and inp.dtype is host.dtype
            and all(leaf.dtype is host.dtype for leaf in leaves)
            and [leaf.shape for leaf in leaves] == self._shapes
            and not torch.is_autocast_enabled(self._device_type)
        )
        return leaves if fits else None

    def _act(self, host: Tensor) -> Tensor:
        length = self.seats[0].chunk.length
        if not self._is_adjacent:
            return torch.cat([host.narrow(1, start, length) for start in self.starts], 1)
        act = host.narrow(1, self.starts[0], length * len(self.starts))
        return act.clone() if self.seats[0].isolated and self.individuals.keeps_act else act

    def _compute(
        self, run: KernelFunction, inp: Tensor, act: Tensor, leaves: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return what ``run`` makes of it, and the stacked weights."""
        counters = [self.cells.counters(seed) for seed in self.seeds]
        weights = stack_weights(leaves, counters)
        if self.entry is not None:
            weight, bias, geometry = self.entry
            stacked_bias = None if bias is None else weights[bias]
            inp = shared_convolution(inp, weights[weight], stacked_bias, geometry, counters)
        return run(inp, guard_chunks(act, counters), weights, ()), weights

    def _give_up(self, error: RuntimeError) -> None:
        self._usable = False
        names = ", ".join(seat.seed for seat in self.seats)
        logger.warning("%s: not run side by side: %s", names, error)
