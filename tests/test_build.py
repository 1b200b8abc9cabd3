"""A real installation from a copy of the sources, and what it must and must not contain."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# The first test compiles everything, on a busy machine for more than the usual two minutes.
pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parent.parent
SOURCES = ("esper", "kernels", "csrc", "CMakeLists.txt", "MANIFEST.in", "LICENSE")
PROBE = """
import torch, esper.ops, esper.kernels
from esper._host import SeedBlock
block = SeedBlock(10)
torch.ops.esper.tick(torch.frombuffer(block, dtype=torch.uint8), 10, 3)
print(esper.ops.__file__)
print(esper.kernels.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install from a copy, so that the build folder and libraries of this checkout stay as is."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in (*SOURCES, "pyproject.toml", "setup.py"):
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(source, checkout / name, ignore=ignored)
        else:
            shutil.copy2(source, checkout / name)
    target = tmp_path_factory.mktemp("target")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--target", str(target), "."]
    # nvcc would take a minute and changes nothing that is tested here.
    subprocess.run(
        [*pip, *options],
        cwd=checkout,
        env={**os.environ, "ESPER_CUDA": "OFF"},
        check=True,
        capture_output=True,
        text=True,
    )
    return target


def test_runs_from_where_it_is_installed(installed: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        check=True,
        capture_output=True,
        text=True,
    )
    ops, kernels = run.stdout.split()
    assert Path(ops) == installed / "esper" / "ops.py"
    assert Path(kernels) == installed / "esper" / "kernels" / "__init__.py"


def test_contains_the_package_and_nothing_else(installed: Path) -> None:
    top = {path.name for path in installed.iterdir()} - {"bin"}
    assert top == {"esper", "esper_torch-0.1.0.dist-info"}
    assert (installed / "esper" / "_ops.so").exists()
    assert list((installed / "esper").glob("_host.*.so"))
    assert list((installed / "esper").glob("_autograd.*.so"))
    assert (installed / "esper" / "kernels" / "blend.py").exists()


def test_native_libraries_name_no_folder_of_this_machine(installed: Path) -> None:
    for library in (installed / "esper").glob("*.so"):
        content = library.read_bytes()
        assert str(ROOT).encode() not in content, library.name
        assert sys.prefix.encode() not in content, library.name


def test_missing_library_says_how_to_build(installed: Path, tmp_path: Path) -> None:
    shutil.copytree(installed / "esper", tmp_path / "esper", ignore=shutil.ignore_patterns("*.so"))
    run = subprocess.run(
        [sys.executable, "-c", "import esper.ops"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "ImportError: Esper's native ops are not built" in run.stderr
    assert "pip install --no-build-isolation -e ." in run.stderr
