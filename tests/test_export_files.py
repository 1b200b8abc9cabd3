"""What ``esper.export`` writes, and where grown and exported models go from there."""

import hashlib
import importlib.util
import io
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from export_cases import grow, wrapped
from kasmina_library import MemoryLibrary, Residual
from torch import Tensor, nn
from torch.export import Dim

import esper
from esper.blueprints.convolutional import Depthwise
from esper.blueprints.low_rank import LowRank
from esper.blueprints.residual_mlp import ResidualMLP
from esper.contracts import KernelManifest, SeedState
from esper.kasmina.model import MorphableModel

BATCH = ({0: Dim.DYNAMIC},)


def image_model() -> MorphableModel:
    """Convolution, activation and Linear, with kernels that fold, that stay, and in between."""
    library = MemoryLibrary()
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 4)
    )
    model = wrapped(net, torch.randn(2, 3, 6, 6), library)
    grow(model, library, "0", LowRank, (0,))
    grow(model, library, "0", Depthwise, (1,))
    grow(model, library, "1", ResidualMLP, (0,), SeedState.GRAFTING)
    grow(model, library, "3", Residual, (1,), SeedState.FINE_TUNING)
    return model.eval()


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(batch))


@pytest.fixture(scope="module")
def model() -> MorphableModel:
    torch.manual_seed(0)
    return image_model()


@pytest.fixture(scope="module")
def folder(model: MorphableModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "new" / "model"
    plain = esper.export(model, path, example_inputs=(images(2),), dynamic_shapes=BATCH)
    torch.save(plain, path.parent / "module.pt")
    torch.save((images(5), model(images(5)).detach()), path.parent / "expected.pt")
    return path


# ------------------------------------------------------------------ files


def test_the_lineage_tells_what_every_kernel_is_and_what_became_of_it(
    model: MorphableModel, folder: Path
) -> None:
    lineage = json.loads((folder / "lineage.json").read_text())
    assert lineage["format_version"] == 1
    assert lineage["torch_version"] == torch.__version__
    assert lineage["model"] == "torch.nn.modules.container.Sequential"
    told = [
        (k["layer"], k["host"], k["seed"], k["channels"], k["state"], k["outcome"], k["prefix"])
        for k in lineage["kernels"]
    ]
    assert told == [
        ("0", "Conv2d", 0, [0, 4], "FOSSILIZED", "folded", None),
        ("0", "Conv2d", 1, [4, 8], "FOSSILIZED", "kept", "0.grown.seed1"),
        ("1", "Tanh", 0, [0, 4], "GRAFTING", "kept", "1.grown.seed0"),
        ("3", "Linear", 1, [2, 4], "FINE_TUNING", "kept", "3.grown.seed1"),
    ]
    assert [round(k["alpha"], 6) for k in lineage["kernels"]] == [1, 1, 0.3, 1]
    for entry in lineage["kernels"]:
        kernel = model.kasmina_layers[entry["layer"]].kernel(entry["seed"])
        manifest = KernelManifest.model_validate(entry["manifest"])
        assert manifest == kernel.manifest
        assert manifest.artifact_id == entry["artifact_id"] == kernel.artifact_id


def test_a_kernel_that_is_left_out_is_told_with_its_reason(tmp_path: Path) -> None:
    library = MemoryLibrary()
    inp = torch.randn(5, 8)
    model = wrapped(nn.Linear(8, 6), inp, library)
    layer = model.kasmina_layers[""]
    grow(model, library, "", Residual, (0,))
    layer.kernel(0).down__weight = nn.Parameter(torch.randn(3, 5))  # does not fit the input
    layer.request_germination(1, library.add(Residual, layer.site(1)))
    model.step()
    model(inp)
    assert [layer.state(0), layer.state(1)] == [SeedState.FOSSILIZED, SeedState.TRAINING]
    esper.export(model, tmp_path)
    first, second = json.loads((tmp_path / "lineage.json").read_text())["kernels"]
    assert first["outcome"] == second["outcome"] == "left out"
    assert first["prefix"] is second["prefix"] is None
    assert first["reason"].startswith("quarantined: its kernel raised RuntimeError: mat1 and mat2")
    assert second["reason"] == "in TRAINING the kernel does not reach the output"


def test_the_lineage_has_the_digests_of_the_files_beside_it(folder: Path) -> None:
    digests = json.loads((folder / "lineage.json").read_text())["files"]
    assert set(digests) == {"model.pt2", "model.safetensors"}
    assert {file.name for file in folder.iterdir()} == {*digests, "lineage.json"}
    for name, digest in digests.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_the_weights_load_into_the_exported_module(model: MorphableModel, folder: Path) -> None:
    plain = esper.export(model)
    expected = plain(images(3))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    safetensors.torch.load_model(plain, folder / "model.safetensors")
    assert torch.equal(plain(images(3)), expected)


def test_the_program_holds_neither_pickles_nor_the_example(folder: Path) -> None:
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        contents = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    payloads = [data for name, data in contents.items() if name.endswith("_config.json")]
    assert len(payloads) == 2  # weights and constants
    for payload in payloads:
        assert not any(entry["use_pickle"] for entry in json.loads(payload)["config"].values())
    assert contents["data/sample_inputs/model.pt"] == b""
    example = images(2).numpy().tobytes()
    assert not any(example in data for data in contents.values())


def test_a_second_export_replaces_the_first(model: MorphableModel, tmp_path: Path) -> None:
    esper.export(model, tmp_path, example_inputs=(images(2),))
    esper.export(model, str(tmp_path), fold=False)
    lineage = json.loads((tmp_path / "lineage.json").read_text())
    assert set(lineage["files"]) == {"model.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "lineage.json"}
    assert "folded" not in [kernel["outcome"] for kernel in lineage["kernels"]]


def test_what_torch_cannot_export_writes_nothing(tmp_path: Path) -> None:
    class Unstable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x)
            return out if out.sum() > 0 else -out

    with pytest.raises(Exception, match="data-dependent"):
        esper.export(esper.wrap(Unstable()), tmp_path, example_inputs=(torch.randn(2, 3),))
    assert not list(tmp_path.iterdir())


def test_the_program_is_in_eval_mode_and_the_module_keeps_its_own(tmp_path: Path) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)))
    model[0].eval()
    plain = esper.export(model, tmp_path, example_inputs=(torch.randn(2, 8),))
    assert [plain.training, plain[0].training, plain[1].training] == [True, False, True]
    inp = torch.randn(2, 8)
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(inp), plain[0](inp))


def test_wrong_arguments_are_named(model: MorphableModel, tmp_path: Path) -> None:
    file = tmp_path / "taken"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match=r"writes into a folder, and .*taken is a file"):
        esper.export(model, file)
    with pytest.raises(TypeError, match=r"must be the tuple of .* arguments, got Tensor"):
        esper.export(model, tmp_path, example_inputs=images(2))
    with pytest.raises(ValueError, match="so they need a path"):
        esper.export(model, example_inputs=(images(2),))
    with pytest.raises(ValueError, match="dynamic_shapes belong to example_inputs"):
        esper.export(model, tmp_path, dynamic_shapes=BATCH)
    assert list(tmp_path.iterdir()) == [file]


def test_the_examples_of_the_documentation_run(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    scope = {"model": image_model(), "batch": images(2), "folder": tmp_path}
    for source in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(source, "docs/export.md", "exec"), scope)
    torch.testing.assert_close(scope["outputs"], scope["model"](images(2)), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ where Esper is not installed

_WITHOUT_ESPER = """
import importlib.util, pathlib, sys

sys.path.append(sys.argv[1])
assert importlib.util.find_spec("esper") is None
import torch

folder = pathlib.Path(sys.argv[2])
inp, expected = torch.load(folder / "expected.pt")
program = torch.export.load(folder / "model" / "model.pt2").module()
torch.testing.assert_close(program(inp), expected)
module = torch.load(folder / "module.pt", weights_only=False)
torch.testing.assert_close(module(inp), expected)
module.train()(inp).square().mean().backward()
assert all(parameter.grad is not None for parameter in module.parameters())
assert not any(name.partition(".")[0] == "esper" for name in sys.modules)
print("computed the same")
"""


def site_packages_without_esper(folder: Path) -> Path:
    """Make a folder that holds what torch's site-packages hold, but Esper."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    folder.mkdir()
    for package in Path(spec.origin).parents[1].iterdir():
        if "esper" not in package.name and package.suffix != ".pth":
            (folder / package.name).symlink_to(package)
    return folder


def test_module_and_program_run_where_esper_is_not_installed(folder: Path, tmp_path: Path) -> None:
    site_packages = site_packages_without_esper(tmp_path / "site-packages")
    # Isolated and without `site`: neither this environment's packages nor its .pth files are seen.
    command = [sys.executable, "-I", "-S", "-c", _WITHOUT_ESPER, site_packages, folder.parent]
    child = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert child.returncode == 0, child.stderr
    assert child.stdout == "computed the same\n"


def test_the_bare_environment_is_bare(tmp_path: Path) -> None:
    site_packages = site_packages_without_esper(tmp_path / "site-packages")
    code = "import sys; sys.path.append(sys.argv[1]); import torch, esper"
    command = [sys.executable, "-I", "-S", "-c", code, site_packages]
    child = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "ModuleNotFoundError: No module named 'esper'" in child.stderr


# ------------------------------------------------------------------ other ways out


def by_torch_export(net: nn.Module) -> Callable[..., Tensor]:
    program = torch.export.export(net, (images(2),), dynamic_shapes=BATCH)
    return program.module()  # type: ignore[return-value]


def by_strict_torch_export(net: nn.Module) -> Callable[..., Tensor]:
    program = torch.export.export(net, (images(2),), dynamic_shapes=BATCH, strict=True)
    return program.module()  # type: ignore[return-value]


def by_jit_trace(net: nn.Module) -> Callable[..., Tensor]:
    with torch.no_grad():  # a grown model's guards are no part of inference
        return torch.jit.trace(net, (images(2),))  # type: ignore[no-any-return]


def by_compile(net: nn.Module) -> Callable[..., Tensor]:
    return torch.compile(net, fullgraph=True, backend="aot_eager")


def by_onnx(net: nn.Module) -> Callable[..., Tensor]:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import onnxruntime

    program = torch.onnx.export(net, (images(2),), dynamic_shapes=BATCH, dynamo=True, verbose=False)
    assert program is not None
    data = io.BytesIO()
    program.save(data)
    session = onnxruntime.InferenceSession(data.getvalue(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(inp: Tensor) -> Tensor:
        [out] = session.run(None, {name: inp.numpy()})
        return torch.from_numpy(out)

    return run


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning",  # shapes decide which seeds speak: a trace is for one rank
    "ignore:.*is deprecated.*:DeprecationWarning",  # torch.jit as a whole, and parts of onnxscript
    "ignore:.*is deprecated.*:FutureWarning",
)
@pytest.mark.parametrize("form", ["grown", "folded", "kept"])
@pytest.mark.parametrize(
    "way", [by_torch_export, by_strict_torch_export, by_jit_trace, by_compile, by_onnx]
)
def test_grown_and_exported_models_go_further(
    model: MorphableModel, form: str, way: Callable[[nn.Module], Callable[..., Tensor]]
) -> None:
    torch._dynamo.reset()
    net = model if form == "grown" else esper.export(model, fold=form == "folded")
    inp = images(5)
    torch.testing.assert_close(way(net)(inp), model(inp), rtol=1e-4, atol=1e-5)
