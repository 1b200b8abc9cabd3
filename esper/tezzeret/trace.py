"""From a design and a site to a blueprint: build the module, export both graphs, check them."""

import hashlib

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils.flop_counter import FlopCounterMode

from esper.blueprints.example import example_inputs
from esper.blueprints.registry import build
from esper.config import ForgeSettings
from esper.contracts import Blueprint, Design, SiteSignature, canonical_json
from esper.errors import ArtifactError, BlueprintError
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
    exported, calls what a kernel may not call, gives an output unlike ``act``, or costs more
    than ``settings`` allow.
    """
    seed = init_seed(design, site)
    module = instantiate(design, site, dtype, seed)
    try:
        num_parameters, flops_per_sample = _check(module, site, dtype, settings or ForgeSettings())
        graph = _program(module, site, dtype, seed).to_json()
    except (ArtifactError, BlueprintError) as error:
        raise BlueprintError(f"design {design.name!r}: {error}") from error
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
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            out = module(inp, act)
        except Exception as error:
            raise BlueprintError(f"does not run: {type(error).__name__}: {error}") from error
    _check_output(out, act)
    flops_per_sample = counter.get_total_flops() // _EXAMPLE_BATCH
    _check_budget("FLOPs per sample", flops_per_sample, settings.max_flops_per_sample)
    return num_parameters, flops_per_sample


def _check_budget(what: str, value: int, limit: int) -> None:
    if value > limit:
        raise BlueprintError(f"{value} {what}, at most {limit} are allowed")


def _check_output(out: object, act: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise BlueprintError(f"the output must be a tensor, got {type(out).__name__}")
    if (out.shape, out.dtype) != (act.shape, act.dtype):
        raise BlueprintError(
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
        return torch.export.export(module, (inp, act), dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        # torch.export raises whatever its many layers raise, and the design's own errors.
        reason = str(error).strip()[:_MAX_REASON]
        raise BlueprintError(f"cannot be exported for sizes that vary: {reason}") from error
