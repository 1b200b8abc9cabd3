"""What do the forge's kernels bring? Each built-in design by each pipeline, against eager PyTorch.

The eager baseline is the design's own module with the same weights. A call is a training step's
part of it: forward, and backward with every gradient, on the chunk of one of a layer's two seeds.
"""

import copy
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.clocks import Work
from benchmarks.findings import duration, exact, ratio
from benchmarks.gate import check_close
from benchmarks.harness import Build, Plan, Times, Trial
from benchmarks.kernels import DTYPE, Kernels
from benchmarks.rows import Finding
from esper import blueprints
from esper.contracts import KernelBundle, Pipeline, SiteSignature
from esper.kasmina import compiled
from esper.tezzeret.trace import instantiate
from esper.trust import verify_bundle

EAGER = "eager"
BATCH_SIZE = 32
MAX_OF_FAST = round(1 / 0.97, 4)  # times the eager module's time
MAX_OF_MEDIAN = 1.0
MAX_OF_BEST = 1.0
MAX_FAST_BUILD_S = 1.0
MAX_FAST_LOAD_US = 2000.0

LINEAR = SiteSignature(host="Linear", inp_shape=(None, 128), act_shape=(None, 64), channel_dim=1)
SEQUENCE = SiteSignature(
    host="Linear", inp_shape=(None, None, 64), act_shape=(None, None, 64), channel_dim=2
)
CONV = SiteSignature(
    host="Conv2d",
    inp_shape=(None, 16, None, None),
    act_shape=(None, 16, None, None),
    channel_dim=1,
    kernel_size=(3, 3),
    stride=(1, 1),
    padding=(1, 1),
    dilation=(1, 1),
)
FREE_SIZE = {LINEAR: 0, SEQUENCE: 32, CONV: 16}  # of positions
BATCH_SIZES = {LINEAR: BATCH_SIZE, SEQUENCE: 8, CONV: 8}
SITES = {
    "residual_mlp": LINEAR,
    "low_rank": LINEAR,
    "gated": LINEAR,
    "norm": LINEAR,
    "standardize": LINEAR,
    "channel_attention": SEQUENCE,
    "self_attention": SEQUENCE,
    "conv_bottleneck": CONV,
    "depthwise": CONV,
}
# Each compiles three times by AGGRESSIVE, which is a minute or more.
AGGRESSIVE = ("gated",)
QUICK = ("low_rank",)


@dataclass(frozen=True)
class Made:
    """What a pipeline delivers; the same bundle twice where one points to a simpler one."""

    bundle: KernelBundle
    build_s: float


def trials(plan: Plan, kernels: Kernels) -> list[Trial]:
    """Compile everything, which takes most of this case's minutes, and return the comparisons."""
    ratios: list[float] = []  # of FAST, for the last trial to report their median
    designs = QUICK if plan.quick else tuple(SITES)
    made = [against_eager(name, plan, kernels, ratios) for name in designs]
    return [*made, loading(designs[0], plan, kernels, ratios)]


def pipelines(design: str, plan: Plan) -> Iterator[Pipeline]:
    yield Pipeline.FAST
    if not plan.quick:
        yield Pipeline.STANDARD
    if design in AGGRESSIVE and not plan.quick:
        yield Pipeline.AGGRESSIVE


def against_eager(design: str, plan: Plan, kernels: Kernels, ratios: list[float]) -> Trial:
    site = SITES[design]
    made = {
        pipeline: Made(*kernels.compile(design, site, pipeline))
        for pipeline in pipelines(design, plan)
    }
    templates: dict[str, nn.Module] = {EAGER: eager_module(design, site, plan)}
    for pipeline, result in made.items():
        if result.bundle.record.manifest.pipeline is pipeline:
            templates[pipeline] = kernel_like(templates[EAGER], result.bundle, plan)
    name = f"{design}, {site.host}"

    def report(times: Times) -> Iterator[Finding]:
        ratios.append(times.ratio(Pipeline.FAST, EAGER).value)
        best = min((work for work in templates if work != EAGER), key=times.median)
        for pipeline, result in made.items():
            delivered = result.bundle.record.manifest.pipeline
            row = f"{name}, forward+backward, {pipeline} / {EAGER}"
            if delivered is not pipeline:
                row += f" (delivers {delivered})"
            limit = MAX_OF_FAST if pipeline is Pipeline.FAST else None
            yield ratio(times, delivered, EAGER, row, at_most=limit)
            yield seconds(f"{name}, {pipeline}: compiling", result.build_s, pipeline)
        row = f"{name}, forward+backward, the best, {best} / {EAGER}"
        yield ratio(times, best, EAGER, row, at_most=MAX_OF_BEST)

    def check() -> None:
        expected = computed(templates[EAGER], site, plan)
        for work, template in templates.items():
            for what, tensor in computed(template, site, plan).items():
                check_close(f"{name}, {work}: {what}", expected[what], tensor)

    def build(template: nn.Module) -> Build:
        return lambda: step(copy.deepcopy(template), site, plan)

    works = {work: build(template) for work, template in templates.items()}
    return Trial(name, works, check, report, grad=True)


def loading(design: str, plan: Plan, kernels: Kernels, ratios: list[float]) -> Trial:
    """From a bundle to a kernel: verify, parse, generate and compile the source, make tensors."""
    bundle, _ = kernels.compile(design, SITES[design], Pipeline.FAST)

    def load() -> None:
        verify_bundle(bundle, kernels.trusted_key)
        compiled.build(bundle.record.manifest, bundle.files)

    def report(times: Times) -> Iterable[Finding]:
        row = f"{design}, FAST: verifying and building"
        yield duration(times, "load", row, unit="us", at_most=MAX_FAST_LOAD_US)
        row = f"FAST / {EAGER}, the median of {len(ratios)} designs"
        median = statistics.median(ratios)
        yield exact(row, "time ratio", median, unit="x", at_most=MAX_OF_MEDIAN)

    return Trial("loading", {"load": lambda: load}, load, report, on_host=True)


def seconds(row: str, elapsed_s: float, pipeline: Pipeline) -> Finding:
    """Return a duration that was measured once."""
    if pipeline is Pipeline.FAST:
        return exact(row, "time", elapsed_s, unit="s", at_most=MAX_FAST_BUILD_S)
    return Finding(
        row=row, metric="time", value=elapsed_s, low=elapsed_s, high=elapsed_s, samples=1, unit="s"
    )


def eager_module(design: str, site: SiteSignature, plan: Plan) -> nn.Module:
    """Return the design's module, with weights that do something."""
    module = instantiate(blueprints.get(design), site, DTYPE, plan.seed).train()
    generator = torch.Generator().manual_seed(plan.seed)
    for weight in module.parameters():
        fan_in = weight[0].numel() if weight.dim() > 1 else 4
        weight.data.copy_(torch.randn(weight.shape, generator=generator) / fan_in**0.5)
    return module.to(plan.device)


def kernel_like(module: nn.Module, bundle: KernelBundle, plan: Plan) -> nn.Module:
    """Return the bundle's kernel with the weights of the design's own module."""
    kernel = compiled.build(bundle.record.manifest, bundle.files).to(plan.device).train()
    weights = zip(kernel.weights(), module.parameters(), strict=True)
    for ours, theirs in weights:
        ours.data.copy_(theirs.data)
    return kernel


def step(module: nn.Module, site: SiteSignature, plan: Plan) -> Work:
    inp, wide, cotangent = given(site, plan)
    act = wide.narrow(site.channel_dim, 0, site.act_channels)
    return lambda: module(inp, act).backward(cotangent)


def given(site: SiteSignature, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Return the layer's input, its output, of which the seed has the first half, and a gradient."""
    generator = torch.Generator().manual_seed(plan.seed)

    def draw(shape: Iterable[int | None]) -> Tensor:
        sizes = [FREE_SIZE[site] if size is None else size for size in shape]
        sizes[0] = BATCH_SIZES[site]
        return torch.randn(sizes, generator=generator).to(plan.device)

    inp, act, other = draw(site.inp_shape), draw(site.act_shape), draw(site.act_shape)
    wide = torch.cat((act, other), site.channel_dim)
    return inp.requires_grad_(), wide.requires_grad_(), draw(site.act_shape)


def computed(module: nn.Module, site: SiteSignature, plan: Plan) -> dict[str, Tensor]:
    inp, wide, cotangent = given(site, plan)
    out = module(inp, wide.narrow(site.channel_dim, 0, site.act_channels))
    leaves = {"inp": inp, "act": wide}
    leaves |= {f"weight {n}": weight for n, weight in enumerate(module.parameters())}
    grads = torch.autograd.grad(
        out, list(leaves.values()), cotangent, materialize_grads=True, allow_unused=True
    )
    found = {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True) if g.any()}
    return {"output": out.detach()} | found
