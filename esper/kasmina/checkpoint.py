"""``esper.save`` and ``esper.load``: a training run that stops between two steps and goes on.

A checkpoint holds numbers and names, no code: kernels are named by their digest and come from the
library, verified as always. ``model.safetensors`` has the weights and buffers by the names that
``state_dict()`` gives them, ``training.safetensors`` all other tensors, ``training.json`` the rest.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from esper.contracts import SeedId, SeedState
from esper.errors import ArtifactError, ArtifactNotFoundError, CheckpointError
from esper.kasmina.capture import capture, restore
from esper.kasmina.checkpoint_files import publish, verified_files
from esper.kasmina.enrollment import Attachment
from esper.kasmina.kernel import Kernel
from esper.kasmina.loader import KernelLoader, KernelSource
from esper.kasmina.model import MorphableModel, unwrap, wrap
from esper.kasmina.optimizer_state import (
    Optimizer,
    Optimizers,
    check_optimizers,
    named_optimizers,
    optimizer_states,
    restore_optimizers,
)
from esper.kasmina.random_state import random_state, restore_random_state
from esper.kasmina.resume import KasminaRecord
from esper.kasmina.seat import Seat
from esper.kasmina.seats import SEATS
from esper.kasmina.tree import Tensors, pack, unpack

_MODEL = "model.safetensors"
_TENSORS = "training.safetensors"
_RECORDS = "training.json"
_BANK = "bank/"


def save(
    model: MorphableModel,
    folder: str | os.PathLike[str],
    optimizer: Optimizers | None = None,
    *,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Make the state of a training run the checkpoint in ``folder``, in place of an earlier one.

    Call it on the training thread between two steps: after ``model.step()``, when gradients have
    been used, as they are not saved. ``optimizer`` may be several: a list or a dict of them.
    ``extra`` is for whatever else has a state, such as ``{"scheduler": scheduler.state_dict()}``:
    None, bool, int, float, str, list, tuple, dict, Counter and Tensor. The run itself goes on as if
    nothing had been saved.

    Killed at any instant it leaves the former checkpoint or the new one, whole. Synchronises with
    the device. Raises ``TypeError`` for a model that is not wrapped, for anything but optimizers and
    for a value in ``extra`` or in an optimizer that cannot be saved, ``ValueError`` for an optimizer
    of another model.
    """
    _check_wrapped(model)
    optimizers = named_optimizers(optimizer)
    host, kernels = _host_state(model), _kernel_tensors(model)
    others = {name: value for name, value in host.items() if not isinstance(value, Tensor)}
    weights, aliases = _without_aliases(
        {name: value for name, value in (host | kernels).items() if isinstance(value, Tensor)}
    )
    tensors = {f"{_BANK}{name}": field for name, field in model.kasmina.bank.capture().items()}
    training = {
        "optimizers": optimizer_states(optimizers, _parameters(model)),
        "attached": _attached(model, optimizers),
        "seat_generators": [
            (name, seat.seed_idx, seat.rng_state)
            for name, seat in _seats(model)
            if seat.rng_state is not None
        ],
        "random": random_state(),
        "buffers_of_other_kinds": others,
        "extra": dict(extra or {}),
    }
    records = {
        "kasmina": capture(model.kasmina).model_dump(mode="json"),
        "aliases": aliases,
        **{name: pack(value, name, tensors) for name, value in training.items()},
    }
    parts = {
        _MODEL: partial(_write_tensors, weights),
        _TENSORS: partial(_write_tensors, tensors),
        _RECORDS: partial(_write_json, records),
    }
    publish(Path(folder), parts)


def load(
    folder: str | os.PathLike[str],
    net: nn.Module,
    optimizer: Optimizers | None = None,
    *,
    library: KernelSource | None = None,
    restore_rng: bool = True,
) -> dict[str, Any]:
    """Put ``net`` where the saved run was, so that it goes on bit for bit; return its ``extra``.

    ``net`` is freshly built, as before it was wrapped, and is wrapped here, in place, with the saved
    settings (or is freshly wrapped with the same). ``optimizer`` is freshly made on its parameters;
    it receives the saved groups and states and, if the saved one was, is attached to the model; of
    several, each takes on what was saved under its name or number. Without one what was saved of
    optimizers is left out. Kernels come from ``library`` (which is then
    connected) or the one that ``net`` is connected to. With ``restore_rng`` the random number
    generators of PyTorch, Python and NumPy go back to where they were.

    ``train()`` or ``eval()`` and the host's ``requires_grad`` stay as the net was built. Reads files
    and synchronises with the device. Raises :class:`CheckpointError` if a file is missing or
    altered, or the net, its settings or the optimizer are other ones, and :class:`ArtifactError` if
    a kernel cannot be had; net and optimizer are then as they were.
    """
    optimizers = named_optimizers(optimizer)
    saved = _Saved.read(Path(folder))
    if isinstance(net, MorphableModel):
        _check_fresh(net, saved.kasmina)
        extra = _load_wrapped(saved, net, optimizers, library)
    else:
        extra = _load_unwrapped(saved, net, optimizers, library)
    if restore_rng:
        restore_random_state(saved.value("random"))
    return extra


@dataclass(frozen=True)
class _Saved:
    """A checkpoint that has been read and verified."""

    records: dict[str, Any]
    kasmina: KasminaRecord
    weights: Tensors  # by the names of ``state_dict()``, kernels included
    tensors: Tensors

    @classmethod
    def read(cls, folder: Path) -> "_Saved":
        files = verified_files(folder)
        records = json.loads(files[_RECORDS].read_bytes())
        weights = safetensors.torch.load_file(files[_MODEL])
        weights |= {alias: weights[name] for alias, name in records["aliases"].items()}
        try:
            kasmina = KasminaRecord.model_validate_json(json.dumps(records["kasmina"]))
        except ValueError as error:
            raise CheckpointError(f"{files[_RECORDS]} has other records: {error}") from None
        return cls(records, kasmina, weights, safetensors.torch.load_file(files[_TENSORS]))

    def value(self, name: str) -> Any:
        return unpack(self.records[name], self.tensors)

    def bank(self) -> Tensors:
        return {
            name.removeprefix(_BANK): field
            for name, field in self.tensors.items()
            if name.startswith(_BANK)
        }

    def host_weights(self) -> Tensors:
        kernels = tuple(_seats_prefix(layer.name) for layer in self.kasmina.layers if layer.seats)
        return {n: tensor for n, tensor in self.weights.items() if not n.startswith(kernels)}

    def kernel_weights(self, name: str, seed_idx: int) -> Tensors:
        prefix = _kernel_prefix(name, seed_idx)
        return {
            weight.removeprefix(prefix): tensor
            for weight, tensor in self.weights.items()
            if weight.startswith(prefix)
        }


def _load_unwrapped(
    saved: _Saved,
    net: nn.Module,
    optimizers: dict[str, Optimizer],
    library: KernelSource | None,
) -> dict[str, Any]:
    # Before it is wrapped: names of parameters say more than that a layer was not found.
    _check_tensors(_tensors_of(net.state_dict()), saved.host_weights(), type(net).__name__)
    layers = [layer.name for layer in saved.kasmina.layers]
    model = wrap(net, layers, settings=saved.kasmina.settings)
    try:
        return _load_wrapped(saved, model, optimizers, library)
    except BaseException:
        unwrap(model, discard_kernels=True)
        raise


def _load_wrapped(
    saved: _Saved,
    model: MorphableModel,
    optimizers: dict[str, Optimizer],
    library: KernelSource | None,
) -> dict[str, Any]:
    """Check everything first, change things last."""
    _check_layers(model, saved.kasmina)
    _check_tensors(_tensors_of(model.state_dict()), saved.host_weights(), type(model).__name__)
    source = library if library is not None else model.kasmina.library
    kernels = _prepare_kernels(saved, model, source)
    learnable = {
        f"{_kernel_prefix(*seed_id)}{name}"
        for seed_id, kernel in kernels.items()
        for name, _ in kernel.named_parameters()
    }
    states = saved.records["optimizers"]
    check_optimizers(states, optimizers, _parameters(model), learnable)
    others, extra = saved.value("buffers_of_other_kinds"), saved.value("extra")

    model.load_state_dict(saved.host_weights() | others)
    model.kasmina.bank.restore(saved.bank())
    restore(model.kasmina, saved.kasmina, kernels)
    for name, seed_idx, generator_state in saved.value("seat_generators"):
        _seat(model, name, seed_idx).rng_state = generator_state
    if library is not None:
        model.connect(library)
    if optimizers:
        restore_optimizers(states, optimizers, _parameters(model), saved.tensors)
        model.kasmina.enrollment.restore(
            [Attachment(optimizers[name], options) for name, options in saved.value("attached")]
        )
    return dict(extra)


# ---------------------------------------------------------------------- kernels


def _prepare_kernels(
    saved: _Saved, model: MorphableModel, source: KernelSource | None
) -> dict[SeedId, Kernel]:
    """Have all kernels ready, with the saved weights, before anything is changed."""
    wanted = {
        (layer.name, seat.seed_idx): seat.artifact_id
        for layer in saved.kasmina.layers
        for seat in layer.seats
    }
    if not wanted:
        return {}
    if source is None:
        raise CheckpointError(
            f"the checkpoint needs kernels ({_listed(wanted)}) and no library is given: "
            "call esper.load with library=..."
        )
    loader = KernelLoader(source, model.kasmina.cache)
    return _with_saved_weights(saved, _prepared(saved, model, loader, wanted))


def _prepared(
    saved: _Saved, model: MorphableModel, loader: KernelLoader, wanted: dict[SeedId, str]
) -> dict[SeedId, Kernel]:
    kernels, missing = {}, {}
    for record in saved.kasmina.layers:
        layer = model.kasmina.layers[record.name]
        for seat in record.seats:
            seed_id, place = (record.name, seat.seed_idx), layer.site_in(record, seat.seed_idx)
            try:
                kernels[seed_id] = loader.prepare(
                    seat.artifact_id, place, layer.dtype, layer.device
                )
            except ArtifactNotFoundError:
                missing[seed_id] = wanted[seed_id]
            except ArtifactError as error:
                error.add_note(f"needed by the checkpoint for {layer.seed_name(seat.seed_idx)}")
                raise
    if missing:
        raise ArtifactNotFoundError(
            f"the library lacks kernels of the checkpoint: {_listed(missing)}"
        )
    return kernels


def _with_saved_weights(saved: _Saved, kernels: dict[SeedId, Kernel]) -> dict[SeedId, Kernel]:
    for (name, seed_idx), kernel in kernels.items():
        weights = saved.kernel_weights(name, seed_idx)
        _check_tensors(kernel.state_dict(), weights, f"the kernel of seed {seed_idx} on '{name}'")
        kernel.load_state_dict(weights)
    return kernels


def _listed(wanted: dict[SeedId, str]) -> str:
    return ", ".join(
        f"{artifact_id} for seed {seed_idx} on '{name}'"
        for (name, seed_idx), artifact_id in wanted.items()
    )


# ---------------------------------------------------------------------- checks


def _check_wrapped(model: nn.Module) -> None:
    if not isinstance(model, MorphableModel):
        raise TypeError(f"{type(model).__name__} is not wrapped by esper.wrap")


def _check_fresh(model: MorphableModel, record: KasminaRecord) -> None:
    busy = model.kasmina.seeds_in(frozenset(SeedState) - {SeedState.DORMANT})
    if busy:
        raise CheckpointError(f"esper.load needs a fresh model, but seeds {busy} are not DORMANT")
    ours, theirs = model.kasmina.settings.model_dump(), record.settings.model_dump()
    differing = [
        f"{name} is {ours[name]}, the checkpoint has {theirs[name]}"
        for name in ours
        if ours[name] != theirs[name]
    ]
    if differing:
        raise CheckpointError(f"the model is wrapped with other settings: {'; '.join(differing)}")


def _check_layers(model: MorphableModel, record: KasminaRecord) -> None:
    found = {name: layer.host_name for name, layer in model.kasmina.layers.items()}
    expected = {layer.name: layer.host for layer in record.layers}
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise CheckpointError(
                f"layer '{name}' that carries seeds is {found.get(name)} in the model and "
                f"{expected.get(name)} in the checkpoint (None: it carries none)"
            )
    if [*found] != [*expected]:
        raise CheckpointError(f"the layers come in order {[*found]}, expected {[*expected]}")


def _check_tensors(found: Tensors, expected: Tensors, owner: str) -> None:
    """Compare names, shapes and dtypes, and raise an error that names all differences."""
    problems = [f"'{name}' is missing in the model" for name in expected if name not in found]
    problems += [f"'{name}' is missing in the checkpoint" for name in found if name not in expected]
    for name, tensor in found.items():
        ours, theirs = tensor, expected.get(name, tensor)
        if ours.shape != theirs.shape:
            problems.append(
                f"'{name}' has shape {tuple(ours.shape)} in the model and "
                f"{tuple(theirs.shape)} in the checkpoint"
            )
        elif ours.dtype is not theirs.dtype:
            problems.append(
                f"'{name}' is {ours.dtype} in the model and {theirs.dtype} in the checkpoint"
            )
    if problems:
        raise CheckpointError(f"the checkpoint does not fit {owner}: {'; '.join(problems)}")


# ---------------------------------------------------------------------- names and tensors


def _seats_prefix(layer_name: str) -> str:
    return f"{layer_name}.{SEATS}." if layer_name else f"{SEATS}."


def _kernel_prefix(layer_name: str, seed_idx: int) -> str:
    return f"{_seats_prefix(layer_name)}{seed_idx}.kernel."


def _seats(model: MorphableModel) -> Iterator[tuple[str, Seat]]:
    for name, layer in model.kasmina.layers.items():
        for seat in layer.occupants():
            yield name, seat


def _seat(model: MorphableModel, name: str, seed_idx: int) -> Seat:
    [seat] = [s for s in model.kasmina.layers[name].occupants() if s.seed_idx == seed_idx]
    return seat


def _host_state(model: MorphableModel) -> dict[str, Any]:
    """Return the ``state_dict()`` without kernels; extra state need not be a tensor."""
    kernels = tuple({_seats_prefix(name) for name, _ in _seats(model)})
    return {k: value for k, value in model.state_dict().items() if not k.startswith(kernels)}


def _kernel_tensors(model: MorphableModel) -> Tensors:
    """Return weights and buffers of all kernels, also of those that the host does not hear."""
    return {
        f"{_kernel_prefix(name, seat.seed_idx)}{weight}": tensor
        for name, seat in _seats(model)
        for weight, tensor in seat.kernel.state_dict().items()
    }


def _parameters(model: MorphableModel) -> Tensors:
    """Return all parameters by name, also of kernels that the host does not hear."""
    isolated = {
        f"{_kernel_prefix(name, seat.seed_idx)}{weight}": parameter
        for name, seat in _seats(model)
        if seat.isolated
        for weight, parameter in seat.kernel.named_parameters()
    }
    return {**dict(model.named_parameters()), **isolated}


def _tensors_of(state: Mapping[str, Any]) -> Tensors:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _attached(
    model: MorphableModel, optimizers: dict[str, Optimizer]
) -> list[tuple[str, dict[str, Any]]]:
    """Return names and options of seeds of the attached ones, in the order in which they were."""
    return [
        (name, attachment.group_options)
        for attachment in model.kasmina.enrollment.attachments
        for name, optimizer in optimizers.items()
        if attachment.optimizer is optimizer
    ]


def _without_aliases(tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
    """Return every tensor once, and alias -> name for those that have several, as tied weights."""
    names: dict[tuple[Any, ...], str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        _check_storable(name, tensor)
        place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        first = names.setdefault(place, name) if tensor.numel() else name
        if first != name:
            aliases[name] = first
    return {name: tensor for name, tensor in tensors.items() if name not in aliases}, aliases


def _write_tensors(tensors: Tensors, path: Path) -> None:
    safetensors.torch.save_file(
        {name: _storable(name, tensor) for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt"},
    )


def _storable(name: str, tensor: Tensor) -> Tensor:
    """Return the tensor as safetensors takes it: contiguous, on the CPU, in memory of its own."""
    _check_storable(name, tensor)
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _check_storable(name: str, tensor: Tensor) -> None:
    if hasattr(tensor, "placements"):
        raise TypeError(
            f"'{name}' is sharded, and esper.save writes what one process has: save the "
            "state_dict() by torch.distributed.checkpoint"
        )
    if tensor.layout is not torch.strided or tensor.dtype is torch.complex128:
        raise TypeError(f"'{name}' is {tensor.dtype}, {tensor.layout}, which cannot be saved")


def _write_json(records: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(records, allow_nan=False), encoding="utf-8")
