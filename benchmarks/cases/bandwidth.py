"""How close do the ops come to the speed of memory? Bytes a second against ``Tensor.copy_``.

Bytes are those that an op cannot do without: each operand read once, each result written once.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import esper.ops as ops
import esper.reference as reference
from benchmarks.clocks import Work
from benchmarks.gate import check_close, check_equal
from benchmarks.harness import Build, Plan, Times, Trial, estimate
from benchmarks.kernels import Kernels
from benchmarks.rows import Baseline, Finding, Point

KIB, MIB = 2**10, 2**20
SIZES = (64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
DTYPES = (torch.float32, torch.bfloat16)
CHANNELS = 512
SEEDS = 4
HEALTH_ROWS = 6
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
COPY = "copy_"
MIN_SHARE = {"cpu": 0.80, "cuda": 0.90}


@dataclass(frozen=True)
class Operands:
    """Tensors of one size, and the state of four seeds."""

    y: Tensor  # (rows, CHANNELS)
    out: Tensor
    grad: Tensor
    alpha: Tensor  # float32 (SEEDS,)
    non_finite: Tensor  # float32 (SEEDS,)
    fault: Tensor  # uint8 (SEEDS,)
    health: Tensor  # float32 (HEALTH_ROWS, SEEDS)

    def blend(self, seeds: int, y: Tensor, outs: tuple[Tensor, ...], in_place: bool) -> Tensor:
        """Blend the chunks of the first ``seeds`` seeds into ``y``, which they divide."""
        starts = [seed * CHANNELS // seeds for seed in range(seeds)]
        counters = (self.non_finite, self.fault)
        return ops.blend(y, outs, range(seeds), starts, self.alpha, 1, *counters, in_place=in_place)

    def outs(self, seeds: int) -> tuple[Tensor, ...]:
        return tuple(chunk.contiguous() for chunk in self.out.chunk(seeds, 1))


@functools.lru_cache(maxsize=1)  # the largest ones take some GiB
def operands(nbytes: int, dtype: torch.dtype, plan: Plan) -> Operands:
    shape = (nbytes // dtype.itemsize // CHANNELS, CHANNELS)
    generator = torch.Generator(plan.device).manual_seed(plan.seed)

    def drawn() -> Tensor:
        # Around 1, so that the means of the statistics are no differences of equal numbers.
        return torch.randn(shape, generator=generator, device=plan.device).add_(1).to(dtype)

    return Operands(
        y=drawn(),
        out=drawn(),
        grad=drawn(),
        alpha=torch.tensor([0.25, 0.5, 0.75, 1.0], device=plan.device),
        non_finite=torch.zeros(SEEDS, device=plan.device),
        fault=torch.zeros(SEEDS, dtype=torch.uint8, device=plan.device),
        health=torch.zeros(HEALTH_ROWS, SEEDS, device=plan.device),
    )


def trials(plan: Plan, kernels: Kernels) -> list[Trial]:
    sizes = SIZES[:2] if plan.quick else SIZES
    return [trial(nbytes, dtype, plan) for dtype in DTYPES for nbytes in sizes]


def trial(nbytes: int, dtype: torch.dtype, plan: Plan) -> Trial:
    """Compare all ops on tensors of ``nbytes`` to a copy from one to another."""

    def build(make: Callable[[Operands], Work]) -> Build:
        def work() -> Work:
            keep_freed_memory()
            return make(operands(nbytes, dtype, plan))

        return work

    return Trial(
        name=f"{size_name(nbytes)}, {dtype_name(dtype)}",
        works={name: build(make) for name, (make, _) in OPS.items()},
        check=lambda: check(nbytes, dtype, plan),
        report=lambda times: report(nbytes, dtype, plan, times),
    )


def copy(at: Operands) -> Work:
    target = torch.empty_like(at.y)
    return lambda: target.copy_(at.y)


def blend(at: Operands, seeds: int, in_place: bool) -> Work:
    outs = at.outs(seeds)
    y = at.y.clone() if in_place else at.y
    return lambda: at.blend(seeds, y, outs, in_place)


def blend_backward(at: Operands) -> Callable[[], tuple[Tensor, ...]]:
    y, out = at.y.detach().requires_grad_(), at.out.detach().requires_grad_()
    with torch.enable_grad():
        result = at.blend(1, y, (out,), in_place=False)
    return lambda: torch.autograd.grad(result, (y, out), at.grad, retain_graph=True)


def observe(at: Operands) -> Work:
    return lambda: ops.observe(at.y, 1, at.health, 0, SEEDS)


def observe_grad(at: Operands) -> Work:
    return lambda: ops.observe_grad(at.grad, 1, at.health, 0, SEEDS)


# What is timed, and how many times the size of one tensor it moves at least.
OPS: Mapping[str, tuple[Callable[[Operands], Work], int]] = {
    COPY: (copy, 2),
    "blend forward": (functools.partial(blend, seeds=1, in_place=False), 3),
    "blend forward in place": (functools.partial(blend, seeds=1, in_place=True), 3),
    "blend forward, 4 seeds": (functools.partial(blend, seeds=SEEDS, in_place=False), 3),
    "blend backward": (blend_backward, 5),
    "observe": (observe, 1),
    "observe_grad": (observe_grad, 1),
}


def report(nbytes: int, dtype: torch.dtype, plan: Plan, times: Times) -> Iterator[Finding]:
    """Yield the copy's bytes a second, and the share of it that each op reaches."""
    place = f"{size_name(nbytes)}, {dtype_name(dtype)}"
    copied_bytes = OPS[COPY][1] * nbytes

    def point(op: str) -> Point:
        return Point(curve=op, axis=f"size of a {dtype_name(dtype)} tensor", x=nbytes)

    speed = estimate(copied_bytes / times.of[COPY], times.rng)  # bytes/ns are GB/s
    yield Finding(
        row=f"{COPY}, {place}",
        metric="bandwidth",
        **asdict(speed),
        unit="GB/s",
        point=point(COPY),
    )
    baseline = Baseline(name=COPY, value=speed.value, unit="GB/s")
    misses_cache = nbytes >= last_cache_bytes(plan.device)
    for op, (_, tensors_moved) in OPS.items():
        if op == COPY:
            continue
        share = times.of[COPY] / times.of[op] * tensors_moved * nbytes / copied_bytes
        found = estimate(share, times.rng)
        row = Finding(
            row=f"{op}, {place}",
            metric="share of the copy's bandwidth",
            **asdict(found),
            unit="x",
            baseline=baseline,
            point=point(op),
        )
        yield with_lower_bound(row, MIN_SHARE[plan.device.type]) if misses_cache else row


def with_lower_bound(row: Finding, at_least: float) -> Finding:
    target = f">= {at_least:g} x, as it misses the cache"
    return row.model_copy(update={"target": target, "met": row.value >= at_least})


def check(nbytes: int, dtype: torch.dtype, plan: Plan) -> None:
    """Compare each op on these very tensors with plain PyTorch in float32 or more."""
    at, name = operands(nbytes, dtype, plan), f"{size_name(nbytes)}, {dtype_name(dtype)}"
    y, out, grad = at.y.float(), at.out.float(), at.grad.float()
    for seeds in (1, SEEDS):
        alpha = at.alpha[:seeds].repeat_interleave(CHANNELS // seeds)
        expected = torch.lerp(y, out, alpha)
        for in_place in (False, True):
            blended = at.blend(seeds, at.y.clone(), at.outs(seeds), in_place)
            check_close(f"{name}: blend, {seeds} seed(s), {in_place=}", expected, blended)
    alpha = at.alpha[0]
    grads = blend_backward(at)()
    check_close(f"{name}: blend's gradient of y", grad * (1 - alpha), grads[0])
    check_close(f"{name}: blend's gradient of out", grad * alpha, grads[1])
    check_health(name, at)


def check_health(name: str, at: Operands) -> None:
    expected, seen = torch.zeros_like(at.health), torch.zeros_like(at.health)
    reference.observe(at.y, 1, expected, 0, SEEDS)
    reference.observe_grad(at.grad, 1, expected, 0, SEEDS)
    ops.observe(at.y, 1, seen, 0, SEEDS)
    ops.observe_grad(at.grad, 1, seen, 0, SEEDS)
    counts = {"elements": 0, "dead elements": 3, "non-finite elements": 4}
    check_equal(
        name,
        {what: expected[row] for what, row in counts.items()},
        {what: seen[row] for what, row in counts.items()},
    )
    for what, row in {"mean": 1, "M2": 2, "energy of the gradient": 5}.items():
        check_close(f"{name}: {what}", expected[row], seen[row])


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc keep what is freed, as torch's CUDA allocator does, for the rest of the process.

    By default it gives large blocks back to the system, and most of the time of an op that returns
    a new tensor is then spent on mapping fresh pages: ``clone`` of 64 MiB took 30 ms, and then 5.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@functools.cache
def last_cache_bytes(device: torch.device) -> int:
    """Return the size of the last cache before memory; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max(
        (int(size.read_text().strip().rstrip("K")) * KIB for size in sizes), default=32 * MIB
    )


def size_name(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
