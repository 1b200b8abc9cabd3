"""Models with kernels in place, for tests of what leaves Esper."""

import asyncio
from collections.abc import Callable, Iterable

import torch
from kasmina_library import MemoryLibrary
from torch import Tensor, nn

import esper
from esper.config import SeedSettings
from esper.contracts import SeedState
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.model import MorphableModel

Builder = Callable[..., nn.Module]


def wrapped(net: nn.Module, inp: Tensor, library: MemoryLibrary, seeds: int = 2) -> MorphableModel:
    """Wrap ``net`` and show it ``inp``, so that all shapes are known."""
    model = esper.wrap(
        net, settings=SeedSettings(seeds_per_layer=seeds, deterministic=True, max_errors=1)
    )
    model.connect(library)
    for layer in model.kasmina_layers.values():
        layer.arm()
    with torch.no_grad():
        model(inp)
    return model


def grow(
    model: MorphableModel,
    library: MemoryLibrary,
    layer: str,
    builder: Builder,
    seeds: Iterable[int] = (0, 1),
    state: SeedState = SeedState.FOSSILIZED,
    alpha: float = 0.3,
    **hparams: float,
) -> MorphableModel:
    """Load ``builder``'s kernel into seeds of a layer, draw its weights, and bring it to ``state``."""
    handle = model.kasmina_layers[layer]
    for seed in seeds:
        artifact_id = library.add(builder, handle.site(seed), **hparams)
        assert asyncio.run(model.load_kernel(layer, seed, artifact_id, alpha=alpha))
        kernel = handle.kernel(seed)
        assert kernel is not None
        with torch.no_grad():
            for weight in kernel.weights():
                weight.copy_(0.5 * torch.randn(weight.shape))
        bring_to(handle, seed, state)
    return model


def bring_to(handle: KasminaLayer, seed: int, state: SeedState) -> None:
    """Move a seed on from GRAFTING."""
    if state > SeedState.GRAFTING:
        handle.stabilize(seed)
    if state > SeedState.STABILIZATION:
        handle.evaluate(seed)
    if state > SeedState.EVALUATING:
        handle.keep(seed, "for the test")
    if state > SeedState.FINE_TUNING and handle.state(seed) is not SeedState.FOSSILIZED:
        handle.fossilize(seed)
    assert handle.state(seed) is state
