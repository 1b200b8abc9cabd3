"""Artifacts made by hand, for the evaluator's tests."""

import hashlib

import safetensors.torch
import torch
from torch import Tensor

from esper.contracts import Design, KernelManifest, Pipeline, SiteSignature
from esper.kasmina.graph import Graph, Node, Ref, TensorSpec, Value
from esper.kasmina.program import Program

Artifact = tuple[KernelManifest, dict[str, bytes]]

INP, ACT = Ref("input", "inp"), Ref("input", "act")
SITE = SiteSignature(host="Linear", inp_shape=(None, 6), act_shape=(None, 4), channel_dim=1)


def param(name: str) -> Ref:
    return Ref("param", name)


def buffer(name: str) -> Ref:
    return Ref("buffer", name)


def graph(*calls: tuple[str, tuple[Value, ...]]) -> Graph:
    nodes = tuple(Node(op, args, {}) for op, args in calls)
    return Graph(nodes, Ref("node", len(nodes) - 1))


def mlp_graph(dropout: float = 0.0) -> Graph:
    """``act + up(dropout(gelu(down(inp))))``."""
    hidden: list[tuple[str, tuple[Value, ...]]] = [
        ("aten.linear.default", (INP, param("down.weight"), param("down.bias"))),
        ("aten.gelu.default", (Ref("node", 0),)),
    ]
    if dropout:
        hidden.append(("aten.dropout.default", (Ref("node", 1), dropout, True)))
    last = Ref("node", len(hidden) - 1)
    branch = Ref("node", len(hidden))
    return graph(
        *hidden,
        ("aten.linear.default", (last, param("up.weight"), param("up.bias"))),
        ("aten.add.Tensor", (ACT, branch)),
    )


def residual_mlp(*, dropout: float = 0.0, dtype: str = "float32") -> Artifact:
    """Zero at the start, as the residual designs are."""
    torch_dtype = getattr(torch, dtype)
    random = torch.Generator().manual_seed(0)
    weights = {
        "down.weight": torch.randn(8, 6, generator=random).to(torch_dtype) / 4,
        "down.bias": torch.zeros(8, dtype=torch_dtype),
        "up.weight": torch.zeros(4, 8, dtype=torch_dtype),
        "up.bias": torch.zeros(4, dtype=torch_dtype),
    }
    return artifact(mlp_graph(dropout), mlp_graph(), weights, dtype)


def batch_normed() -> Artifact:
    """Batch norm of ``act``: with buffers, and another graph in training."""
    normed = (ACT, param("scale"), param("shift"), buffer("mean"), buffer("variance"))
    train, evaluation = (
        graph(("aten.batch_norm.default", (*normed, training, 0.1, 1e-5, False)))
        for training in (True, False)
    )
    params = {"scale": torch.ones(4), "shift": torch.zeros(4)}
    return artifact(
        train, evaluation, params, buffers={"mean": torch.zeros(4), "variance": torch.ones(4)}
    )


def artifact(
    train: Graph,
    evaluation: Graph,
    params: dict[str, Tensor] | None = None,
    dtype: str = "float32",
    buffers: dict[str, Tensor] | None = None,
) -> Artifact:
    params, buffers = params or {}, buffers or {}
    program = Program(
        inp=TensorSpec("inp", SITE.inp_shape, dtype),
        act=TensorSpec("act", SITE.act_shape, dtype),
        parameters=specs(params, dtype),
        buffers=specs(buffers, dtype),
        train=train,
        eval=evaluation,
        seed=0,
    )
    files = {
        "graph.json": program.to_json(),
        "params.safetensors": safetensors.torch.save(params | buffers),
    }
    manifest = KernelManifest(
        blueprint_id="0" * 64,
        design=Design(name="residual_mlp", builder="tests:none"),
        pipeline=Pipeline.FAST,
        site=SITE,
        dtype=dtype,
        device="cpu",
        torch_version=".".join(torch.__version__.split(".")[:2]),
        num_parameters=sum(weight.numel() for weight in params.values()),
        flops_per_sample=2 * sum(weight.numel() for weight in params.values()),
        files={},
    )
    return repacked((manifest, {}), files)


def repacked(artifact: Artifact, files: dict[str, bytes]) -> Artifact:
    """Replace files, with a manifest that names the new ones."""
    manifest, others = artifact
    files = others | files
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return manifest.model_copy(update={"files": digests}), files


def specs(weights: dict[str, Tensor], dtype: str) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, tuple(w.shape), dtype) for name, w in weights.items())
