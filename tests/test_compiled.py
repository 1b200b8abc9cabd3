"""Kernels with machine code: right wherever it runs, and FAST wherever it must not."""

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import forge_samples as samples
import native_artifacts
import pytest
import torch
from forge_samples import SITES
from kasmina_library import MemoryLibrary
from native_artifacts import repacked
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import esper
from esper import blueprints
from esper.contracts import KernelBundle, KernelRecord, KernelStatement, KernelStatus
from esper.errors import ArtifactError, ArtifactIntegrityError
from esper.kasmina import compiled, native
from esper.kasmina.cache import KernelCache
from esper.kasmina.compiled import CompiledStep
from esper.kasmina.example import example_inputs
from esper.kasmina.kernel import Kernel
from esper.kasmina.loader import KernelLoader

pytestmark = pytest.mark.timeout(300)  # the first one compiles

Compiled = Callable[[], Kernel]


@pytest.fixture(scope="module")
def artifact() -> native_artifacts.Artifact:
    return native_artifacts.gated()


@pytest.fixture
def kernel(artifact: native_artifacts.Artifact) -> Kernel:
    """With weights that make a difference."""
    kernel = compiled.build(*artifact)
    with torch.no_grad():
        for weight in kernel.weights():
            weight.normal_(std=0.3)
    return kernel


@pytest.fixture
def fast(artifact: native_artifacts.Artifact, kernel: Kernel) -> Kernel:
    twin = Kernel.build(*artifact)
    twin.load_state_dict(kernel.state_dict())
    return twin


@pytest.fixture
def served(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call that the machine code was offered, whether it took it."""
    calls: list[bool] = []
    step = kernel.compiled
    assert isinstance(step, CompiledStep)
    run = step.run

    def watched(inp: Tensor, act: Tensor, params: Any) -> Tensor | None:
        out = run(inp, act, params)
        calls.append(out is not None)
        return out

    monkeypatch.setattr(step, "run", watched)
    return calls


def leaves(batch_size: int = 8, *, chunk: bool = True) -> tuple[Tensor, Tensor]:
    inp, act = example_inputs(SITES["linear"], "float32", batch_size)
    if chunk:
        act = torch.cat((act, act), 1)[:, :8]
    return inp.requires_grad_(), act.detach().requires_grad_()


def results(kernel: Kernel, inp: Tensor, act: Tensor) -> list[Tensor]:
    """Return the output and the gradients of everything that requires one."""
    out = kernel(inp, act)
    wanted = [x for x in (inp, act, *kernel.weights()) if x.requires_grad]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    """Compare by the norm of the difference: sums are taken in another order."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).norm()) <= 1e-5 * max(float(theirs.norm()), 1e-3)


@pytest.mark.parametrize("batch_size", [2, 3, 7, 32, 257])
@pytest.mark.parametrize("chunk", [False, True])
def test_computes_what_fast_does(
    kernel: Kernel, fast: Kernel, served: list[bool], batch_size: int, chunk: bool
) -> None:
    inp, act = leaves(batch_size, chunk=chunk)
    assert_alike(results(kernel, inp, act), results(fast, inp, act))
    assert served == [True]


@pytest.mark.parametrize("batch_size", [0, 1])
def test_declines_batches_that_compilers_take_for_constants(
    kernel: Kernel, fast: Kernel, served: list[bool], batch_size: int
) -> None:
    inp, act = leaves(batch_size)
    assert_alike(results(kernel, inp, act), results(fast, inp, act))
    assert served == [False]


def transposed(inp: Tensor, act: Tensor) -> tuple[Tensor, Tensor]:
    return inp.detach().t().contiguous().t().requires_grad_(), act


def every_other(inp: Tensor, act: Tensor) -> tuple[Tensor, Tensor]:
    return inp, torch.cat((act, act), 1)[:, ::2].detach().requires_grad_()


def expanded(inp: Tensor, act: Tensor) -> tuple[Tensor, Tensor]:
    return inp.detach()[:1].expand_as(inp).requires_grad_(), act


def broadcast(inp: Tensor, act: Tensor) -> tuple[Tensor, Tensor]:
    return inp.detach()[:1].requires_grad_(), act


def without_gradient(inp: Tensor, act: Tensor) -> tuple[Tensor, Tensor]:
    return inp.detach(), act


@pytest.mark.parametrize("change", [transposed, every_other, expanded, broadcast, without_gradient])
def test_declines_other_layouts_and_demands(
    kernel: Kernel, fast: Kernel, served: list[bool], change: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    inp, act = change(*leaves())
    assert_alike(results(kernel, inp, act), results(fast, inp, act))
    assert served == [False]


def test_other_dtypes_fail_as_they_do_in_fast(kernel: Kernel, served: list[bool]) -> None:
    inp, act = leaves()
    with pytest.raises(RuntimeError, match="dtype"):
        kernel(inp.double(), act)
    assert served == [False]


def test_a_seed_in_training_alone(kernel: Kernel, fast: Kernel, served: list[bool]) -> None:
    inp, act = (x.detach() for x in leaves())
    assert_alike(results(kernel, inp, act), results(fast, inp, act))
    assert served == [True]


def test_a_frozen_kernel_is_left_to_fast(kernel: Kernel, served: list[bool]) -> None:
    kernel.requires_grad_(False)
    results(kernel, *leaves())
    assert served == [False]


def test_weights_of_which_some_are_frozen_are_left_to_fast(
    kernel: Kernel, served: list[bool]
) -> None:
    kernel.weights()[0].requires_grad_(False)
    results(kernel, *leaves())
    assert served == [False]


def test_evaluation_is_not_compiled(kernel: Kernel, fast: Kernel, served: list[bool]) -> None:
    inp, act = leaves()
    assert torch.equal(kernel.eval()(inp, act), fast.eval()(inp, act))
    assert served == []


def test_without_gradients(kernel: Kernel, fast: Kernel, served: list[bool]) -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            inp, act = leaves()
            assert torch.equal(kernel(inp, act), fast(inp, act))
    assert served == [False, False]


def test_autocast(kernel: Kernel, fast: Kernel, served: list[bool]) -> None:
    inp, act = leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kernel(inp, act), fast(inp, act))
    assert served == [False]


# Torch's own, when it first needs its decompositions for forward mode.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_function_transforms_and_modes(kernel: Kernel, fast: Kernel, served: list[bool]) -> None:
    inp, act = leaves()

    def gradient(module: Kernel) -> Tensor:
        loss = torch.func.grad(lambda x: module(x, act).square().sum())
        return torch.vmap(lambda x: loss(x[None].expand(8, -1))[0])(inp)

    torch.testing.assert_close(gradient(kernel), gradient(fast))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inp, torch.ones_like(inp))
        torch.testing.assert_close(
            *(torch.autograd.forward_ad.unpack_dual(m(dual, act)).tangent for m in (kernel, fast))
        )
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        kernel(inp, act)
    assert counter.get_total_flops() > 0
    assert not any(served)


def test_is_traced_as_the_fast_program(kernel: Kernel, fast: Kernel) -> None:
    inp, act = leaves()
    exported = torch.export.export(kernel, (inp, act)).module()
    torch.testing.assert_close(exported(inp, act), fast(inp, act))
    jitted = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    assert_alike(results(jitted, inp, act), results(fast, inp, act))


def test_second_derivatives(kernel: Kernel, fast: Kernel, served: list[bool]) -> None:
    inp, act = leaves()

    def penalty(module: Kernel) -> list[Tensor]:
        out = module(inp, act)
        [slope, of_act] = torch.autograd.grad(out.tanh().sum(), [inp, act], create_graph=True)
        loss = slope.square().sum() + of_act.exp().sum()
        return list(torch.autograd.grad(loss, [inp, act, *module.weights()][:-1]))

    assert_alike(penalty(kernel), penalty(fast))
    assert served == [True]


def test_second_derivatives_see_what_was_modified(kernel: Kernel) -> None:
    inp, act = leaves()
    out = kernel(inp, act)
    with torch.no_grad():
        kernel.weights()[-1].add_(1)
    with pytest.raises(RuntimeError, match=r"input 5 of a kernel, at version \d+, expected"):
        torch.autograd.grad(out.sum(), inp, create_graph=True)


def test_backward_twice_and_under_checkpointing(
    kernel: Kernel, fast: Kernel, served: list[bool]
) -> None:
    inp, act = leaves()
    out = kernel(inp, act)
    first = torch.autograd.grad(out.sum(), inp, retain_graph=True)
    assert_alike(list(torch.autograd.grad(out.sum(), inp)), list(first))
    again = checkpoint(kernel, inp, act, use_reentrant=False)
    torch.testing.assert_close(
        torch.autograd.grad(again.sum(), inp), torch.autograd.grad(fast(inp, act).sum(), inp)
    )
    assert all(served)


def test_copies_share_the_libraries_and_not_the_weights(kernel: Kernel) -> None:
    inp, act = leaves()
    before = kernel(inp, act)
    twin = copy.deepcopy(kernel)
    assert twin.compiled is kernel.compiled
    with torch.no_grad():
        for weight in twin.weights():
            weight.add_(1)
    assert torch.equal(kernel(inp, act), before)
    assert not torch.equal(twin(inp, act), before)


def test_equal_libraries_are_loaded_once(artifact: native_artifacts.Artifact) -> None:
    first, second = (compiled.build(*artifact).compiled for _ in range(2))
    assert isinstance(first, CompiledStep)
    assert isinstance(second, CompiledStep)
    cpu = torch.device("cpu")
    assert first.libraries_for(cpu) == second.libraries_for(cpu)


def test_machine_code_is_not_pickled(kernel: Kernel, fast: Kernel) -> None:
    data = pickle.dumps(kernel)
    assert len(data) < 100_000
    again = pickle.loads(data)
    assert again.compiled is None
    inp, act = leaves()
    assert_alike(results(again, inp, act), results(fast, inp, act))


@pytest.mark.parametrize("field", ["torch_git", "instructions", "machine"])
def test_code_for_another_machine_is_not_loaded(
    artifact: native_artifacts.Artifact, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    native = artifact[0].native
    assert native is not None
    target = native.target.model_copy(update={field: "other"})
    native = native.model_copy(update={"target": target})
    with caplog.at_level(logging.WARNING):
        kernel = compiled.build(*repacked(artifact, {}, native=native))
    assert kernel.compiled is None
    [record] = caplog.records
    assert f"runs as FAST: compiled for {field} other, here it is" in record.getMessage()


def test_a_corrupt_library_is_not_used(
    artifact: native_artifacts.Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = compiled.build(*repacked(artifact, {"forward.so": b"\x7fELF and no more"}))
    assert kernel.compiled is None
    assert "runs as FAST: its machine code cannot be loaded" in caplog.text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"format_version":1', b'"format_version":2', "format_version must be 1, got 2"),
        (b'"saved_inputs":[0', b'"saved_inputs":[9', "it is not for 6 inputs"),
        (b'"gradients":[', b'"gradients":[0,', "it is not for 6 inputs"),
        (b'"strides":[24,1]', b'"strides":["s999",["pow",1,2]]', "expected one of add, mul"),
        (b'"strides":[24,1]', b'"strides":[["add","s999",1],1]', "'s999' stands for no size"),
        (b'"strides":[24,1]', b'"strides":[1]', "2 sizes, but 1 strides"),
    ],
)
def test_refuses_a_malformed_plan(
    artifact: native_artifacts.Artifact, old: bytes, new: bytes, message: str
) -> None:
    plan = artifact[1]["native.json"]
    assert old in plan
    with pytest.raises(ArtifactError, match=rf"native\.json: .*{message}"):
        compiled.build(*repacked(artifact, {"native.json": plan.replace(old, new)}))


def test_refuses_missing_libraries(artifact: native_artifacts.Artifact) -> None:
    manifest, files = artifact
    with pytest.raises(ArtifactError, match=r"the artifact has no backward\.so"):
        compiled.build(manifest, {n: data for n, data in files.items() if n != "backward.so"})


def test_ids_without_machine_code_are_what_they_were() -> None:
    manifest, _ = samples.artifact(blueprints.get("gated"))
    assert b"native" not in manifest.canonical()


def published(library: MemoryLibrary, artifact: native_artifacts.Artifact) -> str:
    manifest, files = artifact
    statement = KernelStatement(
        artifact_id=manifest.artifact_id, status=KernelStatus.VALIDATED, report_digest="0" * 64
    )
    record = KernelRecord(
        artifact_id=manifest.artifact_id,
        manifest=manifest,
        status=KernelStatus.VALIDATED,
        statement=statement,
        signature=library.key.sign(statement),
    )
    library.bundles[manifest.artifact_id] = KernelBundle(record=record, files=files)
    return manifest.artifact_id


async def test_two_seeds_of_a_layer_share_the_libraries(
    artifact: native_artifacts.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = MemoryLibrary()
    first = published(library, artifact)
    plain = samples.artifact(blueprints.get("gated"))
    served: list[bool] = []
    run = CompiledStep.run

    def watched(self: CompiledStep, *given: Any) -> Tensor | None:
        out = run(self, *given)
        served.append(out is not None)
        return out

    monkeypatch.setattr(CompiledStep, "run", watched)
    net = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 16))
    grads, by_library = [], []
    for artifact_id in (first, published(library, plain)):
        model = esper.wrap(copy.deepcopy(net), ["1"], seeds_per_layer=2)
        model.attach_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        model.connect(library)
        layer = model.kasmina_layers["1"]
        torch.manual_seed(1)
        for seed_idx in range(2):
            assert await model.load_kernel("1", seed_idx, artifact_id)
            kernel = layer.kernel(seed_idx)
            assert kernel is not None
            with torch.no_grad():
                for weight in kernel.weights():
                    weight.normal_(std=0.3)
        served.clear()  # of what the loader tried out
        model(torch.linspace(-1, 1, 4 * 24).view(4, 24)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        by_library.append([*served])
    assert by_library == [[True, True], []]
    assert len(grads[0]) == 4 + 2 * 4
    assert_alike(*grads)


async def test_a_swapped_library_is_refused_before_it_is_loaded(
    artifact: native_artifacts.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = MemoryLibrary()
    artifact_id = published(library, artifact)
    bundle = library.bundles[artifact_id]
    swapped = bundle.files | {"forward.so": bundle.files["backward.so"]}
    library.bundles[artifact_id] = bundle.model_copy(update={"files": swapped})
    monkeypatch.setattr(native, "load", None)  # which could not be called
    loader = KernelLoader(library, KernelCache(2**20))
    with pytest.raises(ArtifactIntegrityError, match=r"file 'forward\.so' has digest"):
        loader.prepare(artifact_id, SITES["linear"], torch.float32, torch.device("cpu"))


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize(("batch_size", "takes"), [(1365, True), (1366, False)])
def test_calls_worth_dividing_among_threads_are_left_to_fast(
    kernel: Kernel, served: list[bool], two_threads: None, batch_size: int, takes: bool
) -> None:
    inp, act = leaves(batch_size)
    assert inp.shape[1] == 24, "ATen divides more than 32768 elements"
    kernel.call(inp, act, kernel.weights())
    assert served == [takes]


def test_the_number_of_threads_may_change(kernel: Kernel, served: list[bool]) -> None:
    inp, act = leaves(4096)
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        kernel.call(inp, act, kernel.weights())
    assert served == [True, False, True]


def test_code_compiled_for_more_threads_is_left_to_fast(
    artifact: native_artifacts.Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    [manifest, files] = artifact
    assert manifest.native is not None
    target = manifest.native.target.model_copy(update={"threads": 2})
    native_build = manifest.native.model_copy(update={"target": target})
    kernel = compiled.build(*repacked((manifest, files), {}, native=native_build))
    assert kernel.compiled is None
    assert "runs as FAST: compiled for threads 2, here it is 1" in caplog.text
