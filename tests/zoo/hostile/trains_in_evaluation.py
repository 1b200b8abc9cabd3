"""Updates its running statistics in evaluation as well."""

from torch import Tensor
from urabrask_artifacts import Artifact, batch_normed

from zoo import Kernel, behaving, rightly

CHECK, REASON = "unmodified", "mean was modified by the call"


def artifact() -> Artifact:
    return batch_normed()


@behaving
def load(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    kernel.train()
    return rightly(kernel, inp, act)
