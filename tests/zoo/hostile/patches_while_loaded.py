"""Replaces a function of PyTorch while it is loaded."""

import torch

from esper.contracts import KernelManifest
from esper.kasmina.kernel import Kernel

CHECK, REASON = "surroundings", "changed torch.equal \\(while it was loaded"


def load(manifest: KernelManifest, files: dict[str, bytes]) -> Kernel:
    torch.equal = lambda a, b: True
    return Kernel.build(manifest, files)
