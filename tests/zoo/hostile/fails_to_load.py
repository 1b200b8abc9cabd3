"""Cannot be loaded."""

from esper.contracts import KernelManifest
from esper.kasmina.kernel import Kernel

CHECK, REASON = "loads", "raised ValueError: no such luck"


def load(manifest: KernelManifest, files: dict[str, bytes]) -> Kernel:
    raise ValueError("no such luck")
