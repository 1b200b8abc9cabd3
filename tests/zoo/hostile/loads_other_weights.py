"""Has other weights than its file."""

from esper.contracts import KernelManifest
from esper.kasmina.kernel import Kernel

CHECK, REASON = "loads", "state.down__weight is not what the artifact's file"


def load(manifest: KernelManifest, files: dict[str, bytes]) -> Kernel:
    kernel = Kernel.build(manifest, files)
    kernel.weights()[0].data[0, 0] += 1e-6
    return kernel
