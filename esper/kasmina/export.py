"""``esper.export``: leaving Esper with a grown model, as plain PyTorch and as files."""

import contextlib
import copy
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import esper.kasmina.fold as folding
from esper.contracts import SeedState
from esper.kasmina.kernel import Kernel
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.lifecycle import ACTIVE, OCCUPIED
from esper.kasmina.model import MorphableModel, unwrap
from esper.kasmina.plain import Voice, attach

LINEAGE_VERSION = 1
PROGRAM_FILE = "model.pt2"
WEIGHTS_FILE = "model.safetensors"
LINEAGE_FILE = "lineage.json"


class Outcome(StrEnum):
    """What became of a kernel in the exported model."""

    FOLDED = "folded"  # into the layer's own weight and bias
    KEPT = "kept"  # beside the layer, under parameters of its own
    LEFT_OUT = "left out"  # the layer's output does not hear it


@dataclass
class _Tenant:
    """An occupied seed of the copy that is being exported."""

    layer: str
    host: nn.Module
    seed_idx: int
    state: SeedState
    voice: Voice
    silence: str | None  # why the output does not hear it, or None if it does
    outcome: Outcome = Outcome.LEFT_OUT
    prefix: str | None = None  # of the names of its parameters, if it is kept

    @property
    def kernel(self) -> Kernel:
        return self.voice.kernel


def export(
    model: nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    example_inputs: tuple[Any, ...] | None = None,
    dynamic_shapes: Any = None,
    fold: bool = True,
) -> nn.Module:
    """Return a plain copy of a grown model that computes, in eval mode, what the model computes.

    The copy is made of PyTorch's own parts (and of yours), runs where Esper is not installed, can
    be trained, pickled, compiled, traced and exported further. It keeps the host's modules, parameter
    names, hooks and mode. Kernels that the output hears speak through a forward hook of their
    layer; their parameters are ``<layer>.grown.seed<i>.weights.<the design's name>``, and an alpha
    that is not 1 is frozen in the buffer ``<layer>.grown.seed<i>.alpha``, float32 (1,). Kernels in
    TRAINING, at alpha 0 or quarantined are left out. With ``fold``, FOSSILIZED kernels that are
    linear, on a linear layer or a convolution, disappear into the layer's weight and bias.

    ``path``, a folder that is made if need be, gets the weights (``model.safetensors``), what every
    kernel is and what became of it (``lineage.json``) and, given ``example_inputs``, the positional
    arguments of one forward, a ``torch.export`` program in eval mode (``model.pt2``);
    ``dynamic_shapes`` is handed to ``torch.export.export``, without it all sizes are fixed.

    The model is not changed. Training thread, between two steps; waits for the device. Raises
    ``TypeError`` if the model is not wrapped or ``example_inputs`` is no tuple, ``ValueError`` for
    options that need others, ``NotADirectoryError`` if ``path`` is something else, and whatever
    ``torch.export`` raises; then no file is written.
    """
    folder = None if path is None else Path(path)
    _check_arguments(model, folder, example_inputs, dynamic_shapes)
    twin = copy.deepcopy(model)
    assert isinstance(twin, MorphableModel)
    tenants = _tenants(twin)
    plain = unwrap(twin, discard_kernels=True)
    _decide(plain, tenants, fold)
    if folder is not None:
        program = None
        if example_inputs is not None:
            program = _traced(plain, example_inputs, dynamic_shapes)
        _publish(folder, plain, program, tenants)
    return plain


def _check_arguments(
    model: nn.Module, folder: Path | None, example_inputs: Any, dynamic_shapes: Any
) -> None:
    if not isinstance(model, MorphableModel):
        raise TypeError(f"{type(model).__name__} is not wrapped by esper.wrap")
    if example_inputs is not None and not isinstance(example_inputs, tuple):
        raise TypeError(
            "example_inputs must be the tuple of the forward's positional arguments, "
            f"got {type(example_inputs).__name__}"
        )
    if example_inputs is not None and folder is None:
        raise ValueError("example_inputs are for the program in a file, so they need a path")
    if dynamic_shapes is not None and example_inputs is None:
        raise ValueError("dynamic_shapes belong to example_inputs, which are missing")
    if folder is not None and folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"esper.export writes into a folder, and {folder} is a file")


# ------------------------------------------------------------------ from seeds to plain parts


def _tenants(model: MorphableModel) -> list[_Tenant]:
    return [
        _tenant(layer, seed_idx, kernel)
        for layer in model.kasmina_layers.values()
        for seed_idx in range(layer.num_seeds)
        if layer.state(seed_idx) in OCCUPIED and (kernel := layer.kernel(seed_idx)) is not None
    ]


def _tenant(layer: KasminaLayer, seed_idx: int, kernel: Kernel) -> _Tenant:
    assert layer.shapes is not None  # it has a kernel
    start, length = layer.chunk(seed_idx)
    alpha = _device_value(layer, "alpha_blend", seed_idx)
    voice = Voice(
        name=f"seed{seed_idx}",
        kernel=kernel,
        alpha=alpha,
        start=start,
        length=length,
        channels=layer.shapes.channels,
        channel_dim=layer.kind.channel_dim,
        device=layer.device,
    )
    state = layer.state(seed_idx)
    silence = _silence(layer, seed_idx, state, alpha)
    return _Tenant(layer.name, layer.default_transform, seed_idx, state, voice, silence)


def _silence(layer: KasminaLayer, seed_idx: int, state: SeedState, alpha: float) -> str | None:
    """Return why the layer's output does not hear the seed, or None if it does."""
    if state not in ACTIVE:
        return f"in {state.name} the kernel does not reach the output"
    if _device_value(layer, "fallback_active", seed_idx):
        reason = layer.quarantine_reason(seed_idx)
        return f"quarantined: {reason}" if reason else "quarantined"
    return "alpha is 0" if alpha == 0 else None


def _device_value(layer: KasminaLayer, field: str, seed_idx: int) -> float:
    """Read the bank itself: on CUDA its mirror does not follow a ramp or a quarantine."""
    seeds = layer.state_layout
    return float(seeds.bank.fields[field][seeds.first + seed_idx])


def _decide(plain: nn.Module, tenants: list[_Tenant], may_fold: bool) -> None:
    """Fold what can be folded, attach what else is heard, and note which was done."""
    heard = [tenant for tenant in tenants if tenant.silence is None]
    users = _users(plain)
    for tenant in heard:
        tied = any(users[id(parameter)] > 1 for parameter in _own_parameters(tenant.host))
        is_final = tenant.state is SeedState.FOSSILIZED and tenant.voice.alpha == 1
        folded = may_fold and is_final and not tied and _fold(tenant)
        tenant.outcome = Outcome.FOLDED if folded else Outcome.KEPT
    kept = [tenant for tenant in heard if tenant.outcome is Outcome.KEPT]
    for host in dict.fromkeys(tenant.host for tenant in kept):
        speaking = [tenant for tenant in kept if tenant.host is host]
        name = attach(host, [tenant.voice for tenant in speaking])
        for tenant in speaking:
            tenant.prefix = ".".join(filter(None, (tenant.layer, name, tenant.voice.name)))


def _fold(tenant: _Tenant) -> bool:
    kernel_map = folding.affine_map(tenant.kernel, tenant.host)
    if kernel_map is None:
        return False
    folding.fold(tenant.host, tenant.voice.start, kernel_map)
    return True


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _users(net: nn.Module) -> Counter[int]:
    """Count the modules that have a parameter, by its id: tied weights have several."""
    return Counter(id(p) for module in net.modules() for p in _own_parameters(module))


# ------------------------------------------------------------------ files


def _traced(
    plain: nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    with _evaluating(plain):
        program = torch.export.export(
            plain, example_inputs, dynamic_shapes=dynamic_shapes, strict=False
        )
    program.example_inputs = None  # they would travel in the file, as its only pickle
    return program


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Run the block in eval mode and give every submodule its own mode back."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes.items():
            submodule.training = training


def _publish(
    folder: Path,
    plain: nn.Module,
    program: torch.export.ExportedProgram | None,
    tenants: list[_Tenant],
) -> None:
    """Write all files aside, then move each into its place, the lineage that names them last."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as name:
        aside = Path(name)
        safetensors.torch.save_model(plain, str(aside / WEIGHTS_FILE))
        if program is not None:
            torch.export.save(program, aside / PROGRAM_FILE)
        lineage = _lineage(plain, tenants, _digests(aside))
        (aside / LINEAGE_FILE).write_text(json.dumps(lineage, indent=2) + "\n")
        (folder / PROGRAM_FILE).unlink(missing_ok=True)  # an earlier export may have left one
        for file in sorted(aside.iterdir(), key=lambda file: file.name == LINEAGE_FILE):
            file.replace(folder / file.name)


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for file in sorted(folder.iterdir()):
        with file.open("rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def _lineage(plain: nn.Module, tenants: list[_Tenant], digests: dict[str, str]) -> dict[str, Any]:
    return {
        "format_version": LINEAGE_VERSION,
        "torch_version": torch.__version__,
        "model": f"{type(plain).__module__}.{type(plain).__qualname__}",
        "files": digests,
        "kernels": [_kernel_entry(tenant) for tenant in tenants],
    }


def _kernel_entry(tenant: _Tenant) -> dict[str, Any]:
    voice, manifest = tenant.voice, tenant.kernel.manifest
    return {
        "layer": tenant.layer,
        "host": type(tenant.host).__name__,
        "seed": tenant.seed_idx,
        "channels": [voice.start, voice.start + voice.length],
        "state": tenant.state.name,
        "alpha": voice.alpha,
        "outcome": tenant.outcome.value,
        "reason": tenant.silence,
        "prefix": tenant.prefix,
        "artifact_id": manifest.artifact_id,
        "manifest": manifest.model_dump(mode="json"),
    }
