"""How long does training stand still when a compiled model grows?

Each way of compiling lives in a process of its own, with an empty cache, and goes through the same
life: a few dormant steps, a germination, and the three forms that a seed gives its block. What
counts is the longest step of each form against the median of the dormant ones.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks.context import ROOT
from benchmarks.harness import Plan, Trial
from benchmarks.kernels import Kernels
from benchmarks.rows import Baseline, Finding

WAYS = ("whole", "stall", "ahead", "eager", "background", "background, ahead")
NAMES = {
    "whole": "torch.compile(model)",
    "stall": "block by block",
    "ahead": "block by block, ahead",
    "eager": "block by block, on_germination='eager'",
    "background": "block by block, on_germination='background'",
    "background, ahead": "block by block, 'background' and ahead",
}
TIMEOUT_S = 600.0


def trials(plan: Plan, kernels: Kernels) -> list[Trial]:
    """Return none: what is measured happens once in a process."""
    return []


def counts(plan: Plan) -> Iterator[Finding]:
    """Yield the longest steps of one life, compiled in each way."""
    if plan.quick or plan.device.type != "cpu":
        return
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        print("torch.compile is not measured: no C++ compiler is found", file=sys.stderr)
        return
    for way in WAYS:
        yield from rows(NAMES[way], life(way))


def life(way: str) -> dict[str, Any]:
    """Return what one process tells of the life that it went through; see compiled_life.py."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.compiled_life", way],
            cwd=ROOT,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def rows(name: str, told: dict[str, Any]) -> Iterator[Finding]:
    baseline = Baseline(name="dormant step", value=told["dormant_ms"] * 1e6, unit="ns")
    for what, longest_ms in told["longest_ms"].items():
        yield _row(f"{name}: longest step, {what}", longest_ms, "ms", baseline)
    yield _row(f"{name}: whole life", told["life_s"], "s", None)
    yield _row(f"{name}: graphs compiled since germination", told["num_graphs"], "graphs", None)
    yield _row(f"{name}: graphs compiled at culling", told["num_at_culling"], "graphs", None, 0)


def _row(
    row: str, value: float, unit: str, baseline: Baseline | None, at_most: float | None = None
) -> Finding:
    return Finding(
        row=row,
        metric="stall" if baseline else "count" if unit == "graphs" else "time",
        value=value,
        low=value,
        high=value,
        unit=unit,
        baseline=baseline,
        target=None if at_most is None else f"<= {at_most:g} {unit}",
        met=None if at_most is None else value <= at_most,
    )
