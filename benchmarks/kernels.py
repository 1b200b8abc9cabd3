"""Makes kernels the public way, and puts them into seeds.

Tezzeret compiles each design for each kind of site once a run, Urabrask tries it out, and the
library, in a temporary folder, hands it out as often as it is needed.
"""

import asyncio
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

import esper
from benchmarks.models import NEVER_OBSERVED, copied
from esper import KasminaLayer, MorphableModel, blueprints
from esper.contracts import (
    GraftingStrategy,
    KernelBundle,
    KernelStatus,
    Pipeline,
    SeedState,
    SiteSignature,
)
from esper.trust import TrustedKey

FOR_EVER = 2**31  # steps
DTYPE = "float32"

Seeds = Mapping[str, Iterable[int]]  # by the FQN of their layer


class Kernels:
    """All kernels of a run. Nothing is started before the first one is needed."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stack = AsyncExitStack()
        self._runner = asyncio.Runner()
        self._library: esper.Urza | None = None
        self._artifacts: dict[tuple[str, SiteSignature], str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the forge and the evaluator, and remove the library."""
        self._runner.run(self._stack.aclose())
        self._runner.close()

    def graft(
        self, net: nn.Module, inp: Tensor, seeds: Seeds, design: str, *, seeds_per_layer: int
    ) -> MorphableModel:
        """Return a copy of ``net`` with kernels in ``seeds``, in GRAFTING at alpha 1."""
        model = self.wrapped(net, inp, seeds_per_layer)
        for layer, seed_idx in _places(model, seeds):
            artifact_id = self.artifact(design, layer.site(seed_idx))
            if not self._runner.run(layer.load_kernel(seed_idx, artifact_id, alpha=1.0)):
                raise RuntimeError(f"{layer.seed_name(seed_idx)}: {design} was not loaded")
            randomize(layer, seed_idx)
        model.kasmina.close()
        return model

    def isolate(
        self, net: nn.Module, inp: Tensor, seeds: Seeds, design: str, *, seeds_per_layer: int
    ) -> MorphableModel:
        """Return a copy of ``net`` with kernels in ``seeds``, in TRAINING for ever."""
        model = self.wrapped(net, inp, seeds_per_layer)
        strategy = GraftingStrategy(training_steps=FOR_EVER)
        for layer, seed_idx in _places(model, seeds):
            artifact_id = self.artifact(design, layer.site(seed_idx))
            layer.request_germination(seed_idx, artifact_id, strategy)
        model.step()  # waits for the kernels, as the settings say
        for layer, seed_idx in _places(model, seeds):
            if layer.state(seed_idx) is not SeedState.TRAINING:
                raise RuntimeError(f"{layer.seed_name(seed_idx)}: {layer.state(seed_idx).name}")
            randomize(layer, seed_idx)
        return model

    def compile(
        self, design: str, site: SiteSignature, pipeline: Pipeline
    ) -> tuple[KernelBundle, float]:
        """Return what a pipeline delivers, VALIDATED, and the seconds that it took to compile."""
        library = self.library()
        blueprint_id = self._runner.run(self._forge.submit(blueprints.get(design), site, DTYPE))
        started = time.perf_counter()
        artifact_id = self._runner.run(self._forge.compile(blueprint_id, pipeline))
        elapsed_s = time.perf_counter() - started
        self._runner.run(self._validate(artifact_id))
        return library.fetch_kernel(artifact_id), elapsed_s

    @property
    def trusted_key(self) -> TrustedKey:
        """What the signatures of :meth:`compile` hold for."""
        return self.library().trusted_key

    def wrapped(self, net: nn.Module, inp: Tensor, seeds_per_layer: int) -> MorphableModel:
        """Return a wrapped copy of ``net``, connected to the library; steps wait for kernels."""
        update = {"seeds_per_layer": seeds_per_layer, "deterministic": True}
        model = esper.wrap(copied(net), settings=NEVER_OBSERVED.model_copy(update=update))
        model(inp)
        model.attach_optimizer(torch.optim.SGD(net.parameters()))  # else it warns; never stepped
        model.connect(self.library())
        return model

    def library(self) -> esper.Urza:
        """Return the library that all kernels of the run are in."""
        if self._library is None:
            self._library = self._runner.run(self._open_library())
        return self._library

    def folder(self) -> Path:
        """Return where that library is."""
        self.library()
        return self._folder

    async def _open_library(self) -> esper.Urza:
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        library = self._stack.enter_context(esper.Urza(self._folder))
        self._forge = await self._stack.enter_async_context(
            esper.Tezzeret(library, device=self._device.type)
        )
        self._evaluator = await self._stack.enter_async_context(esper.Urabrask(library))
        return library

    def artifact(self, design: str, site: SiteSignature) -> str:
        """Return the id of the design's VALIDATED kernel for a site; it is made when it is new."""
        key = (design, site)
        if key not in self._artifacts:
            self._artifacts[key] = self._runner.run(self._make(design, site))
        return self._artifacts[key]

    async def _make(self, design: str, site: SiteSignature) -> str:
        blueprint_id = await self._forge.submit(blueprints.get(design), site, DTYPE)
        artifact_id = await self._forge.compile(blueprint_id)
        await self._validate(artifact_id)
        return artifact_id

    async def _validate(self, artifact_id: str) -> None:
        assert self._library is not None
        record = self._library.kernel(artifact_id)
        if record.status is KernelStatus.PENDING_BENCHMARKING:
            report = await self._evaluator.evaluate(artifact_id)
            if report.status is not KernelStatus.VALIDATED:
                design = record.manifest.design.name
                raise RuntimeError(f"{design} for {record.manifest.site}: {report.status}")


def _places(model: MorphableModel, seeds: Seeds) -> list[tuple[KasminaLayer, int]]:
    return [(model.kasmina_layers[name], seed_idx) for name in seeds for seed_idx in seeds[name]]


def randomize(layer: KasminaLayer, seed_idx: int) -> None:
    """Draw the kernel's weights: a fresh one adds exactly nothing, which would check nothing."""
    kernel = layer.kernel(seed_idx)
    assert kernel is not None
    generator = torch.Generator().manual_seed(seed_idx)
    for weight in kernel.weights():
        drawn = torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5
        weight.data.copy_(drawn)
