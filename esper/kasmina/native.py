"""Machine code in a kernel artifact: what it was compiled for, and how it comes into the process.

Loading a library runs its code. The bytes that are loaded are the bytes that were verified: they
are written to a file in a folder of our own and loaded from there.
"""

import hashlib
import platform
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from esper.contracts import NativeTarget

NUM_THREADS = 1  # that compiled loops on the CPU are divided among
_CPU_INFO = Path("/proc/cpuinfo")
_lock = threading.Lock()
_loaded: dict[tuple[str, str], "Library"] = {}  # by digest and device


class Library(Protocol):
    """A compiled graph: tensors in, tensors out, all on the one device."""

    def run(self, inputs: list[Tensor]) -> list[Tensor]: ...


def native_target(device: str) -> NativeTarget:
    """Return what machine code has to be compiled with and for to run in this process."""
    return NativeTarget(
        torch_version=str(torch.__version__),
        torch_git=torch.version.git_version,
        python=".".join(platform.python_version_tuple()[:2]),
        machine=platform.machine(),
        instructions=_compute_capability() if device == "cuda" else _processor_features(),
        cuda=torch.version.cuda if device == "cuda" else None,
        threads=None if device == "cuda" else NUM_THREADS,
    )


def mismatch(built_for: NativeTarget, device: str) -> str | None:
    """Name the first thing in which this process differs from ``built_for``, or return None."""
    here = native_target(device)
    for field in NativeTarget.model_fields:
        wanted, found = getattr(built_for, field), getattr(here, field)
        if wanted != found:
            return f"compiled for {field} {wanted}, here it is {found}"
    return None


def load(data: bytes, device: torch.device) -> Library:
    """Return the library with these bytes, which are the caller's to verify. Any thread.

    Equal libraries are loaded once a device. They stay for the life of the process, since code
    that has run cannot be unloaded safely. Raises ``RuntimeError`` for what cannot be loaded.
    """
    digest = hashlib.sha256(data).hexdigest()
    key = (digest, str(device))
    with _lock:
        if key not in _loaded:
            # A fresh name each time: the dynamic linker takes equal paths for equal files.
            with tempfile.TemporaryDirectory(prefix="esper-native-") as folder:
                path = Path(folder) / f"{digest}.so"
                path.write_bytes(data)
                _loaded[key] = _open(path, device)
        return _loaded[key]


def _open(path: Path, device: torch.device) -> Library:
    runners = torch._C._aoti
    if device.type == "cuda":
        return runners.AOTIModelContainerRunnerCuda(str(path), 1, str(device))
    return runners.AOTIModelContainerRunnerCpu(str(path), 1)


def _compute_capability() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@cache
def _processor_features() -> str:
    """Return a digest of what the processor can do, all of which the compiler makes use of."""
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else [platform.processor()]
    kinds = ("flags", "Features", "CPU part")
    features = sorted({line for line in lines if line.startswith(kinds)}) or lines[:1]
    return hashlib.sha256("\n".join(features).encode()).hexdigest()[:16]
