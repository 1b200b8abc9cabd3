"""How long does training stand still when a compiled model grows?

Each way of compiling lives in a process of its own and goes through the same life: a few dormant
steps, a germination, and the three forms that a seed gives its block. What counts is the longest
step of each form against the median of the dormant ones. The processes begin with equal caches,
which hold what the dormant model is compiled to and nothing else.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.compiled_life import WAYS, made_by
from benchmarks.context import ROOT
from benchmarks.gate import WrongResultError
from benchmarks.harness import Plan
from benchmarks.kernels import Kernels
from benchmarks.rows import Baseline, Finding

NAMES = {
    "whole": "torch.compile(model)",
    "stall": "esper.compile(model)",
    "ahead": "esper.compile(model, ahead=...)",
    "eager": "on_germination='eager'",
    "background": "on_germination='background'",
    "foreseen": "'background', compiled before germination",
}
TIMEOUT_S = 600.0


def samples(plan: Plan, kernels: Kernels) -> Iterator[Finding]:
    """Yield the longest steps of one life, compiled in each way."""
    if plan.quick or plan.device.type != "cpu":
        return
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        print("torch.compile is not measured: no C++ compiler is found", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder:
        dormant = Path(folder, "dormant")
        told("dormant", dormant, kernels)
        for way in WAYS:
            cache = Path(folder, way)
            shutil.copytree(dormant, cache)
            yield from rows(NAMES[way], json.loads(told(way, cache, kernels)))


def told(way: str, cache: Path, kernels: Kernels) -> str:
    """Return what one process tells of the life that it went through; see compiled_life.py."""
    arguments = [way, str(kernels.folder()), made_by(kernels)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiled_life", *arguments],
        cwd=ROOT,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise WrongResultError(f"{NAMES.get(way, way)}: {done.stderr.splitlines()[-1]}")
    return done.stdout


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
