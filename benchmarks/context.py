"""Finds out where a benchmark runs: commit, machine and versions."""

import contextlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.rows import Context

ROOT = Path(__file__).resolve().parents[1]


def current_context(device: torch.device, seed: int) -> Context:
    status = _git("status", "--porcelain")
    return Context(
        commit=_git("rev-parse", "--verify", "--quiet", "HEAD"),
        dirty=None if status is None else bool(status),
        machine=_machine(device),
        versions=_versions(device),
        threads=torch.get_num_threads(),
        seed=seed,
        device=device.type,
    )


def _git(*arguments: str) -> str | None:
    """Return what git prints, or None where there is no git, no checkout or no such thing."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _machine(device: torch.device) -> str:
    machine = f"{_cpu_model()}, {os.cpu_count()} cores"
    if device.type == "cuda":
        machine += f", {torch.cuda.get_device_name(device)}"
    return machine


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux systems
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _versions(device: torch.device) -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "esper": version("esper-torch"),
    }
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
    with contextlib.suppress(PackageNotFoundError):
        versions["peft"] = version("peft")
    return versions
