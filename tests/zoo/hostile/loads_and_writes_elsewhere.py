"""Leaves a file outside of its scratch folder while it is loaded."""

from pathlib import Path

from esper.contracts import KernelManifest
from esper.kasmina.kernel import Kernel

CHECK, REASON = "loads", "Permission denied"


def load(manifest: KernelManifest, files: dict[str, bytes]) -> Kernel:
    Path("/var/tmp/trace").write_bytes(b"x")
    return Kernel.build(manifest, files)
