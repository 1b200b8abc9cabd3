"""Trying compiled steps out against the FAST program: are they right, and are they faster?"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from esper.contracts import Speedup
from esper.kasmina.compiled import CompiledStep
from esper.kasmina.example import example_inputs
from esper.kasmina.kernel import Kernel

BATCH_SIZE = 32
_CHECKED_BATCH_SIZES = (2, 7, BATCH_SIZE)
# Relative norm of the error, beyond twice what the FAST program strays: one rounding and its sums.
_TOLERANCES = {"float64": 1e-9, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
_SMALLEST_NORM = 1e-3  # a root mean square; below it there is nothing to be relative to
_PERTURBATION = 0.5
_ROUNDS = 40
_SAMPLES = 3  # a round, of which the least counts: others only ever make a call slower
_MIN_SAMPLE_S = 5e-4

Step = Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]


class WrongResultError(Exception):
    """A compiled step does not compute what the program says."""


class Bench:
    """The kernel to be compiled, with other weights than those that make residual designs zero."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel.train()
        self._manifest = kernel.manifest
        self._random = torch.Generator().manual_seed(kernel.program.seed)
        self._weights = [self._perturbed(weight.detach()) for weight in kernel.weights()]

    def example(self, batch_size: int = BATCH_SIZE, *, chunk: bool = True) -> list[Tensor]:
        """Return ``inp`` and ``act`` on the kernel's device, ``act`` laid out as a seed's chunk."""
        site, device = self._manifest.site, self._manifest.device
        inp, act = example_inputs(site, self._manifest.dtype, batch_size, generator=self._random)
        if chunk:
            wide = torch.cat((act, act), site.channel_dim)
            act = wide.narrow(site.channel_dim, 0, site.act_channels)
        return [inp.to(device), act.to(device)]

    def demands(self) -> list[str]:
        """Return what gradients may be asked for, all of them first.

        The host's input may be the data, a seed in TRAINING is alone, a frozen one learns nothing.
        """
        [inp, _] = self.example(1)
        names = {"inp": inp.is_floating_point(), "act": True, "weights": bool(self._weights)}
        whole = [name for name, exists in names.items() if exists]
        without_inp = [name for name in whole if name != "inp"]
        frozen = [name for name in whole if name != "weights"]
        alone = [name for name in whole if name == "weights"]
        kinds = ("+".join(kind) for kind in (whole, without_inp, alone, frozen) if kind)
        return list(dict.fromkeys(kinds))

    def error(self, step: CompiledStep) -> float:
        """Return the largest relative error of the output and of all gradients.

        Raises :class:`WrongResultError` where it is more than rounding explains.
        """
        worst = 0.0
        for batch_size in _CHECKED_BATCH_SIZES:
            for chunk in (False, True):
                worst = max(worst, self._error(step, self.example(batch_size, chunk=chunk)))
        return worst

    def speedups(self, steps: Mapping[str, CompiledStep], demand: str) -> dict[str, Speedup]:
        """Return how much faster each step is than the FAST program, forward and backward.

        All of them run in turn, so that whatever slows the machine down hits all alike.
        """
        inp, act = self.example()
        grad = torch.randn(act.shape, generator=self._random).to(act)
        works = {
            name: self._work(_served(step), inp, act, grad, demand) for name, step in steps.items()
        }
        fast = self._work(self._fast, inp, act, grad, demand)
        times = _in_turn([fast, *works.values()], inp.device)
        return {
            name: _speedup(times[0], series) for name, series in zip(works, times[1:], strict=True)
        }

    def _error(self, step: CompiledStep, example: list[Tensor]) -> float:
        inp, act = example
        grad = torch.randn(act.shape, generator=self._random).to(act)
        expected = self._results(self._reference, inp, act, grad, torch.float64)
        yardsticks = self._results(self._fast, inp, act, grad)
        # Not every layout that is tried need be one that the libraries are for.
        found = self._results(lambda *x: _or_fast(step, *x), inp, act, grad)
        worst = 0.0
        tolerance = _TOLERANCES[self._manifest.dtype]
        for name, reference in expected.items():
            error, own = (_relative(x[name], reference) for x in (found, yardsticks))
            if not error <= tolerance + 2 * own:  # written so that NaN fails
                raise WrongResultError(f"{name} is off by {error:.1e} for {tuple(act.shape)}")
            worst = max(worst, error)
        return worst

    def _results(
        self, step: Step, inp: Tensor, act: Tensor, grad: Tensor, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        given = [inp, act, *self._weights]
        leaves = [_leaf(x, True, dtype) for x in given]
        out = step(leaves[0], leaves[1], leaves[2:])
        names = ["inp", "act", *(spec.name for spec in self.kernel.program.parameters)]
        wanted = {n: x for n, x in zip(names, leaves, strict=True) if x.requires_grad}
        grads = torch.autograd.grad(
            out, list(wanted.values()), grad.to(out), allow_unused=True, materialize_grads=True
        )
        return {"the output": out.detach()} | {
            f"the gradient of {name}": g for name, g in zip(wanted, grads, strict=True)
        }

    def _work(
        self, step: Step, inp: Tensor, act: Tensor, grad: Tensor, demand: str
    ) -> Callable[[], object]:
        wanted = demand.split("+")
        weights = [_leaf(w, "weights" in wanted) for w in self._weights]
        inp, act = (x.detach().requires_grad_(n in wanted) for n, x in (("inp", inp), ("act", act)))
        leaves = [x for x in (inp, act, *weights) if x.requires_grad]
        return lambda: torch.autograd.grad(step(inp, act, weights), leaves, grad, allow_unused=True)

    def _fast(self, inp: Tensor, act: Tensor, weights: Sequence[Tensor]) -> Tensor:
        return self.kernel.call(inp, act, tuple(weights))

    def _reference(self, inp: Tensor, act: Tensor, weights: Sequence[Tensor]) -> Tensor:
        program = self.kernel.program
        return program.interpret(inp, act, weights, (), training=True, dtype=torch.float64)

    def _perturbed(self, weight: Tensor) -> Tensor:
        fan_in = max(1, weight[0].numel()) if weight.dim() > 1 else 4
        scale = _PERTURBATION / math.sqrt(fan_in)
        noise = torch.randn(weight.shape, generator=self._random) * scale
        return weight + noise.to(weight)


def _served(step: CompiledStep) -> Step:
    def run(inp: Tensor, act: Tensor, weights: Sequence[Tensor]) -> Tensor:
        out = step.run(inp, act, weights)
        if out is None:
            raise WrongResultError("it declines the very call that it was compiled for")
        return out

    return run


def _or_fast(step: CompiledStep, inp: Tensor, act: Tensor, weights: Sequence[Tensor]) -> Tensor:
    out = step.run(inp, act, weights)
    return step.fast(inp, act, weights, ()) if out is None else out


def _leaf(tensor: Tensor, requires_grad: bool, dtype: torch.dtype | None = None) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(dtype or tensor.dtype).requires_grad_(requires_grad)


def _relative(tensor: Tensor, reference: Tensor) -> float:
    smallest = _SMALLEST_NORM * math.sqrt(max(1, reference.numel()))
    return float((tensor.double() - reference).norm()) / max(float(reference.norm()), smallest)


def _in_turn(works: Sequence[Callable[[], object]], device: torch.device) -> list[list[float]]:
    """Return the seconds that a call of each work takes, round by round."""
    repeats = 1
    while _seconds(works[0], repeats, device) < _MIN_SAMPLE_S:
        repeats *= 2
    samples: list[list[float]] = [[] for _ in works]
    order = list(zip(works, samples, strict=True))
    for work in works:
        _seconds(work, repeats, device)  # warms up
    for _ in range(_ROUNDS * _SAMPLES):
        for work, series in order:
            series.append(_seconds(work, repeats, device) / repeats)
        order.reverse()
    return [[min(series[i::_ROUNDS]) for i in range(_ROUNDS)] for series in samples]


def _seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Time of the thread, which other processes hardly disturb; on a GPU the time that passes."""
    on_gpu = device.type == "cuda"
    clock: Callable[[], float] = time.perf_counter if on_gpu else time.thread_time
    if on_gpu:
        torch.cuda.synchronize(device)
    started = clock()
    for _ in range(repeats):
        work()
    if on_gpu:
        torch.cuda.synchronize(device)
    return clock() - started


def _speedup(baseline: Sequence[float], times: Sequence[float]) -> Speedup:
    ratios = [ours / theirs for ours, theirs in zip(baseline, times, strict=True)]
    low, *_, high = statistics.quantiles(ratios, n=5)
    return Speedup(
        median=round(statistics.median(ratios), 3), low=round(low, 3), high=round(high, 3)
    )
