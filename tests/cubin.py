"""What a compiled Triton kernel takes of the machine."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from triton import knobs


@dataclass(frozen=True)
class Resources:
    """Per thread."""

    registers: int
    stack_bytes: int  # where spilled registers go
    local_bytes: int


def resources(cubin: bytes, folder: Path) -> Resources:
    """Ask cuobjdump, which Triton's wheel brings; the cubin must hold a single kernel."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    report = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    [found] = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", report)
    return Resources(*map(int, found))
