"""From a design and a site to a blueprint: build the module, export both graphs, check them."""

import hashlib
from typing import Any, NoReturn

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    free_unbacked_symbols,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from esper.blueprints.registry import build
from esper.config import ForgeSettings
from esper.contracts import Blueprint, Design, SiteSignature, canonical_json
from esper.errors import (
    ArtifactError,
    BlueprintError,
    BudgetExceededError,
    DataDependentShapeError,
    OutputMismatchError,
)
from esper.kasmina.example import example_inputs
from esper.kasmina.graph import DTYPES, TensorSpec
from esper.kasmina.program import Program
from esper.tezzeret.encode import dtype_name, encode

_EXAMPLE_BATCH = 3  # neither 0 nor 1, which export would take for constants
_MAX_REASON = 2000  # characters of what torch.export has to say


def trace(
    design: Design, site: SiteSignature, dtype: str, settings: ForgeSettings | None = None
) -> tuple[Blueprint, bytes, bytes]:
    """Return the blueprint, its ``graph.json`` and its initial ``params.safetensors``.

    Deterministic: the parameters are drawn under a seed that the design and the site determine.
    Runs the design's code. Raises :class:`BlueprintError` where the design cannot be built or
    exported, and as its subclasses ForbiddenOperatorError, DataDependentShapeError,
    OutputMismatchError and BudgetExceededError what a kernel may not be.
    """
    seed = init_seed(design, site)
    module = instantiate(design, site, dtype, seed)
    try:
        num_parameters, flops_per_sample = _check(module, site, dtype, settings or ForgeSettings())
        graph = _program(module, site, dtype, seed).to_json()
    except (ArtifactError, BlueprintError) as error:
        kind = type(error) if isinstance(error, BlueprintError) else BlueprintError
        raise kind(f"design {design.name!r}: {error}") from error
    blueprint = Blueprint(
        design=design,
        site=site,
        dtype=dtype,
        graph_digest=hashlib.sha256(graph).hexdigest(),
        num_parameters=num_parameters,
        flops_per_sample=flops_per_sample,
    )
    return blueprint, graph, serialize_weights(module)


def init_seed(design: Design, site: SiteSignature) -> int:
    """Seed of the initial parameters; not of the dtype, so float32 and bfloat16 start alike."""
    identity = [design.model_dump(mode="json"), site.model_dump(mode="json")]
    return int(hashlib.sha256(canonical_json(identity)).hexdigest()[:13], 16)


def instantiate(design: Design, site: SiteSignature, dtype: str, seed: int) -> nn.Module:
    """Build the design's module with the initial parameters that belong to ``seed``."""
    if dtype not in DTYPES or not DTYPES[dtype].is_floating_point:
        raise BlueprintError(f"design {design.name!r}: dtype {dtype!r} is not supported")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(design, site).to(DTYPES[dtype])


def serialize_weights(module: nn.Module) -> bytes:
    """Return parameters and buffers, each once, as ``params.safetensors``."""
    weights = dict(module.named_parameters()) | dict(module.named_buffers())
    contiguous = torch.contiguous_format
    return safetensors.torch.save(
        {name: weight.detach().clone(memory_format=contiguous) for name, weight in weights.items()}
    )


def _example(site: SiteSignature, dtype: str) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    return example_inputs(site, dtype, _EXAMPLE_BATCH, generator=random)


def _check(
    module: nn.Module, site: SiteSignature, dtype: str, settings: ForgeSettings
) -> tuple[int, int]:
    """Run the module once; return its number of parameters and FLOPs per sample."""
    num_parameters = sum(p.numel() for p in module.parameters())
    _check_budget("parameters", num_parameters, settings.max_parameters)
    inp, act = _example(site, dtype)
    module.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _ComputedBytes() as memory:
        try:
            out = module(inp, act)
        except Exception as error:
            raise BlueprintError(f"does not run: {type(error).__name__}: {error}") from error
    _check_output(out, act)
    flops_per_sample = counter.get_total_flops() // _EXAMPLE_BATCH
    _check_budget("FLOPs per sample", flops_per_sample, settings.max_flops_per_sample)
    weight_bytes = sum(w.nbytes for w in (*module.parameters(), *module.buffers()))
    memory_bytes = weight_bytes + memory.total_bytes // _EXAMPLE_BATCH
    _check_budget(
        "bytes of weights and of what a sample computes", memory_bytes, settings.max_memory_bytes
    )
    return num_parameters, flops_per_sample


class _ComputedBytes(TorchDispatchMode):
    """Sums up the new memory that operators return, all of which a backward pass may keep."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _storages(args, kwargs)
        out = func(*args, **(kwargs or {}))
        self.total_bytes += sum(size for key, size in _storages(out).items() if key not in given)
        return out


def _storages(*values: object) -> dict[int, int]:
    """Return the sizes in bytes of the memory of all tensors in there, by its address."""
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _check_budget(what: str, value: int, limit: int) -> None:
    if value > limit:
        raise BudgetExceededError(f"{value} {what}, at most {limit} are allowed")


def _check_output(out: object, act: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise OutputMismatchError(f"the output must be a tensor, got {type(out).__name__}")
    if (out.shape, out.dtype) != (act.shape, act.dtype):
        raise OutputMismatchError(
            f"the output must be like act, {act.dtype} {tuple(act.shape)}, "
            f"got {out.dtype} {tuple(out.shape)}"
        )


def _program(module: nn.Module, site: SiteSignature, dtype: str, seed: int) -> Program:
    inp, act = _example(site, dtype)
    return encode(
        _export(module.train(), site, inp, act),
        _export(module.eval(), site, inp, act),
        module=module,
        inp=TensorSpec("inp", site.inp_shape, dtype_name(inp.dtype)),
        act=TensorSpec("act", site.act_shape, dtype_name(act.dtype)),
        seed=seed,
    )


def _export(module: nn.Module, site: SiteSignature, inp: Tensor, act: Tensor) -> ExportedProgram:
    dynamic = tuple(
        {dim: Dim.DYNAMIC for dim, size in enumerate(shape) if size is None}
        for shape in (site.inp_shape, site.act_shape)
    )
    try:
        exported = torch.export.export(module, (inp, act), dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        # torch.export raises whatever its many layers raise, and the design's own errors.
        _refuse_export(error)
    _check_sizes(exported)
    return exported


def _refuse_export(error: Exception) -> NoReturn:
    depends_on_data = isinstance(error, GuardOnDataDependentSymNode)
    kind = DataDependentShapeError if depends_on_data else BlueprintError
    reason = str(error).strip()[:_MAX_REASON]
    raise kind(f"cannot be exported for sizes that vary: {reason}") from error


def _check_sizes(exported: ExportedProgram) -> None:
    for node in exported.graph.nodes:
        if free_unbacked_symbols(node.meta.get("val")):
            raise DataDependentShapeError(
                f"{node.target} makes a size or a number of the values of its inputs"
            )
