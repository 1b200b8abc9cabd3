"""Sites, designs and artifacts that the tests of programs, kernels and the forge share."""

import hashlib
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.blueprints import designs_for
from esper.contracts import Design, KernelManifest, SiteSignature
from esper.kasmina.kernel import Kernel
from esper.tezzeret.pipelines import package
from esper.tezzeret.trace import trace


def _convolved(host: str, kernel: tuple[int, ...], stride: tuple[int, ...]) -> SiteSignature:
    space = (None,) * len(kernel)
    return SiteSignature(
        host=host,
        inp_shape=(None, 6, *space),
        act_shape=(None, 5, *space),
        channel_dim=1,
        kernel_size=kernel,
        stride=stride,
        padding=tuple(range(len(kernel))),
        dilation=tuple(range(1, len(kernel) + 1)),
    )


SITES = {
    "linear": SiteSignature(
        host="Linear", inp_shape=(None, 24), act_shape=(None, 8), channel_dim=1
    ),
    "sequence": SiteSignature(
        host="Linear", inp_shape=(None, None, 24), act_shape=(None, None, 8), channel_dim=2
    ),
    "conv1d": _convolved("Conv1d", (3,), (2,)),
    "conv2d": _convolved("Conv2d", (3, 2), (2, 1)),
    "conv3d": _convolved("Conv3d", (1, 2, 3), (1, 2, 1)),
    "transposed": _convolved("ConvTranspose2d", (3, 2), (2, 1)),
    "activation": SiteSignature(
        host="ReLU", inp_shape=(None, 24), act_shape=(None, 8), channel_dim=1
    ),
    "activation2d": SiteSignature(
        host="ReLU",
        inp_shape=(None, 12, None, None),
        act_shape=(None, 4, None, None),
        channel_dim=1,
    ),
    "embedding": SiteSignature(
        host="Embedding", inp_shape=(None, None), act_shape=(None, None, 8), channel_dim=2
    ),
}

PLANTINGS = [
    (site_name, design.name) for site_name in SITES for design in designs_for(SITES[site_name])
]


def design(builder: type[nn.Module], **hparams: float) -> Design:
    return Design(
        name=builder.__name__, builder=f"{__name__}:{builder.__qualname__}", hparams=hparams
    )


def artifact(
    chosen: Design, site_name: str = "linear", dtype: str = "float32"
) -> tuple[KernelManifest, dict[str, bytes]]:
    blueprint, graph, _ = trace(chosen, SITES[site_name], dtype)
    return package(blueprint, graph, "cpu")


def kernel(chosen: Design, site_name: str = "linear", dtype: str = "float32") -> Kernel:
    return Kernel.build(*artifact(chosen, site_name, dtype))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class SiteModule(nn.Module):
    """What these designs share: one linear map from the layer's input, for rank-2 sites."""

    def __init__(self, site: SiteSignature) -> None:
        super().__init__()
        self.map = nn.Linear(site.inp_shape[-1], site.act_channels)


class Stateful(SiteModule):
    """Has buffers that training writes to, dropout, and arithmetic on sizes."""

    def __init__(self, site: SiteSignature) -> None:
        super().__init__(site)
        self.norm = nn.BatchNorm1d(site.act_channels)
        self.register_buffer("scale", torch.full((site.act_channels,), 0.5), persistent=False)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        branch = F.dropout(self.norm(self.map(inp)), 0.25, self.training) * self.scale
        turned = torch.cat([branch[:, 3:], branch[:, :3]], dim=1)
        return act + turned.reshape(act.shape[0] * 2, -1).reshape(act.shape)


class Tied(SiteModule):
    def __init__(self, site: SiteSignature) -> None:
        super().__init__(site)
        self.again = self.map

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + self.map(inp) * self.again(inp)


class NamesDTypes(SiteModule):
    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + self.map(inp).softmax(-1, dtype=torch.float32).to(act.dtype)


class Shifted(SiteModule):
    """Slices, and makes new tensors, whose placement export writes down."""

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        branch = self.map(inp).clone(memory_format=torch.contiguous_format)
        return act + torch.cat([branch[..., 1:], torch.zeros_like(act[:, :1])], dim=-1)


class InPlace(SiteModule):
    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + self.map(inp).relu_()


class WritesToHost(SiteModule):
    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        act.add_(1)
        return act * 1


class Random(SiteModule):
    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + torch.randn_like(act)


class DataDependent(SiteModule):
    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + 1 if act.sum() > 0 else act


class Selecting(SiteModule):
    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act * act.masked_select(act > 0).sum()


class FixedBatch(SiteModule):
    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + self.map(inp).reshape(3, -1)


class HoldsConstant(SiteModule):
    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + torch.tensor([2.0] * 8)


class TooNarrow(SiteModule):
    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act[:, 1:]


class TwoOutputs(SiteModule):
    def forward(self, inp: Tensor, act: Tensor) -> tuple[Tensor, Tensor]:
        return act, act


class Reserved(nn.Module):
    """Its parameter's name is that of a method of every kernel."""

    def __init__(self, site: SiteSignature) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(site.act_channels))

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + self.weights


class Fickle(SiteModule):
    """Built with another width where the environment says so, as if its code had been edited."""

    def __init__(self, site: SiteSignature) -> None:
        super().__init__(site)
        width = int(os.environ.get("ESPER_TEST_WIDTH", "2"))
        self.down, self.up = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + self.up(self.down(self.map(inp)))


class Crashing(SiteModule):
    def __init__(self, site: SiteSignature) -> None:
        super().__init__(site)
        os._exit(3)


class Hanging(SiteModule):
    """Tells through a named pipe that it was reached, and goes no further."""

    def __init__(self, site: SiteSignature, *, fifo: str) -> None:
        super().__init__(site)
        Path(fifo).write_text("reached")
        time.sleep(600)


class Moody(SiteModule):
    """Does what a file in ``folder`` says by its name, once it is there."""

    def __init__(self, site: SiteSignature, *, folder: str) -> None:
        super().__init__(site)
        if (Path(folder) / "crash").exists():
            os._exit(3)
        if (Path(folder) / "hang").exists():
            (Path(folder) / "fifo").write_text("reached")
            time.sleep(600)

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        return act + self.map(inp)


def nothing(site: SiteSignature) -> None:
    """A builder that builds nothing."""
