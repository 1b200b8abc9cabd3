"""Kernels: built of bytes, refused when the bytes disagree, and modules like any other."""

import copy
import pickle

import forge_samples as samples
import pytest
import safetensors.torch
import torch
from forge_samples import SITES
from torch import Tensor

from esper import blueprints
from esper.contracts import KernelManifest
from esper.errors import ArtifactError
from esper.kasmina.example import example_inputs
from esper.kasmina.kernel import Kernel

Artifact = tuple[KernelManifest, dict[str, bytes]]


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return samples.artifact(blueprints.get("residual_mlp"))


@pytest.fixture(scope="module")
def stateful() -> Artifact:
    return samples.artifact(samples.design(samples.Stateful))


def inputs(batch_size: int = 5) -> tuple[Tensor, Tensor]:
    return example_inputs(SITES["linear"], "float32", batch_size)


def test_names_and_order_of_weights(stateful: Artifact) -> None:
    kernel = Kernel.build(*stateful)
    names = ["map__weight", "map__bias", "norm__weight", "norm__bias"]
    assert [name for name, _ in kernel.named_parameters()] == names
    assert all(map(torch.equal, kernel.weights(), kernel.parameters()))
    assert [name for name, _ in kernel.named_buffers()] == [
        "scale",
        "norm__running_mean",
        "norm__running_var",
        "norm__num_batches_tracked",
    ]
    assert kernel.artifact_id == stateful[0].artifact_id
    assert repr(kernel) == f"Kernel(Stateful, {kernel.artifact_id[:12]})"


def test_calls_with_the_parameters_it_is_given(artifact: Artifact) -> None:
    kernel = Kernel.build(*artifact)
    inp, act = inputs()
    assert torch.equal(kernel(inp, act), act)
    others = tuple(torch.ones_like(p) for p in kernel.weights())
    hidden = torch.nn.functional.gelu(inp.sum(1, keepdim=True) + 1)
    expected = act + 16 * hidden + 1
    torch.testing.assert_close(kernel.call(inp, act, others), expected)


def test_mode_chooses_the_graph(stateful: Artifact) -> None:
    kernel = Kernel.build(*stateful)
    inp, act = inputs()
    assert not torch.equal(kernel(inp, act), kernel(inp, act))
    assert kernel.norm__num_batches_tracked == 2
    kernel.eval()
    assert torch.equal(kernel(inp, act), kernel(inp, act))
    assert kernel.norm__num_batches_tracked == 2


def test_copy_computes_with_its_own_weights_and_buffers(stateful: Artifact) -> None:
    kernel = Kernel.build(*stateful).eval()
    inp, act = inputs()
    before = kernel(inp, act)
    twin = copy.deepcopy(kernel)
    assert twin.program is kernel.program
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.add_(1)
    assert torch.equal(kernel(inp, act), before)
    assert not torch.equal(twin(inp, act), before)


def test_a_replica_is_the_artifact_with_weights_and_buffers_of_its_own(
    stateful: Artifact,
) -> None:
    kernel = Kernel.build(*stateful).eval()
    inp, act = inputs()
    before, tensors = kernel(inp, act), kernel.state_dict()
    kernel.register_forward_hook(lambda *_: torch.zeros(1))
    replica = kernel.replica()
    assert [*replica.__dict__] == [*Kernel.build(*stateful).__dict__]
    assert (replica.artifact_id, replica.program) == (kernel.artifact_id, kernel.program)
    assert not replica.training
    assert all(parameter.requires_grad for parameter in replica.parameters())
    assert torch.equal(replica(inp, act), before), "without the hook"
    for name, tensor in replica.state_dict().items():
        assert torch.equal(tensor, tensors[name])
        assert tensor.data_ptr() != tensors[name].data_ptr()
    assert kernel.replica().train()._train is kernel._train


def test_pickle_and_state_dict(stateful: Artifact) -> None:
    kernel = Kernel.build(*stateful)
    inp, act = inputs()
    kernel(inp, act)
    kernel.eval()
    again = pickle.loads(pickle.dumps(kernel))
    assert torch.equal(again(inp, act), kernel(inp, act))
    fresh = Kernel.build(*stateful).eval()
    assert not torch.equal(fresh(inp, act), kernel(inp, act))
    fresh.load_state_dict(kernel.state_dict())
    assert torch.equal(fresh(inp, act), kernel(inp, act))


def test_changes_its_dtype(artifact: Artifact) -> None:
    kernel = Kernel.build(*artifact).double()
    inp, act = inputs()
    assert kernel(inp.double(), act.double()).dtype is torch.float64


@pytest.mark.parametrize("training", [True, False])
def test_is_traced_by_torch(stateful: Artifact, training: bool) -> None:
    kernel = Kernel.build(*stateful).train(training)
    inp, act = inputs()

    exported = torch.export.export(copy.deepcopy(kernel), (inp, act)).module()
    twin = copy.deepcopy(kernel)
    compiled = torch.compile(twin, fullgraph=True, backend="eager")
    outs = []
    for module in (kernel, exported, compiled):
        torch.manual_seed(1)
        outs.append(module(inp, act))
    assert torch.equal(outs[1], outs[0])
    assert torch.equal(outs[2], outs[0])
    assert all(map(torch.equal, twin.buffers(), kernel.buffers()))


def test_kernels_of_one_design_share_their_functions(artifact: Artifact) -> None:
    first, second = Kernel.build(*artifact), Kernel.build(*artifact)
    assert first._train is second._train


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("graph.json", "the artifact has no graph.json"),
        ("params.safetensors", "the artifact has no params.safetensors"),
    ],
)
def test_refuses_missing_files(artifact: Artifact, missing: str, message: str) -> None:
    manifest, files = artifact
    with pytest.raises(ArtifactError, match=message):
        Kernel.build(manifest, {k: v for k, v in files.items() if k != missing})


def damaged(tensors: dict[str, Tensor], damage: str) -> dict[str, Tensor]:
    match damage:
        case "missing":
            del tensors["up.bias"]
        case "extra":
            tensors["more"] = torch.zeros(1)
        case "shape":
            tensors["up.bias"] = torch.zeros(9)
        case "dtype":
            tensors["up.bias"] = tensors["up.bias"].double()
    return tensors


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"params.safetensors: expected \['down.project.bias'.*, got"),
        ("extra", r"params.safetensors: expected .*'more'"),
        ("shape", r"'up.bias' must be float32 \(8,\), got torch.float32 \(9,\)"),
        ("dtype", r"'up.bias' must be float32 \(8,\), got torch.float64 \(8,\)"),
    ],
)
def test_refuses_weights_unlike_the_graph(artifact: Artifact, damage: str, message: str) -> None:
    manifest, files = artifact
    tensors = damaged(safetensors.torch.load(files["params.safetensors"]), damage)
    with pytest.raises(ArtifactError, match=message):
        Kernel.build(manifest, files | {"params.safetensors": safetensors.torch.save(tensors)})


@pytest.mark.parametrize("data", [b"", b"\x08\0\0\0\0\0\0\0notjson!", b"\xff" * 64])
def test_refuses_what_is_no_safetensors_file(artifact: Artifact, data: bytes) -> None:
    manifest, files = artifact
    with pytest.raises(ArtifactError, match=r"params\.safetensors: "):
        Kernel.build(manifest, files | {"params.safetensors": data})


def test_refuses_the_name_of_a_method(artifact: Artifact) -> None:
    manifest, files = artifact
    graph = files["graph.json"].replace(b'"up.bias"', b'"weights"')
    tensors = safetensors.torch.load(files["params.safetensors"])
    tensors["weights"] = tensors.pop("up.bias")
    params = safetensors.torch.save(tensors)
    with pytest.raises(ArtifactError, match=r"a weight cannot have this name.*weights"):
        Kernel.build(manifest, {"graph.json": graph, "params.safetensors": params})
