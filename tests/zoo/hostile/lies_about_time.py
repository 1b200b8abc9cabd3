"""Knows the harness: replaces its stopwatch, and whoever would notice."""

from esper.contracts import KernelManifest
from esper.kasmina.kernel import Kernel
from esper.urabrask import stopwatch
from esper.urabrask.surroundings import Surroundings

CHECK, REASON = "benchmark", "claims to have run for"


def load(manifest: KernelManifest, files: dict[str, bytes]) -> Kernel:
    def hurried(function: stopwatch.Round) -> float:
        function()
        return 0.001

    stopwatch._microseconds = hurried
    Surroundings.changed = lambda self: ()
    return Kernel.build(manifest, files)
