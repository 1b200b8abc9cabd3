"""The same grown network as others would make it: by hand, as a naive wrapper, with PEFT's LoRA.

All take host and weights from a model that Esper has grown, so they compute with the same memory.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.models import copied
from esper import KasminaLayer, MorphableModel

HAS_PEFT = find_spec("peft") is not None
PEFT_PREFIX = "base_model.model"  # where a PeftModel has the network
NO_PEFT = "PEFT is not compared with: it is not installed (pip install peft)"


def by_hand(net: nn.Module, grown: MorphableModel) -> nn.Module:
    """Return a copy of ``net`` into which the branches of ``grown`` are written as modules."""
    model = copied(net)
    for name, layer in _grown_layers(grown).items():
        host = model.get_submodule(name)
        seeds = layer.state_layout.get_active_seeds()
        branches = [_branch(layer, seed_idx) for seed_idx in seeds]
        if len(seeds) < layer.num_seeds:
            starts = [layer.chunk(seed_idx)[0] for seed_idx in seeds]
            written: nn.Module = SumOfSome(host, branches, starts)
        else:
            written = Sum(host, branches[0] if len(branches) == 1 else SideBySide(branches))
        model.set_submodule(name, written)
    return model


def naive(net: nn.Module, grown: MorphableModel) -> nn.Module:
    """Return a copy of ``net`` with a wrapper module around each grown layer."""
    model = copied(net)
    for name, layer in _grown_layers(grown).items():
        model.set_submodule(name, NaiveWrapper(model.get_submodule(name), _branch(layer, 0)))
    return model


def peft_lora(net: nn.Module, grown: MorphableModel) -> nn.Module:
    """Return a copy of ``net`` with PEFT's LoRA on the grown layers, computing the same rank.

    PEFT freezes the host; it is thawed, so that backward does the same work in all variants.
    """
    model = _peft_model(net, grown)
    for name, layer in _grown_layers(grown).items():
        lora = model.get_submodule(f"{PEFT_PREFIX}.{name}")
        down, up, *_ = _weights(layer, 0)
        lora.get_submodule("lora_A.default").weight = down
        lora.get_submodule("lora_B.default").weight = up
    return model.requires_grad_(True)


def peft_disabled(net: nn.Module, grown: MorphableModel) -> nn.Module:
    """Return the same with the adapters disabled, as ``disable_adapter_layers`` does it."""
    model: Any = _peft_model(net, grown).requires_grad_(True)
    model.disable_adapter_layers()
    return cast(nn.Module, model)


def is_peft(model: nn.Module) -> bool:
    return type(model).__module__.startswith("peft.")


def _peft_model(net: nn.Module, grown: MorphableModel) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    layers = _grown_layers(grown)
    rank = _weights(next(iter(layers.values())), 0)[0].shape[0]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))
    model: nn.Module = get_peft_model(copied(net), config)
    return model.train(net.training)


def without_bias(model: nn.Module) -> nn.Module:
    """Return a copy whose branches have no bias of their own: what PEFT's LoRA computes."""
    model = copied(model)
    for module in model.modules():
        if isinstance(module, Sum):
            cast(nn.Linear, module.branch.get_submodule("1")).bias = None  # type: ignore[assignment]
    return model


class Sum(nn.Module):
    """A host layer and a branch beside it."""

    def __init__(self, host: nn.Module, branch: nn.Module):
        super().__init__()
        self.host = host
        self.branch = branch

    def forward(self, inp: Tensor) -> Tensor:
        out: Tensor = self.host(inp) + self.branch(inp)
        return out


class SideBySide(nn.Module):
    """Branches that each make their part of the channels."""

    def __init__(self, branches: Sequence[nn.Module]):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, inp: Tensor) -> Tensor:
        return torch.cat([branch(inp) for branch in self.branches], -1)


class SumOfSome(nn.Module):
    """A Linear and branches beside some of its channels only."""

    def __init__(self, host: nn.Module, branches: Sequence[nn.Module], starts: Sequence[int]):
        super().__init__()
        self.host = host
        self.branches = nn.ModuleList(branches)
        self.starts = starts

    def forward(self, inp: Tensor) -> Tensor:
        # In place is the fastest way to write this, some 3 % ahead of torch.cat and F.pad.
        out: Tensor = self.host(inp)
        for branch, start in zip(self.branches, self.starts, strict=True):
            added = branch(inp)
            out.narrow(-1, start, added.shape[-1]).add_(added)
        return out


class NaiveWrapper(nn.Module):
    """What one writes first: a module around the host, and a mask of the seeds that are active."""

    mask: Tensor  # bool (channels,)
    alpha: Tensor  # float32 (1,)

    def __init__(self, host: nn.Module, adapter: nn.Sequential):
        super().__init__()
        self.host = host
        self.adapter = adapter
        up = cast(nn.Linear, adapter[-1])
        device = up.weight.device
        mask = torch.ones(up.out_features, dtype=torch.bool, device=device)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("alpha", torch.ones(1, device=device), persistent=False)

    def forward(self, inp: Tensor) -> Tensor:
        act: Tensor = self.host(inp)
        if self.mask.any():
            out = act + self.adapter(inp)
            act = torch.where(self.mask, act + self.alpha * (out - act), act)
        return act


def _grown_layers(grown: MorphableModel) -> dict[str, KasminaLayer]:
    layers = grown.kasmina_layers.items()
    return {name: layer for name, layer in layers if layer.state_layout.get_active_seeds()}


def _weights(layer: KasminaLayer, seed_idx: int) -> tuple[nn.Parameter, ...]:
    kernel = layer.kernel(seed_idx)
    assert kernel is not None
    return kernel.weights()


def _branch(layer: KasminaLayer, seed_idx: int) -> nn.Sequential:
    """Return the seed's kernel as modules: what ``low_rank`` and ``residual_mlp`` add to ``act``."""
    kernel = layer.kernel(seed_idx)
    assert kernel is not None
    if kernel.manifest.design.name == "low_rank":
        down, up, up_bias = kernel.weights()
        return nn.Sequential(_linear(down, None), _linear(up, up_bias))
    down, down_bias, up, up_bias = kernel.weights()
    return nn.Sequential(_linear(down, down_bias), nn.GELU(), _linear(up, up_bias))


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = weight
    linear.bias = bias  # type: ignore[assignment]
    return linear
