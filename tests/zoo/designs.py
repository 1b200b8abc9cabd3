"""The built-in designs, traced for small sites."""

import hashlib

import torch
from urabrask_artifacts import Artifact

import esper.blueprints as blueprints
from esper.contracts import KernelManifest, Pipeline, SiteSignature
from esper.tezzeret.trace import trace

LINEAR = SiteSignature(host="Linear", inp_shape=(None, 6), act_shape=(None, 4), channel_dim=1)
SEQUENCE = SiteSignature(
    host="Linear", inp_shape=(None, None, 6), act_shape=(None, None, 4), channel_dim=2
)
IMAGES = SiteSignature(
    host="Conv2d",
    inp_shape=(None, 3, None, None),
    act_shape=(None, 4, None, None),
    channel_dim=1,
    kernel_size=(3, 3),
    stride=(2, 2),
    padding=(1, 1),
    dilation=(1, 1),
)


def traced(name: str, site: SiteSignature, dtype: str = "float32") -> Artifact:
    design = blueprints.get(name)
    blueprint, graph, params = trace(design, site, dtype)
    files = {"graph.json": graph, "params.safetensors": params}
    manifest = KernelManifest(
        blueprint_id=blueprint.blueprint_id,
        design=design,
        pipeline=Pipeline.FAST,
        site=site,
        dtype=dtype,
        device="cpu",
        torch_version=".".join(torch.__version__.split(".")[:2]),
        num_parameters=blueprint.num_parameters,
        flops_per_sample=blueprint.flops_per_sample,
        files={file: hashlib.sha256(data).hexdigest() for file, data in files.items()},
    )
    return manifest, files
