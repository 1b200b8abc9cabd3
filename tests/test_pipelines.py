"""STANDARD and AGGRESSIVE: what is compiled, what is kept of it, and what is refused."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import forge_samples as samples
import native_artifacts
import pytest
import torch
from forge_samples import PLANTINGS, SITES
from native_artifacts import repacked
from torch import Tensor

from esper import blueprints
from esper.config import EvaluatorSettings
from esper.contracts import Design, KernelStatus, Pipeline, Speedup, UrabraskValidationReport
from esper.errors import ArtifactIntegrityError, ArtifactMismatchError
from esper.kasmina.compiled import StepPlan
from esper.kasmina.kernel import Kernel
from esper.tezzeret import attempts, inductor
from esper.tezzeret.inductor import UnsuitableError, Variant, compile_step
from esper.tezzeret.pipelines import Delivery, deliver
from esper.tezzeret.trace import trace
from esper.tezzeret.trial import BATCH_SIZE, Bench, WrongResultError
from esper.tezzeret.variants import STANDARD, variants
from esper.urabrask.gauntlet import Gauntlet
from esper.urabrask.sandbox import Sandbox

pytestmark = pytest.mark.timeout(300)  # the first one compiles

SETTINGS = EvaluatorSettings(
    timeout_s=60.0, memory_limit_bytes=2 * 2**30, batch_sizes=(1, 7), timed_rounds=5
)
GATED = blueprints.get("gated")


@pytest.fixture(scope="module")
def artifact() -> native_artifacts.Artifact:
    return native_artifacts.gated()


# ------------------------------------------------------------------ what is compiled


@pytest.fixture
def plan_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor._Traced, "compile", lambda self, graph, variant, folder: b"")


def plan_of(kernel: Kernel, inp: Tensor, act: Tensor) -> StepPlan:
    files = compile_step(kernel, inp, act, STANDARD)
    return StepPlan.from_json(files["native.json"], 2 + len(kernel.program.parameters))


def admits(plan: StepPlan, *tensors: Tensor) -> bool:
    return plan.layout.admits([(x.shape, x.stride()) for x in tensors])


TRACED = [
    (site, design)
    for site, design in PLANTINGS
    if site in ("linear", "sequence", "conv2d", "embedding")
    # The mean over the input's positions: nothing that is kept has their number.
    and (site == "embedding" or design != "channel_attention")
]


@pytest.mark.usefixtures("plan_only")
@pytest.mark.parametrize(("site_name", "design_name"), TRACED)
def test_plans_of_built_in_designs(site_name: str, design_name: str) -> None:
    kernel = samples.kernel(blueprints.get(design_name), site_name)
    bench = Bench(kernel)
    inp, act = bench.example()
    plan = plan_of(kernel, inp, act)
    assert plan.gradients[0] is None or inp.is_floating_point()
    assert all(place is not None for place in plan.gradients[1:])
    assert admits(plan, inp, act)
    assert admits(plan, *bench.example(chunk=False))
    assert not admits(plan, *bench.example(1))
    if plan.gradients[0] is not None:
        assert not admits(plan, inp, act[:-1])


@pytest.mark.usefixtures("plan_only")
def test_sizes_that_nothing_tells() -> None:
    kernel = samples.kernel(blueprints.get("channel_attention"), "conv2d")
    with pytest.raises(UnsuitableError, match="needs the size of a tensor that is not kept"):
        plan_of(kernel, *Bench(kernel).example())


@pytest.mark.usefixtures("plan_only")
def test_sizes_that_follow_from_others() -> None:
    kernel = samples.kernel(blueprints.get("low_rank"), "conv2d")  # stride (2, 1), padding (0, 1)
    plan = plan_of(kernel, *Bench(kernel).example())

    def shapes(*sizes: int, out: tuple[int, ...]) -> bool:
        return admits(plan, torch.empty(32, 6, *sizes), torch.empty(32, 5, *out))

    assert shapes(15, 12, out=(7, 12))
    assert shapes(16, 12, out=(7, 12))
    assert not shapes(17, 12, out=(7, 12))
    assert not shapes(15, 12, out=(1, 12))  # which PyTorch would broadcast


@pytest.mark.usefixtures("plan_only")
def test_a_size_that_the_compiler_fixes(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(traced: inductor._Traced, graph: object, variant: Variant, folder: Path) -> bytes:
        assert int(traced.inputs[0].shape[0]) == BATCH_SIZE  # which Inductor does for some
        return b""

    monkeypatch.setattr(inductor._Traced, "compile", compiled)
    kernel = samples.kernel(GATED)
    with pytest.raises(UnsuitableError, match="the compiler fixes a size that varies, to 32"):
        plan_of(kernel, *Bench(kernel).example())


@pytest.mark.parametrize(
    ("design", "message"),
    [
        (samples.design(samples.Stateful), "it has buffers"),
        (
            Design(name="Residual", builder="kasmina_library:Residual", hparams={"dropout": 0.5}),
            "it draws random numbers",
        ),
    ],
)
def test_what_no_library_may_compute(design: Design, message: str) -> None:
    kernel = samples.kernel(design)
    with pytest.raises(UnsuitableError, match=message):
        compile_step(kernel, *Bench(kernel).example(), STANDARD)


# ------------------------------------------------------------------ what is kept


@pytest.fixture
def speed() -> dict[str, float]:
    """How much faster than FAST each variant pretends to be."""
    return {}


@pytest.fixture
def pretending(
    artifact: native_artifacts.Artifact, speed: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compile nothing anew, and measure nothing: what is decided does not follow the clock."""
    libraries = {n: artifact[1][n] for n in ("native.json", "forward.so", "backward.so")}

    def compiled(kernel: Kernel, inp: Tensor, act: Tensor, variant: Variant) -> dict[str, bytes]:
        if variant.name not in speed:
            raise RuntimeError(f"g++ refuses\nline after line: {variant.name}")
        return libraries

    def speedups(bench: Bench, steps: Mapping[str, object], demand: str) -> dict[str, Speedup]:
        share = 1.0 if demand == "inp+act+weights" else 0.8
        ratios = {name: share * speed[name] for name in steps}
        return {n: Speedup(median=r, low=r - 0.05, high=r + 0.05) for n, r in ratios.items()}

    monkeypatch.setattr(attempts, "compile_step", compiled)
    monkeypatch.setattr(Bench, "speedups", speedups)


def delivered(pipeline: Pipeline, design: Design = GATED) -> Delivery:
    blueprint, graph, _ = trace(design, SITES["linear"], "float32")
    return deliver(blueprint, graph, "cpu", pipeline)


FAST_ID = samples.artifact(GATED)[0].artifact_id


@pytest.mark.usefixtures("pretending")
def test_what_is_faster_is_delivered(speed: dict[str, float]) -> None:
    speed["standard"] = 1.3
    delivery = delivered(Pipeline.STANDARD)
    native = delivery.manifest.native
    assert native is not None
    assert (delivery.manifest.pipeline, delivery.remark) == (Pipeline.STANDARD, "")
    assert native.speedups == {
        "inp+act+weights": Speedup(median=1.3, low=1.25, high=1.35)
    }  # 0.8 of it is less than 1.1
    assert 0 < native.gradient_error < 2e-6
    assert delivery.files.keys() == delivery.manifest.files.keys()


@pytest.mark.usefixtures("pretending")
def test_what_is_no_faster_points_to_fast(speed: dict[str, float]) -> None:
    speed["standard"] = 1.09
    delivery = delivered(Pipeline.STANDARD)
    assert delivery.manifest.artifact_id == FAST_ID
    assert delivery.remark == (
        f"STANDARD points to kernel {FAST_ID} of FAST: "
        "standard brings 1.09x (1.04 to 1.14); 1.1x of FAST is needed"
    )


@pytest.mark.usefixtures("pretending")
def test_what_does_not_compile_points_to_fast() -> None:
    delivery = delivered(Pipeline.STANDARD)
    assert delivery.manifest.artifact_id == FAST_ID
    assert "of FAST: standard: RuntimeError: g++ refuses; 1.1x" in delivery.remark


@pytest.mark.usefixtures("pretending")
def test_aggressive_keeps_the_fastest(speed: dict[str, float]) -> None:
    first, second = (v.name for v in variants(Pipeline.AGGRESSIVE, "cpu")[:2])
    speed.update({first: 1.2, second: 1.4})
    manifest = delivered(Pipeline.AGGRESSIVE).manifest
    assert manifest.native is not None
    assert (manifest.pipeline, manifest.native.variant) == (Pipeline.AGGRESSIVE, second)


@pytest.mark.usefixtures("pretending")
def test_aggressive_that_is_no_faster_delivers_standard(speed: dict[str, float]) -> None:
    first, second = (v.name for v in variants(Pipeline.AGGRESSIVE, "cpu")[:2])
    speed.update({first: 1.4, second: 1.2})
    delivery = delivered(Pipeline.AGGRESSIVE)
    assert delivery.manifest.pipeline is Pipeline.STANDARD
    assert delivery.remark.startswith("AGGRESSIVE delivers what STANDARD does: ")


@pytest.mark.usefixtures("pretending")
def test_seeds_that_compute_as_one_are_not_compiled() -> None:
    delivery = delivered(Pipeline.STANDARD, blueprints.get("low_rank"))
    assert delivery.manifest.pipeline is Pipeline.FAST
    assert delivery.remark.endswith("all of its seeds compute as one, by the op bottleneck")


def test_wrong_gradients_are_noticed(artifact: native_artifacts.Artifact) -> None:
    manifest, files = artifact
    kernel = Kernel.build(manifest, files)
    plan = StepPlan.from_json(files["native.json"], 6)
    for wrong in ((None, *plan.gradients[1:]), (*plan.gradients[:1], None, *plan.gradients[2:])):
        step = attempts.CompiledStep(
            kernel.program,
            StepPlan(plan.layout, plan.saved_inputs, plan.num_saved, wrong),
            files,
            ["inp+act+weights"],
        )
        with pytest.raises(WrongResultError, match=r"the gradient of (inp|act) is off by 1\.0e"):
            Bench(kernel).error(step)


def test_measures_by_what_it_is_faster(artifact: native_artifacts.Artifact) -> None:
    kernel = Kernel.build(*artifact)
    plan = StepPlan.from_json(artifact[1]["native.json"], 6)
    bench = Bench(kernel)
    assert bench.demands() == ["inp+act+weights", "act+weights", "weights", "inp+act"]
    step = attempts.CompiledStep(kernel.program, plan, artifact[1], bench.demands())
    for demand in bench.demands():
        [speedup] = bench.speedups({"standard": step}, demand).values()
        assert 0 < speedup.low <= speedup.median <= speedup.high


def test_fixed_functions_ask_for_no_weights() -> None:
    kernel = samples.kernel(blueprints.get("standardize"))
    assert Bench(kernel).demands() == ["inp+act", "act"]
    kernel = samples.kernel(blueprints.get("norm"), "embedding")
    assert Bench(kernel).demands() == ["act+weights", "weights", "act"]


# ------------------------------------------------------------------ what is refused


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


def examine(sandbox: Sandbox, specimen: native_artifacts.Artifact) -> UrabraskValidationReport:
    return Gauntlet(SETTINGS, sandbox).run(*specimen)


def test_the_gauntlet_runs_machine_code(
    sandbox: Sandbox, artifact: native_artifacts.Artifact
) -> None:
    report = examine(sandbox, artifact)
    assert report.status is KernelStatus.VALIDATED
    assert report.max_relative_error is not None
    assert report.max_relative_error < 2e-6


def rejected_by(
    sandbox: Sandbox, artifact: native_artifacts.Artifact, files: dict[str, bytes]
) -> Sequence[str]:
    report = examine(sandbox, repacked(artifact, files))
    assert report.status is KernelStatus.REJECTED
    return report.checks[-1].name, report.checks[-1].reason


def test_the_gauntlet_rejects_wrong_gradients(
    sandbox: Sandbox, artifact: native_artifacts.Artifact
) -> None:
    plan = artifact[1]["native.json"]
    wrong = plan.replace(b'"gradients":[0,', b'"gradients":[null,')
    assert wrong != plan
    name, reason = rejected_by(sandbox, artifact, {"native.json": wrong})
    assert name == "gradients"
    assert "grad.inp is missing (batch 7, perturbed parameters, training)" in reason


def test_the_gauntlet_rejects_swapped_libraries(
    sandbox: Sandbox, artifact: native_artifacts.Artifact
) -> None:
    swapped = {"forward.so": artifact[1]["backward.so"], "backward.so": artifact[1]["forward.so"]}
    name, _ = rejected_by(sandbox, artifact, swapped)
    assert name == "runs"


def test_the_gauntlet_rejects_a_corrupt_library(
    sandbox: Sandbox, artifact: native_artifacts.Artifact
) -> None:
    name, reason = rejected_by(sandbox, artifact, {"backward.so": b"\x7fELF and no more"})
    assert name == "loads"
    assert "its machine code was not loaded" in reason


def test_only_the_machine_it_is_for_can_judge(
    sandbox: Sandbox, artifact: native_artifacts.Artifact
) -> None:
    native = artifact[0].native
    assert native is not None
    target = native.target.model_copy(update={"instructions": "other"})
    native = native.model_copy(update={"target": target})
    with pytest.raises(ArtifactMismatchError, match="was compiled for instructions other"):
        examine(sandbox, repacked(artifact, {}, native=native))


def test_bytes_that_the_manifest_does_not_name(
    sandbox: Sandbox, artifact: native_artifacts.Artifact
) -> None:
    manifest, files = artifact
    tampered = files | {"forward.so": files["forward.so"][:-1] + b"\0\0"}
    with pytest.raises(ArtifactIntegrityError, match=r"file 'forward\.so' has digest"):
        examine(sandbox, (manifest, tampered))
