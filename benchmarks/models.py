"""The models of the suite, and how their wrapped and unwrapped variants are made."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import esper
from esper import MorphableModel
from esper.config import SeedSettings

SEEDS_PER_LAYER = SeedSettings().seeds_per_layer
NEVER_OBSERVED = SeedSettings(observe_every=2**31)  # telemetry is on, but never due


@dataclass(frozen=True)
class Subject:
    """A model, with the shape of the batch that it is measured on."""

    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]

    def prepare(self, device: torch.device, seed: int) -> tuple[nn.Module, Tensor]:
        """Return the model and its batch, the same ones for the same seed."""
        torch.manual_seed(seed)
        return self.build().to(device), torch.randn(self.input_shape, device=device)


def linear() -> nn.Module:
    return nn.Linear(128, 64)


def linear_relu() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU())


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, 10),
    )


def convolutions() -> nn.Module:
    # Without batch norm, which makes the gradient of the bias before it zero up to rounding.
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def many_linears() -> nn.Module:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(2_500)))  # with 4 seeds each


LINEAR = Subject("Linear(128, 64)", linear, (32, 128))
LINEAR_RELU = Subject("Linear(128, 64) and ReLU in a Sequential", linear_relu, (32, 128))
MLP = Subject("MLP 128-512-512-10", mlp, (32, 128))
CNN = Subject("CNN, 2 convolutions", cnn, (32, 3, 32, 32))
CONVOLUTIONS = Subject("2 convolutions", convolutions, (32, 3, 32, 32))
ENCODER = Subject("transformer encoder, 2 layers", encoder, (8, 32, 64))
SUITE = (LINEAR, MLP, CNN, ENCODER)
MANY_LINEARS = Subject("2,500 small Linears", many_linears, (1, 4))


def copied(net: nn.Module) -> nn.Module:
    """Copy the tree of modules but no parameter: every variant computes with the same memory."""
    shared = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    return copy.deepcopy(net, shared)


def wrapped(net: nn.Module, inp: Tensor, settings: SeedSettings = NEVER_OBSERVED) -> MorphableModel:
    """Wrap such a copy; its activations have learnt their width."""
    model = esper.wrap(copied(net), settings=settings)
    model(inp)
    return model


def every_seed(net: nn.Module, inp: Tensor) -> dict[str, range]:
    """Return all seeds that ``net`` gets when it is wrapped, by layer."""
    layers = wrapped(net, inp).kasmina_layers
    return {name: range(layer.num_seeds) for name, layer in layers.items()}
